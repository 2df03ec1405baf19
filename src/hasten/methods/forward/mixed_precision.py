"""Mixed precision, memory format and compilation: the first method to switch on.

Convolutions and matrix products run on 16-bit operands with 32-bit accumulation, while weights, statistics
and the optimizer stay in 32 bit (Micikevicius et al. 2018; Kalamkar et al. 2019). Images and weights lie in
memory as NHWC.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hasten.contract import Batch, Effect, Method, MethodSpec
from hasten.diagnose import look
from hasten.errors import CheckpointError, NonFiniteError
from hasten.methods.forward.machine_dtype import DTYPES, choose_dtype

if TYPE_CHECKING:
    from hasten.session import Session
    from hasten.surgery import Change

PRODUCTS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
SMALLEST_SCALE = 2.0**-16  # 32 halvings below the first scale: no overflow, the gradients are broken


@dataclass(kw_only=True, eq=False)
class MixedPrecision(Method):
    """Run the network in 16 bit and NHWC.

    dtype: "bfloat16", "float16" (with loss scaling), "float32", or "auto" (our choice): bfloat16 where
    this machine computes it faster than float32, else float32. On a CPU a timed convolution decides, on a
    GPU its generation.
    channels_last: lay 4-D weights and images out as NHWC (our choice: on).
    compile: run the model through ``torch.compile`` (our choice: off; a short run does not earn the time of compiling back).
    force: use a dtype that is slower than float32 here (our choice: off).
    init_scale (S0), growth_factor, backoff_factor, growth_interval: loss scaling of float16. The scale
    doubles after 2000 steps without overflow and halves at one, whose update is skipped and whose gradients
    other methods see as zeros (defaults of PyTorch's GradScaler).

    The outputs of the network reach the loss as float32: a CPU's autocast leaves softmax, log, exp and sums
    in bfloat16 if fed with it, so a loss other than PyTorch's cross-entropy would lose digits.
    """

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    channels_last: bool = True
    compile: bool = False
    force: bool = False
    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000

    spec: ClassVar[MethodSpec] = MethodSpec(
        name="mixed_precision",
        title="Mixed precision and channels_last",
        paper="Micikevicius et al., Mixed Precision Training, ICLR 2018, arXiv 1710.03740; Kalamkar et al., "
        "A Study of BFLOAT16 for Deep Learning Training, 2019, arXiv 1905.12322",
        saves="time per step",
        acts="multiplies in 16 bit, adds up in 32 bit, and lays tensors out as NHWC",
        writes=frozenset({"layout", "precision", "graph", "update"}),
        layers=("Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "Linear"),
        state=("dtype_", "scaler_", "counts_"),
        slower_when="the processor has no 16-bit units (float16 on a CPU: 7 times), or the layers are small",
    )

    @property
    def writes(self) -> frozenset[str]:
        """Only the places that these settings decide; float16 also decides whether an update is skipped."""
        places = {
            "layout": self.channels_last,
            "precision": self.dtype != "float32",
            "graph": self.compile,
            "update": self.dtype == "float16",
        }
        return frozenset(place for place, decided in places.items() if decided)

    def problems(self) -> list[str]:
        """Return every setting that is out of range."""
        found = []
        if self.dtype not in {"auto", *DTYPES}:
            found.append(f"dtype is {self.dtype!r}; allowed: 'auto', 'bfloat16', 'float16', 'float32'.")
        found += [
            f"{name} is {value!r}; allowed: True or False."
            for name, value in (
                ("channels_last", self.channels_last),
                ("compile", self.compile),
                ("force", self.force),
            )
            if not isinstance(value, bool)
        ]
        if not self.init_scale > 0:
            found.append(f"init_scale is {self.init_scale}; allowed: above 0.")
        if not self.growth_factor > 1:
            found.append(f"growth_factor is {self.growth_factor}; allowed: above 1.")
        if not 0 < self.backoff_factor < 1:
            found.append(f"backoff_factor is {self.backoff_factor}; allowed: between 0 and 1.")
        if not (isinstance(self.growth_interval, int) and self.growth_interval >= 1):
            found.append(f"growth_interval is {self.growth_interval}; allowed: whole numbers from 1.")
        return found

    # -- attaching
    def attach(self, session: Session) -> Effect:
        """Choose the dtype, see which layers take it, and have the model converted.

        Raises UnsupportedError for a dtype that this machine computes slower than float32.
        """
        model, sample = session.model, session.sample[0]
        self.device_ = sample.device.type
        self.dtype_, reason = choose_dtype(self.dtype, sample.device, self.channels_last, self.force)
        self.counts_ = {f"forward_{self.dtype_}": 0, "channels_last_batches": 0, "skipped_updates": 0}
        self.scaler_: torch.amp.GradScaler | None = None
        self.optimizers_ = session.optimizers
        if self.dtype_ == "float16":
            self.scaler_ = torch.amp.GradScaler(
                self.device_,
                init_scale=self.init_scale,
                growth_factor=self.growth_factor,
                backoff_factor=self.backoff_factor,
                growth_interval=self.growth_interval,
            )

        effect = Effect(saves="arithmetic, memory traffic and half of the saved activations")
        notes: dict[str, list[str]] = {}
        if self.dtype_ == "float32":
            effect.skipped["precision"] = reason
        else:
            with self.context():
                seen = _output_dtypes(model, sample)
            self.counts_[f"forward_{self.dtype_}"] = 0
            for name, dtype in seen.items():
                if dtype == DTYPES[self.dtype_]:
                    notes.setdefault(name, []).append(self.dtype_)
                else:
                    effect.skipped[name] = f"its output is {str(dtype).removeprefix('torch.')} under autocast"
        self.layout_ = self.channels_last and sample.dim() == 4
        if self.layout_:
            for name, _ in session.layers(nn.Conv2d, nn.ConvTranspose2d):
                notes.setdefault(name, []).append("channels_last")
        if self.channels_last and not any("channels_last" in n for n in notes.values()):
            self.layout_ = False
            effect.skipped["layout"] = (
                "the model has no 2-D convolution, or its inputs are not images (N, C, H, W)"
            )
        if self.compile:
            notes.setdefault("model", []).append("runs through torch.compile")
        effect.touched = {name: ", ".join(note) for name, note in notes.items()}

        # twice deferred: it has to see the modules that the edits of the other methods bring in
        session.edit(lambda: session.edit(lambda: self._convert(session, effect)))
        return effect

    def _convert(self, session: Session, effect: Effect) -> None:
        if self.layout_:
            if session.wrapper is session.model:
                session.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            else:
                effect.skipped["weights"] = (
                    "DistributedDataParallel has laid out its buckets by them; convert the model with "
                    "model.to(memory_format=torch.channels_last) before you wrap it"
                )
            with self.context():
                for name in not_channels_last(session.model, _nhwc(session.sample[0])):
                    effect.skipped.setdefault(name, "falls back to NCHW here, at the cost of a copy")
            self.counts_[f"forward_{self.dtype_}"] = 0
        if self.compile:
            session.wrap(torch.compile)
        if self.dtype_ != "float32":
            session.wrap(_with_float32_outputs)

    def reshaped(self, change: Change) -> None:
        """Drop what was compiled for the old shapes, or many changes would exhaust the number of recompilations."""
        if self.compile:
            torch.compiler.reset()

    # -- in the step
    def select(self, batch: Batch) -> Batch:
        """Return the batch with its images in NHWC; nothing is copied if they are."""
        if self.layout_:
            batch.inputs = _nhwc(batch.inputs)
            self.counts_["channels_last_batches"] += 1
        return batch

    def context(self) -> AbstractContextManager[Any]:
        """Return autocast for the chosen dtype."""
        if self.dtype_ == "float32":
            return nullcontext()
        self.counts_[f"forward_{self.dtype_}"] += 1
        return torch.autocast(self.device_, DTYPES[self.dtype_])

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass; for float16 of the scaled loss, with gradients scaled back at once."""
        if self.scaler_ is None:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        self.scaler_.scale(loss).backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers_:
            self.scaler_.unscale_(optimizer)
            groups = optimizer.param_groups
            grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            if grads and not torch.stack(torch._foreach_norm(grads)).isfinite().all():
                # the scaler has noted it and will skip the update; nobody else should see infinities
                torch._foreach_zero_(grads)

    def update(self, optimizers: tuple[Optimizer, ...]) -> None:
        """Step the optimizers; for float16 only those whose gradients are finite."""
        if self.scaler_ is None:
            for optimizer in optimizers:
                optimizer.step()
            return
        for optimizer in optimizers:
            self.scaler_.step(optimizer)
        before = self.scaler_.get_scale()
        self.scaler_.update()
        scale = self.scaler_.get_scale()
        self.counts_["skipped_updates"] += scale < before
        if scale < SMALLEST_SCALE:
            raise NonFiniteError(
                f"mixed_precision: gradients stay infinite or NaN though the loss scale fell to {scale:.3g}. "
                f"No weight was changed by them. Lower the learning rate, or give dtype='bfloat16'."
            )

    # -- evidence and state
    def witness(self) -> dict[str, float]:
        """Return forward passes in the dtype, batches brought to NHWC, and updates skipped for overflow."""
        return dict(self.counts_)

    def state_dict(self) -> dict[str, Any]:
        """Return the dtype, the loss scale and the counters."""
        scaler = {} if self.scaler_ is None else self.scaler_.state_dict()
        return {"dtype_": self.dtype_, "scaler_": scaler, "counts_": self.counts_}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave; with dtype "auto" the run's dtype wins over today's probe.

        Raises CheckpointError if the run was in another dtype than the one asked for.
        """
        if state["dtype_"] != self.dtype_:
            if self.dtype != "auto":
                raise CheckpointError(
                    f"mixed_precision: the run was in {state['dtype_']}, this machine or setting gives "
                    f"{self.dtype_}; give dtype={state['dtype_']!r} (with force=True if it is slower here)."
                )
            self.dtype_ = state["dtype_"]
        self.counts_ = dict(state["counts_"])
        if self.scaler_ is not None:
            self.scaler_.load_state_dict(state["scaler_"])


# -- looking into the model
def _output_dtypes(model: nn.Module, x: Tensor) -> dict[str, torch.dtype]:
    """Return the dtype of the output of each product layer for one pass on ``x``."""
    seen: dict[str, torch.dtype] = {}

    def see(name: str, _: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            seen[name] = output.dtype

    look(model, x, see, PRODUCTS)
    return seen


def not_channels_last(model: nn.Module, x: Tensor) -> list[str]:
    """Return the 4-D parameters and layer outputs of ``model`` that are not NHWC when ``x`` (N, C, H, W) is.

    Each of them costs a silent copy. One pass in eval mode, without gradients.
    """
    found = [f"parameter {name}" for name, p in model.named_parameters() if p.dim() == 4 and not _is_nhwc(p)]

    def see(name: str, _: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and not _is_nhwc(output):
            found.append(f"output of {name}")

    look(model, _nhwc(x), see)
    return found


def _is_nhwc(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _nhwc(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


def _with_float32_outputs(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        return forward(x).float()

    return run
