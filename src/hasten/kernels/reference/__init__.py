"""What each kernel computes, in plain torch operations that run on every device."""
