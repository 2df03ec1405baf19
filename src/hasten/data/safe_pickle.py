"""The one place that reads pickles: the dictionaries of CIFAR's Python version, and nothing else.

A pickle is a program. Three fences: its instructions are read first and only those that plain data need may
occur; the only names it may import are the three by which NumPy stores an array; and those names lead to the
inert stand-ins below, never to NumPy. Nothing that a file says is called, and no memory is taken that the
file does not itself fill.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import DataError

_STRINGS = {
    "SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BINUNICODE",
    "SHORT_BINUNICODE", "STRING", "UNICODE",
}  # fmt: skip
_NUMBERS = {"BININT", "BININT1", "BININT2", "INT", "LONG1", "NONE", "NEWTRUE", "NEWFALSE"}
_CONTAINERS = {
    "MARK", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "DICT", "LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "APPEND", "APPENDS", "SETITEM", "SETITEMS", "REDUCE", "BUILD",
}  # fmt: skip
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_OTHER = {"PROTO", "FRAME", "GLOBAL", "STACK_GLOBAL", "STOP"}
_ALLOWED = _STRINGS | _NUMBERS | _CONTAINERS | _PUTS | _GETS | _OTHER
# Only these may be used twice. A container that holds itself many times over grows without bound as it is
# walked.
_SHAREABLE = _STRINGS | _NUMBERS | {"GLOBAL", "STACK_GLOBAL"}
_MOST_MEMOS = 1 << 20
# An array needs six. Python hashes tuples within tuples by recursion, which a million would overflow.
_MOST_TUPLES = 64


class _DType:
    """Stands for numpy.dtype; knows one type, the byte."""

    def __init__(self, *arguments: object) -> None:
        if not arguments or arguments[0] not in (b"u1", "u1", b"|u1", "|u1"):
            raise DataError("the pickle holds an array that is not of unsigned bytes.")

    def __setstate__(self, state: object) -> None:
        pass  # Byte order and flags mean nothing for bytes.


class _NdArray:
    """Stands for the class numpy.ndarray, which the pickle only names."""

    def __init__(self) -> None:
        raise DataError("the pickle calls numpy.ndarray, which CIFAR files do not.")


class _Array:
    """Stands for an array while the pickle fills it."""

    data: NDArray[np.uint8] | None = None

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), tuple() as shape, _DType(), 0 | 1 as fortran, bytes() as raw):
                if len(shape) != 2 or not all(type(n) is int and n >= 0 for n in shape):
                    raise DataError("the pickle holds an array that has not two dimensions.")
                if shape[0] * shape[1] != len(raw):
                    raise DataError(
                        f"the pickle tells of {shape[0]} x {shape[1]} pixel bytes and has {len(raw):,}."
                    )
                flat = np.frombuffer(bytearray(raw), np.uint8)
                self.data = flat.reshape(shape, order="F" if fortran else "C")
            case _:
                raise DataError("the pickle holds an array in a form that CIFAR files do not have.")


def _encode(text: object, encoding: object) -> bytes:
    """Stand for _codecs.encode, by which Python 3 writes bytes in the old protocol."""
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise DataError("the pickle encodes text in a way that CIFAR files do not.")
    return text.encode("latin1")


_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NdArray,
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("_codecs", "encode"): _encode,
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise DataError(
                f"the pickle asks for {module}.{name}, which CIFAR files do not; it was not run."
            ) from None


def load_pickle(raw: bytes) -> dict[bytes, Any]:
    """Return the dictionary of a CIFAR Python file; arrays are uint8 with two dimensions.

    Raises DataError for anything else, without having run or imported anything that the file names.
    """
    try:
        _check_instructions(raw)
        content = _Restricted(io.BytesIO(raw), encoding="bytes").load()
    except DataError:
        raise
    except Exception as error:  # Damaged pickles raise nearly every built-in error.
        raise DataError(f"the pickle is damaged or truncated ({type(error).__name__}: {error}).") from error
    if type(content) is not dict:
        raise DataError(f"the pickle holds a {type(content).__name__}, not a dictionary.")
    out: dict[bytes, Any] = {}
    for key, value in content.items():
        if not isinstance(key, bytes | str):
            raise DataError(f"the pickle's dictionary has a key of type {type(key).__name__}.")
        name = key.encode() if isinstance(key, str) else key
        out[name] = value.data if isinstance(value, _Array) else _plain(value)
    return out


def _plain(value: Any) -> Any:
    """Return lists of text as lists of bytes, so that both Pythons' files look alike."""
    if type(value) is list:
        return [item.encode() if isinstance(item, str) else item for item in value]
    return value


def _check_instructions(raw: bytes) -> None:
    memo: dict[int, str] = {}
    before, tuples = "", 0
    for opcode, argument, position in pickletools.genops(raw):
        name = opcode.name
        if name not in _ALLOWED:
            raise DataError(
                f"the pickle uses {name} at byte {position}, which CIFAR files do not; it was not run."
            )
        if name == "GLOBAL" and tuple(str(argument).split(" ", 1)) not in _NAMES:
            called = str(argument).replace(" ", ".")
            raise DataError(f"the pickle asks for {called}, which CIFAR files do not; it was not run.")
        tuples += name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
        if tuples > _MOST_TUPLES:
            raise DataError(
                f"the pickle has more than {_MOST_TUPLES} tuples at byte {position}; it was not run."
            )
        if name in _PUTS:
            slot = len(memo) if name == "MEMOIZE" else int(argument or 0)
            if not 0 <= slot < _MOST_MEMOS:
                raise DataError(f"the pickle asks for memo slot {slot:,} at byte {position}; it was not run.")
            memo[slot] = before
        elif name in _GETS:
            if memo.get(int(argument or 0)) not in _SHAREABLE:
                raise DataError(f"the pickle uses a container twice at byte {position}; it was not run.")
            before = memo[int(argument or 0)]
        else:
            before = name
