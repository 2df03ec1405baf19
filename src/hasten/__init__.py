"""hasten: train convolutional networks in less time, and measure by how much.

``Session`` applies methods to your own training loop, ``fit`` is a ready loop, ``compare`` measures what methods buy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.comparison import Arm, compare
    from hasten.conformance import check_method
    from hasten.contract import Batch, Effect, Method, MethodSpec
    from hasten.errors import HastenError
    from hasten.exporting import Trained, export, load
    from hasten.loop import Result, fit
    from hasten.recipe import PLAIN, STRONG, Recipe
    from hasten.registry import available, method
    from hasten.session import Session
    from hasten.surgery import check_training_state

__version__ = "0.1.0"

# name -> module it lives in; imported when first used, so that `import hasten` and the command line start fast
_WHERE = {
    "Arm": "comparison",
    "Batch": "contract",
    "Effect": "contract",
    "HastenError": "errors",
    "Method": "contract",
    "MethodSpec": "contract",
    "PLAIN": "recipe",
    "Recipe": "recipe",
    "Result": "loop",
    "STRONG": "recipe",
    "Session": "session",
    "Trained": "exporting",
    "available": "registry",
    "check_method": "conformance",
    "check_training_state": "surgery",
    "compare": "comparison",
    "export": "exporting",
    "fit": "loop",
    "load": "exporting",
    "method": "registry",
}

__all__ = [
    "PLAIN",
    "STRONG",
    "Arm",
    "Batch",
    "Effect",
    "HastenError",
    "Method",
    "MethodSpec",
    "Recipe",
    "Result",
    "Session",
    "Trained",
    "__version__",
    "available",
    "check_method",
    "check_training_state",
    "compare",
    "export",
    "fit",
    "load",
    "method",
]


# subpackages that users reach as attributes, such as hasten.models.build
_PACKAGES = frozenset({"data", "measure", "models", "products", "report", "surgery"})


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"hasten.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'hasten' has no attribute {name!r}")
    value = getattr(import_module(f"hasten.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_PACKAGES})
