"""Benchmarks: one file a headline claim. ``python -m benchmarks`` lists them."""
