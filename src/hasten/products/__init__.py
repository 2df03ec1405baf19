"""Conv2d and Linear as three products, changed by a plan of transforms, selections, kernels, a codec."""

from hasten.products.arithmetic import Geometry, Saved
from hasten.products.function import three_products
from hasten.products.gather import put, take
from hasten.products.layers import PlannedConv2d, PlannedLinear, install, planned, supported, uninstall
from hasten.products.pieces import (
    Codec,
    GradInputKernel,
    GradWeightKernel,
    OutputKernel,
    Selection,
    Selector,
    Transform,
)
from hasten.products.plan import Claim, Plan, Recipe

__all__ = [
    "Claim",
    "Codec",
    "Geometry",
    "GradInputKernel",
    "GradWeightKernel",
    "OutputKernel",
    "Plan",
    "PlannedConv2d",
    "PlannedLinear",
    "Recipe",
    "Saved",
    "Selection",
    "Selector",
    "Transform",
    "install",
    "planned",
    "put",
    "supported",
    "take",
    "three_products",
    "uninstall",
]
