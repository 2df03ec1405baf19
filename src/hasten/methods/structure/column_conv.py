"""Convolutions that leave out dead columns of their kernels: smaller kernels, sums of parts, and unfolded products.

A column is one position (c, m, k) of a kernel over all filters: where it is zero, all filters have lost that position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.models.registry import seeded
from hasten.products import gather
from hasten.surgery import builders

if TYPE_CHECKING:
    from hasten.surgery.labels import Array
    from hasten.surgery.trace import Follower

Rect = tuple[int, int, int, int]
"""First row and the one after the last, first column and the one after the last, of a kernel."""
Pads = tuple[int, int, int, int]
"""Zeros around a map: left, right, top, bottom; negative where it is cut."""


# -- geometry
def pads_of(conv: nn.Conv2d) -> Pads:
    """Return the zeros that ``conv`` puts around its input."""
    if conv.padding == "valid":
        return 0, 0, 0, 0
    if conv.padding == "same":
        whole = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return whole[1] // 2, whole[1] - whole[1] // 2, whole[0] // 2, whole[0] - whole[0] // 2
    high, wide = cast("tuple[int, int]", conv.padding)
    return wide, wide, high, high


def rectangle(live: Tensor) -> Rect | None:
    """Return the smallest rectangle around the True entries of ``live`` (kh, kw), or None if there is none."""
    rows, columns = live.any(1).nonzero().flatten().tolist(), live.any(0).nonzero().flatten().tolist()
    return (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) if rows else None


def area(rect: Rect) -> int:
    """Return how many positions a rectangle holds."""
    return (rect[1] - rect[0]) * (rect[3] - rect[2])


def cut(weight: Tensor, rect: Rect) -> Tensor:
    """Return the positions ``rect`` of a weight (O, C, kh, kw)."""
    return weight[:, :, rect[0] : rect[1], rect[2] : rect[3]]


@dataclass(frozen=True)
class Frame:
    """What a convolution is but for its weights. ``settings`` are those of the modules that an edit names."""

    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: Pads
    groups: int
    bias: bool

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Frame:
        """Return the frame of ``conv``."""
        return cls(conv.in_channels, conv.out_channels, _pair(conv.kernel_size), _pair(conv.stride),
                   _pair(conv.dilation), pads_of(conv), conv.groups, conv.bias is not None)  # fmt: skip

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Frame:
        """Return the frame that ``settings`` gave."""
        own: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**own)

    def settings(self) -> dict[str, Any]:
        """Return the frame as plain values."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in vars(self).items()}

    def inside(self, rect: Rect, *, channels: int | None = None, bias: bool | None = None) -> Frame:
        """Return the frame of the same sum over the positions ``rect`` (of fewer input channels)."""
        left, right, top, bottom = self.pads
        (high, wide), (down, across) = self.kernel, self.dilation
        pads = (
            left - rect[2] * across, right - (wide - rect[3]) * across,
            top - rect[0] * down, bottom - (high - rect[1]) * down,
        )  # fmt: skip
        return Frame(
            self.in_channels if channels is None else channels, self.out_channels,
            (rect[1] - rect[0], rect[3] - rect[2]), self.stride, self.dilation, pads, self.groups,
            self.bias if bias is None else bias,
        )  # fmt: skip

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the map made of one of this size."""
        left, right, top, bottom = self.pads
        sizes = ((height + top + bottom, 0), (width + left + right, 1))
        high, wide = (
            (size - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1 for size, i in sizes
        )
        return high, wide

    @property
    def common(self) -> tuple[int, int]:
        """The padding that both sides have: above and below, left and right."""
        left, right, top, bottom = self.pads
        return max(0, min(top, bottom)), max(0, min(left, right))

    @property
    def rest(self) -> Pads:
        """The padding beside the common one."""
        (high, wide), (left, right, top, bottom) = self.common, self.pads
        return left - wide, right - wide, top - high, bottom - high

    @property
    def prefix(self) -> str:
        """What comes before the names of the parameters in the module that ``conv`` makes."""
        return "1." if any(self.rest) else ""

    def conv(self) -> nn.Module:
        """Return a convolution of this frame, behind a padding of its own where both sides differ."""
        conv = nn.Conv2d(self.in_channels, self.out_channels, self.kernel, self.stride, self.common, self.dilation,
                         self.groups, self.bias)  # fmt: skip
        return nn.Sequential(nn.ZeroPad2d(self.rest), conv) if any(self.rest) else conv


def _pair(value: Sequence[int]) -> tuple[int, int]:
    return int(value[0]), int(value[1])


def _inner(module: nn.Module) -> nn.Conv2d:
    """Return the convolution that `Frame.conv` made."""
    found = module[1] if isinstance(module, nn.Sequential) else module
    assert isinstance(found, nn.Conv2d)
    return found


# -- the modules that an edit names
def cropped_conv(frame: Mapping[str, Any]) -> nn.Module:
    """Return the convolution of a frame."""
    return Frame.read(frame).conv()


class ColumnConv(nn.Module):
    """Computes what a convolution with dead columns does, from the others alone. Its channels stay as they are."""

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.frame = frame
        self.in_channels, self.out_channels = frame.in_channels, frame.out_channels

    def follow_channels(self, follow: Follower, name: str, labels: Array) -> Array:
        """Say that the channels on both sides must stay."""
        why = f"{name} reads chosen columns of its input"
        follow.labels.protect(labels, why)
        return follow.labels.fresh(self.out_channels, name, why)

    def take(self, dense: Tensor) -> dict[str, Tensor]:
        """Return, by the names of the own weights, their entries of a tensor in the form of the dense weight."""
        raise NotImplementedError

    def put(self, dense: Tensor) -> None:
        """Write the own weights into a tensor in the form of the dense weight."""
        raise NotImplementedError

    @torch.no_grad()
    def dense(self) -> nn.Module:
        """Return the plain convolution that computes the same."""
        like = next(self.parameters())
        with seeded(0):  # the weights are overwritten, but drawing them must not move the global generator
            made = self.frame.conv().to(device=like.device, dtype=like.dtype)
        conv = _inner(made)
        conv.weight.zero_()
        self.put(conv.weight)
        bias = next((p for name, p in self.named_parameters() if name.endswith("bias")), None)
        if conv.bias is not None and bias is not None:
            conv.bias.copy_(bias)
        return made.train(self.training)


class PartsConv(ColumnConv):
    """The sum of convolutions, each of some input channels at the positions of a rectangle of the kernel."""

    def __init__(self, frame: Frame, parts: Sequence[tuple[Sequence[int], Rect]]) -> None:
        super().__init__(frame)
        self.rects = [rect for _, rect in parts]
        self.whole = [len(at) == frame.in_channels for at, _ in parts]
        self.convs = nn.ModuleList()
        for i, (at, rect) in enumerate(parts):
            self.convs.append(frame.inside(rect, channels=len(at), bias=frame.bias and i == 0).conv())
            self.register_buffer(f"channels{i}", torch.tensor(at), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, O, H', W')."""
        total: Tensor | None = None
        for i, conv in enumerate(self.convs):
            part = conv(x if self.whole[i] else pick(x, self.get_buffer(f"channels{i}")))
            total = part if total is None else total + part
        assert total is not None
        return total

    def take(self, dense: Tensor) -> dict[str, Tensor]:
        """Return the entries of each part's weight."""
        return {
            f"convs.{i}.{'1.' if isinstance(conv, nn.Sequential) else ''}weight": cut(
                dense[:, self.get_buffer(f"channels{i}")], self.rects[i]
            )
            for i, conv in enumerate(self.convs)
        }

    def put(self, dense: Tensor) -> None:
        """Write each part's weight where it lies."""
        for i, (rect, conv) in enumerate(zip(self.rects, self.convs, strict=True)):
            part = cut(dense, rect)
            part[:, self.get_buffer(f"channels{i}")] = _inner(conv).weight


class UnfoldConv(ColumnConv):
    """The surviving columns of the unfolded input, laid side by side, times a matrix (a 1x1 convolution).

    columns: numbers c * kh * kw + m * kw + k, in any order; they are laid out by position.
    """

    def __init__(self, frame: Frame, columns: Sequence[int]) -> None:
        super().__init__(frame)
        kernel = frame.kernel
        each = kernel[0] * kernel[1]
        self.positions = sorted({column % each for column in columns})
        order = sorted(columns, key=lambda column: (column % each, column))
        self.register_buffer("columns", torch.tensor(order), persistent=False)
        for position in self.positions:
            own = [column // each for column in order if column % each == position]
            self.register_buffer(f"channels{position}", torch.tensor(own), persistent=False)
        self.product = nn.Conv2d(len(order), frame.out_channels, 1, bias=frame.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, O, H', W')."""
        high, wide = self.frame.output(x.shape[2], x.shape[3])
        x = F.pad(x, self.frame.pads) if any(self.frame.pads) else x
        (down, across), (sy, sx) = self.frame.dilation, self.frame.stride
        pieces = []
        for position in self.positions:
            at = self.get_buffer(f"channels{position}")
            y, z = position // self.frame.kernel[1] * down, position % self.frame.kernel[1] * across
            own = x if len(at) == x.shape[1] else pick(x, at)
            pieces.append(own[:, :, y : y + (high - 1) * sy + 1 : sy, z : z + (wide - 1) * sx + 1 : sx])
        result: Tensor = self.product(torch.cat(pieces, 1))
        return result

    def take(self, dense: Tensor) -> dict[str, Tensor]:
        """Return the entries of the matrix, (O, columns, 1, 1)."""
        matrix = dense.reshape(len(dense), -1)[:, self.get_buffer("columns")]
        return {"product.weight": matrix[:, :, None, None]}

    def put(self, dense: Tensor) -> None:
        """Write the matrix where its columns lie."""
        matrix = dense.new_zeros(len(dense), dense[0].numel())
        matrix[:, self.get_buffer("columns")] = self.product.weight[:, :, 0, 0]
        dense.copy_(matrix.view(dense.shape))


def pick(x: Tensor, at: Tensor) -> Tensor:
    """Return the channels ``at`` of x (N, C, H, W) in its memory format; with gradients where they are wanted."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return gather.take(x, 1, at)
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return x.permute(0, 2, 3, 1).index_select(3, at).permute(0, 3, 1, 2)
    return x.index_select(1, at)


def parts_conv(frame: Mapping[str, Any], parts: Sequence[Sequence[Sequence[int]]]) -> nn.Module:
    """Return a `PartsConv` from plain values."""
    return PartsConv(Frame.read(frame), [(at, cast(Rect, tuple(rect))) for at, rect in parts])


def unfold_conv(frame: Mapping[str, Any], columns: Sequence[int]) -> nn.Module:
    """Return an `UnfoldConv` from plain values."""
    return UnfoldConv(Frame.read(frame), columns)


builders.register("cropped_conv", cropped_conv)
builders.register("parts_conv", parts_conv)
builders.register("unfold_conv", unfold_conv)
