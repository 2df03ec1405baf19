"""Ways of training the same network on the same data: trained at several budgets, and compared at equal accuracy."""

from hasten.comparison.arms import Arm, baselines, stacks, usual
from hasten.comparison.demo import demo_arms
from hasten.comparison.run import Comparison, Told, compare

__all__ = ["Arm", "Comparison", "Told", "baselines", "compare", "demo_arms", "stacks", "usual"]
