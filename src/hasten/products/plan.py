"""The plan of one layer: who changes what in its three products.

A plan is a list of claims, each with its owner (a method's name). Transforms stack; of everything else
there is one per place, and a second claim on a place is refused when it is made. So whether two methods
combine on a layer follows from what they claim, not from a table.

    place                          taken by
    transform TENSOR               any number, in the order claimed
    select in_channels             one owner; shrinks all three products
    select out_channels, PRODUCT   one owner for each of grad_input and grad_weight
    select batch, grad_weight      one owner
    kernel PRODUCT                 one owner; next to a selection of another only if it is `selectable`
    codec                          one owner
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hasten import errors
from hasten.products.arithmetic import PRODUCTS
from hasten.products.pieces import (
    Codec,
    GradInputKernel,
    GradWeightKernel,
    Kernel,
    OutputKernel,
    Selector,
    Transform,
)

TENSORS = ("x", "w", "output", "grad_output", "grad_input", "grad_weight")
DIMENSIONS = {
    "in_channels": PRODUCTS,
    "out_channels": ("grad_input", "grad_weight"),
    "batch": ("grad_weight",),
}


@dataclass(frozen=True)
class Claim:
    """One thing that one method does in a layer."""

    owner: str
    kind: str  # "transform", "select", "kernel" or "codec"
    place: str  # a tensor, a dimension, a product, or "x" for the codec
    products: tuple[str, ...]  # the products it acts on
    piece: Any

    def __str__(self) -> str:
        name = getattr(self.piece, "name", type(self.piece).__name__)
        return f"{self.owner}: {self.kind} {self.place} ({name})"


@dataclass(frozen=True, eq=False)
class Recipe:
    """What the live claims of a plan amount to, laid out for the step. Rebuilt whenever the claims change."""

    x: tuple[Transform, ...] = ()
    w: tuple[Transform, ...] = ()
    output: tuple[Transform, ...] = ()
    grad_output: tuple[tuple[Transform, bool, bool], ...] = ()  # (transform, for grad_input, for grad_weight)
    grad_input: tuple[Transform, ...] = ()
    grad_weight: tuple[Transform, ...] = ()
    in_channels: Selector | None = None
    out_input: Selector | None = None  # out_channels of grad_input
    out_weight: Selector | None = None  # out_channels of grad_weight
    out_shared: bool = False  # one claim chooses both, so it is asked once
    batch: Selector | None = None
    output_kernel: OutputKernel | None = None
    grad_input_kernel: GradInputKernel | None = None
    grad_weight_kernel: GradWeightKernel | None = None
    codec: Codec | None = None
    exact: bool = True
    plain_output: bool = True  # the output is PyTorch's own
    joint: bool = True  # both gradients come from the same operands, so one call computes them


@dataclass(eq=False)
class Plan:
    """The claims on one layer.

    ``active`` turns all of them on and off; `activate` those of one owner. While nothing is live, the layer
    runs PyTorch's own op.
    """

    layer: str = "layer"
    groups: int = 1
    active: bool = True
    claims: list[Claim] = field(default_factory=list)
    inactive: set[str] = field(default_factory=set)
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def exact(self) -> bool:
        """Whether nothing is live, so that the layer computes what plain PyTorch does, by the same op."""
        return not self.active or self.recipe.exact

    @property
    def owners(self) -> tuple[str, ...]:
        """The methods with a claim here, in the order of their first claim."""
        return tuple(dict.fromkeys(claim.owner for claim in self.claims))

    def transform(
        self,
        tensor: str,
        piece: Transform,
        owner: str,
        products: Iterable[str] = ("grad_input", "grad_weight"),
    ) -> None:
        """Append ``piece`` to the stack of ``tensor``.

        ``products`` narrows a transform of grad_output to grad_input or grad_weight. The bias gradient
        uses the same grad_output as grad_weight.
        """
        if tensor not in TENSORS:
            raise errors.unknown("tensor to transform", tensor, TENSORS, errors.SettingsError)
        wanted = _products(products, ("grad_input", "grad_weight")) if tensor == "grad_output" else ()
        self._add(Claim(owner, "transform", tensor, wanted, piece))

    def select(
        self, dimension: str, piece: Selector, owner: str, products: Iterable[str] | None = None
    ) -> None:
        """Let ``piece`` choose the indices of ``dimension`` to compute, in ``products`` (default: all).

        in_channels always shrinks all three products, because the unselected channels are not kept for the
        backward pass; their gradients are exactly 0. The unselected rows of grad_weight and of the bias
        gradient are 0 under out_channels. Raises `UnsupportedError` where channels are tied into groups.
        """
        if dimension not in DIMENSIONS:
            raise errors.unknown("dimension to select", dimension, DIMENSIONS, errors.SettingsError)
        able = DIMENSIONS[dimension]
        wanted = able if products is None else _products(products, able)
        if dimension == "in_channels" and set(wanted) != set(able):
            raise errors.SettingsError(
                f"{owner!r} asks to select in_channels for {', '.join(wanted)} only; it selects for all of "
                f"{', '.join(able)}, or for none. Leave out `products`."
            )
        if self.groups != 1 and dimension != "batch":
            raise errors.UnsupportedError(
                f"layer {self.layer!r}: {owner!r} selects {dimension}, but it has groups={self.groups}, "
                "which tie channels together; allowed: groups=1. Leave this layer out."
            )
        self._add(Claim(owner, "select", dimension, wanted, piece))

    def kernel(self, product: str, piece: Kernel, owner: str) -> None:
        """Let ``piece`` compute ``product`` ("output", "grad_input" or "grad_weight")."""
        if product not in PRODUCTS:
            raise errors.unknown("product", product, PRODUCTS, errors.SettingsError)
        self._add(Claim(owner, "kernel", product, (product,), piece))

    def codec(self, piece: Codec, owner: str) -> None:
        """Let ``piece`` store x between forward and backward."""
        self._add(Claim(owner, "codec", "x", (), piece))

    def release(self, owner: str) -> None:
        """Withdraw every claim of ``owner``."""
        self.claims = [claim for claim in self.claims if claim.owner != owner]
        self.inactive.discard(owner)
        self._rebuild()

    def activate(self, owner: str, on: bool = True) -> None:
        """Turn the claims of ``owner`` on or off, as its schedule says. They keep their places while off."""
        if owner not in self.owners:
            raise errors.unknown(f"owner of a claim on layer {self.layer!r}:", owner, self.owners)
        if on == (owner in self.inactive):
            self.inactive.symmetric_difference_update({owner})
            self._rebuild()

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        """Return a plan with its own list of claims that shares the pieces, which belong to methods."""
        twin = Plan(self.layer, self.groups, self.active, [*self.claims], {*self.inactive})
        twin._rebuild()
        memo[id(self)] = twin
        return twin

    def _add(self, claim: Claim) -> None:
        for other in self.claims:
            place = _contested(claim, other)
            if place:
                raise errors.ConflictError(
                    f"layer {self.layer!r}: {claim.owner!r} wants {place}, which {other.owner!r} already "
                    "has. Use one of the two, or give them different layers."
                )
        self.claims.append(claim)
        self._rebuild()

    def _rebuild(self) -> None:
        self.recipe = _recipe([claim for claim in self.claims if claim.owner not in self.inactive])


def _products(given: Iterable[str], allowed: tuple[str, ...]) -> tuple[str, ...]:
    asked = (given,) if isinstance(given, str) else tuple(given)
    for product in asked:
        if product not in allowed:
            raise errors.unknown("product here", product, allowed, errors.SettingsError)
    if not asked:
        raise errors.SettingsError(f"no product given; allowed: {', '.join(allowed)}.")
    return tuple(product for product in allowed if product in asked)


def _contested(new: Claim, old: Claim) -> str | None:
    """Name the place that both claims need, or None."""
    shared = [product for product in new.products if product in old.products]
    kinds = {new.kind, old.kind}
    if kinds == {"select"} and new.place == old.place and shared:
        return f"the selection of {new.place} for {' and '.join(shared)}"
    if kinds == {"kernel"} and shared:
        return f"the kernel of {shared[0]}"
    if kinds == {"codec"}:
        return "the codec of x"
    if kinds == {"kernel", "select"} and shared and new.owner != old.owner:
        kernel = new if new.kind == "kernel" else old
        if not kernel.piece.selectable:
            return f"{shared[0]} (a kernel that cannot work on a selection)"
    return None


def _recipe(claims: list[Claim]) -> Recipe:
    if not claims:
        return Recipe()
    stacks = {
        tensor: tuple(c.piece for c in claims if c.kind == "transform" and c.place == tensor)
        for tensor in TENSORS
    }
    one = {
        ("kernel" if c.kind == "kernel" else c.place, product): c.piece
        for c in claims
        if c.kind in {"select", "kernel"}
        for product in c.products
    }
    out_input = one.get(("out_channels", "grad_input"))
    out_weight = one.get(("out_channels", "grad_weight"))
    out_shared = out_input is not None and out_input is out_weight
    grad_output = tuple(
        (c.piece, "grad_input" in c.products, "grad_weight" in c.products)
        for c in claims
        if c.kind == "transform" and c.place == "grad_output"
    )
    return Recipe(
        x=stacks["x"],
        w=stacks["w"],
        output=stacks["output"],
        grad_output=grad_output,
        grad_input=stacks["grad_input"],
        grad_weight=stacks["grad_weight"],
        in_channels=one.get(("in_channels", "output")),
        out_input=out_input,
        out_weight=out_weight,
        out_shared=out_shared,
        batch=one.get(("batch", "grad_weight")),
        output_kernel=one.get(("kernel", "output")),
        grad_input_kernel=one.get(("kernel", "grad_input")),
        grad_weight_kernel=one.get(("kernel", "grad_weight")),
        codec=next((c.piece for c in claims if c.kind == "codec"), None),
        exact=False,
        plain_output=not (stacks["x"] or stacks["w"] or stacks["output"])
        and ("in_channels", "output") not in one
        and ("kernel", "output") not in one,
        joint=all(to_input and to_weight for _, to_input, to_weight in grad_output)
        and (out_shared or (out_input is None and out_weight is None))
        and not {("batch", "grad_weight"), ("kernel", "grad_input"), ("kernel", "grad_weight")} & one.keys(),
    )
