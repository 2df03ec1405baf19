"""A nested state as named tensors plus a JSON skeleton, and back, bit for bit.

`pack` splits a tree of dicts, lists and tuples into what a safetensors file holds (the tensors, named by
their path in the tree, so a model's file has its `state_dict` keys) and what JSON holds (everything else).
Values that JSON has no word for become an object with one key that starts with ``$``: ``$tensor``,
``$tuple``, ``$dict`` (keys that are not plain strings), ``$ordered``, ``$int`` (beyond 64 bits), ``$float``
(nan and infinities, as bits), ``$bytes``.
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from hasten.errors import CheckpointError

Json = Any
"""What `json.dumps` takes: None, bool, int, float, str, lists, and dicts with string keys."""

MAX_DEPTH = 100

# Written under their own name. The others go as raw bytes with the type noted: old readers do not know them.
NATIVE = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool,
}  # fmt: skip
RAW = {
    str(kind).removeprefix("torch."): kind
    for kind in (
        torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128,
        torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    )
}  # fmt: skip


def pack(state: dict[Any, Any], where: str = "") -> tuple[dict[str, Tensor], Json]:
    """Split ``state`` into CPU tensors by name and a JSON skeleton.

    Kept exactly: tensors of any size, type and dense stride order (so channels_last survives; a strided slice
    comes back contiguous), tensors shared between two places (shared again after `unpack`; tensors that
    merely overlap come back apart), ints of any size, floats including nan and infinities, bools, None, str,
    bytes, list, tuple, dict and OrderedDict with str and int keys in their order. NumPy arrays and scalars
    come back as tensors, `torch.Size` as a tuple. The tensors may share memory with ``state``: write them
    before it changes.

    Raises CheckpointError, with the place in the tree, for anything else. ``where`` starts that place.
    """
    packer = _Packer(where)
    return packer.tensors, packer.node(state, ())


def unpack(tensors: dict[str, Tensor], skeleton: Json) -> Any:
    """Rebuild the tree that `pack` split. Tensors are fresh copies on the CPU with the recorded strides.

    Raises CheckpointError if the skeleton is not one that `pack` writes or does not fit the tensors.
    """
    unpacker = _Unpacker(tensors)
    try:
        state = unpacker.node(skeleton, 0)
    except (ValueError, TypeError, RuntimeError, OverflowError, KeyError, struct.error) as error:
        raise CheckpointError(f"the structure of the checkpoint is malformed: {error}") from error
    unused = sorted(tensors.keys() - unpacker.done.keys())
    if unused:
        raise CheckpointError(
            f"{len(unused)} tensors belong to nothing in the checkpoint: {', '.join(unused[:5])}"
        )
    return state


class _Packer:
    def __init__(self, where: str) -> None:
        self.where = where
        self.tensors: dict[str, Tensor] = {}
        self.nodes: dict[object, Json] = {}  # one node for every distinct tensor met
        self.storages: set[int] = set()
        self.alive: list[object] = []  # what `nodes` identifies by address must outlive the packing

    def node(self, value: object, path: tuple[str, ...]) -> Json:
        if len(path) > MAX_DEPTH:
            raise self.refuse(path, f"nesting deeper than {MAX_DEPTH} levels; does it contain itself?")
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if isinstance(value, int) and kind is int:
            return value if -(2**63) <= value < 2**63 else {"$int": hex(value)}
        if isinstance(value, float) and kind is float:
            return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
        if isinstance(value, bytes) and kind is bytes:
            return {"$bytes": value.hex()}
        if isinstance(value, Tensor):
            return self.tensor(value, path)
        if isinstance(value, np.ndarray | np.generic):
            return self.array(value, path)
        if isinstance(value, list) and kind is list:
            return self.items(value, path)
        if isinstance(value, tuple) and kind in (tuple, torch.Size):
            return {"$tuple": self.items(value, path)}
        if isinstance(value, dict) and kind in (dict, OrderedDict):
            return self.mapping(value, path)
        raise self.refuse(
            path,
            f"a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold. Allowed are tensors, "
            "NumPy arrays, int, float, bool, str, bytes, None, and lists, tuples and dicts of these",
        )

    def items(self, values: Iterable[object], path: tuple[str, ...]) -> list[Json]:
        return [self.node(value, (*path, str(index))) for index, value in enumerate(values)]

    def mapping(self, value: dict[Any, Any], path: tuple[str, ...]) -> Json:
        for key in value:
            if type(key) not in (str, int):
                raise self.refuse(path, f"a dict with the key {key!r}; keys must be str or int")
        pairs = [(key, self.node(item, (*path, str(key)))) for key, item in value.items()]
        if isinstance(value, OrderedDict):
            return {"$ordered": [[self.node(key, path), item] for key, item in pairs]}
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs):
            return dict(pairs)
        return {"$dict": [[self.node(key, path), item] for key, item in pairs]}

    def array(self, value: np.ndarray[Any, Any] | np.generic, path: tuple[str, ...]) -> Json:
        kind = value.dtype
        try:
            if not isinstance(value, np.generic) and type(value) not in (np.ndarray, np.memmap):
                raise TypeError(f"{type(value).__name__} is more than a plain array")
            if kind.hasobject or kind.fields is not None:
                raise TypeError("it holds Python objects or records")
            array = np.array(
                value, dtype=kind.newbyteorder("="), order="C"
            )  # a copy: may be read-only or reversed
            tensor = torch.from_numpy(array)
        except TypeError as error:
            raise self.refuse(
                path, f"a NumPy value of type {kind}, which has no tensor type ({error})"
            ) from error
        if isinstance(value, np.generic):
            return self.tensor(tensor, path)
        key = ("array", id(value))  # the same array twice is one tensor twice
        if key not in self.nodes:
            self.alive.append(value)
            self.nodes[key] = self.tensor(tensor, path)
        return self.nodes[key]

    def tensor(self, value: Tensor, path: tuple[str, ...]) -> Json:
        plain = type(value) is Tensor or isinstance(value, torch.nn.Parameter)
        if (
            not plain
            or is_lazy(value)
            or value.layout != torch.strided
            or value.is_quantized
            or value.is_meta
        ):
            raise self.refuse(
                path,
                f"a {type(value).__name__} of layout {value.layout} on {value.device}; only plain dense "
                "tensors with values can be saved",
            )
        if value.dtype not in NATIVE and value.dtype not in RAW.values():
            raise self.refuse(path, f"a tensor of type {value.dtype}, which a checkpoint cannot hold")
        shape, stride = tuple(value.shape), value.stride()
        key: object = ("empty", id(value))
        if value.numel():
            lazy_bits = (value.is_conj(), value.is_neg())
            key = (value.device, value.data_ptr(), value.dtype, shape, stride, lazy_bits)
        if key not in self.nodes:
            self.alive.append(value)
            self.nodes[key] = self.store(value, shape, stride, path)
        return self.nodes[key]

    def store(
        self, value: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], path: tuple[str, ...]
    ) -> Json:
        name = self.name(path)
        node: dict[str, Json] = {"$tensor": name}
        data = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        if value.dtype not in NATIVE:
            node["dtype"], node["shape"] = str(value.dtype).removeprefix("torch."), list(shape)
            flat = torch.empty(
                data.numel(), dtype=data.dtype
            )  # reshape may keep a stride of 0, which has no bytes
            data = flat.copy_(data.reshape(-1)).view(torch.uint8)
        if value.numel() and stride != _row_major(shape) and _dense(shape, stride):
            node["stride"] = list(stride)
        # safetensors refuses tensors that share memory; the second view of a storage is written from a copy.
        storage = data.untyped_storage().data_ptr()
        self.tensors[name] = data.clone() if storage in self.storages else data
        self.storages.add(self.tensors[name].untyped_storage().data_ptr())
        return node

    def name(self, path: tuple[str, ...]) -> str:
        base = ".".join(path).encode("utf-8", "backslashreplace").decode() or "_"
        name, count = base, 1
        while name in self.tensors or name == "__metadata__":  # that name is taken by the file format
            count += 1
            name = f"{base}#{count}"
        return name

    def refuse(self, path: tuple[str, ...], problem: str) -> CheckpointError:
        place = ".".join((*((self.where,) if self.where else ()), *path)) or "the top"
        return CheckpointError(f"cannot save the state: at {place!r} there is {problem}.")


class _Unpacker:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.done: dict[str, tuple[Json, Tensor]] = {}

    def node(self, node: Json, depth: int) -> Any:
        if depth > 2 * MAX_DEPTH:
            raise ValueError("nesting too deep")
        if node is None or isinstance(node, bool | int | float | str):
            return node
        if isinstance(node, list):
            return [self.node(item, depth + 1) for item in node]
        if not isinstance(node, dict):
            raise ValueError(f"a {type(node).__name__} is no JSON value")
        tag = next((key for key in node if key.startswith("$")), None)
        if tag is None:
            return {key: self.node(item, depth + 1) for key, item in node.items()}
        if tag == "$tensor":
            return self.tensor(node)
        if len(node) != 1:
            raise ValueError(f"{tag} with other keys beside it")
        return self.tagged(tag, node[tag], depth)

    def tagged(self, tag: str, value: Json, depth: int) -> Any:
        if tag in ("$tuple", "$dict", "$ordered"):
            if not isinstance(value, list):
                raise ValueError(f"{tag} needs a list")
            items = [self.node(item, depth + 1) for item in value]
            if tag == "$tuple":
                return tuple(items)
            for item in items:
                if not (isinstance(item, list) and len(item) == 2 and type(item[0]) in (int, str)):
                    raise ValueError(f"{tag} needs pairs of a key and a value")
            if len({item[0] for item in items}) != len(items):
                raise ValueError(f"{tag} with a key given twice")
            return dict(items) if tag == "$dict" else OrderedDict(items)
        if not isinstance(value, str):
            raise ValueError(f"{tag} needs a string")
        if tag == "$int":
            return int(value, 16)
        if tag == "$float":
            return struct.unpack(">d", bytes.fromhex(value))[0]
        if tag == "$bytes":
            return bytes.fromhex(value)
        raise ValueError(f"unknown tag {tag}")

    def tensor(self, node: dict[str, Json]) -> Tensor:
        name = node["$tensor"]
        if not isinstance(name, str) or name not in self.tensors:
            raise ValueError(f"the tensor {name!r} is missing")
        if name not in self.done:
            self.done[name] = (node, self.restore(self.tensors[name], node))
        known, tensor = self.done[name]
        if known != node:  # else a small file could ask for one large tensor in thousands of layouts
            raise ValueError(f"the tensor {name!r} is described in two ways")
        return tensor

    def restore(self, data: Tensor, node: dict[str, Json]) -> Tensor:
        if not node.keys() <= {"$tensor", "dtype", "shape", "stride"}:
            raise ValueError(f"unknown keys in {sorted(node)}")
        if "dtype" in node:
            if node["dtype"] not in RAW or data.dtype != torch.uint8 or data.dim() != 1:
                raise ValueError(f"cannot read bytes as {node['dtype']!r}")
            data = data.clone().view(RAW[node["dtype"]]).reshape(_sizes(node["shape"]))
        shape = tuple(data.shape)
        stride = _sizes(node["stride"]) if "stride" in node else _row_major(shape)
        if data.numel() and (len(stride) != len(shape) or not _dense(shape, stride)):
            raise ValueError(f"strides {stride} do not fit shape {shape}")
        return torch.empty_strided(shape, stride, dtype=data.dtype).copy_(data)


def _sizes(value: Json) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise ValueError("sizes and strides must be lists of integers >= 0")
    return tuple(value)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def _dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the strides are those of some order of the dimensions, without gaps or overlap."""
    step = 1
    for width, size in sorted((width, size) for width, size in zip(stride, shape, strict=True) if size != 1):
        if width != step:
            return False
        step *= size
    return True
