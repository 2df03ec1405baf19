"""The user's own factories, `file.py:factory` or `pkg.mod:factory`: find, hash and load them."""

from __future__ import annotations

import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from hasten.errors import SettingsError


@dataclass(frozen=True)
class UserCode:
    """A loaded factory, the file it came from and that file's SHA-256."""

    target: str
    path: Path
    sha256: str
    function: Callable[..., Any]


class _HeldSource(importlib.abc.ExecutionLoader):
    """Runs the bytes that were hashed, not a second read of the file."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data = path, data

    def get_filename(self, fullname: str) -> str:
        return str(self.path)

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self.data)

    def is_package(self, fullname: str) -> bool:
        return False


@contextmanager
def _search_first(folder: Path) -> Iterator[None]:
    """Let imports see ``folder`` while a user's module loads, as `python file.py` would."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def split(target: str) -> tuple[str, str]:
    """Return ("file.py" or "pkg.mod", "factory"); raises SettingsError for another form."""
    where, _, name = target.rpartition(":")
    is_file = where.endswith(".py")
    dotted = bool(where) and all(part.isidentifier() for part in where.split("."))
    if not name.isidentifier() or not (is_file or dotted):
        raise SettingsError(f"model {target!r}: write 'path/file.py:factory' or 'package.module:factory'")
    return where, name


def locate(target: str) -> tuple[Path | None, str | None]:
    """Return the file ``target`` names and its SHA-256, or (None, None); imports and runs nothing.

    Packages are searched part by part, because importlib's own search would import the parents.
    """
    where, _ = split(target)
    if where.endswith(".py"):
        path = Path(where).expanduser().resolve()
    else:
        loaded = sys.modules.get(where)
        origin = getattr(loaded, "__file__", None) if loaded is not None else _find(where)
        if origin is None:
            return None, None
        path = Path(origin).resolve()
    if not path.is_file():
        return None, None
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def _find(dotted: str) -> str | None:
    search: list[str] = [str(Path.cwd()), *sys.path]
    parts = dotted.split(".")
    for i, _ in enumerate(parts):
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[: i + 1]), search)
        if spec is None:
            return None
        if i == len(parts) - 1:
            return spec.origin
        search = list(spec.submodule_search_locations or [])
    return None


def load(target: str) -> UserCode:
    """Import the module that ``target`` names and return its factory. This runs the user's code.

    Raises SettingsError when the file, module or factory does not exist or the factory cannot be called; an
    error raised by the user's own code passes through.
    """
    where, name = split(target)
    if where.endswith(".py"):
        path = Path(where).expanduser().resolve()
        if not path.is_file():
            raise SettingsError(f"model {target!r}: there is no file {path}")
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        module = _run_file(path, data, digest)
        target = f"{path}:{name}"
    else:
        module = _import(where, target)
        path = Path(module.__file__ or where).resolve()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    function = getattr(module, name, None)
    if not callable(function):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise SettingsError(
            f"model {target!r}: {path} has no factory {name!r}"
            + (f"; it has {', '.join(public)}" if public else "")
        )
    return UserCode(target, path, digest, function)


def _run_file(path: Path, data: bytes, digest: str) -> ModuleType:
    # The path is part of the name: two equal files in two folders may import different neighbours.
    name = f"_hasten_user_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    loader = _HeldSource(path, data)
    spec = importlib.machinery.ModuleSpec(name, loader, origin=str(path))
    spec.has_location = True
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up here
    try:
        with _search_first(path.parent):
            loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import(dotted: str, target: str) -> ModuleType:
    try:
        with _search_first(Path.cwd()):
            return importlib.import_module(dotted)
    except ModuleNotFoundError as error:
        # Only the module the user named; a missing import inside it is the user's own error.
        if error.name is not None and (dotted == error.name or dotted.startswith(error.name + ".")):
            raise SettingsError(f"model {target!r}: there is no module {error.name!r} on the path") from error
        raise


def importable(function: Callable[..., Any]) -> str | None:
    """Return ``pkg.mod:name`` when a new process can import ``function`` by it, else None."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if not module or module == "__main__" or module.startswith("_hasten_user_") or not name.isidentifier():
        return None
    loaded = sys.modules.get(module)
    if getattr(loaded, name, None) is not function or not getattr(loaded, "__file__", None):
        return None
    return f"{module}:{name}"


def call(function: Callable[..., Any], numbers: dict[str, int], label: str) -> nn.Module:
    """Call a factory with those of ``numbers`` that its parameters name, or all for ``**kwargs``."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise SettingsError(f"model {label}: the factory has no readable signature ({error})") from error
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    needed = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in numbers
    ]
    if needed:
        raise SettingsError(
            f"model {label}: the factory needs {', '.join(needed)}; hasten gives only {', '.join(numbers)}. "
            "Write a factory that fixes the rest"
        )
    result: nn.Module = function(**{k: v for k, v in numbers.items() if everything or k in names})
    return result
