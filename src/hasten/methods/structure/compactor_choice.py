"""Which rows of compactors to mask: the smallest of all layers, until what is left costs as little as is wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from hasten.measure.macs import macs
from hasten.methods.structure.compactor import Target
from hasten.surgery import Channels
from hasten.surgery.labels import Array


@dataclass(frozen=True, eq=False)
class Work:
    """Forward MACs per image of the network without compactors, as a function of the rows gone from T targets.

    Layer l costs ``unit * (n_in - in_per_row @ gone) * (n_out - out_per_row @ gone)``; the per-row numbers are (L, T).
    Layers that no target touches cost ``fixed``.
    """

    fixed: int
    unit: Array
    n_in: Array
    n_out: Array
    in_per_row: Array
    out_per_row: Array

    def __call__(self, gone: Array) -> int:
        """Return the MACs when ``gone`` (T,) rows are gone."""
        ins, outs = self.n_in - self.in_per_row @ gone, self.n_out - self.out_per_row @ gone
        return self.fixed + int((self.unit * ins * outs).sum())

    @property
    def whole(self) -> int:
        """MACs of the whole network."""
        return self.fixed + int((self.unit * self.n_in * self.n_out).sum())

    @classmethod
    def of(cls, model: nn.Module, channels: Channels, targets: Sequence[Target], x: Tensor) -> Work:
        """Return the work of ``model``, traced in ``channels``, on images like ``x``."""
        mine = [channels.outputs(target.conv) for target in targets]
        fixed, rows = 0, []
        for name, layer in macs(model, x).layers.items():
            touched = []
            for role in ("in", "out"):
                slot = channels.slots.get((name, role))
                held = np.zeros(0, np.int64) if slot is None else channels.classes[slot.labels]
                per_row = np.array([np.isin(held, own).sum() // len(own) for own in mine], np.int64)
                touched.append((len(held) if per_row.any() else 1, per_row))
            (n_in, in_per_row), (n_out, out_per_row) = touched
            if getattr(model.get_submodule(name), "groups", 1) > 1:  # depthwise: one input for each output
                n_in, in_per_row = 1, np.zeros(len(mine), np.int64)
            if in_per_row.any() or out_per_row.any():
                rows.append((layer.output // (n_in * n_out), n_in, n_out, in_per_row, out_per_row))
            else:
                fixed += layer.output
        return cls(fixed, *(np.array(column, np.int64) for column in zip(*rows, strict=True)))


def choose(
    norms: Sequence[NDArray[Any]], masked: Sequence[NDArray[np.bool_]], lost: Array, work: Work, limit: float,
    granularity: int, num_at_least: int,
) -> list[NDArray[np.bool_]]:  # fmt: skip
    """Return which rows of each compactor to mask: from scratch, the smallest first, until the MACs are ``limit``.

    norms, masked: by compactor, of its present rows. lost (T,): rows removed before, which count as masked. While the
    MACs of what is masked now exceed ``limit``, at most ``granularity`` rows more than now are masked. A compactor
    keeps ``num_at_least`` rows. Unlike in the authors' code, rows passed over for that do not use up the budget.
    """
    now = lost + np.array([rows.sum() for rows in masked])
    budget = now.sum() + granularity if work(now) > limit else math.inf
    gone, chosen = lost.copy(), [np.zeros(len(rows), np.bool_) for rows in norms]
    places = [(t, row) for t, rows in enumerate(norms) for row in range(len(rows))]
    for place in np.argsort(np.concatenate(norms), kind="stable"):
        if work(gone) <= limit or gone.sum() >= budget:
            break
        t, row = places[place]
        if len(norms[t]) - chosen[t].sum() > num_at_least:
            chosen[t][row] = True
            gone[t] += 1
    return chosen


def fewest_rows(work: Work, widths: Array, limit: float, num_at_least: int) -> int | None:
    """Return a number of rows without which the MACs cannot fall to ``limit``; None if they cannot at all.

    A row saves most while all others are there, so no choice needs fewer rows than counting them all at that.
    """
    spare = widths - np.minimum(widths, num_at_least)
    if work(spare) > limit:
        return None
    saved = np.array([work.whole - work(one) for one in np.eye(len(widths), dtype=np.int64)])
    excess, rows = work.whole - limit, 0
    for t in np.argsort(-saved, kind="stable"):
        if excess > 0 and saved[t] > 0:
            count = min(int(spare[t]), math.ceil(excess / saved[t]))
            rows, excess = rows + count, excess - count * saved[t]
    return rows
