"""Where a model comes from: a name, an object, a file or a package, and how a checkpoint may rebuild it.

Strings given by the user are the user's code and run. Strings found inside a checkpoint import nothing but
the registry and, for names they themselves list, torchvision and timm, unless the user trusts the code by
hand.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hasten import errors
from hasten.errors import SettingsError, UnsupportedError
from hasten.models import external, registry, usercode

Recipe = dict[str, Any]
_GEOMETRY = ("num_classes", "in_channels", "image_size")


@dataclass(frozen=True)
class ModelSource:
    """A model that can be made again: ``make()`` returns a fresh module each time.

    ``recipe`` is plain JSON from which `from_recipe` rebuilds the source, or None for an object without an
    importable factory: such a model trains, but a new process cannot resume it. ``label`` names it in
    reports. ``module`` is the given object when the source is one; ``make()`` then returns deep copies of it,
    with its weights.
    """

    label: str
    recipe: Recipe | None
    module: nn.Module | None = field(default=None, repr=False)
    factory: Callable[[], nn.Module] | None = field(default=None, repr=False)

    def make(self) -> nn.Module:
        """Return a fresh model; raises SettingsError when the user's factory returns something else."""
        if self.module is not None:
            return copy.deepcopy(self.module)
        assert self.factory is not None
        model = self.factory()
        if not isinstance(model, nn.Module):
            raise SettingsError(
                f"model {self.label}: the factory returned {type(model).__name__}, not an nn.Module"
            )
        return model


def _from_callable(
    function: Callable[..., Any], label: str, recipe: Recipe | None, geometry: Recipe
) -> ModelSource:
    numbers = {key: geometry[key] for key in _GEOMETRY}

    def factory() -> nn.Module:
        with registry.seeded(geometry["seed"]):
            return usercode.call(function, numbers, label)

    return ModelSource(label, recipe, factory=factory)


def _from_name(name: str, geometry: Recipe) -> ModelSource:
    registry.lookup(name)
    recipe = {"kind": "name", "name": name, **geometry}
    return ModelSource(name, recipe, factory=lambda: registry.build(name, **geometry))


def _from_external(library: str, name: str, geometry: Recipe) -> ModelSource:
    numbers = {key: geometry[key] for key in ("num_classes", "in_channels")}
    maker = external.torchvision_model if library == "torchvision" else external.timm_model
    make = maker(name, **numbers)

    def factory() -> nn.Module:
        with registry.seeded(geometry["seed"]):
            return make()

    return ModelSource(f"{library}:{name}", {"kind": library, "name": name, **geometry}, factory=factory)


def _from_code(target: str, geometry: Recipe, expected: str | None = None) -> ModelSource:
    code = usercode.load(target)
    if expected is not None and code.sha256 != expected:
        warnings.warn(
            f"{code.path} changed since the checkpoint was written (SHA-256 {code.sha256}, was {expected})",
            stacklevel=4,
        )
    recipe = {
        "kind": "code",
        "target": code.target,
        "path": str(code.path),
        "sha256": code.sha256,
        **geometry,
    }
    return _from_callable(code.function, target, recipe, geometry)


def resolve(
    spec: str | nn.Module | Callable[..., nn.Module],
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    seed: int | None = None,
) -> ModelSource:
    """Return the source of a model the *user* named.

    ``spec`` is a known name (`registry.available`), an nn.Module, a factory, ``path/file.py:factory``,
    ``pkg.mod:factory``, ``torchvision:NAME`` or ``timm:NAME``. A factory is called with those of
    ``num_classes``, ``in_channels`` and ``image_size`` that its parameters name. ``seed`` fixes the initial
    weights (not those of a module, which it already has).

    Raises UnknownName, SettingsError (a spec of another type, a factory that is missing or not callable) and
    UnsupportedError (an extra that is not installed, an image too small at ``make()``).
    """
    registry.check_geometry(num_classes, in_channels, image_size)
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise SettingsError(f"model: seed is {seed!r}, must be an integer or None")
    geometry: Recipe = dict(
        num_classes=num_classes, in_channels=in_channels, image_size=image_size, seed=seed
    )
    if isinstance(spec, nn.Module):
        return ModelSource(type(spec).__name__, None, module=spec)
    if isinstance(spec, str):
        library, _, name = spec.partition(":")
        if library in ("torchvision", "timm") and name:
            return _from_external(library, name, geometry)
        return _from_code(spec, geometry) if ":" in spec else _from_name(spec, geometry)
    if callable(spec):
        target = usercode.importable(spec)
        label = getattr(spec, "__qualname__", type(spec).__name__)
        if target is None:
            return _from_callable(spec, label, None, geometry)
        found = usercode.locate(target)
        recipe = {"kind": "code", "target": target, "path": str(found[0]), "sha256": found[1], **geometry}
        return _from_callable(spec, label, recipe, geometry)
    raise SettingsError(
        f"model: got {type(spec).__name__}; give a name, an nn.Module, a factory, 'file.py:factory', "
        "'pkg.mod:factory', 'torchvision:NAME' or 'timm:NAME'"
    )


def from_recipe(recipe: Recipe, trust_code: bool = False) -> ModelSource:
    """Return the source a checkpoint's recipe describes, importing no code unless ``trust_code``.

    Raises UnsupportedError for a recipe that names code when it is not trusted, with the path and its SHA-256
    as it is on disk now; SettingsError for a damaged recipe; UnknownName for an unknown network. With
    ``trust_code`` a file that changed since the checkpoint was written gives a warning with both hashes.
    """
    kind = recipe.get("kind")
    text = {
        "name": ("name",),
        "torchvision": ("name",),
        "timm": ("name",),
        "code": ("target", "path", "sha256"),
    }
    if not isinstance(kind, str) or kind not in text:
        raise errors.unknown("kind of model recipe", str(kind), text, SettingsError)
    wanted = {"kind", *text[kind], *_GEOMETRY, "seed"}
    wrong = [key for key in text[kind] if not isinstance(recipe.get(key), str)]
    if set(recipe) != wanted or wrong:
        raise SettingsError(
            f"model recipe: keys {sorted(recipe)}, must be {sorted(wanted)}"
            + (f"; {', '.join(wrong)} must be text" if wrong else "")
        )
    geometry = {key: recipe[key] for key in (*_GEOMETRY, "seed")}
    if kind == "code" and not trust_code:
        path, digest = usercode.locate(recipe["target"])
        raise UnsupportedError(
            f"this checkpoint wants to run code: {recipe['target']!r}, file {path or 'not found'} "
            f"(SHA-256 {digest or 'unknown'}; when written: {recipe['path']}, {recipe['sha256']}). Nothing "
            "was imported. If you trust that file, say so (trust_code=True or --trust-code), "
            "or pass the model yourself"
        )
    registry.check_geometry(*(geometry[key] for key in _GEOMETRY))
    if kind == "code":
        return _from_code(recipe["target"], geometry, recipe["sha256"])
    if kind == "name":
        if ":" in recipe["name"]:
            raise errors.unknown("model", recipe["name"], registry.available())
        return resolve(recipe["name"], **geometry)
    return _from_external(kind, recipe["name"], geometry)
