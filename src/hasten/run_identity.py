"""What makes two runs the same: network and its code, data, methods, recipe, seed, and the caller's own functions."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten import models
from hasten.contract import Method
from hasten.data import DataSet, Streams
from hasten.models.source import ModelSource
from hasten.places import ordered
from hasten.recipe import Recipe


def source_of(
    model: str | nn.Module | Callable[..., nn.Module], data: DataSet | Streams, seed: int
) -> ModelSource:
    """Return where ``model`` comes from, with the classes, channels and size of ``data`` and weights keyed by ``seed``."""
    return models.resolve(model, num_classes=len(data.classes), in_channels=data.shape[2],
                          image_size=data.shape[0], seed=seed)  # fmt: skip


def identity_of(
    model: str | nn.Module | Callable[..., nn.Module] | ModelSource,
    data: DataSet | Streams,
    methods: Sequence[Method],
    recipe: Recipe,
    seed: int,
    *,
    init: str | Path | Mapping[str, Tensor] | None = None,
    loss: Callable[..., Any] | None = None,
    optimizer: Callable[..., Any] | None = None,
    train_fn: Callable[..., Any] | None = None,
    weights: bool = False,
) -> dict[str, Any]:
    """Return, as plain JSON, all that shapes a run's result: two runs with equal identities are the same run.

    The model is its recipe with the SHA-256 of its file and of what that imports from its own folder; an object is its
    ``repr``, and with ``weights`` also its weights. (A resumed run takes its weights from the checkpoint and leaves
    them out.)  The caller's own functions are told apart by their source and what they hold.
    """
    source = model if isinstance(model, ModelSource) else source_of(model, data, seed)
    identity: dict[str, Any] = {
        "model": source.recipe or object_identity(source, weights),
        "data": data.identity(),
        "seed": seed,
        "recipe": dataclasses.asdict(recipe) | {"augment": list(recipe.augment)},
        "methods": [{"name": m.spec.name, "settings": jsonable(m.settings())} for m in ordered(methods)],
    }
    if source.recipe is not None and source.recipe["kind"] == "code":
        identity["code"] = neighbours(Path(source.recipe["path"]))
    if init is not None:
        identity["init"] = weights_identity(init)
    given = {"loss": loss, "optimizer": optimizer, "train_fn": train_fn}
    return identity | {name: described(value) for name, value in given.items() if value is not None}


def jsonable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with tuples as lists, as JSON holds them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def object_identity(source: ModelSource, weights: bool) -> dict[str, str]:
    """Return what tells a model without a factory from another: its text, and its weights where asked for."""
    net = source.module if source.module is not None else source.make()
    found = {"object": source.label, "text": _short(repr(net).encode())}
    return found | ({"weights": state_digest(net.state_dict())} if weights else {})


def state_digest(state: Mapping[str, Any]) -> str:
    """Return a digest of the names, types, shapes and bytes of a state dict."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(
            repr(
                (name, str(getattr(value, "dtype", type(value))), tuple(getattr(value, "shape", ())))
            ).encode()
        )
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()[:16]


def weights_identity(init: str | Path | Mapping[str, Tensor]) -> dict[str, str]:
    """Return the digest of initial weights: of the file, or of the tensors."""
    if isinstance(init, str | Path):
        path = Path(init).expanduser()
        return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""}
    return {"weights": state_digest(init)}


def neighbours(path: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in the folder of ``path`` that its code imports, itself left out; nothing runs.

    Follows ``import`` statements through modules and packages below that folder; a name is relative to it.
    """
    folder, found, left = path.parent, dict[str, str](), [path]
    while left:
        file = left.pop()
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        for name in _imported(tree, file.parent.relative_to(folder).parts):
            for candidate in (
                folder.joinpath(*name).with_suffix(".py"),
                folder.joinpath(*name, "__init__.py"),
            ):
                key = candidate.relative_to(folder).as_posix()
                if candidate.is_file() and candidate != path and key not in found:
                    found[key] = hashlib.sha256(candidate.read_bytes()).hexdigest()
                    left.append(candidate)
    return dict(sorted(found.items()))


def _imported(tree: ast.AST, package: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Return the dotted names that a module inside ``package`` imports, each with the packages it lies in."""
    names: set[tuple[str, ...]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = (*above, *(node.module or "").split(".")) if node.module else above
            names |= {base} | {(*base, alias.name) for alias in node.names}
    return {name[:end] for name in names for end in range(1, len(name) + 1)}


def described(value: object) -> Any:
    """Return ``value`` (a function, a partial, a loss module, plain data) as JSON that changes with what it does."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return {"tensor": state_digest({"": value})}
    if isinstance(value, nn.Module):
        return {"module": repr(value), "state": state_digest(value.state_dict(keep_vars=True)),
                "settings": {k: described(v) for k, v in vars(value).items() if isinstance(v, bool | int | float | str)}}  # fmt: skip
    if isinstance(value, partial):
        return {"function": described(value.func), "given": [described(v) for v in value.args],
                "named": {k: described(v) for k, v in sorted(value.keywords.items())}}  # fmt: skip
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    name = getattr(value, "__qualname__", type(value).__qualname__)
    found: dict[str, Any] = {"name": f"{getattr(value, '__module__', '')}:{name}"}
    try:
        found["source"] = _short(inspect.getsource(value).encode())  # type: ignore[arg-type]
    except (OSError, TypeError):
        code = getattr(value, "__code__", None)
        if code is not None:
            found["source"] = _short(repr((code.co_code, code.co_names)).encode())
    cells = [
        c.cell_contents for c in getattr(value, "__closure__", None) or () if not callable(c.cell_contents)
    ]
    if cells:
        found["holds"] = [
            described(c) for c in cells if isinstance(c, bool | int | float | str | Tensor | tuple | list)
        ]
    return found


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
