"""Paired, interleaved runs of several ways of training, and what they amount to."""

from hasten.comparison.arms import Arm, baselines, controls
from hasten.comparison.demo import demo_arms
from hasten.comparison.run import Comparison, compare

__all__ = ["Arm", "Comparison", "baselines", "compare", "controls", "demo_arms"]
