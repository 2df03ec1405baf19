"""The work of one training step, operation by operation, found from shapes alone.

The step runs once on tensors that have shapes and no values, so a batch of any size costs no memory and no arithmetic.
Every operation that autograd and autocast call is seen, also the additions and casts that no module stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

PAGED = 6 * 2**20  # bytes of a tensor from which on its memory comes fresh from the system (seen with glibc)
PRODUCTS = ("output", "grad_input", "grad_weight")
_aten = torch.ops.aten
_CONV, _CONV_BACKWARD = _aten.convolution.default, _aten.convolution_backward.default
_FREE = {
    "detach", "view", "t", "expand", "as_strided", "as_strided_", "squeeze", "unsqueeze", "transpose", "permute",
    "slice", "select", "alias", "empty", "empty_like", "empty_strided", "_unsafe_view", "lift_fresh", "device",
    "new_empty", "split", "flatten", "_reshape_alias", "resize_", "chunk",
}  # fmt: skip
_NORM_PASSES = {"native_batch_norm": 3, "_native_batch_norm_legit": 3, "native_batch_norm_backward": 4}


@dataclass(frozen=True, eq=False)
class Work:
    """One operation. term: what limits it, ``KIND DTYPE``; KIND is a product, "norm", "pass" or "cast".

    flops: 2 for each multiply-add, 0 for all but products. bytes: moved at least once. weights: elements of the weight, which
    libraries lay out anew in every call. fresh: bytes of results so large that the system hands out new pages. converts: elements that an emulated format would round here. call: what `replay` runs; shapes and strides are those of the step.
    """

    name: str
    term: str
    flops: float
    bytes: float
    weights: float = 0.0
    fresh: float = 0.0
    converts: float = 0.0
    call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] = field(
        repr=False, default=(print, (), {})
    )

    @property
    def product(self) -> bool:
        """Whether it is one of the products of a convolution or linear layer."""
        return self.term.split()[0] in PRODUCTS

    def key(self) -> str:
        """Return a text that is the same for operations that take the same time."""
        f, args, kwargs = self.call
        return f"{self.term} {f} {args} {kwargs}"

    def replay(self) -> Callable[[], object]:
        """Return a call of the operation on random tensors of its shapes, dtypes and strides."""
        f, args, kwargs = self.call
        generator = torch.Generator().manual_seed(0)
        args, kwargs = tree_map(lambda x: x.real(generator) if isinstance(x, _Spec) else x, (args, kwargs))

        def run() -> object:
            with torch.no_grad():
                return f(*args, **kwargs)

        return run


def trace(
    model: nn.Module,
    inputs: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
) -> list[Work]:
    """Return the work of forward, cross-entropy and backward of ``model`` on a batch of shape ``inputs`` (N, C, H, W).

    dtype: float32, or the one of autocast. Nothing about ``model`` changes. The optimizer's step is not in it.
    """
    mode = FakeTensorMode()
    held = [*model.named_parameters(), *model.named_buffers()]
    state = {name: _fake(mode, t, channels_last) for name, t in held}
    modes = [(m, m.training) for m in model.modules()]
    seen = _Recorder()
    model.train()
    try:
        with mode:
            layout = torch.channels_last if channels_last and len(inputs) == 4 else torch.contiguous_format
            x = torch.empty(inputs).contiguous(memory_format=layout)
            with seen:
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    out = functional_call(model, state, (x,))
                target = torch.zeros(len(out), dtype=torch.int64)
                nn.functional.cross_entropy(out.float(), target).backward()  # type: ignore[no-untyped-call]
    finally:
        for module, training in modes:
            module.training = training
    return seen.works


def _fake(mode: FakeTensorMode, t: Tensor, channels_last: bool) -> Tensor:
    fake: Tensor = mode.from_tensor(t.detach())
    with mode:
        if channels_last and t.dim() == 4:
            fake = fake.contiguous(memory_format=torch.channels_last)
    return fake.requires_grad_(t.requires_grad and t.is_floating_point())


class _Recorder(TorchDispatchMode):
    """Keeps what each operation was, and no tensor: autograd copies gradients that anybody else holds."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.works: list[Work] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.works += _works(func, *tree_map(_spec, (args, kwargs or {}, out)))
        return out


@dataclass(frozen=True)
class _Spec:
    """A tensor without values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        return float(self.numel * self.dtype.itemsize)

    def real(self, generator: torch.Generator) -> Tensor:
        """Return a random tensor of this shape, dtype and strides."""
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype)
        if not self.dtype.is_floating_point:
            return made.zero_()
        line = made.as_strided((made.untyped_storage().nbytes() // made.element_size(),), (1,))
        line.copy_(torch.randn(len(line), generator=generator))
        return made


def _spec(x: Any) -> Any:
    return _Spec(tuple(x.shape), tuple(x.stride()), x.dtype) if isinstance(x, Tensor) else x


def _works(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Work]:
    name = func.__name__.split(".")[0]
    given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, _Spec)]
    made = [t for t in tree_flatten(out)[0] if isinstance(t, _Spec)]
    largest = max((*given, *made), key=lambda t: t.numel, default=None)
    if name in _FREE or largest is None or largest.numel <= 1 or "prim" in str(func):
        return []
    kind = str(largest.dtype).removeprefix("torch.") if largest.dtype.is_floating_point else "float32"
    if func is _CONV:
        x, w = args[:2]
        return [
            _product(
                name,
                "output",
                kind,
                (x, w, out),
                out.numel * math.prod(w.shape[1:]),
                out,
                (func, args, kwargs),
            )
        ]
    if func is _CONV_BACKWARD:
        return _backward_products(name, kind, args, kwargs, out)
    if name in ("mm", "addmm"):
        a, b = args[-2:]
        macs = a.shape[0] * a.shape[1] * b.shape[1]
        return [_product(name, "output", kind, (a, b, out), macs, out, (func, args, kwargs))]
    # what an operation changes in place is no result of its own
    fresh = 0.0 if name.endswith("_") else _fresh(*made)
    if name in _NORM_PASSES:
        # statistics are float32 also beside 16-bit tensors, of which tensors without values know nothing
        wide = tree_map(_float32_vector, args)
        moved = _NORM_PASSES[name] * largest.bytes
        return [Work(name, f"norm {kind}", 0.0, moved, fresh=fresh, call=(func, wide, kwargs))]
    term = "cast" if name == "_to_copy" and kwargs.get("dtype") is not None else f"pass {kind}"
    return [Work(name, term, 0.0, _bytes(*given, *made), fresh=fresh, call=(func, args, kwargs))]


def _float32_vector(x: Any) -> Any:
    return replace(x, dtype=torch.float32) if isinstance(x, _Spec) and len(x.shape) == 1 else x


def _backward_products(
    name: str, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> list[Work]:
    """Return the products of a backward convolution one by one; its bias gradient is a pass of its own."""
    grad, x, w = args[:3]
    *front, mask = args
    macs = grad.numel * math.prod(w.shape[1:])
    found = []
    for i, product in ((0, "grad_input"), (1, "grad_weight")):
        if mask[i]:
            alone = (*front, [j == i for j in range(3)])
            call = (_CONV_BACKWARD, alone, kwargs)
            found.append(_product(name, product, kind, (x, w, grad), macs, out[i], call))
    if mask[2]:
        total: Any = (_aten.sum.dim_IntList, (grad, [0, 2, 3]), {})
        found.append(Work("sum", f"pass {kind}", 0.0, grad.bytes, call=total))
    return found


def _product(name: str, product: str, kind: str, tensors: tuple[_Spec, ...], macs: float, made: _Spec, call: Any) -> Work:  # fmt: skip
    term, weights = f"{product} {kind}", float(tensors[1].numel)
    return Work(name, term, 2.0 * macs, _bytes(*tensors), weights, _fresh(made), float(made.numel), call)


def _bytes(*tensors: _Spec) -> float:
    return sum(t.bytes for t in tensors)


def _fresh(*tensors: _Spec) -> float:
    return sum(t.bytes for t in tensors if t.bytes > PAGED)
