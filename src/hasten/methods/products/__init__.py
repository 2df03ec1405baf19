"""Methods that change the three products of convolution and linear layers."""
