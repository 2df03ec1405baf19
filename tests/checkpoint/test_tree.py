"""Packing and unpacking lose no bit and refuse what they do not know."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from hasten.checkpoint import pack, unpack
from hasten.checkpoint.tree import NATIVE, RAW
from hasten.errors import CheckpointError

from .trees import equal, raw

KINDS = sorted({*NATIVE, *RAW.values()}, key=str)


def through_files(state: dict[Any, Any]) -> Any:
    """Pack, write as safetensors and JSON text, read, unpack."""
    tensors, skeleton = pack(state)
    return unpack(load(save(tensors)) if tensors else {}, json.loads(json.dumps(skeleton, allow_nan=False)))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    kind = draw(st.sampled_from(KINDS))
    shape = draw(st.lists(st.integers(0, 4), max_size=5))
    seed = draw(st.integers(0, 2**31))
    size = math.prod(shape) * torch.empty(0, dtype=kind).element_size()
    top = 2 if kind == torch.bool else 256
    data = torch.randint(0, top, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    tensor = data.view(kind).reshape(shape)  # any bit pattern: nan payloads and subnormals too
    match draw(st.sampled_from(["plain", "permuted", "sliced", "expanded", "parameter"])):
        case "permuted":
            return tensor.permute(draw(st.permutations(range(len(shape)))))
        case "sliced" if shape and shape[0]:
            return tensor[::2]
        case "expanded":
            return tensor.unsqueeze(0).expand(3, *shape)
        case "parameter" if kind.is_floating_point and kind.itemsize > 1:
            return torch.nn.Parameter(tensor)
    return tensor


arrays = st.builds(
    lambda kind, values: np.array(values).astype(kind)[::-1],
    st.sampled_from(["f4", ">f8", "i2", "u8", "?", "c16", "f2"]),
    st.lists(st.integers(0, 1), max_size=4),
)
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(min_value=2**62).map(lambda x: -(x**3)),
    st.floats(), st.text(st.characters()), st.binary(max_size=9), tensors(), arrays,
    st.floats(width=32).map(np.float32), st.integers(0, 255).map(np.uint8), st.floats().map(np.float64),
)  # fmt: skip
keys = st.one_of(
    st.integers(), st.text(st.characters(), max_size=5), st.sampled_from(["$tensor", "a.b", "__metadata__"])
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(OrderedDict),
    ),
    max_leaves=12,
)


@given(st.dictionaries(keys, trees, max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_tree_comes_back_bit_for_bit(state: dict[Any, Any]) -> None:
    assert equal(state, through_files(state))


@given(st.permutations(range(4)), st.lists(st.integers(1, 4), min_size=4, max_size=4))
@settings(max_examples=100, deadline=None)
def test_every_order_of_the_dimensions_keeps_its_strides(order: list[int], shape: list[int]) -> None:
    tensor = torch.randn(shape).permute(order)
    assert through_files({"a": tensor})["a"].stride() == tensor.stride()


def test_channels_last_survives_also_for_1x1_weights() -> None:
    for shape in ((8, 4, 3, 3), (8, 4, 1, 1), (8, 1, 3, 3), (1, 4, 5, 6, 7)):
        layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        weight = torch.randn(shape).contiguous(memory_format=layout)
        assert through_files({"w": weight})["w"].stride() == weight.stride()


def test_a_model_keeps_its_names_and_tied_weights() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    packed, _ = pack(model.state_dict())
    assert set(packed) == {"a.weight", "a.bias", "b.bias"}
    found = through_files(model.state_dict())
    assert found["a.weight"] is found["b.weight"]
    assert found["a.bias"] is not found["b.bias"]


def test_views_of_one_storage_come_back_with_their_own_values() -> None:
    flat = torch.arange(12.0)
    found = through_files(
        {"flat": flat, "half": flat[:6], "table": flat.view(3, 4), "empty": flat[:0], "none": flat[3:3]}
    )
    assert equal(
        {"flat": flat, "half": flat[:6], "table": flat.view(3, 4)},
        {k: found[k] for k in ("flat", "half", "table")},
    )
    assert found["empty"] is not found["none"]


def test_names_that_collide_stay_apart() -> None:
    state = {"a.b": torch.zeros(2), "a": {"b": torch.ones(2), 0: torch.ones(1), "0": torch.zeros(1)}}
    assert equal(state, through_files(state))


def test_packing_does_not_need_or_change_gradients() -> None:
    weight = torch.randn(3, requires_grad=True)
    found = through_files({"w": weight, "y": weight * 2})
    assert not found["w"].requires_grad
    assert weight.requires_grad
    assert raw(found["y"]) == raw(weight * 2)


def test_lazy_conjugates_and_negatives_are_saved_as_their_values() -> None:
    value = torch.randn(3, 2, dtype=torch.complex128)
    found = through_files({"a": value, "b": value.conj(), "c": value.conj().imag, "d": value.imag})
    for name, wanted in {"a": value, "b": value.conj(), "c": -value.imag, "d": value.imag}.items():
        assert torch.equal(found[name], wanted)


class Thing:
    pass


class Sub(dict[str, int]):
    pass


@pytest.mark.parametrize(
    "value",
    [
        Thing(), {1, 2}, 1j, Sub(), range(3), len, torch.float32, torch.device("cpu"),
        np.array([Thing()]), np.array("s"),
        np.ma.masked_array([1.0], [True]), np.datetime64("2020-01-01"), torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"), {True: 1}, {(1, 2): 3}, {None: 1}, {1.0: 2}, torch.nn.Linear(1, 1),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_cannot_be_saved_is_named_with_its_place(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"optim\.groups\.1\.odd"):
        pack({"groups": [0, {"odd": value}]}, "optim")


def test_a_tree_that_contains_itself_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["again"] = loop
    with pytest.raises(CheckpointError, match="contain itself"):
        pack(loop)


ONE = {"a": torch.arange(6.0).reshape(2, 3)}
BYTES = {"a": torch.zeros(16, dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("given", "skeleton"),
    [
        (ONE, {"x": {"$tensor": "b"}}),
        (ONE, {"x": {"$tensor": 3}}),
        (ONE, {"x": {"$tensor": ["a"]}}),
        (ONE, {}),
        (ONE, {"x": {"$tensor": "a", "stride": [1 << 40, 1]}}),
        (ONE, {"x": {"$tensor": "a", "stride": [0, 0]}}),
        (ONE, {"x": {"$tensor": "a", "stride": [-3, 1]}}),
        (ONE, {"x": {"$tensor": "a", "stride": [3]}}),
        (ONE, {"x": {"$tensor": "a", "stride": "31"}}),
        (ONE, {"x": {"$tensor": "a", "code": "os:system"}}),
        (ONE, {"x": {"$tensor": "a", "dtype": "complex128", "shape": [1]}}),
        (BYTES, {"x": {"$tensor": "a", "dtype": "complex128", "shape": [1 << 60]}}),
        (BYTES, {"x": {"$tensor": "a", "dtype": "object", "shape": [1]}}),
        (BYTES, {"x": {"$tensor": "a", "dtype": ["complex64"], "shape": [1]}}),
        (BYTES, {"x": {"$tensor": "a", "dtype": "complex128"}}),
        (ONE, [{"$tensor": "a"}, {"$tensor": "a", "stride": [1, 2]}]),
        ({}, {"$import": "os:system"}),
        ({}, {"$int": "zz"}),
        ({}, {"$int": 5}),
        ({}, {"$float": "00"}),
        ({}, {"$bytes": "0"}),
        ({}, {"$tuple": 3}),
        ({}, {"$dict": [[1]]}),
        ({}, {"$dict": [[[], 1]]}),
        ({}, {"$dict": [[1, 1], [1, 2]]}),
        ({}, {"$dict": [], "more": 1}),
        ({}, json.loads("[" * 300 + "]" * 300)),
    ],
)
def test_a_hostile_skeleton_is_refused(given: dict[str, torch.Tensor], skeleton: Any) -> None:
    with pytest.raises(CheckpointError, match=r"malformed|belong to nothing"):
        unpack(given, skeleton)
