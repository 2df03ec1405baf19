"""Methods that add to the loss."""
