"""Changes of a network while it trains, and the bookkeeping that keeps optimizer and model in step."""

from hasten.surgery.parameters import adopt, check_training_state, release, replace_module

__all__ = ["adopt", "check_training_state", "release", "replace_module"]
