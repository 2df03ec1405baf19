"""Timing, memory, statistics and the rules that a published figure must keep."""
