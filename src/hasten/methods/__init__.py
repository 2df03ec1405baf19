"""The methods, one file each, in folders named after the place of the step at which they act."""
