"""The halving search of AOFP for one layer, without tensors: what to ablate next, what to mask, and when.

A half is a number of steps in which random halves of the search space S are ablated. After it the g = floor(|S| / 2)
filters whose ablation did least are masked if even the g-th of them did little enough; else they are the next S.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten import keyed
from hasten.surgery.labels import Array

Outcome = Literal["none", "void", "move", "halve", "restart"]
"""What a step ended with: no half is over; a half without a score, which is run again; and the three of the paper."""

Flags = NDArray[np.bool_]
Numbers = NDArray[np.float64]
_ARRAYS = ("alive", "space", "total", "count", "damage")


class Search:
    """The search in a layer of ``width`` filters that always keeps ``round_to`` of them (or all it has, if fewer).

    Filters have the numbers of now; `keep` follows when surgery takes some out. ``alive``: the base mask. ``space``: S.
    ``total``, ``count``: T and N of the half. ``damage``: the average by which a masked filter was chosen. ``steps``:
    done in this half. ``restarts``: searches in a row that ended without a move.
    """

    def __init__(self, width: int, round_to: int = 1) -> None:
        self.round_to = round_to
        self.alive: Flags = np.ones(width, np.bool_)
        self.space: Flags = np.zeros(width, np.bool_)
        self.total: Numbers = np.zeros(width)
        self.count: Array = np.zeros(width, np.int64)
        self.damage: Numbers = np.zeros(width)
        self.steps = self.restarts = 0
        self.started = False

    # -- where it stands
    @property
    def over(self) -> bool:
        """Whether nothing more can be gained: one filter is left, or as few as rounding keeps anyway."""
        return int(self.alive.sum()) <= max(1, self.round_to)

    @property
    def searching(self) -> bool:
        """Whether it has begun and is not over."""
        return self.started and not self.over

    @property
    def granularity(self) -> int:
        """g: how many filters are ablated at once."""
        return int(self.space.sum()) // 2

    @property
    def kept(self) -> int:
        """How many filters surgery would leave: those alive, rounded up as far as there are filters."""
        return min(len(self.alive), math.ceil(int(self.alive.sum()) / self.round_to) * self.round_to)

    # -- a half
    def start(self) -> None:
        """Begin with all alive filters as S."""
        self.started = True
        self._narrow(np.flatnonzero(self.alive))

    def draw(self, *key: keyed.Key) -> Array:
        """Return g filters of S to ablate, ascending: a pure function of S and ``key``."""
        members = np.flatnonzero(self.space)
        return np.sort(members[keyed.permutation(len(members), *key)[: self.granularity]])

    def add(self, ablated: Array, t: float) -> None:
        """Note that ablating these filters changed the next layer's output by ``t``."""
        self.total[ablated] += t
        self.count[ablated] += 1

    def averages(self) -> Numbers:
        """Return the average t of each filter; infinity for those outside S and those never ablated in this half."""
        found = np.full(len(self.alive), np.inf)
        known = self.space & (self.count > 0)
        found[known] = self.total[known] / self.count[known]
        return found

    def step(self, h: int, theta: float) -> Outcome:
        """Count one step; after ``h`` of them decide. Nothing happens before the start and after the end."""
        if not self.searching:
            return "none"
        self.steps += 1
        return "none" if self.steps < h else self._decide(theta)

    def _decide(self, theta: float) -> Outcome:
        if not self.count.any():
            self.steps = 0
            return "void"
        g, average = self.granularity, self.averages()
        least = np.argsort(average, kind="stable")[:g]
        if average[least[-1]] < theta:
            self.alive[least] = False
            self.damage[least] = average[least]
            self.restarts = 0
            self._narrow(np.flatnonzero(self.alive))
            return "move"
        if g > 1:
            self._narrow(least)
            return "halve"
        self.restarts += 1
        self._narrow(np.flatnonzero(self.alive))
        return "restart"

    def _narrow(self, members: Array) -> None:
        self.space = np.zeros(len(self.alive), np.bool_)
        self.space[members] = True
        self.total = np.zeros(len(self.alive))
        self.count = np.zeros(len(self.alive), np.int64)
        self.steps = 0

    # -- surgery
    def to_go(self) -> Array:
        """Return the masked filters that surgery takes out, ascending: as many as rounding lets go.

        Those that did least damage stay, since they are the ones that `put_back` moves back.
        """
        masked = np.flatnonzero(~self.alive)
        order = np.argsort(-self.damage[masked], kind="stable")
        return np.sort(masked[order[: len(self.alive) - self.kept]])

    def keep(self, index: Array) -> None:
        """Follow a surgery: position i holds what was at ``index[i]``."""
        for name in _ARRAYS:
            setattr(self, name, getattr(self, name)[index])

    def put_back(self) -> int:
        """Unmask every filter; return how many that were."""
        masked = int((~self.alive).sum())
        self.alive = np.ones(len(self.alive), np.bool_)
        self.damage = np.zeros(len(self.alive))
        return masked

    # -- state
    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors and numbers."""
        arrays = {name: torch.from_numpy(getattr(self, name).copy()) for name in _ARRAYS}
        return {**arrays, "steps": self.steps, "restarts": self.restarts, "started": self.started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        for name in _ARRAYS:
            kept: Tensor = state[name]
            setattr(self, name, kept.cpu().numpy().copy())
        self.steps, self.restarts = int(state["steps"]), int(state["restarts"])
        self.started = bool(state["started"])
