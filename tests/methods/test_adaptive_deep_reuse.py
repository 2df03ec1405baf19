"""Adaptive deep reuse: what groups are, that products are those of the grouped input, and how the ladder moves."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hasten import keyed
from hasten.errors import ConflictError, NoEffectError, NonFiniteError, SettingsError, UnsupportedError
from hasten.kernels.reference import deep_reuse as reference
from hasten.kernels.reference.deep_reuse import Clusters
from hasten.methods.products.activation_gradient_pruning import ActivationGradientPruning
from hasten.methods.products.adaptive_deep_reuse import AdaptiveDeepReuse
from hasten.methods.products.error_map_pruning import ErrorMapPruning
from hasten.methods.products.reuse_clusters import RowMemory
from hasten.methods.products.reuse_ladder import (
    DENSE,
    PRODUCTS,
    Measured,
    Rung,
    candidates,
    ladder,
    rho,
    step_finer,
)
from hasten.methods.products.reuse_plateau import Plateau
from hasten.session import Session

NAME = "adaptive_deep_reuse"


def rand(*shape: int, key: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=keyed.generator("test", key), dtype=dtype)


def network(c: int = 32, o: int = 48, kernel: int = 3) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, o, kernel, padding=kernel // 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(o, 4),
    )  # fmt: skip
    for i, p in enumerate(model.parameters()):
        p.data = rand(*p.shape, key=i) / math.sqrt(max(1, p[0].numel()))
    return model


PAPER: dict[str, Any] = {"products": PRODUCTS, "scale": "none", "max_error": 0.35}


def session(model: nn.Module, *methods: Any, total: int | None = None, **settings: Any) -> Session:
    x, y = rand(8, 3, 8, 8), torch.arange(8) % 4
    given = {"kernel": "native", "dense_share": 0.0, "layers": ("2",), **PAPER, **settings}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Session(
        model, optimizer, [*methods, AdaptiveDeepReuse(**given)], sample=(x, y), total_samples=total
    )


def run(layer: nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(g)
    found = [y.detach(), x.grad, layer.weight.grad, layer.bias.grad]
    return [t.clone() for t in found if isinstance(t, Tensor)]


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# -- groups (section 9 of the specification)


@pytest.mark.parametrize("order", ["pixel", "patch"])
def test_repeated_rows_are_exact(order: str) -> None:
    """U distinct pixels, each repeated: all products equal the dense ones and r_c = U / N."""
    distinct, times = 16, 16
    model = network(kernel=1)
    plain = copy.deepcopy(model)
    s = session(model, strategy="S1", length=16, bits=32, order=order)
    which = torch.arange(distinct).repeat(times)
    x = rand(distinct, 32)[which].view(4, 8, 8, 32).permute(0, 3, 1, 2)
    g = rand(distinct, 48, key=1)[which].view(4, 8, 8, 48).permute(0, 3, 1, 2)
    for a, b in zip(run(model[2], x, g), run(plain[2], x, g), strict=True):
        assert error(a, b) < 1e-5
    report = s.methods[0].report()["2"]  # type: ignore[attr-defined]
    assert report["r_c"] == pytest.approx(distinct / (distinct * times))


def test_one_group_is_the_mean_row() -> None:
    pieces = rand(1, 50, 12, dtype=torch.float64).abs()
    found = reference.cluster(pieces, torch.empty(12, 0), None, 1, False)
    w, bias = rand(7, 12, 1, 1, key=1, dtype=torch.float64), rand(7, key=2, dtype=torch.float64)
    y = reference.pixel_output(found, w, bias, (50, 1, 1), (1, 1), (0, 0))
    expected = pieces[0].mean(0) @ w.flatten(1).t() + bias
    assert torch.allclose(y.flatten(1), expected.expand(50, -1), atol=1e-12)


def test_many_bits_separate_random_rows() -> None:
    pieces = rand(2, 32, 24)
    found = reference.cluster(pieces, rand(24, 32, key=1), None, 1, False)
    assert found.rows.tolist() == [33, 33]
    assert error(reference.replaced(found), pieces) < 1e-6


def test_hashes_follow_the_law_of_angles() -> None:
    """P(same hash) = (1 - angle / pi)^H over random V."""
    a, b = rand(16, dtype=torch.float64), rand(16, key=1, dtype=torch.float64)
    b = 0.8 * a / a.norm() + 0.3 * b / b.norm()
    angle = float(torch.acos(a @ b / (a.norm() * b.norm())))
    draws, bits = 40_000, 4
    v = rand(16, draws * bits, key=2, dtype=torch.float64)
    same = ((a @ v > 0) == (b @ v > 0)).view(draws, bits).all(1).double().mean()
    law = (1 - angle / math.pi) ** bits
    assert abs(float(same) - law) < 5 * math.sqrt(law * (1 - law) / draws)


def test_hash_reads_the_first_bit_highest_and_zero_as_zero() -> None:
    v = torch.tensor([[1.0, 0.0, -1.0]])
    assert reference.hashes(torch.tensor([[[2.0], [-2.0], [0.0]]]), v).tolist() == [[0b100, 0b001, 0]]


def test_more_bits_never_merge_groups() -> None:
    pieces, v = rand(3, 400, 8).relu(), rand(8, 32, key=1)
    nonzero = ~(pieces == 0).all(-1)
    last = [0, 0, 0]
    for bits in (1, 2, 4, 8, 16, 32):
        found = reference.cluster(pieces, v[:, :bits], None, 1, False)
        rows = [n - 1 for n in found.rows.tolist()]
        assert all(r <= min(int(k), 2**bits) for r, k in zip(rows, nonzero.sum(1), strict=True))
        assert all(a >= b for a, b in zip(rows, last, strict=True))
        last = rows


def test_error_falls_with_more_bits_and_with_shorter_pieces() -> None:
    x = functional.avg_pool2d(rand(16, 64, 16, 16).relu(), 3, 1, 1)
    errors = {}
    for length in (16, 32, 64):
        for bits in (2, 4, 8, 16):
            total = 0.0
            for draw in range(5):
                v = rand(length, bits, key=draw)
                pieces = reference.pixel_pieces(x, length)
                total += error(reference.replaced(reference.cluster(pieces, v, None, 1, False)), pieces)
            errors[length, bits] = total / 5
    for length in (16, 32, 64):
        assert errors[length, 2] > errors[length, 4] > errors[length, 8] > errors[length, 16]
    for bits in (2, 4, 8, 16):
        assert errors[16, bits] < errors[32, bits] < errors[64, bits]


def test_sums_are_kept() -> None:
    x, v = rand(4, 16, 6, 6, dtype=torch.float64).relu(), rand(18, 6, key=1)
    w = rand(10, 16, 3, 3, key=2, dtype=torch.float64)
    pieces = reference.patch_pieces(x, (3, 3), (1, 1), (1, 1), 18)
    found = reference.cluster(pieces, v, None, 1, False)
    assert torch.allclose(reference.replaced(found).sum(1), pieces.sum(1), atol=1e-10)
    y = reference.patch_output(found, w, None, (4, 6, 6))
    exact = functional.conv2d(x, w, None, 1, 1)
    assert error(y, exact) > 0.05
    assert torch.allclose(y.sum((0, 2, 3)), exact.sum((0, 2, 3)), atol=1e-9)
    pieces = reference.pixel_pieces(x, 8)
    found = reference.cluster(pieces, v[:8], None, 1, False)
    assert torch.allclose(reference.replaced(found).sum(1), pieces.sum(1), atol=1e-10)


def test_zeros_have_a_group_of_their_own() -> None:
    pieces = rand(1, 40, 8)
    pieces[0, ::2] = 0
    found = reference.cluster(pieces, rand(8, 2, key=1), None, 1, False)
    assert (found.ids[0, ::2] == 0).all()
    assert (found.ids[0, 1::2] > 0).all()
    assert (reference.replaced(found)[0, ::2] == 0).all()


def test_images_share_no_group() -> None:
    pieces = rand(1, 8, 4).repeat(1, 3, 1)  # three equal images
    v = rand(4, 6, key=1)
    batch, image = (reference.cluster(pieces, v, None, groups, False) for groups in (1, 3))
    assert len(image.ids[0].unique()) == 3 * len(batch.ids[0].unique())
    assert (image.ids[0].view(3, 8) >= image.starts[0, :3, None]).all()


def test_norm_keeps_the_length_of_each_member() -> None:
    base = rand(1, 1, 6)
    pieces = base * torch.tensor([0.1, 1.0, 10.0, 3.0])[None, :, None]
    v = rand(6, 8, key=1)
    plain, scaled = (reference.cluster(pieces, v, None, 1, norm) for norm in (False, True))
    assert plain.rows.tolist() == scaled.rows.tolist() == [2]
    assert error(reference.replaced(plain), pieces) > 0.3
    assert error(reference.replaced(scaled), pieces) < 1e-6


# -- the layer


def through_autograd(
    layer: nn.Conv2d, x: Tensor, g: Tensor, found: Clusters, order: str, length: int
) -> list[Tensor]:
    """Gradients of "replace every piece by the mean of its group", by autograd in float64."""
    leaf, w = x.double().requires_grad_(), layer.weight.detach().double().requires_grad_()
    if order == "pixel":
        pieces = reference.pixel_pieces(leaf, length)
    else:
        pieces = reference.patch_pieces(leaf, (3, 3), (1, 1), (1, 1), length)
    index = found.ids.long()[..., None].expand_as(pieces)
    means = torch.zeros(found.means.shape, dtype=torch.float64).scatter_add(1, index, pieces)
    replaced = (means / found.counts.clamp(min=1)[..., None]).gather(1, index)
    assert layer.bias is not None
    bias = layer.bias.detach().double()
    if order == "pixel":
        b, _, h, wide = x.shape
        y = functional.conv2d(reference.pixel_image(replaced, (b, h, wide)), w, bias, 1, 1)
    else:
        rows = replaced.transpose(0, 1).flatten(1) @ w.flatten(1).t() + bias
        y = rows.view(g.shape[0], g.shape[2], g.shape[3], -1).permute(0, 3, 1, 2)
    y.backward(g.double())
    assert leaf.grad is not None
    assert w.grad is not None
    return [y.detach(), leaf.grad, w.grad, g.double().sum((0, 2, 3))]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("order", "length", "scope"),
    [("pixel", 16, "batch"), ("pixel", 32, "image"), ("patch", 9, "batch"), ("patch", 48, "image")],
)
def test_products_are_those_of_autograd(
    order: str, length: int, scope: str, layout: torch.memory_format
) -> None:
    model = network().to(memory_format=layout)  # type: ignore[call-overload]
    s = session(model, strategy="S1", length=length, bits=8, order=order, scope=scope)
    x = rand(8, 32, 8, 8).relu().contiguous(memory_format=layout)
    g = rand(8, 48, 8, 8, key=3).contiguous(memory_format=layout)
    got = run(model[2], x, g)
    layer = s.methods[0].layers_["2"]  # type: ignore[attr-defined]
    found = layer.cluster(x, model[2].weight, _geometry(), Rung(length, 8))
    expected = through_autograd(model[2], x, g, found, order, length)  # type: ignore[arg-type]
    for name, a, b in zip(("output", "grad_input", "grad_weight", "grad_bias"), got, expected, strict=True):
        assert error(a.double(), b) < 2e-6, name
        assert a.is_contiguous(memory_format=layout) or a.dim() < 4, name
    exact = functional.conv2d(x, model[2].weight, model[2].bias, 1, 1)
    assert error(got[0], exact.detach()) > 0.05, "nothing was grouped"


def _geometry() -> Any:
    from hasten.products import Geometry

    return Geometry(True, (1, 1), (1, 1))


def test_patch_gradients_pass_gradcheck() -> None:
    x, w = rand(2, 4, 4, 4, dtype=torch.float64), rand(3, 4, 3, 3, key=1, dtype=torch.float64)
    found = reference.cluster(
        reference.patch_pieces(x, (3, 3), (2, 2), (1, 1), 6), rand(6, 2, key=2), None, 1, False
    )

    class Reuse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            pieces = reference.patch_pieces(x, (3, 3), (2, 2), (1, 1), 6)
            index = found.ids.long()[..., None].expand_as(pieces)
            means = torch.zeros(found.means.shape, dtype=x.dtype).scatter_add(1, index, pieces)
            ctx.found = found._replace(means=means / found.counts.clamp(min=1)[..., None])
            ctx.save_for_backward(w)
            return reference.patch_output(ctx.found, w, None, (2, 2, 2))

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return reference.patch_gradients(grads[0], ctx.found, *ctx.saved_tensors, (4, 4), (2, 2), (1, 1))

    def reuse(*given: Tensor) -> Tensor:
        y: Tensor = Reuse.apply(*given)  # type: ignore[no-untyped-call]
        return y

    assert torch.autograd.gradcheck(reuse, (x.requires_grad_(), w.requires_grad_()))


@pytest.mark.parametrize(
    "products", [("output",), ("output", "grad_weight"), ("output", "grad_input"), PRODUCTS]
)
def test_products_that_are_left_out_are_exact(products: tuple[str, ...]) -> None:
    model = network()
    plain = copy.deepcopy(model)
    s = session(model, strategy="S1", length=16, bits=6, products=products, scale="norm")
    assert s.methods[0].writes == set(products)
    x, g = rand(8, 32, 8, 8).relu(), rand(8, 48, 8, 8, key=3)
    for name, a, b in zip(
        ("output", "grad_input", "grad_weight"), run(model[2], x, g), run(plain[2], x, g), strict=False
    ):
        assert error(a, b) > 0.05 if name in products else error(a, b) < 1e-5, name


def test_gradients_may_be_another_methods() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(inplace=True),
                          nn.Flatten(), nn.Linear(48 * 64, 4))  # fmt: skip
    pruning = ActivationGradientPruning(p=0.0, kernel="native", layers=("2",))
    s = session(model, pruning, strategy="S1", length=16, bits=6, products=("output",))
    s.step(rand(8, 3, 8, 8), torch.arange(8) % 4)
    witness = s.witness()
    assert witness[NAME]["outputs"] == 1
    assert witness[NAME]["gradients"] == 0
    assert any(witness["activation_gradient_pruning"].values())
    with pytest.raises(ConflictError, match="grad_weight"):
        session(network(), pruning, strategy="S1", length=16, bits=6, products=("output", "grad_weight"))


def test_linear_is_a_convolution_of_one_pixel() -> None:
    x = rand(64, 32)[torch.arange(256) % 16]
    model = nn.Sequential(nn.Linear(32, 40), nn.ReLU(), nn.Linear(40, 4))
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = AdaptiveDeepReuse(
        strategy="S1", length=8, bits=24, linear=True, layers=("0",), dense_share=0.0, kernel="native"
    )
    s = Session(model, optimizer, [method], sample=(x, torch.zeros(256).long()))
    g = rand(16, 40, key=1)[torch.arange(256) % 16]
    for a, b in zip(run(model[0], x, g), run(plain[0], x, g), strict=True):
        assert error(a, b) < 1e-5
    assert s.witness()[NAME]["outputs"] == 1


def test_padding_the_last_block_changes_nothing() -> None:
    model = network(c=24)
    s = session(model, strategy="S1", length=16, bits=12, pad_last_block=True)
    x, g = rand(8, 24, 8, 8).relu(), rand(8, 48, 8, 8, key=3)
    got = run(model[2], x, g)
    wide = network(c=32)
    wide[2].weight.data = functional.pad(model[2].weight.detach(), (0, 0, 0, 0, 0, 8))
    wide[2].bias.data = model[2].bias.detach().clone()
    session(wide, strategy="S1", length=16, bits=12)
    expected = run(wide[2], functional.pad(x, (0, 0, 0, 0, 0, 8)), g)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1][:, :24])
    assert torch.equal(got[2], expected[2][:, :24])
    assert s.witness()[NAME]["outputs"] == 1


def test_bias_gradient_is_exact_and_evaluation_too() -> None:
    model = network()
    plain = copy.deepcopy(model)
    session(model, strategy="S1", length=32, bits=4)
    x, g = rand(8, 32, 8, 8), rand(8, 48, 8, 8, key=3)
    assert error(run(model[2], x, g)[3], run(plain[2], x, g)[3]) < 1e-6
    images = rand(8, 3, 8, 8)
    assert torch.equal(model.eval()(images), plain.eval()(images))


def test_kernel_dense_is_plain_training() -> None:
    plain, model = network(), network()
    s = session(model, kernel="dense")
    x, y = rand(8, 3, 8, 8), torch.arange(8) % 4
    other = Session(plain, torch.optim.SGD(plain.parameters(), lr=0.1), [], sample=(x, y))
    for _ in range(3):
        assert torch.equal(s.step(x, y), other.step(x, y))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_what_is_not_finite_is_refused() -> None:
    for order, length in (("pixel", 16), ("patch", 9)):
        model = network()
        session(model, strategy="S1", length=length, bits=8, order=order)
        x = rand(8, 32, 8, 8)
        x[3, 20, 1, 1] = float("nan")
        with pytest.raises(NonFiniteError, match="layer '2'"):
            model[2](x)


def test_gradients_of_gradients_are_refused() -> None:
    model = network()
    session(model, strategy="S1", length=16, bits=8)
    x = rand(8, 32, 8, 8).requires_grad_()
    y = model[2](x)
    with pytest.raises(UnsupportedError, match="gradient of a gradient"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


# -- rows reused across batches


def test_rows_of_earlier_batches_are_taken_until_they_are_too_old() -> None:
    memory = RowMemory(max_age=2)
    pieces, v = rand(2, 30, 8), rand(8, 4, key=1)
    found = reference.cluster(pieces, v, None, 1, False)
    w = rand(5, 16, 3, 3, key=2)
    z, first = memory.products(found, w, 0)
    exact, where = reference.pixel_products(found, w)
    assert torch.allclose(z, exact, atol=1e-5)
    assert torch.equal(first, where)
    assert memory.found == 0
    again, _ = memory.products(found, 2 * w, 2)  # stale: the weights have moved
    assert torch.equal(again, z)
    assert memory.found == memory.asked // 2 > 0
    fresh, _ = memory.products(found, 2 * w, 3)
    assert torch.allclose(fresh, 2 * exact, atol=1e-5)
    other = reference.cluster(rand(2, 30, 8, key=5), v, None, 1, False)
    mixed, _ = memory.products(other, w, 4)
    rows, _ = reference.pixel_products(other, w)
    known = set(found.keys[0, 1 : int(found.rows[0])].tolist())
    for row in range(1, int(other.rows[0])):
        stored = int(other.keys[0, row]) in known
        assert torch.allclose(mixed[row], rows[row], atol=1e-5) != stored


def test_reused_rows_leave_the_gradient_of_this_batch() -> None:
    model = network()
    s = session(model, strategy="S1", length=16, bits=6, scope="across_batch")
    layer = s.methods[0].layers_["2"]  # type: ignore[attr-defined]
    x, g = rand(8, 32, 8, 8).relu(), rand(8, 48, 8, 8, key=3)
    first = run(model[2], x, g)
    with torch.no_grad():
        model[2].weight *= 2
    again = run(model[2], x, g)
    assert layer.memory.found > 0
    assert torch.allclose(again[0], first[0], atol=1e-5), "rows are those of the earlier weights"
    assert torch.equal(again[2], first[2]), "grad_weight has no stale part"
    assert torch.allclose(again[1], 2 * first[1], atol=1e-5)
    with s.inference() as forward:
        forward(rand(8, 3, 8, 8))
    assert not len(layer.memory.keys)


# -- the ladder


def test_cost_model() -> None:
    rung = Rung(32, 16)
    assert rho(rung, 256, 0.1, 2.0) == pytest.approx((16 / 256 + 0.3 + 4 / 32 + 2 / 256) / 3)
    assert rho(rung, 256, 0.1, 2.0, 1, 64.0) == pytest.approx(rho(rung, 256, 0.1, 2.0) + 0.25)
    assert rho(rung, 256, 0.1, 2.0, taps=9) < rho(rung, 256, 0.1, 2.0)
    some = {len(p): rho(rung, 256, 0.1, 2.0, reused=p) for p in (PRODUCTS[:1], PRODUCTS[::2], PRODUCTS)}
    assert some[3] == rho(rung, 256, 0.1, 2.0)
    assert some[2] == pytest.approx((16 / 256 + 0.2 + 4 / 32 + 1 / 256) / 2)
    assert some[1] == pytest.approx(16 / 256 + 0.1 + 2 / 32 + 1 / 256)


def test_candidates_divide_the_channels() -> None:
    assert {r.length for r in candidates(96, 16, (), (8,), 64)} == {16, 32, 48, 96}
    assert {r.length for r in candidates(576, 3, (), (8,), 64)} >= {3, 9, 36, 576}
    assert [*candidates(64, 16, (8, 32, 5), (8, 64, 65), 64)] == [Rung(8, 8), Rung(32, 8)]


def test_ladder_is_the_front_from_coarse_to_fine() -> None:
    found = [
        Measured(Rung(32, h), 0.1, e, c)
        for h, e, c in [
            (1, 0.5, 0.1),
            (2, 0.3, 0.2),
            (3, 0.35, 0.25),
            (4, 0.2, 0.5),
            (5, 0.1, 0.95),
            (6, 0.15, 0.6),
        ]
    ]
    assert [m.rung.bits for m in ladder(found, 0.9, 0.4)] == [2, 4, 6]
    assert not ladder(found, 0.05)
    front = ladder(found, 0.9)
    assert [m.rung.bits for m in front] == [1, 2, 4, 6]
    assert [step_finer(front, 0.5, left).bits for left in (9, 3, 2, 1)] == [2, 2, 4, 6]
    assert step_finer(front, 0.5, 0) == DENSE
    assert step_finer(front, 0.15, 3) == DENSE


@pytest.mark.parametrize("limit", [0.1, 0.25, 0.4, 0.6, 0.001])
def test_a_search_finds_the_rung_that_measuring_all_would(limit: float) -> None:
    model = network(c=64, o=64)
    s = session(model, strategy="S2", overhead=0.0)
    layer = s.methods[0].layers_["2"]  # type: ignore[attr-defined]
    x = functional.avg_pool2d(rand(16, 64, 8, 8).relu(), 3, 1, 1)
    given = (x, model[2].weight.detach(), None, _geometry())
    everything, some = layer.measure(*given), layer.measure(*given, limit)
    assert {m for m in some if m.error < math.inf} < set(everything)
    assert len(some) <= 4 * len({m.rung.length for m in everything})
    best, found = (ladder(each, 0.9, limit)[:1] for each in (everything, some))
    assert found == best
    assert bool(best) == (limit > 0.2)


@pytest.mark.parametrize("order", ["pixel", "patch"])
@pytest.mark.parametrize("scale", ["none", "norm"])
def test_centred_hashes_err_less_on_rectified_inputs(order: str, scale: str) -> None:
    errors = {}
    for center in (False, True):
        model = network()
        s = session(model, strategy="S1", length=16, bits=8, order=order, scale=scale, center_hash=center)
        x = functional.avg_pool2d(rand(20, 32, 8, 8).relu(), 3, 1, 1)
        with torch.no_grad():
            exact = functional.conv2d(x, model[2].weight, model[2].bias, 1, 1)
            model.train()
            errors[center] = error(model[2](x), exact)
        assert s.witness()[NAME]["outputs"] > 0
    assert errors[True] < 0.9 * errors[False]


def test_plateau_fires_on_a_flat_loss_only() -> None:
    flat, falling = Plateau(), Plateau()
    noise = rand(600).tolist()
    fired = {"flat": 0, "falling": 0}
    for epoch in range(6):
        for step in range(100):
            at = 100 * epoch + step
            flat.step(1 + 0.01 * noise[at])
            falling.step(2 * 0.995**at + 0.01 * noise[at])
        fired["flat"] += flat.epoch()
        fired["falling"] += falling.epoch()
    assert fired["flat"] >= 4
    assert fired["falling"] == 0
    twin = Plateau()
    twin.load(flat.state())
    assert twin == flat


def train(s: Session, epochs: range, steps: int = 4) -> list[float]:
    x, y = rand(8, 3, 8, 8), torch.arange(8) % 4
    losses = []
    for epoch in epochs:
        s.start_epoch(epoch)
        losses += [s.step(x + 0.01 * epoch, y).item() for _ in range(steps)]
    return losses


def flat(model: nn.Module) -> nn.Module:
    """Return the model with outputs that no step can change much, so that the loss stays."""
    model[-1].weight.data.zero_()  # type: ignore[index, union-attr]
    for p in model.parameters():
        p.requires_grad_(p is next(iter(model[2].parameters())))  # type: ignore[index]
    return model


def test_the_ladder_is_climbed_to_the_dense_layer() -> None:
    model = flat(network(c=64, o=64))
    s = session(model, max_error=1.0, bit_counts=(2, 6, 12), rungs=3, overhead=0.0)
    method = s.methods[0]
    assert isinstance(method, AdaptiveDeepReuse)
    errors, rungs = [], []
    for epoch in range(7):
        train(s, range(epoch, epoch + 1))
        layer = method.layers_["2"]
        rungs.append(layer.rung)
        errors.append(layer.limit)
    assert rungs[0] == rungs[1], "the first epoch only sets the mark"
    assert rungs[-1] == DENSE
    assert len(dict.fromkeys(rungs)) == 4, "three rungs and the dense layer"
    assert all(b < 1.01 * a for a, b in itertools.pairwise(errors))
    moves = s.witness()[NAME]["moves"]
    assert moves == 3
    assert model[2].plan.exact
    assert method.report()["2"]["dense"] == "the last rung is dense"


def test_a_falling_loss_keeps_the_rung() -> None:
    model = network(c=64, o=64)
    s = session(model, max_error=1.0, improvement=0.0, decay=0.0)
    losses = train(s, range(4))
    assert losses[-1] < losses[0]
    assert s.witness()[NAME]["moves"] == 0
    assert s.witness()[NAME]["layers"] == 1


def test_s3_stops_reusing_rows_on_a_plateau() -> None:
    model = flat(network())
    s = session(model, strategy="S3", scope="across_batch", length=16, bits=6)
    method = s.methods[0]
    assert isinstance(method, AdaptiveDeepReuse)
    train(s, range(2))
    layer = method.layers_["2"]
    assert layer.reuse_rows
    assert layer.memory.found > 0
    train(s, range(2, 4))
    assert not layer.reuse_rows
    assert not len(layer.memory.keys)
    assert layer.rung == Rung(16, 6)
    assert s.witness()[NAME]["moves"] == 1


def test_the_end_of_the_run_is_exact() -> None:
    model, plain = network(), network()
    s = session(model, strategy="S1", length=32, bits=4, dense_share=0.25, total=64)
    x, y = rand(8, 3, 8, 8), torch.arange(8) % 4
    exact = []
    for _ in range(8):
        s.step(x, y)
        exact.append(model[2].plan.exact)
    assert exact == [False] * 5 + [True] * 3  # the step that reaches 75% of the samples is exact already
    assert s.witness()[NAME]["steps"] == 5
    with pytest.raises(UnsupportedError, match="total_samples"):
        session(plain, dense_share=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_error": 1.0, "bit_counts": (2, 6, 12), "rungs": 3, "overhead": 0.0},
        {"strategy": "S3", "scope": "across_batch", "length": 16, "bits": 6},
    ],
)
def test_resume_is_exact_across_moves(settings: dict[str, Any]) -> None:
    whole = session(flat(network(c=64, o=64)), **settings)
    train(whole, range(2))
    state = copy.deepcopy(whole.state_dict())
    after = train(whole, range(2, 6))
    again = session(flat(network(c=64, o=64)), **settings)
    again.load_state_dict(state)
    assert train(again, range(2, 6)) == after
    assert again.witness() == whole.witness()
    assert whole.witness()[NAME]["moves"] > 0
    assert again.methods[0].report() == whole.methods[0].report()  # type: ignore[attr-defined]


def test_the_probe_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.kernels import probe

    asked: list[str] = []
    for answer in ("dense", "native"):

        def choose(key: str, ways: Any, answer: str = answer, **_: Any) -> str:
            asked.append(key)
            assert list(ways) == ["dense", "native"]
            for way in ways.values():
                way()
            return answer

        monkeypatch.setattr(probe, "choose", choose)
        model = network(c=64, o=64)
        s = session(model, kernel="auto", max_error=1.0)
        train(s, range(1))
        assert model[2].plan.exact == (answer == "dense")
        assert (s.witness()[NAME]["outputs"] > 0) == (answer == "native")
    assert len(asked) == 2


@pytest.mark.parametrize("answers", ["ddnn", "dddd"])
def test_the_first_rung_is_chosen_anew_for_three_epochs(
    answers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hasten.kernels import probe

    told = iter(answers)
    count = []

    def choose(key: str, ways: Any, **_: Any) -> str:
        count.append(key)
        return {"d": "dense", "n": "native"}[next(told)]

    monkeypatch.setattr(probe, "choose", choose)
    model = network(c=64, o=64)
    s = session(model, kernel="auto", max_error=1.0, patience_epochs=100)
    train(s, range(6))
    assert len(count) == 4
    assert model[2].plan.exact == ("n" not in answers)


def test_a_cost_that_is_too_high_leaves_the_layer_dense() -> None:
    model = network()
    s = session(model, strategy="S1", length=16, bits=32, kernel="auto", max_rho=0.5, overhead=0.0)
    x, y = rand(8, 3, 8, 8), torch.arange(8) % 4
    s.step(x, y)
    assert model[2].plan.exact
    assert "no setting has rho < 0.5" in s.methods[0].report()["2"]["dense"]  # type: ignore[attr-defined]


# -- what is refused


def test_layers_that_cannot_be_reused_are_named() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, groups=4), nn.Conv2d(32, 32, 3, dilation=2, padding=2),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular"), nn.ConvTranspose2d(32, 32, 3),
        nn.Conv2d(32, 4, 1), nn.Conv2d(4, 32, 1), nn.Conv2d(32, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    effect = session(model, layers=(), bit_counts=(6,)).effects[NAME]
    assert set(effect.touched) == {"7"}
    words = {
        "0": "no L fits",
        "1": "groups=4",
        "2": "dilation=(2, 2)",
        "3": "'circular'",
        "5": "fewer bits",
        "6": "no L fits",
    }
    for name, word in words.items():
        assert word in effect.skipped[name]
    for name, word in {
        "1": "groups=1 only, layer 1 has groups=4",
        "4": "transposed",
        "3": "circular",
    }.items():
        with pytest.raises(ValueError, match=word):
            session(copy.deepcopy(model), layers=(name,))
    with pytest.raises(ValueError, match="L=7 does not divide C=32; valid: 1,2,4,8,16,32"):
        session(network(), strategy="S1", length=7, bits=4)
    with pytest.raises(ValueError, match="L=7 does not divide K=27; valid: 1,3,9,27"):
        session(network(), strategy="S1", length=7, bits=4, order="patch", layers=("0",))
    with pytest.raises(NoEffectError, match="H=32 bits of hash for 32 outputs"):
        session(network(o=32), strategy="S1", length=16, bits=32)
    with pytest.raises(NoEffectError, match="hashing and gathering alone cost"):
        session(network(), strategy="S1", length=16, bits=8, a=50.0, kernel="auto")


def test_another_kernel_or_selection_of_the_layer_is_refused() -> None:
    with pytest.raises(ConflictError, match="error_map_pruning"):
        session(network(), ErrorMapPruning(), strategy="S1", length=16, bits=8)


@pytest.mark.parametrize(
    "settings",
    [{"bits": 0}, {"bits": 33}, {"length": 0}, {"strategy": "S4"}, {"order": "row"}, {"scope": "world"}, {"scale": "l2"},
     {"kernel": "fast"}, {"bit_counts": ()}, {"bit_counts": (40,)}, {"rungs": 0}, {"a": 0.0}, {"max_rho": 0.0},
     {"decay": 1.0}, {"dense_share": 1.0}, {"strategy": "S3"}, {"scope": "across_batch", "center_hash": True},
     {"scope": "across_batch", "order": "patch"}, {"patience_epochs": 0}],
)  # fmt: skip
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        AdaptiveDeepReuse(**settings)
