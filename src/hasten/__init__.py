"""hasten: train convolutional networks in less time, and measure by how much."""
