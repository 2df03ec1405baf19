"""Methods that change how the forward pass runs."""
