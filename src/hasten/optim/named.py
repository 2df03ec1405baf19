"""Optimizer state by parameter name, so that a change of order or number of parameters cannot shift it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from hasten.errors import CheckpointError


def _names(optimizer: Optimizer, model: nn.Module) -> list[list[str]]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [[by_id[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def named_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return ``{"slots": {parameter: {slot: value}}, "groups": [{setting: value, "params": [name]}]}``."""
    plain, names = optimizer.state_dict(), _names(optimizer, model)
    flat = {number: name for group, known in zip(plain["param_groups"], names, strict=True)
            for number, name in zip(group["params"], known, strict=True)}  # fmt: skip
    return {
        "slots": {flat[number]: slots for number, slots in plain["state"].items()},
        "groups": [
            {**group, "params": known} for group, known in zip(plain["param_groups"], names, strict=True)
        ],
    }


def load_named_state(optimizer: Optimizer, model: nn.Module, saved: dict[str, Any]) -> None:
    """Give ``optimizer`` the state that ``named_state`` returned. Raises CheckpointError if the parameters differ."""
    names = _names(optimizer, model)
    theirs = [group["params"] for group in saved["groups"]]
    if [sorted(group) for group in names] != [sorted(group) for group in theirs]:
        ours, others = {n for g in names for n in g}, {n for g in theirs for n in g}
        raise CheckpointError(
            f"the saved optimizer has other parameters or groups: only saved {sorted(others - ours)}, only here "
            f"{sorted(ours - others)}; build model, methods and optimizer as they were when it was saved."
        )
    current = optimizer.state_dict()
    number = {name: n for group, known in zip(current["param_groups"], names, strict=True)
              for n, name in zip(group["params"], known, strict=True)}  # fmt: skip
    groups = [
        {**theirs, "params": ours["params"]}
        for theirs, ours in zip(saved["groups"], current["param_groups"], strict=True)
    ]
    optimizer.load_state_dict(
        {"state": {number[n]: s for n, s in saved["slots"].items()}, "param_groups": groups}
    )
