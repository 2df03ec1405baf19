"""Labels for channels: who makes each one, and which of them are one and the same."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.int64]


class Layout(NamedTuple):
    """The channels along one axis of a tensor: ``labels[i]`` names what lies at position i."""

    labels: Array
    axis: int


class Labels:
    """Labels in the order they were made, joined into classes; a class is what must come and go together."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self.maker: list[str] = []
        self._reasons: dict[int, str] = {}

    def fresh(self, count: int, maker: str, protect: str | None = None) -> Array:
        """Return ``count`` new labels made by the module or node ``maker``; protected if a reason is given."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        self.maker.extend([maker] * count)
        made = np.arange(start, start + count, dtype=np.int64)
        if protect is not None:
            self.protect(made, protect)
        return made

    def find(self, label: int) -> int:
        """Return the class of ``label``: its smallest member."""
        parent = self._parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    def join(self, a: Array, b: Array) -> None:
        """Make the labels at equal positions of ``a`` and ``b`` one class each."""
        for one, other in zip(a.tolist(), b.tolist(), strict=True):
            low, high = sorted((self.find(one), self.find(other)))
            self._parent[high] = low

    def protect(self, labels: Array, reason: str) -> None:
        """Say why these channels must stay. The first reason given is kept."""
        for label in labels.tolist():
            self._reasons.setdefault(label, reason)

    def classes(self) -> Array:
        """Return the class of every label."""
        return np.fromiter((self.find(i) for i in range(len(self._parent))), np.int64, len(self._parent))

    def protected(self) -> dict[int, str]:
        """Return the classes that must stay, with the reason."""
        found: dict[int, str] = {}
        for label, reason in self._reasons.items():
            found.setdefault(self.find(label), reason)
        return found
