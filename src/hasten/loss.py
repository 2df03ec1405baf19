"""Losses: what hasten needs of one, how it gets at the loss of each sample, and what a loss's own mean divides by."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.errors import UnsupportedError

Loss = Callable[..., Tensor]


class ModuleLoss:
    """A loss module such as ``nn.CrossEntropyLoss(...)`` as a function that also takes ``reduction=``.

    Without it, or with "mean" for a module that was made so, the module itself is called.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, outputs: Tensor, targets: Tensor, *, reduction: str | None = None) -> Tensor:
        module = self.module
        if reduction is not None and reduction != module.reduction:
            module = copy.copy(module)  # shares weights and buffers with the one given
            module.reduction = reduction  # type: ignore[assignment]  # PyTorch declares no attribute
        result: Tensor = module(outputs, targets)
        return result


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """Return cross-entropy with label smoothing, ``loss(outputs (N, K), targets, reduction=...)``."""
    return partial(F.cross_entropy, label_smoothing=label_smoothing) if label_smoothing else F.cross_entropy


def understood(loss: Loss) -> Loss:
    """Return ``loss`` so that it can be asked for each sample's loss where that is possible.

    A module with the attribute ``reduction``, as PyTorch's losses have, is wrapped; a function stays as it is. Raises
    UnsupportedError for what cannot be called, or a class in the place of an object.
    """
    if isinstance(loss, type) or not callable(loss):
        name = getattr(loss, "__name__", repr(loss))
        raise UnsupportedError(
            f"loss: {name} is {'a class, give an object: ' + name + '()' if isinstance(loss, type) else 'no function'}."
        )
    if isinstance(loss, nn.Module) and isinstance(getattr(loss, "reduction", None), str):
        return ModuleLoss(loss)
    return loss


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
    if isinstance(loss, ModuleLoss) and getattr(loss.module, "label_smoothing", None):
        plain = copy.copy(loss.module)
        plain.label_smoothing = 0.0  # type: ignore[assignment]
        return ModuleLoss(plain)
    return loss


def weighted_mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean over the batch of ``weights * losses``, both (N,); the plain mean without weights.

    The divisor is N, not the sum of the weights: importance weights have mean 1 only in expectation, and dividing by
    their sum would bias the gradient.
    """
    return losses.mean() if weights is None else (weights * losses).mean()


def divisor(loss: Loss, outputs: Tensor, targets: Tensor) -> float:
    """Return what the mean of ``loss`` over ``targets`` divides the sum of the samples' losses by.

    That is N for most losses; the sum of the samples' class weights for cross-entropy with ``weight``; the number of
    samples that count where others are ignored; 1 for a sum. It does not depend on the outputs, of which only the shape
    (anything, K), type and device are used. 0.0 where no sample counts. A loss without ``reduction=`` counts as a mean.
    """
    count = len(targets)
    if not has_reduction(loss):
        return float(count)
    # any outputs do for which no sample that counts has the loss 0; these are fit for logits and for probabilities
    level = torch.full((count, *outputs.shape[1:]), 0.5, dtype=torch.float32, device=outputs.device)
    with torch.no_grad(), torch.autocast(outputs.device.type, enabled=False):
        whole = float(loss(level, targets, reduction="none").sum())
        mean = float(loss(level, targets))
    if mean != mean or whole == 0:  # 0 / 0: nothing counts
        return 0.0
    found = whole / mean
    return float(round(found)) if abs(found - round(found)) <= 1e-4 else found
