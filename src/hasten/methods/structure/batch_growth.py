"""A larger batch in the memory that removed channels no longer need (PruneTrain, step 10; its rule in our form)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hasten.measure.memory import SavedActivations

if TYPE_CHECKING:
    from hasten.session import Session


def saved_bytes(session: Session, samples: int = 8) -> int:
    """Return the bytes that autograd keeps for the backward pass of one sample, measured on the session's own.

    The forward pass runs in eval mode, so that it changes no statistics; what training keeps is the same but for
    dropout and for inputs that a method stores in another form. Rounded up to whole bytes.
    """
    x = session.sample[0][:samples]
    with session.inference() as forward, torch.enable_grad(), SavedActivations(session.model) as saved:
        forward(x)
    return -(-saved.bytes // len(x))


def grown_batch(
    batch: int, memory_start: int, memory_now: int, *, limit: int | None = None, multiple: int = 8
) -> int:
    """Return the batch size that fills the memory used at the start.

    batch: the size now. memory_start, memory_now: bytes that a step needed above what is there anyway, with the first batch
    at the start and with ``batch`` now; memory grows with the batch. limit: the largest size wanted. The size is a
    multiple of ``multiple``, at most doubles, and never falls. Learning rates are to be multiplied by its growth
    (linear rule). Epochs stay the unit of the schedule.

    Raises ValueError if a number is not positive.
    """
    if min(batch, memory_start, memory_now, multiple, 1 if limit is None else limit) <= 0:
        raise ValueError("sizes and memory must be positive.")
    wanted = min(batch * memory_start // memory_now, 2 * batch)
    wanted = wanted if limit is None else min(wanted, limit)
    return max(batch, wanted // multiple * multiple)
