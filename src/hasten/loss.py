"""Losses: what hasten needs of one, and how it gets at the loss of each sample."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[..., Tensor]


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """Return cross-entropy with label smoothing, ``loss(outputs (N, K), targets, reduction=...)``."""
    return partial(F.cross_entropy, label_smoothing=label_smoothing) if label_smoothing else F.cross_entropy


def has_reduction(loss: Loss) -> bool:
    """Return whether ``loss`` takes ``reduction=``, and can so give the loss of each sample."""
    try:
        return "reduction" in inspect.signature(loss).parameters
    except (TypeError, ValueError):
        return False


def without_smoothing(loss: Loss) -> Loss:
    """Return ``loss`` without label smoothing, for methods that compare loss values between samples."""
    if isinstance(loss, partial) and loss.keywords.get("label_smoothing"):
        kept: dict[str, Any] = {k: v for k, v in loss.keywords.items() if k != "label_smoothing"}
        return partial(loss.func, *loss.args, **kept)
    return loss


def weighted_mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean over the batch of ``weights * losses``, both (N,); the plain mean without weights.

    The divisor is N, not the sum of the weights: importance weights have mean 1 only in expectation, and dividing by
    their sum would bias the gradient.
    """
    return losses.mean() if weights is None else (weights * losses).mean()
