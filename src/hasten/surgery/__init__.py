"""Changes of a network while it trains, and the bookkeeping that keeps optimizer, averages and methods in step.

`Surgeon` carries out edits (`RemoveChannels`, `Widen`, `DropBlock`, `Insert`, `Replace`, `Gate`); ``follow`` tells which
channels hang together; the log of a surgeon rebuilds the structure of a saved network.
"""

from hasten.surgery.change import Change
from hasten.surgery.edits import DropBlock, Edit, Gate, Insert, RemoveChannels, Replace, Widen
from hasten.surgery.parameters import adopt, check_training_state, release, replace_module
from hasten.surgery.surgeon import Surgeon
from hasten.surgery.trace import Channels, Slot, follow

__all__ = [
    "Change",
    "Channels",
    "DropBlock",
    "Edit",
    "Gate",
    "Insert",
    "RemoveChannels",
    "Replace",
    "Slot",
    "Surgeon",
    "Widen",
    "adopt",
    "check_training_state",
    "follow",
    "release",
    "replace_module",
]
