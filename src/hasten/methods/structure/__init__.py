"""Methods that change the network's structure."""
