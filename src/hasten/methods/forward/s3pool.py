"""S3Pool: pooling with stochastic spatial sampling, for better accuracy from fewer labelled images.

Max pooling is a max filter of stride 1, then a regular choice of rows and columns. S3Pool chooses them at
random in each block of a grid (Zhai et al. 2017). It saves no time in a step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.contract import Effect, Method, MethodSpec
from hasten.diagnose import look
from hasten.errors import SettingsError, UnsupportedError
from hasten.methods.forward.s3pool_layer import S3Pool2d, grid_for, plain_modules, valid_grids
from hasten.surgery import replace_module

if TYPE_CHECKING:
    from hasten.session import Session


@dataclass(kw_only=True, eq=False)
class S3Pool(Method):
    """Replace max pooling by S3Pool.

    grid (g): the side of the blocks in which rows and columns are drawn: one number of pixels for all maps, a
    tuple with one for each replaced layer in the model's order, or a share of each map's side, of which the
    largest valid grid is taken (default 0.5, from the authors' code: 16 on 32x32, 8 on 16x16). The window p
    is the layer's own.
    strided_convs: also replace the strides of convolutions: S3Pool first, then the block at stride 1, as in
    the authors' residual network (our choice: off, because it changes the network).
    author_compat: a max filter without padding, as in the authors' code (our choice: the paper's padding).
    per_sample: a draw for each image instead of one for the batch (our choice: off, as published).
    """

    grid: int | float | tuple[int, ...] = 0.5
    strided_convs: bool = False
    author_compat: bool = False
    per_sample: bool = False

    spec: ClassVar[MethodSpec] = MethodSpec(
        name="s3pool",
        title="S3Pool",
        paper="Zhai et al., S3Pool: Pooling with Stochastic Spatial Sampling, CVPR 2017, arXiv 1611.05138",
        saves="data",
        acts="keeps random rows and columns of the max-filtered map where max pooling keeps every p-th",
        writes=frozenset({"pooling"}),
        layers=("MaxPool2d", "Conv2d"),
        slower_when="always, by the gathering of windows; it is for accuracy from fewer data",
    )

    def problems(self) -> list[str]:
        """Return every setting that is out of range."""
        grid, found = self.grid, []
        if isinstance(grid, bool) or not isinstance(grid, int | float | tuple | list):
            found.append(
                f"grid is {grid!r}; allowed: a whole number, a share up to 1.0, or a tuple of numbers."
            )
        elif isinstance(grid, float) and not 0 < grid <= 1:
            found.append(f"grid is {grid}; allowed as a share of the map: above 0, up to 1.0.")
        elif not isinstance(grid, float):
            given = [grid] if isinstance(grid, int) else list(grid)
            if not given or any(isinstance(g, bool) or not isinstance(g, int) or g < 2 for g in given):
                found.append(f"grid is {grid}; allowed in pixels: whole numbers from 2.")
        found += [
            f"{name} is {value!r}; allowed: True or False."
            for name, value in self.settings().items()
            if name != "grid" and not isinstance(value, bool)
        ]
        return found

    def attach(self, session: Session) -> Effect:
        """Find the layers that can be replaced.

        Raises SettingsError, with the valid grids of every layer, if ``grid`` does not fit.
        """
        model, counters = session.model, session.counters
        effect = Effect(saves="labelled data; nothing in a step")
        shapes = _map_shapes(model, session.sample[0])
        sites = list(_poolings(model, shapes, effect))
        if self.strided_convs:
            sites += _strided(model, shapes, effect)
            order = {name: i for i, (name, _) in enumerate(model.named_modules())}
            sites.sort(key=lambda site: order[site.name])
        self.pools_: list[S3Pool2d] = []
        self.model_ = model
        for site, grid in zip(sites, self._grids(sites), strict=True):
            pool = S3Pool2d(
                site.p,
                grid,
                author_compat=self.author_compat,
                per_sample=self.per_sample,
                key=(session.seed, "s3pool", site.name),
                count=lambda: counters["updates"],
            ).to(session.sample[0].device)
            pool.size = (len(session.sample[0]) if self.per_sample else 1, *site.size)
            self.pools_.append(pool)
            height, width = site.size
            note = f"p={site.p}, g={grid_for(grid, height, width, site.p)} on {height}x{width}"
            if site.strided:
                effect.touched[site.name] = (
                    f"{note}, then {', '.join(site.strided) or 'the layer itself'} at stride 1"
                )
                session.edit(partial(_pool_before, model, site, pool))
            else:
                effect.touched[site.name] = note
                session.replace(site.name, pool)
        return effect

    def _grids(self, sites: list[_Site]) -> list[int | float]:
        grid = self.grid
        grids: list[int | float] = [grid] * len(sites) if isinstance(grid, int | float) else [*grid]
        if len(grids) != len(sites):
            names = ", ".join(f"{s.name} ({s.size[0]}x{s.size[1]})" for s in sites)
            raise SettingsError(
                f"s3pool: grid has {len(grids)} numbers for {len(sites)} layers: {names}; give one for each."
            )
        problems = []
        for site, g in zip(sites, grids, strict=True):
            try:
                grid_for(g, *site.size, site.p)
            except UnsupportedError as error:
                problems.append(f"{site.name}: {error}.")
        if problems:
            raise SettingsError("s3pool: " + " ".join(problems))
        return grids

    def context(self) -> AbstractContextManager[Any]:
        """Draw rows and columns anew before a forward pass that trains."""
        if self.model_.training:
            for pool in self.pools_:
                pool.redraw()
        return nullcontext()

    def witness(self) -> dict[str, float]:
        """Return the forward passes that layers made over random rows and columns."""
        return {"random_poolings": float(sum(int(pool.passes) for pool in self.pools_))}

    def state_dict(self) -> dict[str, Any]:
        """Return the passes of each layer; the draws themselves are keyed and need no state."""
        return {"passes": [int(pool.passes) for pool in self.pools_]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        for pool, passes in zip(self.pools_, state["passes"], strict=True):
            pool.passes.fill_(passes)

    def export(self, model: nn.Module) -> None:
        """Put the evaluation rule in the place of the layers, as PyTorch's own modules.

        A block whose stride was replaced becomes a Sequential of the pooling and the block.
        """
        for name, module in list(model.named_modules()):
            if isinstance(module, S3Pool2d) and not name.endswith(f".{BEFORE}"):
                replace_module(model, name, _evaluation(module))
        for name, module in reversed(list(model.named_modules())):
            pool = getattr(module, BEFORE, None)
            if isinstance(pool, S3Pool2d):
                getattr(module, f"{BEFORE}_hook").remove()
                delattr(module, BEFORE)
                delattr(module, f"{BEFORE}_hook")
                replace_module(model, name, _evaluation(pool).append(module))


BEFORE = "s3pool_before"


def _evaluation(pool: S3Pool2d) -> nn.Sequential:
    return nn.Sequential(*plain_modules(pool.p, author_compat=pool.author_compat))


# -- which layers
@dataclass
class _Site:
    """A place to pool: the layer or block, its window and map, and its members that lose their stride."""

    name: str
    p: int
    size: tuple[int, int]
    strided: list[str] = field(default_factory=list)


Shapes = dict[str, tuple[torch.Size, torch.Size]]


def _map_shapes(model: nn.Module, x: Tensor) -> Shapes:
    """Return (input, output) shapes of all modules, blocks included, that map one 4-D tensor to another."""
    shapes: Shapes = {}

    def see(name: str, given: tuple[Any, ...], output: Any) -> None:
        if len(given) == 1 and all(isinstance(t, Tensor) and t.dim() == 4 for t in (*given, output)):
            shapes[name] = (given[0].shape, output.shape)

    look(model, x, see)
    return shapes


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _poolings(model: nn.Module, shapes: Shapes, effect: Effect) -> Iterable[_Site]:
    for name, module in model.named_modules():
        if isinstance(module, nn.AdaptiveMaxPool2d | nn.MaxPool1d | nn.MaxPool3d | nn.FractionalMaxPool2d):
            effect.skipped[name] = f"a {type(module).__name__} has no fixed 2-D window"
        if not isinstance(module, nn.MaxPool2d):
            continue
        p, shape = _pair(module.kernel_size)[0], shapes.get(name)
        reason = None
        if shape is None:
            reason = "it did not run on the sample batch"
        elif _pair(module.kernel_size) != (p, p) or _pair(module.stride) != (p, p):
            reason = f"its window {module.kernel_size} differs from its stride {module.stride}"
        elif _pair(module.padding) != (0, 0) or _pair(module.dilation) != (1, 1):
            reason = f"it has padding {module.padding} and dilation {module.dilation}; allowed: 0 and 1"
        elif module.ceil_mode or module.return_indices:
            reason = "it uses ceil_mode or return_indices"
        elif p == 1:
            reason = "it does not thin the map out"
        elif shape[1][2:] == (1, 1):
            reason = "it pools the whole map to one pixel"
        elif not valid_grids(shape[0][2], shape[0][3], p):
            reason = f"no grid fits: {p} does not divide its map of {shape[0][2]}x{shape[0][3]}"
        if reason is not None or shape is None:
            effect.skipped[name] = str(reason)
        else:
            yield _Site(name, p, (shape[0][2], shape[0][3]))


def _strided(model: nn.Module, shapes: Shapes, effect: Effect) -> list[_Site]:
    """Return the blocks, or single convolutions, before which to pool so that their strides become 1."""
    sites: dict[str, _Site] = {}
    first = next((n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), None)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or _pair(module.stride) == (1, 1) or name not in shapes:
            continue
        p = _pair(module.stride)[0]
        block = _block(model, name, p, shapes)
        if block in sites or block in effect.skipped:
            continue
        inside, (_, _, height, width) = model.get_submodule(block), shapes[block][0]
        members = [n for n, m in inside.named_modules() if _stride_of(m) == (p, p)]
        if name == first:
            effect.skipped[name] = "it reads the images themselves; pooling there would drop pixels unseen"
        elif _pair(module.stride) != (p, p):
            effect.skipped[name] = f"its stride {module.stride} differs between rows and columns"
        elif not valid_grids(height, width, p):
            effect.skipped[block] = f"no grid fits: {p} does not divide its map of {height}x{width}"
        elif not _fits(inside, members, p, shapes[block]):
            effect.skipped[block] = "pooled, and at stride 1, it would give a map of another size"
        else:
            sites[block] = _Site(block, p, (height, width), members)
    return list(sites.values())


def _block(model: nn.Module, conv: str, p: int, shapes: Shapes) -> str:
    """Return the residual block around a strided convolution: the nearest module that is not a Sequential.

    It counts as the block if it thins its map out by ``p`` in one go; otherwise the convolution stands alone.
    """
    name = conv.rpartition(".")[0]
    while name and isinstance(model.get_submodule(name), nn.Sequential):
        name = name.rpartition(".")[0]
    if not name or name not in shapes:
        return conv
    given, output = shapes[name]
    return name if tuple(s // p for s in given[2:]) == tuple(output[2:]) else conv


def _stride_of(module: nn.Module) -> tuple[int, int]:
    stride = getattr(module, "stride", 1)
    return _pair(stride) if isinstance(stride, int | tuple) else (1, 1)


def _unstrided(block: nn.Module, members: list[str]) -> None:
    for name in members:
        module: Any = block.get_submodule(name)
        module.stride = 1 if isinstance(module.stride, int) else (1, 1)


def _fits(block: nn.Module, members: list[str], p: int, shapes: tuple[torch.Size, torch.Size]) -> bool:
    """Whether a copy of ``block`` at stride 1 maps the pooled input to the output's shape."""
    trial = copy.deepcopy(block).eval()
    _unstrided(trial, members)
    (_, channels, height, width), expected = shapes
    like = next(block.parameters())
    pooled = torch.zeros(1, channels, height // p, width // p, dtype=like.dtype, device=like.device)
    try:
        with torch.no_grad():
            output = trial(pooled)
    except RuntimeError:
        return False
    return bool(output.shape[1:] == expected[1:])


def _pool_before(model: nn.Module, site: _Site, pool: S3Pool2d) -> None:
    """Pool the input of the block and take the stride off its members; the names of parameters stay."""
    block = model.get_submodule(site.name)
    _unstrided(block, site.strided)
    pool.train(block.training)
    block.add_module(BEFORE, pool)
    hook = block.register_forward_pre_hook(lambda block, given: (getattr(block, BEFORE)(given[0]),))
    setattr(block, f"{BEFORE}_hook", hook)
