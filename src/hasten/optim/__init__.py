"""Optimizers, averages, parameter groups and schedules of the baselines."""

from __future__ import annotations

from hasten.optim.ema import EMA
from hasten.optim.groups import TorchRates, decay_groups, torch_rates
from hasten.optim.lookahead import Lookahead, lookahead_decay
from hasten.optim.muon import Muon, orthogonalise
from hasten.optim.schedules import schedule

__all__ = [
    "EMA",
    "Lookahead",
    "Muon",
    "TorchRates",
    "decay_groups",
    "lookahead_decay",
    "orthogonalise",
    "schedule",
    "torch_rates",
]
