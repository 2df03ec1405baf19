"""Patch whitening: filters that turn the first layer's responses into uncorrelated unit-variance channels."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.errors import DataError


def whitening_filters(images: Tensor, kernel: int = 2, eps: float = 5e-4) -> Tensor:
    """Return whitening filters, shape (2 * C * kernel**2, C, kernel, kernel), float32, on the images' device.

    ``images`` (N, C, H, W) are *normalised* floating-point training images; the recipe uses the first 5000.
    With second moment E[p p'] = V diag(lam) V' of all kernel x kernel patches, filter i is V[:, i] /
    sqrt(lam[i] + eps), largest eigenvalue first; the second half is the negative of the first, so that a
    one-sided activation loses nothing. The sign of each filter is fixed (its largest entry is positive),
    which keeps the result the same across LAPACK versions. Source: training_recipes.md 3.1 (airbench94); the
    sign rule is our choice.

    Raises DataError when images are constant, not finite, or give fewer than ten patches for each dimension.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise DataError(
            f"whitening needs normalised float images of shape (N, C, H, W), got {images.dtype} "
            f"{tuple(images.shape)}: normalise them first"
        )
    n, channels, height, width = images.shape
    dims = channels * kernel * kernel
    count = n * max(height - kernel + 1, 0) * max(width - kernel + 1, 0)
    if count < 10 * dims:
        raise DataError(
            f"whitening of {dims} dimensions needs >= {10 * dims} patches, got {count}: give more images"
        )
    second = torch.zeros(dims, dims, dtype=torch.float64, device=images.device)
    for start in range(0, n, 512):
        # (n, C, H', W', kh, kw) -> rows in the order of a flattened filter: C, kh, kw
        patches = (
            images[start : start + 512]
            .float()
            .unfold(2, kernel, 1)
            .unfold(3, kernel, 1)
            .permute(0, 2, 3, 1, 4, 5)
        )
        flat = patches.reshape(-1, dims).double()
        second += flat.T @ flat
    second /= count
    if not bool(torch.isfinite(second).all()):
        raise DataError("whitening: the images contain NaN or infinite values")
    if bool((images == images[0, 0, 0, 0]).all()):
        raise DataError("whitening: all pixels have the same value, there is nothing to whiten")
    eigenvalues, vectors = torch.linalg.eigh(second)
    eigenvalues, vectors = eigenvalues.flip(0).clamp(min=0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
    filters = (vectors / torch.sqrt(eigenvalues + eps)).T.reshape(dims, channels, kernel, kernel).float()
    return torch.cat((filters, -filters))
