"""Keep the optimizers' parameters and the model's parameters the same set while modules come and go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import nn
from torch.optim import Optimizer

from hasten.errors import HastenError


def check_training_state(model: nn.Module, optimizers: Optimizer | Sequence[Optimizer]) -> None:
    """Raise HastenError unless the optimizers hold exactly the trainable parameters of ``model``, each once.

    Compared by identity: a parameter the optimizers do not hold would silently stop learning, and one that the model
    no longer has would be trained for nothing.
    """
    optimizers = [optimizers] if isinstance(optimizers, Optimizer) else optimizers
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    held = [id(p) for o in optimizers for group in o.param_groups for p in group["params"] if p.requires_grad]
    times = Counter(held)
    missing = [name for key, name in names.items() if key not in times]
    orphans = sum(key not in names for key in held)
    twice = [names[key] for key, count in times.items() if count > 1 and key in names]
    problems = []
    if missing:
        problems.append(f"the optimizer does not hold {', '.join(missing)}")
    if orphans:
        problems.append(
            f"the optimizer holds {orphans} tensors that are not trainable parameters of the model"
        )
    if twice:
        problems.append(f"the optimizer holds {', '.join(twice)} more than once")
    if problems:
        raise HastenError(
            f"optimizer and model do not match: {'; '.join(problems)}. Create the optimizer from the parameters of "
            f"this very model, each once, and freeze what must not train with requires_grad_(False)."
        )


def adopt(optimizers: Iterable[Optimizer], new: nn.Parameter, like: nn.Parameter) -> None:
    """Give ``new`` to the optimizer and parameter group that hold ``like``. Nothing happens if none holds it."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(p is like for p in group["params"]):
                group["params"].append(new)
                return


def release(optimizers: Iterable[Optimizer], gone: Iterable[nn.Parameter]) -> None:
    """Take the parameters ``gone`` and their state out of the optimizers."""
    keys = {id(p) for p in gone}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in keys]
        for parameter in [p for p in optimizer.state if id(p) in keys]:
            del optimizer.state[parameter]


def replace_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put ``new`` in the place of the submodule ``name`` and return the old one; training mode is carried over."""
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = model.get_submodule(name)
    new.train(old.training)
    setattr(parent, attribute, new)
    return old
