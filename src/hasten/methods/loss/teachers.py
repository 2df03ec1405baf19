"""Networks that teach another: where one comes from, whether it fits, which one it is, and its answers kept."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten import keyed
from hasten.diagnose import look
from hasten.errors import SettingsError, UnsupportedError
from hasten.products import uninstall

NAME = "knowledge_distillation"
HANDED_OVER = "sha256:"
"""How the name of a teacher begins that is an object: its digest follows."""


def digest(model: nn.Module) -> str:
    """Return ``sha256:`` and 16 digits that depend on the name, type, shape and every bit of the model's tensors."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            found.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return HANDED_OVER + found.hexdigest()[:16]


def frozen(model: nn.Module) -> nn.Module:
    """Return ``model`` in eval mode and without gradients."""
    return model.eval().requires_grad_(False)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers that hold numbers, by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if tensor.numel()}


# -- where one comes from
def load_teacher(path: Path, model: nn.Module) -> nn.Module:
    """Return the frozen teacher of ``model`` that ``path`` holds, on its device and of its type.

    path: the folder of a run of hasten, or a .safetensors file with weights for a network of the form of ``model``.
    Raises CheckpointError for a folder without a checkpoint, UnsupportedError for a run of the user's own code,
    SettingsError for weights that do not fit.
    """
    if path.suffix == ".safetensors":
        teacher = _same_form(model, path)
    else:
        from hasten.exporting import load_run

        teacher = load_run(path).network
    like = next(model.parameters())
    return frozen(teacher.to(device=like.device, dtype=like.dtype))


def _same_form(model: nn.Module, path: Path) -> nn.Module:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    made = copy.deepcopy(model)
    for module in made.modules():
        uninstall(module)
    try:
        made.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise SettingsError(
            f"{NAME}: {path} does not hold weights for this network ({str(error).splitlines()[0]}); a teacher of another form "
            f"is given by the folder of its run, or by with_teacher(module)."
        ) from error
    return made


# -- whether it fits
def outputs_of(model: nn.Module, x: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """Return the outputs of the modules ``names`` and, under "", of the model, in eval mode and without gradients."""
    found: dict[str, Tensor] = {}

    def see(name: str, _: tuple[Any, ...], output: Any) -> None:
        if (not name or name in names) and isinstance(output, Tensor):
            found[name] = output

    look(model, x, see)
    return found


@contextmanager
def noted(model: nn.Module, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that fills with the outputs of the modules ``names``, where there are such, while the model runs."""
    found: dict[str, Tensor] = {}
    known = dict(model.named_modules())
    with ExitStack() as stack:
        for name in names:
            if name in known:

                def note(module: nn.Module, _: Any, output: Tensor, name: str = name) -> None:
                    found[name] = output

                stack.callback(known[name].register_forward_hook(note).remove)
        yield found


def fitting(teacher: nn.Module, model: nn.Module, x: Tensor, outputs: Tensor, names: Collection[str]) -> dict[str, Tensor]:  # fmt: skip
    """Return what `outputs_of` finds in the teacher for ``x``; ``outputs`` are the logits of ``model`` for it.

    Raises SettingsError (a ValueError) if the teacher is in train mode, shares memory with ``model``, does not run on
    ``x``, or tells another number of classes apart.
    """
    if any(module.training for module in teacher.modules()):
        raise SettingsError(f"{NAME}: the teacher is in train mode; call teacher.eval() first.")
    ours = {t.untyped_storage().data_ptr() for t in tensors_of(model).values()}
    shared = [n for n, t in tensors_of(teacher).items() if t.untyped_storage().data_ptr() in ours]
    if shared:
        raise SettingsError(
            f"{NAME}: the teacher shares {len(shared)} tensors with the network ({shared[0]} first), so that training changes "
            f"it; give a deep copy, or teacher='' for a frozen one."
        )
    try:
        theirs = outputs_of(teacher, x, names)
    except Exception as error:  # anything a forward can do
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SettingsError(
            f"{NAME}: the teacher does not run on the network's inputs {tuple(x.shape)} on {x.device} ({reason})."
        ) from error
    if "" not in theirs or theirs[""].shape != outputs.shape:
        got = tuple(theirs[""].shape[1:]) if "" in theirs else "no tensor"
        raise SettingsError(
            f"{NAME}: the teacher gives {got} numbers an image, the network {tuple(outputs.shape[1:])}; both must tell the same "
            f"classes apart."
        )
    return theirs


def refuse_task(outputs: Tensor | None, targets: Tensor, labels: str) -> None:
    """Raise UnsupportedError unless ``outputs`` are logits (N, K) and ``targets`` labels of the kind ``labels``."""
    if outputs is None or outputs.dim() != 2:
        got = "no single tensor" if outputs is None else f"shape {tuple(outputs.shape)}"
        raise UnsupportedError(
            f"{NAME}: a classifier with logits (images, classes) is needed, and this network gives {got}: detection, segmentation "
            f"and regression have no class probabilities to teach."
        )
    classes, whole = outputs.shape[1], not targets.dtype.is_floating_point
    if labels == "many":
        fits = (
            not whole
            and targets.shape[1:] == outputs.shape[1:]
            and bool(((targets >= 0) & (targets <= 1)).all())
        )
        wanted = f"shares in [0, 1] of shape (images, {classes})"
    else:
        sums = None if whole or targets.dim() != 2 else targets.sum(1)
        shares = sums is not None and bool(((sums - 1).abs() < 1e-2).all())
        fits = classes > 1 and ((whole and targets.dim() == 1) or shares)
        wanted = (
            "two classes or more, with class numbers (images,) or shares (images, classes) that add up to 1"
        )
    if not fits:
        raise UnsupportedError(
            f"{NAME}: labels={labels!r} needs {wanted}; given are {classes} outputs and targets of shape {tuple(targets.shape)}, "
            f"{targets.dtype}. labels='many' is for several labels an image; regression has no classes to teach."
        )


# -- its answers, kept
class LogitCache:
    """The teacher's logits by the number of the sample, with a mark of the image they were given for.

    A mark is the image's product with a fixed random one: any change that augmentation makes moves it.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.logits = torch.zeros(0, 0, dtype=dtype)
        self.marks = torch.zeros(0)
        self.known = torch.zeros(0, dtype=torch.bool)

    def missing(self, index: Tensor, images: Tensor) -> Tensor:
        """Return the rows of a batch whose logits are not known, and keep the marks of these images.

        index (N,) numbers of the samples, on the CPU; images (N, ...). Raises UnsupportedError if a known image differs
        from the one its logits were given for.
        """
        self._grow(int(index.max()) + 1)
        x = images if images.dtype == torch.float64 else images.float()
        pattern = torch.randn(x.shape[1:], generator=keyed.generator("logit cache")).to(x)
        marks = (x * pattern).flatten(1).sum(1).float().cpu()
        sizes = x.flatten(1).norm(dim=1).float().cpu()
        known = self.known[index]
        moved = known & ((marks - self.marks[index]).abs() > 1e-3 * sizes + 1e-12)
        if moved.any():
            raise UnsupportedError(
                f"{NAME}: the image of sample {int(index[moved][0])} is not the one whose logits were kept: augmentation or "
                f"mixing changes images. Train without it, or give cache=''."
            )
        self.marks[index] = torch.where(known, self.marks[index], marks)
        return (~known).nonzero().flatten()

    def put(self, index: Tensor, logits: Tensor) -> None:
        """Keep logits (N, K) of the samples ``index`` (N,)."""
        if not self.logits.shape[1]:
            self.logits = self.logits.new_zeros(len(self.known), logits.shape[1])
        top = min(6e4, torch.finfo(self.logits.dtype).max)  # softmax and sigmoid are 0 and 1 long before
        self.logits[index] = logits.detach().float().clamp(-top, top).cpu().to(self.logits.dtype)
        self.known[index] = True

    def get(self, index: Tensor) -> Tensor:
        """Return the logits (N, K) kept for the samples ``index`` (N,)."""
        return self.logits[index]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the logits, the marks and which are known."""
        return {"logits": self.logits, "marks": self.marks, "known": self.known}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state_dict`` gave."""
        self.logits, self.marks, self.known = (state[key].clone() for key in ("logits", "marks", "known"))

    def _grow(self, count: int) -> None:
        more = count - len(self.known)
        if more > 0:
            more = max(more, len(self.known))
            self.known = torch.cat([self.known, self.known.new_zeros(more)])
            self.marks = torch.cat([self.marks, self.marks.new_zeros(more)])
            self.logits = torch.cat([self.logits, self.logits.new_zeros(more, self.logits.shape[1])])
