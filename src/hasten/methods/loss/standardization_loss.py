"""Standardization loss: normalisation as a term of the loss instead of a layer (Collins et al. 2019).

Batch norm is taken out. The term pulls each channel of a layer's output towards mean 0 and variance 1, so that the
outputs of one image depend on no other image, and nothing is left to normalise after training.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hasten.contract import Effect, Method, MethodSpec
from hasten.errors import HastenError, UnsupportedError
from hasten.methods.loss.batch_norm_removal import (
    ChannelAffine,
    Trace,
    fold_affine,
    remove,
    run_quietly,
    trace,
)

if TYPE_CHECKING:
    from hasten.session import Session


# -- the mathematics
class _Divergence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, channel_dim: int, eps: float) -> Tensor:
        var, mean = _moments(x, channel_dim)
        ctx.save_for_backward(x, mean, var)
        ctx.eps = eps
        return _kl(mean, var, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, mean, var = ctx.saved_tensors
        m = x.numel() // mean.numel()
        slope = grad * (1 - 1 / (var + ctx.eps)) / m
        offset = grad * mean / m - slope * mean
        return torch.addcmul(offset, slope, _wide(x)).to(x.dtype), None, None


def divergence(x: Tensor, channel_dim: int = 1, eps: float = 1e-5) -> Tensor:
    """Return D, the KL divergence of a Gaussian fitted to each channel of ``x`` from N(0, 1), summed over channels.

    D = 1/2 * sum_i (mu_i^2 + var_i - log(var_i + eps) - 1), with the biased variance over all dimensions but the
    channels'. A scalar; moments are computed in float32 at least. Its gradient is in closed form (no second
    derivative): mu/m + (1 - 1/(var + eps)) * (x - mu)/m, m the number of values of a channel.
    """
    if torch.compiler.is_compiling():
        # the compiler derives and fuses it by itself, and stumbles over functions of our own
        var, mean = _moments(x, channel_dim)
        return _kl(mean, var, eps)
    result: Tensor = _Divergence.apply(x, channel_dim, eps)  # type: ignore[no-untyped-call]
    return result


def _moments(x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    dims = [d for d in range(x.dim()) if d != channel_dim % x.dim()]
    var, mean = torch.var_mean(_wide(x), dims, correction=0, keepdim=True)
    return var, mean


def _kl(mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return 0.5 * (mean.square() + var - (var + eps).log() - 1).sum()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# -- the method
@dataclass(kw_only=True, eq=False)
class StandardizationLoss(Method):
    """Replace batch norm by a term of the loss.

    lam (lambda): weight of the sum of D over layers and channels (from the paper: 1.0 for a small CNN on MNIST,
    1e-4 for MobileNet-v1, 1e-6 for ResNet-50); None takes it from ``lambda_rel``.
    lambda_rel: weight of the mean of D over channels instead, lambda = lambda_rel / channels, which the paper's
    values put between 0.03 and 56 (our choice: 1.0, MobileNet-v1's).
    affine: keep a learnable scale and shift behind each tapped layer that had a batch norm (our choice: off; in the
    paper PointNet gained from it).
    eps: added to the variance in the logarithm, so that a dead channel stays finite (our choice: 1e-5).
    """

    lam: float | None = None
    lambda_rel: float = 1.0
    affine: bool = False
    eps: float = 1e-5

    spec: ClassVar[MethodSpec] = MethodSpec(
        name="standardization_loss",
        title="Standardization loss",
        paper="Collins, Balle, Shlens, Accelerating Training of Deep Neural Networks with a Standardization Loss, "
        "2019, arXiv 1903.00925",
        saves="iterations",
        acts="takes batch norm out and adds to the loss how far layer outputs are from mean 0 and variance 1",
        writes=frozenset({"normalization", "loss.terms"}),
        excludes=frozenset({"structure"}),
        excludes_reason="a channel that dies away makes the standardization loss grow without bound, and it pulls "
        "the channel back.",
        layers=("Conv1d", "Conv2d", "Conv3d", "Linear"),
        state=("counts_", "last_"),
        promises=frozenset({"autocast", "channels_last", "compile"}),
        slower_when="batch norm works: it needs fewer steps still; the gain is over a network without normalisation",
    )

    def problems(self) -> list[str]:
        """Return every setting that is out of range."""
        found = []
        if self.lam is not None and not 0 <= self.lam < float("inf"):
            found.append(f"lam is {self.lam}; allowed: from 0, or None.")
        if not 0 <= self.lambda_rel < float("inf"):
            found.append(f"lambda_rel is {self.lambda_rel}; allowed: from 0.")
        if not isinstance(self.affine, bool):
            found.append(f"affine is {self.affine!r}; allowed: True or False.")
        if not self.eps > 0:
            found.append(f"eps is {self.eps}; allowed: above 0.")
        return found

    def attach(self, session: Session) -> Effect:
        """Find the layers to tap and the batch norms to take out.

        Raises UnsupportedError for a model under DistributedDataParallel that has batch norm.
        """
        model, sample = session.model, session.sample[0]
        seen = trace(model, sample)
        if seen.pairs and session.wrapper is not model:
            raise UnsupportedError(
                "standardization_loss: parameters must not come and go under DistributedDataParallel; before you wrap "
                "the model, call hasten.methods.loss.batch_norm_removal.remove_batch_norm(model, inputs)."
            )
        self.pairs_, self.taps_ = seen.pairs, self._taps(model, seen)
        self.terms_: list[Tensor] = []
        self.counts_ = {"terms": 0, "batch_norms_removed": len(seen.pairs)}
        self.last_: Tensor | None = None

        channels = sum(seen.shapes[name][dim] for name, dim in self.taps_.items())
        self.lam_ = self.lam if self.lam is not None else self.lambda_rel / max(1, channels)
        effect = Effect(saves=f"iterations against no normalisation; lambda = {self.lam_:.4g}, that is lambda_rel = "
                        f"{self.lam_ * channels:.4g} over {channels} channels")  # fmt: skip
        for name, dim in self.taps_.items():
            norm = f", batch norm {seen.pairs[name]} is taken out" if name in seen.pairs else ""
            effect.touched[name] = f"{seen.shapes[name][dim]} channels standardized{norm}"
        effect.skipped = {**seen.kept, **self._left_out(model, seen)}
        session.edit(lambda: self._edit(session))
        return effect

    def _taps(self, model: nn.Module, seen: Trace) -> dict[str, int]:
        """Return the layers to tap, in the order of their calls, with the dimension of their channels."""
        out = self._left_out(model, seen)
        return {n: _channel_dim(model.get_submodule(n)) for n in dict.fromkeys(seen.calls) if n not in out}

    def _left_out(self, model: nn.Module, seen: Trace) -> dict[str, str]:
        out = {}
        for name in dict.fromkeys(seen.calls):
            shape, norms = (
                seen.shapes[name],
                [n for n in seen.norms.get(name, []) if n != seen.pairs.get(name)],
            )
            if name == seen.calls[-1]:
                out[name] = "it is the classifier, whose outputs are not standardized"
            elif norms:
                out[name] = (
                    f"its output is normalised by {', '.join(norms)}, so that the term could change nothing"
                )
            elif shape.numel() // shape[_channel_dim(model.get_submodule(name))] < 2:
                out[name] = "it has fewer than 2 values a channel, and so no variance"
        return out

    def _edit(self, session: Session) -> None:
        model = session.model
        for layer, norm in self.pairs_.items():
            remove(model, layer, norm, affine=self.affine, optimizers=session.optimizers)
        if self.lam_ == 0:
            return
        terms, eps = self.terms_, self.eps
        changed = _changed_in_place(model, session.sample[0], self.taps_)

        def start(module: nn.Module, given: tuple[Any, ...]) -> None:
            if module.training and torch.is_grad_enabled():
                terms.clear()

        setattr(model, HOOK, model.register_forward_pre_hook(start))
        for name, dim in self.taps_.items():

            def tap(
                module: nn.Module, _: Any, output: Tensor, dim: int = dim, copied: bool = name in changed
            ) -> Tensor | None:
                if not (module.training and torch.is_grad_enabled()):
                    return None
                if output.numel() // output.shape[dim] > 1:
                    terms.append(divergence(output, dim, eps))
                return output.clone() if copied else None

            module = model.get_submodule(name)
            setattr(module, HOOK, module.register_forward_hook(tap))

    # -- in the step
    def loss_terms(self) -> Tensor:
        """Return lambda times the sum of D over the layers of this forward pass, and over their uses in it."""
        if self.lam_ == 0:
            return torch.zeros(())
        if not self.terms_:
            raise HastenError(
                "standardization_loss: no layer was seen in this forward pass; is a part of the model in eval mode?"
            )
        total = self.lam_ * torch.stack(self.terms_).sum()
        self.counts_["terms"] += len(self.terms_)
        self.last_ = total.detach()
        self.terms_.clear()
        return total

    # -- evidence and export
    def witness(self) -> dict[str, float]:
        """Return the layers' terms added so far, the last value of the penalty, and the batch norms taken out."""
        return {**self.counts_, "last_penalty": 0.0 if self.last_ is None else float(self.last_)}

    def export(self, model: nn.Module) -> None:
        """Take the taps off and fold scales and shifts into the layers."""
        for module in model.modules():
            if hasattr(module, HOOK):
                getattr(module, HOOK).remove()
                delattr(module, HOOK)
        for layer, norm in self.pairs_.items():
            if isinstance(model.get_submodule(norm), ChannelAffine):
                fold_affine(model, layer, norm)


HOOK = "standardization_hook"


def _channel_dim(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1


def _changed_in_place(model: nn.Module, x: Tensor, taps: dict[str, int]) -> set[str]:
    """Return the tapped layers whose output the model changes in place, which the gradient of D must still see.

    Modules with a switch for it (``ReLU(inplace=True)``) are switched instead, which costs less than a copy.
    """
    outputs: list[tuple[str, Tensor, int]] = []

    def before(module: Any, given: tuple[Any, ...]) -> None:
        if module.inplace and any(given[0] is tensor for _, tensor, _ in outputs):
            module.inplace = False

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(getattr(module, "inplace", None), bool):
                stack.callback(module.register_forward_pre_hook(before).remove)
        for name in taps:
            hook = model.get_submodule(name).register_forward_hook(
                lambda _, __, out, name=name: outputs.append((name, out, out._version))
            )
            stack.callback(hook.remove)
        run_quietly(model, x)
        return {name for name, tensor, version in outputs if tensor._version != version}
