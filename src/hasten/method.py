"""Renamed: import from hasten.contract. This file goes away."""

from hasten.contract import *  # noqa: F403
from hasten.contract import take_rows  # noqa: F401
