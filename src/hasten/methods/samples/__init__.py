"""Methods that choose which samples train."""
