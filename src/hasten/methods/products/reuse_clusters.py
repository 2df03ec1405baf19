"""Cluster reuse across batches (CR): the rows of products that clusters of earlier batches left, by hash, with their age."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hasten.kernels.reference.deep_reuse import Clusters


class RowMemory:
    """Rows of products (taps, O) of one layer, by (block, hash).

    A stored row is stale, for the weights have moved since: rows older than ``max_age`` steps are dropped (our choice:
    20). Rows of zero clusters are zero and are not stored.
    """

    def __init__(self, max_age: int) -> None:
        self.max_age = max_age
        self.found = self.asked = 0
        self.clear()

    def clear(self, device: torch.device | str = "cpu") -> None:
        """Forget every row."""
        self.keys = torch.empty(0, dtype=torch.int64, device=device)
        self.steps = torch.empty(0, dtype=torch.int64, device=device)
        self.rows = torch.empty(0, device=device)

    def products(self, clusters: Clusters, w: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return (z (rows of all blocks, taps, O), first (blocks + 1,)): stored rows where known, computed ones elsewhere.

        w (O, C, kh, kw). What is computed is stored with ``step``.
        """
        o, _, kh, kw = w.shape
        length, used = clusters.means.shape[-1], clusters.rows.tolist()
        first = torch.tensor([0, *used]).cumsum(0)
        device = clusters.keys.device
        keep = step - self.steps <= self.max_age
        if (
            self.keys.device != device
            or self.rows.shape[1:] != (kh * kw, o)
            or self.rows.dtype != clusters.means.dtype
        ):
            self.clear(device)
        elif not bool(keep.all()):
            self.keys, self.steps, self.rows = self.keys[keep], self.steps[keep], self.rows[keep]
        z = clusters.means.new_empty(int(first[-1]), kh * kw, o)
        keys, new = [], []
        for block, n in enumerate(used):
            zero = clusters.starts[block, :-1].long()
            here = z[int(first[block]) : int(first[block]) + n]
            key = (block << 32) | (clusters.keys[block, :n].long() & 0xFFFFFFFF)
            at = torch.searchsorted(self.keys, key)
            known = torch.zeros(n, dtype=torch.bool, device=device)
            if len(self.keys):
                known = self.keys[at.clamp(max=len(self.keys) - 1)] == key
            known[zero] = False
            self.found += int(known.sum())
            self.asked += n - len(zero)
            here[known] = self.rows[at[known]] if len(self.keys) else here[known]
            missing = (~known).nonzero().flatten()
            kernel = w[:, block * length : (block + 1) * length].to(z.dtype).flatten(2).permute(1, 2, 0)
            means = clusters.means[block, :n].index_select(0, missing)
            computed = (means @ kernel.reshape(length, -1)).view(-1, kh * kw, o)
            here[missing] = computed
            fresh = torch.ones(len(missing), dtype=torch.bool, device=device)
            fresh[torch.isin(missing, zero)] = False
            keys.append(key[missing][fresh])
            new.append(computed[fresh])
        added = torch.cat(keys)
        everything = torch.cat([self.keys, added])
        order = everything.argsort()
        self.keys = everything[order]
        self.steps = torch.cat([self.steps, torch.full_like(added, step)])[order]
        self.rows = torch.cat([self.rows.to(z.dtype).view(-1, kh * kw, o), *new])[order]
        return z, first

    def state(self) -> dict[str, Any]:
        """Return the rows and the counts."""
        counts = {"found": self.found, "asked": self.asked}
        return {"keys": self.keys, "steps": self.steps, "rows": self.rows, **counts}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.keys, self.steps, self.rows = state["keys"], state["steps"], state["rows"]
        self.found, self.asked = state["found"], state["asked"]
