"""Scores of samples by a forward pass that leaves no trace: no gradient, no statistics, no random draw."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.diagnose import layer_shapes
from hasten.errors import UnsupportedError
from hasten.loss import Loss
from hasten.session import Session

SCALES = (0.125, 1.0)
"""The least and greatest factor by which images may be resized for scoring."""


def shrink(images: Tensor, scale: float) -> Tensor:
    """Return ``images`` (N, C, H, W) resized by ``scale`` <= 1, each pixel the mean of those it covers."""
    if scale == 1.0:
        return images
    factor = 1.0 / scale
    if abs(factor - round(factor)) < 1e-6:
        return F.avg_pool2d(images, round(factor))
    return F.interpolate(images, scale_factor=scale, mode="area")


def bad_scale(name: str, scale: float) -> list[str]:
    """Return the sentence that says that ``scale`` is out of range, if it is."""
    low, high = SCALES
    return [] if low <= scale <= high else [f"{name} must lie in [{low}, {high}], not {scale}."]


def per_example(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each sample (N,), float32. Raises UnsupportedError for a loss of another shape."""
    each = loss(outputs.float(), targets, reduction="none")
    if each.shape != outputs.shape[:1]:
        raise UnsupportedError(
            f'the loss with reduction="none" returned shape {tuple(each.shape)} for {len(outputs)} samples; '
            f"choosing samples needs one number for each: average the rest inside the loss."
        )
    return each


def logit_gradient_norms(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return || d loss_i / d outputs_i ||_2 of each sample, (N,) float32.

    For softmax cross-entropy this is || softmax(z_i) - y_i ||_2 with y_i the one-hot, soft or smoothed target
    (Katharopoulos and Fleuret 2018, eq. 20: up to a constant a bound on the norm of the sample's whole
    gradient).
    """
    with torch.enable_grad():
        logits = outputs.detach().float().requires_grad_()
        (grad,) = torch.autograd.grad(per_example(loss, logits, targets).sum(), logits)
    norms: Tensor = grad.flatten(1).norm(dim=1)
    return norms


def scored(session: Session, images: Tensor, scale: float = 1.0) -> Tensor:
    """Return the outputs for ``images``, float32: eval mode, no gradients, the precision of training.

    Under DistributedDataParallel the plain module runs, because ranks may score at different steps.
    """
    with session.inference() as forward:
        model = forward if session.wrapper is session.model else session.model
        return model(shrink(images, scale)).float()


def check_scale(session: Session, name: str, scale: float) -> None:
    """Raise UnsupportedError if the model cannot run on images resized by ``scale``."""
    if scale == 1.0:
        return
    images = session.sample[0]
    try:
        layer_shapes(session.model, shrink(images, scale))
    except RuntimeError as error:
        raise UnsupportedError(
            f"{name}={scale}: this model does not run on its {images.shape[2]}x{images.shape[3]} images "
            f"resized by that factor ({str(error).splitlines()[0]}); use {name}=1.0, or a model that ends in "
            f"global pooling."
        ) from error


def refuse_ranks(session: Session, name: str) -> None:
    """Raise UnsupportedError under DistributedDataParallel: ranks with different counts would wait."""
    if session.wrapper is not session.model:
        raise UnsupportedError(
            f"{name} does not run under DistributedDataParallel: each rank would keep another number of "
            f"samples, and one that skips an update would leave the others waiting. Train in one process, or "
            f"leave it out."
        )
