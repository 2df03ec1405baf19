"""What the averaging helpers share: which tensors of a model are averaged, under which names."""

from __future__ import annotations

from torch import Tensor, nn

from hasten.errors import CheckpointError


def float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's floating-point parameters and buffers by state_dict name (running statistics
    included)."""
    return {key: value for key, value in model.state_dict().items() if value.is_floating_point()}


def wide_copies(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of `float_tensors`, those of 16 bits in float32: an average moves by less than their steps."""
    return {
        key: value.float() if value.element_size() == 2 else value.clone()
        for key, value in float_tensors(model).items()
    }


def check_names(kind: str, held: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Raise CheckpointError, listing everything that differs, unless names and shapes are the same."""
    problems = [f"{key} is missing" for key in held if key not in given]
    problems += [f"{key} is unknown" for key in given if key not in held]
    problems += [
        f"{key} has shape {tuple(given[key].shape)}, must be {tuple(held[key].shape)}"
        for key in held
        if key in given and given[key].shape != held[key].shape
    ]
    if problems:
        raise CheckpointError(f"{kind} does not fit this model: " + "; ".join(problems[:10]))
