"""Deep reuse: every form of the kernels against the reference, and the reference against autograd and the dense layer."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.support import each_isa, instruction_set, layouts, poisoned_memory
from torch import Tensor
from torch.nn import functional

from hasten.errors import NonFiniteError, UnsupportedError
from hasten.kernels.deep_reuse import deep_reuse_cluster, deep_reuse_gradients, deep_reuse_output
from hasten.kernels.reference import deep_reuse as reference
from hasten.kernels.reference.deep_reuse import Clusters

# batch, C, H, W, O, kernel, stride, padding, L, bits, groups, norm, bias
CASES = {
    "plain": (4, 32, 5, 6, 40, (3, 3), 1, 1, 16, 6, 1, False, True),
    "strided, by image": (4, 24, 7, 5, 33, (3, 3), 2, 1, 8, 5, 4, False, False),
    "five by five, norms": (2, 20, 6, 6, 65, (5, 5), 1, 2, 5, 20, 1, True, True),
    "one by one, 32 bits": (3, 16, 4, 4, 16, (1, 1), 1, 0, 16, 32, 3, False, True),
    "no padding, norms": (2, 8, 9, 9, 7, (3, 3), 1, 0, 4, 3, 1, True, False),
    "even kernel, stride 3": (2, 8, 9, 9, 7, (2, 2), 3, 1, 4, 3, 2, True, False),
    "wide padding, odd kernel": (2, 8, 3, 2, 5, (3, 7), 1, 4, 8, 4, 1, False, False),
    "small, norms": (2, 4, 3, 3, 5, (3, 3), 2, 1, 2, 3, 2, True, True),
    "small": (2, 4, 3, 2, 3, (2, 2), 1, 0, 4, 3, 1, False, False),
    "one pixel": (7, 48, 1, 1, 70, (1, 1), 1, 0, 48, 12, 1, False, True),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return (x, v, w, bias, grad_output) whose projections are exact in float32, so that every form hashes alike."""
    b, c, h, wide, o, kernel, stride, padding, length, bits, _, _, _ = CASES[name]
    g = torch.Generator().manual_seed(len(name))
    x = torch.randint(-8, 9, (b, c, h, wide), generator=g).relu() / 8
    x[:, : c // 4] *= torch.randint(0, 2, (b, 1, h, wide), generator=g)
    x[:, :length] *= torch.randint(0, 2, (b, 1, h, wide), generator=g)
    v = torch.randint(-16, 17, (length, bits), generator=g) / 8
    w, bias = torch.randn(o, c, *kernel, generator=g), torch.randn(o, generator=g)
    like = functional.conv2d(x, w, None, stride, padding)
    grad = torch.randn(like.shape, generator=g)
    return x.to(dtype), v, w.to(dtype), bias.to(dtype), grad.to(dtype)


def how(name: str) -> tuple[list[int], list[int], list[int]]:
    b, _, h, wide, _, _, stride, padding, *_ = CASES[name]
    return [b, h, wide], [stride, stride], [padding, padding]


def close(a: Tensor, b: Tensor, within: float = 2e-6) -> bool:
    """Compare to `within` of the largest element; NaN is never close."""
    return a.shape == b.shape and bool((a - b).abs().max() <= within * b.abs().max().clamp(min=1e-6) * 10)


def same_clusters(got: Clusters, expected: Clusters) -> None:
    assert torch.equal(got.ids, expected.ids)
    assert torch.equal(got.starts, expected.starts)
    for block, n in enumerate(expected.rows.tolist()):
        assert torch.equal(got.keys[block, :n], expected.keys[block, :n])
        assert torch.equal(got.counts[block, :n], expected.counts[block, :n])
        assert torch.allclose(got.means[block, :n], expected.means[block, :n], atol=1e-6)
    assert torch.allclose(got.scale, expected.scale, atol=1e-6)


def by_reference(name: str, x: Tensor, v: Tensor) -> Clusters:
    length, _, groups, norm, _ = CASES[name][8:]
    return reference.cluster(reference.pixel_pieces(x, length), v, None, groups, norm)


@each_isa
@pytest.mark.parametrize("name", CASES)
def test_every_form_equals_the_reference(isa: str, name: str) -> None:
    x, v, w, bias, grad = make(name)
    (shape, stride, padding), groups, norm = how(name), CASES[name][10], CASES[name][11]
    some_bias = bias if CASES[name][12] else None
    expected = by_reference(name, x, v)
    with instruction_set(isa), poisoned_memory():
        got = Clusters(*deep_reuse_cluster(x, v, None, groups, norm))
        y = deep_reuse_output(got, w, some_bias, None, None, shape, stride, padding)
        gx, gw = deep_reuse_gradients(grad, got, w, shape, stride, padding, True, True)
        z, first = reference.pixel_products(expected, w)
        assembled = deep_reuse_output(got, w, some_bias, z, first, shape, stride, padding)
        only_x, none = deep_reuse_gradients(grad, got, w, shape, stride, padding, True, False)
        nothing, only_w = deep_reuse_gradients(grad, got, w, shape, stride, padding, False, True)
    same_clusters(got, expected)
    args = ((shape[0], shape[1], shape[2]), (stride[0], stride[1]), (padding[0], padding[1]))
    assert close(y, reference.pixel_output(expected, w, some_bias, *args))
    assert close(assembled, y)
    ex, ew = reference.pixel_gradients(grad, expected, w, *args)
    assert close(gx, ex)
    assert close(gw, ew)
    assert torch.equal(only_x, gx)
    assert torch.equal(only_w, gw)
    assert none.numel() == nothing.numel() == 0


@pytest.mark.parametrize("name", CASES)
def test_assembling_rows_equals_the_convolution(name: str) -> None:
    x, v, w, bias, _ = make(name, torch.float64)
    found = by_reference(name, x, v)
    (b, h, wide), stride, padding = how(name)
    args = ((b, h, wide), (stride[0], stride[1]), (padding[0], padding[1]))
    z, first = reference.pixel_products(found, w)
    y = reference.pixel_assembled(found, z, first, w, bias, *args)
    assert close(y, reference.pixel_output(found, w, bias, *args), 1e-12)


@each_isa
def test_bfloat16(isa: str) -> None:
    name = "plain"
    x, v, w, bias, grad = make(name, torch.bfloat16)
    shape, stride, padding = how(name)
    expected = by_reference(name, x, v)
    with instruction_set(isa), poisoned_memory():
        got = Clusters(*deep_reuse_cluster(x, v, None, 1, False))
        y = deep_reuse_output(got, w, bias, None, None, shape, stride, padding)
        gx, gw = deep_reuse_gradients(grad, got, w, shape, stride, padding, True, True)
    same_clusters(got, expected)
    assert y.dtype == gx.dtype == gw.dtype == torch.bfloat16
    wide = [t.float() for t in (w, bias, grad)]
    assert close(
        y.float(), reference.pixel_output(expected, wide[0], wide[1], (4, 5, 6), (1, 1), (1, 1)), 4e-4
    )
    ex, ew = reference.pixel_gradients(wide[2], expected, wide[0], (4, 5, 6), (1, 1), (1, 1))
    assert close(gx.float(), ex, 4e-4)
    assert close(gw.float(), ew, 4e-4)


@each_isa
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_memory_layouts(isa: str, layout: str) -> None:
    name = "plain"
    x, v, w, bias, grad = (t if t.dim() != 4 else layouts(t)[layout] for t in make(name))
    shape, stride, padding = how(name)
    expected = by_reference(name, x, v)
    with instruction_set(isa), poisoned_memory():
        got = Clusters(*deep_reuse_cluster(x, v, None, 1, False))
        y = deep_reuse_output(got, w, bias, None, None, shape, stride, padding)
        gx, gw = deep_reuse_gradients(grad, got, w, shape, stride, padding, True, True)
    same_clusters(got, expected)
    args = ((4, 5, 6), (1, 1), (1, 1))
    assert close(y, reference.pixel_output(expected, w, bias, *args))
    ex, ew = reference.pixel_gradients(grad, expected, w, *args)
    assert close(gx, ex)
    assert close(gw, ew)


@each_isa
def test_large_sums_and_many_rows(isa: str) -> None:
    """More products than are held at once, several tiles, and a share of rows that fill no block of a loop."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(4, 64, 16, 16, generator=g)
    w, bias = torch.randn(70, 64, 3, 3, generator=g), torch.randn(70, generator=g)
    v = torch.randn(32, 14, generator=g)
    with instruction_set(isa):
        got = Clusters(*deep_reuse_cluster(x, v, None, 1, False))
        y = deep_reuse_output(got, w, bias, None, None, [4, 16, 16], [1, 1], [1, 1])
        grad = torch.randn(y.shape, generator=g)
        gx, gw = deep_reuse_gradients(grad, got, w, [4, 16, 16], [1, 1], [1, 1], True, True)
    # rounding may turn single bits of a hash, so the clusters are taken as they are, in float64
    exact = got._replace(means=means_of(got, x).double())
    args = ((4, 16, 16), (1, 1), (1, 1))
    assert torch.allclose(got.means[0, :9].double(), exact.means[0, :9], atol=1e-5)
    assert close(y.double(), reference.pixel_output(exact, w.double(), bias.double(), *args))
    ex, ew = reference.pixel_gradients(grad.double(), exact, w.double(), *args)
    assert close(gx.double(), ex)
    assert close(gw.double(), ew)
    expected = reference.hashes(reference.pixel_pieces(x, 32).double(), v)
    keys = got.keys.gather(1, got.ids.long()).long()
    assert (keys != expected).double().mean() < 1e-3


def means_of(found: Clusters, x: Tensor) -> Tensor:
    pieces = reference.pixel_pieces(x, found.means.shape[-1]).double()
    index = found.ids.long()
    sums = pieces.new_zeros(found.means.shape).scatter_add_(1, index[..., None].expand_as(pieces), pieces)
    return sums / found.counts.clamp(min=1)[..., None].double()


@each_isa
@pytest.mark.parametrize("norm", [False, True])
def test_thresholds_move_the_hashes(isa: str, norm: bool) -> None:
    x, v, *_ = make("plain")
    shift = torch.arange(12.0).view(2, 6) / 8 - 0.5
    pieces = reference.pixel_pieces(x, 16)
    with instruction_set(isa):
        got = Clusters(*deep_reuse_cluster(x, v, shift, 1, norm))
    same_clusters(got, reference.cluster(pieces, v, shift, 1, norm))
    plain = reference.cluster(pieces, v, None, 1, norm)
    assert not torch.equal(got.ids, plain.ids)


@each_isa
def test_thresholds_of_unit_vectors_do_not_see_lengths(isa: str) -> None:
    x, v, *_ = make("plain")
    shift = torch.arange(12.0).view(2, 6) / 8 - 0.5
    longer = x * 2.0 ** torch.arange(4.0).view(4, 1, 1, 1)
    with instruction_set(isa):
        a, b = (Clusters(*deep_reuse_cluster(each, v, shift, 1, True)) for each in (x, longer))
    assert torch.equal(a.ids, b.ids)
    unit = functional.normalize(reference.pixel_pieces(x, 16), dim=-1)
    expected = reference.hashes(unit.double(), v, shift)
    keys = a.keys.gather(1, a.ids.long()).long()
    assert (keys != expected)[unit.any(-1)].double().mean() < 1e-2


def test_results_do_not_depend_on_threads() -> None:
    x, v, w, bias, grad = make("plain")
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            got = Clusters(*deep_reuse_cluster(x, v, None, 1, False))
            y = deep_reuse_output(got, w, bias, None, None, [4, 5, 6], [1, 1], [1, 1])
            results.append(
                (got.ids, y, *deep_reuse_gradients(grad, got, w, [4, 5, 6], [1, 1], [1, 1], True, True))
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_are_those_of_the_replaced_input() -> None:
    """Autograd through "replace every piece by the mean of its cluster", clusters held fixed, in float64."""
    for name in ("strided, by image", "five by five, norms"):
        x, v, w, bias, grad = make(name, torch.float64)
        found = by_reference(name, x, v)
        (b, h, wide), stride, padding = how(name)
        leaf, kernel = x.clone().requires_grad_(), w.clone().requires_grad_()
        pieces = reference.pixel_pieces(leaf, found.means.shape[-1])
        unit = pieces / found.scale[..., None] if found.scale.numel() else pieces
        index = found.ids.long()[..., None].expand_as(unit)
        means = torch.zeros(found.means.shape, dtype=torch.float64).scatter_add(1, index, unit)
        means = means / found.counts.clamp(min=1)[..., None]
        replaced = means.gather(1, index)
        if found.scale.numel():
            replaced = replaced * found.scale[..., None]
        y = functional.conv2d(reference.pixel_image(replaced, (b, h, wide)), kernel, bias, stride, padding)
        y.backward(grad)
        args = ((b, h, wide), (stride[0], stride[1]), (padding[0], padding[1]))
        assert close(reference.pixel_output(found, w, bias, *args), y.detach(), 1e-12)
        gx, gw = reference.pixel_gradients(grad, found, w, *args)
        assert leaf.grad is not None
        assert kernel.grad is not None
        assert close(gw, kernel.grad, 1e-12)
        if not found.scale.numel():
            assert close(gx, leaf.grad, 1e-12)
            continue
        dense = torch.nn.grad.conv2d_input(x.shape, w, grad, stride, padding)
        dense, mean = (reference.pixel_pieces(t, found.means.shape[-1]) for t in (dense, gx))
        for block, ids in enumerate(found.ids):
            for row in ids.unique():
                s, g = found.scale[block, ids == row], dense[block, ids == row]
                assert close(mean[block, ids == row], ((s @ g) / s.sum()).expand_as(g), 1e-12)


def test_a_short_piece_among_long_ones_has_no_larger_gradient_than_they() -> None:
    x, v = torch.ones(2, 8, 4, 4), torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    x[0] *= 1e-6
    w, grad = torch.randn(16, 8, 1, 1), torch.randn(2, 16, 4, 4)
    found = Clusters(*deep_reuse_cluster(x, v, None, 1, True))
    gx, _ = deep_reuse_gradients(grad, found, w, [2, 4, 4], [1, 1], [0, 0], True, True)
    assert gx.abs().max() <= functional.conv_transpose2d(grad, w).abs().max() * (1 + 1e-5)


@each_isa
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(isa: str, bad: float) -> None:
    x, v, *_ = make("plain")
    x[3, 31, 4, 5] = bad
    with instruction_set(isa), pytest.raises(NonFiniteError, match="infinite or not a number"):
        deep_reuse_cluster(x, v, None, 1, False)


def test_largest_numbers_are_finite() -> None:
    x, v, *_ = make("plain")
    x[0, 0], x[0, 1] = 3e38, 1e-38
    assert deep_reuse_cluster(x, v, None, 1, False)[0].shape == (2, 120)


def test_what_does_not_fit_is_refused() -> None:
    x, v, *_ = make("plain")
    with pytest.raises(UnsupportedError, match="L=7 does not divide C=32; valid: 1, 2, 4, 8, 16, 32"):
        deep_reuse_cluster(x, v[:7], None, 1, False)
    with pytest.raises(UnsupportedError, match="groups=3 must divide the batch of 4"):
        deep_reuse_cluster(x, v, None, 3, False)
    with pytest.raises(UnsupportedError, match="H=33"):
        deep_reuse_cluster(x, torch.zeros(16, 33), None, 1, False)


def test_the_operators_are_well_formed() -> None:
    x, v, w, bias, grad = make("plain")
    checks = ("test_schema", "test_faketensor")
    found = deep_reuse_cluster(x, v, None, 2, True)
    torch.library.opcheck(
        deep_reuse_output, (list(found), w, bias, None, None, [4, 5, 6], [1, 1], [1, 1]), test_utils=checks
    )
    torch.library.opcheck(
        deep_reuse_gradients, (grad, list(found), w, [4, 5, 6], [1, 1], [1, 1], True, True), test_utils=checks
    )
    torch.library.opcheck(deep_reuse_cluster, (x, v, None, 2, True), test_utils=("test_faketensor",))


@pytest.mark.parametrize("name", ["small, norms", "small"])
def test_triton_equals_the_reference(triton_interpreter: None, name: str) -> None:
    from hasten.kernels.gpu import deep_reuse as triton

    x, v, w, bias, grad = make(name)
    (b, h, wide), stride, padding = how(name)
    args = ((b, h, wide), (stride[0], stride[1]), (padding[0], padding[1]))
    expected = by_reference(name, x, v)
    got = triton.cluster(x, v, None, CASES[name][10], CASES[name][11])
    same_clusters(got, expected)
    z, first = reference.pixel_products(expected, w)
    exact = reference.pixel_output(expected, w, bias, *args)
    y = torch.full_like(exact, torch.nan).contiguous(memory_format=torch.channels_last)
    triton.output(got, z, first, w, bias, *args, y)
    assert close(y, exact)
    gx, gw = triton.gradients(grad, got, w, *args, True, True)
    ex, ew = reference.pixel_gradients(grad, expected, w, *args)
    assert close(gx, ex)
    assert close(gw, ew)
