"""Deep reuse in one layer: the clustering of its input and the three products, as pieces of its plan."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from hasten import keyed
from hasten.errors import NonFiniteError
from hasten.kernels import deep_reuse as kernels
from hasten.kernels import probe
from hasten.kernels.native import instruction_set
from hasten.kernels.reference import deep_reuse as reference
from hasten.kernels.reference.deep_reuse import HIGHEST_BITS, Clusters
from hasten.methods.products.reuse_clusters import RowMemory
from hasten.methods.products.reuse_ladder import DENSE, Measured, Rung, ladder, rho, step_finer
from hasten.products import Geometry, Saved, arithmetic

Way = Literal["auto", "native", "dense"]
SEEN = 16  # images of a batch that thresholds are taken from, about (our choice)
TRIES = 3  # epochs after the first at whose start a layer chooses its first rung anew (our choice)


@dataclass(frozen=True)
class How:
    """What the method's settings say to every layer."""

    key: tuple[int | str, ...]
    order: Literal["pixel", "patch"]
    scope: Literal["image", "batch", "across_batch"]
    norm: bool
    center: bool
    products: tuple[str, ...]
    a: float
    overhead: float
    max_rho: float
    max_error: float
    rungs: int
    max_age: int
    kernel: Way


class LayerReuse:
    """The state of one layer and its arithmetic.

    ``rung`` is what it computes with. With ``due`` set the next forward pass measures the candidates on its input and
    chooses: on "start" the coarsest rung of the ladder, on "finer" the next one.
    """

    def __init__(self, name: str, how: How, options: list[Rung], outputs: int, taps: int) -> None:
        self.name, self.how, self.options, self.outputs = name, how, options, outputs
        self.taps = taps if how.order == "pixel" else 1
        self.rung = options[0]
        self.due: Literal["", "start", "finer"] = "start"
        self.limit = how.max_error
        self.moved = self.tries = 0
        self.reuse_rows = how.scope == "across_batch"
        self.ladder: list[Measured] = []
        self.reason = ""
        self.memory = RowMemory(how.max_age)
        self.step: Callable[[], int] = lambda: 0
        self.calls = 0
        self.remaining = 0.0
        self.gradients = 0
        self.shared: tuple[Tensor, int, Tensor, Tensor] | None = None

    # -- clusters
    def vectors(self, rung: Rung, like: Tensor) -> Tensor:
        """Return V (L, H): the first H columns of the layer's normal matrix for this L, a function of the run's key."""
        generator = keyed.generator(*self.how.key, self.name, rung.length)
        v = torch.randn(rung.length, HIGHEST_BITS, generator=generator)
        return v[:, : rung.bits].contiguous().to(like.device)

    def cluster(self, x: Tensor, w: Tensor, geometry: Geometry, rung: Rung) -> Clusters:
        """Return the clusters of x (B, C, H, W)."""
        v = self.vectors(rung, x)
        groups = x.shape[0] if self.how.scope == "image" else 1
        try:
            if self.how.order == "pixel":
                x = padded_channels(x, rung.length)
                shift = None
                if self.how.center:
                    few = x[:: max(1, len(x) // SEEN)]
                    shift = self.thresholds(reference.pixel_pieces(few, rung.length), v)
                return Clusters(*kernels.deep_reuse_cluster(x, v, shift, groups, self.how.norm))
            if not bool(x.isfinite().all()):
                raise NonFiniteError("deep_reuse got an input that is infinite or not a number.")
            kernel = (w.shape[2], w.shape[3])
            pieces = reference.patch_pieces(
                x.float() if x.dtype == torch.bfloat16 else x, kernel, pair(geometry.stride), pair(geometry.padding),
                rung.length,
            )  # fmt: skip
            shift = self.thresholds(pieces, v) if self.how.center else None
            return reference.cluster(pieces, v, shift, groups, self.how.norm)
        except NonFiniteError as error:
            raise NonFiniteError(f"layer {self.name!r}: {error}") from None

    def thresholds(self, pieces: Tensor, v: Tensor) -> Tensor:
        """Return (blocks, H): the projections of the mean of ``pieces`` (blocks, n, L), of unit vectors if ``norm``."""
        pieces = pieces.to(torch.promote_types(pieces.dtype, torch.float32))
        mean = (functional.normalize(pieces, dim=-1) if self.how.norm else pieces).mean(1)
        return mean @ v.to(mean.dtype)

    def remaining_ratio(self, clusters: Clusters, rows: int) -> float:
        """Return r_c: clusters that need a product, over pieces of the unfolded input; ``rows`` is its N."""
        blocks, groups = clusters.starts.shape[0], clusters.starts.shape[1] - 1
        return (float(clusters.rows.sum()) - blocks * groups) / (blocks * rows)

    # -- the products
    def output(self, clusters: Clusters, x: Tensor, w: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
        """Return the output (B, O, H', W') for the clusters of x."""
        b, _, h, width = x.shape
        if self.how.order == "patch":
            high, wide = out_size(x, w, g)
            y = reference.patch_output(clusters, w, bias, (b, high, wide)).to(w.dtype)
        else:
            w = padded_channels(w, clusters.means.shape[-1])
            z = first = None
            if self.reuse_rows and not self.due:
                z, first = self.memory.products(clusters, w, self.step())
            y = kernels.deep_reuse_output(
                clusters, w, bias, z, first, [b, h, width], [*g.stride], [*g.padding]
            )
        return in_layout_of(y, x)

    def backward(
        self, grad: Tensor, w: Tensor, saved: Saved, geometry: Geometry, to_input: bool, to_weight: bool
    ) -> tuple[Tensor, Tensor]:
        """Return (grad_input (B, C, H, W), grad_weight (O, C, kh, kw)), those that are wanted."""
        clusters, g = Clusters(*saved.extras), as_conv(geometry)
        b, c, h, width = as_images(saved.x_like, geometry).shape
        if self.how.order == "patch":
            gx, gw = reference.patch_gradients(grad, clusters, w, (h, width), pair(g.stride), pair(g.padding))
            return gx.to(w.dtype), gw.to(w.dtype)
        wide = padded_channels(w, clusters.means.shape[-1])
        gx, gw = kernels.deep_reuse_gradients(
            grad, clusters, wide, [b, h, width], [*g.stride], [*g.padding], to_input, to_weight
        )
        if wide is not w:
            gx = gx[:, :c] if to_input else gx
            gw = gw[:, :c] if to_weight else gw
        return gx, gw

    # -- state
    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold; V is a function of the run's seed and is not needed."""
        return {
            "rung": [*self.rung], "due": self.due, "limit": self.limit, "moved": self.moved, "tries": self.tries, "reuse_rows": self.reuse_rows,
            "ladder": [m.row() for m in self.ladder], "reason": self.reason, "calls": self.calls,
            "remaining": self.remaining, "gradients": self.gradients, "memory": self.memory.state(),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.rung = Rung(*state["rung"])
        self.ladder = [Measured.of_row(row) for row in state["ladder"]]
        for name in (
            "due",
            "limit",
            "moved",
            "tries",
            "reuse_rows",
            "reason",
            "calls",
            "remaining",
            "gradients",
        ):
            setattr(self, name, state[name])
        self.memory.load(state["memory"])

    # -- choosing the rung
    def try_again(self) -> None:
        """Have the layer choose its first rung anew, `TRIES` times at most: activations of a new network soon change."""
        settled = self.rung != DENSE and len(self.options) == 1
        if settled or self.due or self.moved or self.how.kernel == "dense" or self.tries >= TRIES:
            return
        self.tries += 1
        self.due, self.limit = "start", self.how.max_error

    def measure(
        self, x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry, enough: float | None = None
    ) -> list[Measured]:
        """Return what the candidates cost and err on this input.

        enough: an error; only what it takes to find the cheapest candidate that keeps to it. More bits split groups, so
        that errors fall and costs rise with H. Errors of those that cost too much are not computed, and infinite here.
        """
        exact = arithmetic.output(x, w, bias, geometry).float()
        size = float(torch.linalg.vector_norm(exact)) or 1.0
        rows = exact.numel() // exact.shape[1]

        def one(rung: Rung, most: float = math.inf) -> Measured:
            clusters, how = self.cluster(x, w, geometry, rung), self.how
            remaining = self.remaining_ratio(clusters, rows)
            cost = rho(rung, self.outputs, remaining, how.a, self.taps, how.overhead, how.products)
            if cost >= most:
                return Measured(rung, remaining, math.inf, cost)
            y = self.output(clusters, x, w, bias, geometry).float()
            return Measured(rung, remaining, float(torch.linalg.vector_norm(y - exact)) / size, cost)

        if enough is None:
            return [one(rung) for rung in dict.fromkeys([*self.options, self.rung]) if rung != DENSE]
        found, least = [], self.how.max_rho
        for length in dict.fromkeys(rung.length for rung in self.options):
            able = sorted(rung for rung in self.options if rung.length == length)
            while able:
                middle = len(able) // 2
                now = one(able[middle], least)
                found.append(now)
                if now.rho >= least or now.error <= enough:
                    least, able = min(least, now.rho), able[:middle]
                else:
                    able = able[middle + 1 :]
        return found

    def choose(self, x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry) -> None:
        """Measure, and set the rung that is due."""
        how, due = self.how, self.due
        start = due == "start" and len(self.options) > 1
        measured = self.measure(x, w, bias, geometry, self.limit if start else None)
        self.memory.clear()
        if len(self.options) == 1:  # a fixed setting: the errors are the user's choice
            self.ladder = [m for m in measured if m.rho < how.max_rho or how.kernel == "native"]
        else:
            self.ladder = ladder(measured, how.max_rho, math.inf if due == "finer" else self.limit)
        before = next((m for m in measured if m.rung == self.rung), None)
        if due == "finer" and before is not None and self.rung != DENSE:
            self.moved += 1
            self.rung = step_finer(self.ladder, before.error, how.rungs - self.moved)
            self.reason = "the last rung is dense" if self.rung == DENSE else ""
        elif self.ladder:
            self.rung = self.ladder[0].rung
        else:
            self.rung = DENSE
            cheapest = min((m.rho for m in measured), default=math.inf)
            least = min((m.error for m in measured), default=math.inf)
            seen = f", smallest error {least:.2f}" if least < math.inf else ""
            self.reason = (
                f"no setting has rho < {how.max_rho:g} at an error of {self.limit:g} or less (smallest rho "
                f"{cheapest:.2f}{seen})"
            )
        # a finer rung costs more, so where this one does not pay none does
        if self.rung != DENSE and not self._pays(x, w, bias, geometry):
            self.rung, self.reason = DENSE, "the probe found the dense layer faster here"
        self.due = ""
        now = next((m for m in measured if m.rung == self.rung), None)
        if now is not None:
            self.limit = now.error

    def _pays(self, x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry) -> bool:
        if self.how.kernel != "auto":
            return self.how.kernel == "native"
        rung = self.rung
        clusters = self.cluster(x, w, geometry, rung)
        y = self.output(clusters, x, w, bias, geometry)
        r_c = self.remaining_ratio(clusters, y.numel() // y.shape[1])
        grad = torch.ones_like(y)

        def dense() -> None:
            arithmetic.output(x, w, bias, geometry)
            arithmetic.gradients(grad, x, w, geometry, (True, True, False))

        def native() -> None:
            found = self.cluster(x, w, geometry, rung)
            self.output(found, x, w, bias, geometry)
            to_input, to_weight = ("grad_input" in self.how.products, "grad_weight" in self.how.products)
            if to_input or to_weight:
                self.backward(grad, w, Saved(x, w, tuple(found)), geometry, to_input, to_weight)
            arithmetic.gradients(grad, x, w, geometry, (not to_input, not to_weight, False))

        last = x.is_contiguous(memory_format=torch.channels_last)
        # a sixteenth of a doubling of r_c is the same answer
        about = round(16 * math.log2(max(r_c, 1e-4)))
        key = (
            f"deep_reuse {self.how.order} {tuple(x.shape)} {tuple(w.shape)} {geometry.stride} {geometry.padding} "
            f"{x.dtype} {'nhwc' if last else 'nchw'} L{rung.length} H{rung.bits} {self.how.scope} {self.how.norm} "
            f"{self.how.center} {self.how.products} {about} {instruction_set()}"
        )
        return probe.choose(key, {"dense": dense, "native": native}, rounds=3) == "native"


class _Piece:
    """What the three kernels share."""

    name = "deep reuse"
    selectable = False

    def __init__(self, layer: LayerReuse) -> None:
        self.layer = layer


class ReuseOutput(_Piece):
    """The output from the products of cluster means. It tells the piece of grad_weight whether that needs x."""

    def __init__(self, layer: LayerReuse, weight: ReuseGradWeight) -> None:
        super().__init__(layer)
        self.weight = weight

    def __call__(
        self, x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return (output, the tensors of the clusters); no tensors where the layer is dense."""
        layer, images, kernel, g = self.layer, as_images(x, geometry), as_kernel(w), as_conv(geometry)
        layer.shared = None
        if layer.due:
            layer.choose(images, kernel, bias, g)
        self.weight.needs_x = layer.rung == DENSE
        if layer.rung == DENSE:
            return arithmetic.output(x, w, bias, geometry), ()
        clusters = layer.cluster(images, kernel, g, layer.rung)
        y = layer.output(clusters, images, kernel, bias, g)
        layer.calls += 1
        layer.remaining += layer.remaining_ratio(clusters, y.numel() // y.shape[1])
        if not geometry.conv:
            y = y.reshape(*x.shape[:-1], w.shape[0])
        return y, tuple(clusters)


class ReuseGradInput(_Piece):
    """grad_input from sums of grad_output over clusters; grad_weight comes with it and is kept for the next piece."""

    def __call__(self, grad_output: Tensor, w: Tensor, geometry: Geometry, saved: Saved) -> Tensor:
        """Return grad_input."""
        if not saved.extras:
            return arithmetic.grad_input(grad_output, w, geometry, saved)
        layer = self.layer
        grad = as_images(grad_output, geometry)
        both = w.requires_grad and "grad_weight" in layer.how.products
        grad_x, grad_w = layer.backward(grad, as_kernel(w), saved, geometry, True, both)
        layer.gradients += 1
        if both:
            layer.shared = (grad_output, grad_output._version, saved.extras[0], grad_w)
        if not geometry.conv:
            return grad_x.reshape(saved.x_like.shape)
        return in_layout_of(grad_x, saved.x_like)


class ReuseGradWeight(_Piece):
    """grad_weight from cluster means and sums of grad_output over clusters."""

    needs_x = True  # set by each forward pass: x is kept only where the layer computes densely

    def __call__(self, grad_output: Tensor, x: Tensor, geometry: Geometry, saved: Saved) -> Tensor:
        """Return grad_weight."""
        layer = self.layer
        if not saved.extras:
            return arithmetic.grad_weight(grad_output, x, geometry, saved)
        shared, layer.shared = layer.shared, None
        if (
            shared is not None
            and shared[0] is grad_output
            and shared[1] == grad_output._version
            and shared[2] is saved.extras[0]
        ):
            grad_w = shared[3]
        else:
            like = as_kernel(saved.w_like)
            # only the shape and type of w enter grad_weight
            _, grad_w = layer.backward(as_images(grad_output, geometry), like, saved, geometry, False, True)
            layer.gradients += 1
        if not geometry.conv:
            return grad_w.reshape(saved.w_like.shape).contiguous()
        return in_layout_of(grad_w, saved.w_like)


# -- shapes: a linear layer is a 1x1 convolution of images of one pixel
def as_images(x: Tensor, geometry: Geometry) -> Tensor:
    """Return x, or its gradient, as (B, C, H, W)."""
    return x if geometry.conv else x.reshape(-1, x.shape[-1], 1, 1)


def as_kernel(w: Tensor) -> Tensor:
    """Return w as (O, C, kh, kw)."""
    return w if w.dim() == 4 else w[:, :, None, None]


def as_conv(geometry: Geometry) -> Geometry:
    """Return the geometry of the convolution."""
    return geometry if geometry.conv else Geometry(True)


def pair(values: tuple[int, ...]) -> tuple[int, int]:
    """Return a pair."""
    return values[0], values[1]


def out_size(x: Tensor, w: Tensor, g: Geometry) -> tuple[int, int]:
    """Return (H', W')."""
    high = (x.shape[2] + 2 * g.padding[0] - w.shape[2]) // g.stride[0] + 1
    return high, (x.shape[3] + 2 * g.padding[1] - w.shape[3]) // g.stride[1] + 1


def padded_channels(x: Tensor, length: int) -> Tensor:
    """Return x with zero channels appended to a multiple of ``length``, which change no product."""
    short = -x.shape[1] % length
    return functional.pad(x, (0, 0, 0, 0, 0, short)) if short else x


def in_layout_of(y: Tensor, like: Tensor) -> Tensor:
    """Return y contiguous, or in channels_last where ``like`` is only that."""
    last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
