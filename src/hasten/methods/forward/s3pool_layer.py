"""The arithmetic of S3Pool and its layer: random rows and columns of the max-filtered map, kept in order."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten import keyed
from hasten.errors import UnsupportedError


def valid_grids(height: int, width: int, p: int) -> list[int]:
    """Return the grid sizes g allowed on a map: multiples of ``p`` that divide both sides."""
    both = math.gcd(height, width)
    return [g for g in range(p, both + 1, p) if both % g == 0]


def grid_for(grid: int | float, height: int, width: int, p: int) -> int:
    """Return g in pixels for a map. Raises UnsupportedError, with the valid grids, if there is none."""
    valid = valid_grids(height, width, p)
    known = f"valid for p={p}: {', '.join(map(str, valid)) or 'none'}"
    if isinstance(grid, float):
        fitting = [g for g in valid if g <= grid * min(height, width)] or valid[:1]
        if not fitting:
            raise UnsupportedError(f"no grid divides a map of {height}x{width}; {known}")
        return fitting[-1]
    if grid not in valid:
        raise UnsupportedError(f"grid {grid} does not divide a map of {height}x{width}; {known}")
    return grid


def draw(
    size: int,
    p: int,
    g: int,
    generator: torch.Generator,
    *,
    author_compat: bool = False,
    samples: int | None = None,
) -> Tensor:
    """Return the rows (or columns) kept of a side of ``size``: g/p of each block of g, in order.

    They are int64, (size/p,), or (samples, size/p) with a draw for each sample. ``author_compat`` draws for a
    max filter without padding, whose last block has p - 1 rows fewer.
    """
    scores = torch.rand(samples or 1, size // g, g, generator=generator, device=generator.device)
    if author_compat:
        scores[:, -1, g - p + 1 :] = 2.0  # beyond every draw: never among the smallest
    kept = scores.argsort(dim=2)[:, :, : g // p].sort(dim=2).values
    kept = (kept + torch.arange(0, size, g, device=kept.device)[:, None]).flatten(1)
    return kept if samples is not None else kept[0]


def max_filter(x: Tensor, p: int, *, author_compat: bool = False) -> Tensor:
    """Return the max of each p x p window of ``x`` (N, C, H, W) at stride 1.

    Windows that reach over the right or lower border see -inf there, so that the size stays (the paper's
    padding); ``author_compat`` leaves them out: (N, C, H-p+1, W-p+1), as in the authors' code.
    """
    return F.max_pool2d(x if author_compat else F.pad(x, (0, p - 1, 0, p - 1), value=-math.inf), p, stride=1)


def sampled_max(x: Tensor, rows: Tensor, cols: Tensor, p: int) -> Tensor:
    """Return the max filter of ``x`` (N, C, H, W) at ``rows`` x ``cols`` only.

    Equal to ``max_filter(x, p)[:, :, rows][..., cols]`` bit for bit, without its map of p*p times the size:
    the windows that are kept are gathered side by side, then pooled. ``rows`` and ``cols`` may be (N, ...).
    """
    height, width = x.shape[2:]
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    window = torch.arange(p, device=x.device)
    # a window over the border sees the last row once more, which changes no maximum
    rows = (rows[..., None] + window).clamp(max=height - 1).flatten(-2)
    cols = (cols[..., None] + window).clamp(max=width - 1).flatten(-2)
    if rows.dim() == 2:
        n = torch.arange(len(x), device=x.device)[:, None, None]
        x = x.permute(0, 2, 3, 1)[n, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
    elif nhwc:
        pixels = (rows[:, None] * width + cols).flatten()
        x = x.permute(0, 2, 3, 1).flatten(1, 2).index_select(1, pixels)
        x = x.view(len(x), len(rows), len(cols), -1).permute(0, 3, 1, 2)
    else:
        x = x.index_select(2, rows).index_select(3, cols)
    return F.max_pool2d(x, p)


def plain_modules(p: int, *, author_compat: bool = False) -> list[nn.Module]:
    """Return PyTorch's modules that compute the evaluation rule: p x p averages of the max filter."""
    if author_compat:
        return [nn.MaxPool2d(p, 1), nn.AvgPool2d(p, p, padding=p // 2, count_include_pad=False)]
    return [nn.ConstantPad2d((0, p - 1, 0, p - 1), -math.inf), nn.MaxPool2d(p, 1), nn.AvgPool2d(p)]


def average(x: Tensor, p: int, *, author_compat: bool = False) -> Tensor:
    """Return the evaluation rule, (N, C, H/p, W/p): what ``plain_modules`` compute."""
    z = max_filter(x, p, author_compat=author_compat)
    return F.avg_pool2d(z, p, padding=p // 2 if author_compat else 0, count_include_pad=False)


class S3Pool2d(nn.Module):
    """S3Pool of window and factor ``p`` over a map: (N, C, H, W) -> (N, C, H/p, W/p).

    grid: g in pixels, or as a share of the map's smaller side (rounded down to a valid one). The rows and
    columns are a function of (key, ``count()``), drawn by ``redraw`` before the forward pass, or in it if the
    map's size is new; so the forward pass draws nothing and can be compiled. In evaluation nothing is random.
    """

    rows: Tensor
    cols: Tensor
    passes: Tensor

    passes_channels = True  # for surgery: channel i in is channel i out

    def __init__(
        self,
        p: int,
        grid: int | float,
        *,
        author_compat: bool = False,
        per_sample: bool = False,
        key: tuple[int | str, ...] = ("s3pool",),
        count: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__()
        self.p, self.grid, self.author_compat, self.per_sample = p, grid, author_compat, per_sample
        self.key, self.count = key, count
        self.size: tuple[int, ...] = ()
        for name in ("rows", "cols"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64), persistent=False)

    def redraw(self) -> None:
        """Draw rows and columns for the present count. Raises UnsupportedError if the grid does not fit."""
        n, height, width = self.size
        g = grid_for(self.grid, height, width, self.p)
        generator = keyed.generator(*self.key, self.count(), device=self.rows.device)
        samples = n if self.per_sample else None
        for name, side in (("rows", height), ("cols", width)):
            new = draw(side, self.p, g, generator, author_compat=self.author_compat, samples=samples)
            old: Tensor = getattr(self, name)
            if old.shape == new.shape:
                old.copy_(new)  # in place: a compiled forward pass expects the same tensor
            else:
                setattr(self, name, new)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H/p, W/p)."""
        if not self.training or x.is_meta:  # without data there is nothing to draw for
            return average(x, self.p, author_compat=self.author_compat)
        size = (x.shape[0] if self.per_sample else 1, x.shape[2], x.shape[3])
        if size != self.size or self.rows.numel() == 0:
            self.size = size
            self.redraw()
        self.passes.add_(1)
        return sampled_max(x, self.rows, self.cols, self.p)

    def extra_repr(self) -> str:
        """Show the window, the grid and the options."""
        return (
            f"p={self.p}, grid={self.grid}, author_compat={self.author_compat}, per_sample={self.per_sample}"
        )
