"""The global generators of PyTorch, NumPy and Python, keyed and kept apart from the rest of the program.

Transforms of others draw from these. hasten lends them generators of its own and puts back what was there.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from hasten import keyed

State = tuple[Any, Any, Any]


def seed_globals(*key: keyed.Key) -> None:
    """Seed the three global generators by ``key``."""
    value = keyed.key64(*key)
    torch.default_generator.manual_seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002  # The transforms of others use this generator.
    random.seed(value)


def globals_state() -> State:
    """Return the states of the three global generators."""
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002


def set_globals(state: State) -> None:
    """Put states that ``globals_state`` returned back."""
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    random.setstate(state[2])


class Lent:
    """Global generators that begin at ``key`` and go on from one ``with lent:`` to the next.

    Outside of it the rest of the program finds its own states untouched.
    """

    def __init__(self, *key: keyed.Key) -> None:
        outside = globals_state()
        seed_globals(*key)
        self._state = globals_state()
        set_globals(outside)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Lend the generators for the body."""
        outside = globals_state()
        set_globals(self._state)
        try:
            yield
        finally:
            self._state = globals_state()
            set_globals(outside)
