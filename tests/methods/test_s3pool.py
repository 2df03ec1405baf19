"""S3Pool draws as published, computes what its two steps compute, and is plain pooling in evaluation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

from hasten import keyed, models
from hasten.errors import NoEffectError, SettingsError, UnsupportedError
from hasten.methods.forward.s3pool import S3Pool
from hasten.methods.forward.s3pool_layer import S3Pool2d, draw, max_filter, sampled_max, valid_grids
from hasten.session import Session

CASES = [(p, p * k, n) for p in (2, 3) for k in (1, 2, 4) for n in (1, 3)]  # p, g, blocks


def maps(n: int, c: int, h: int, w: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, c, h, w, generator=keyed.generator("maps", seed), dtype=dtype)


@pytest.mark.parametrize(("p", "g", "blocks"), CASES)
@pytest.mark.parametrize("author_compat", [False, True])
def test_each_block_keeps_g_over_p_rows_in_order(p: int, g: int, blocks: int, author_compat: bool) -> None:
    for seed in range(20):
        kept = draw(g * blocks, p, g, keyed.generator("t", seed), author_compat=author_compat)
        assert len(kept) == g * blocks // p
        assert (kept.diff() > 0).all()
        assert torch.bincount(kept // g, minlength=blocks).tolist() == [g // p] * blocks
        assert kept[-1] <= g * blocks - (p if author_compat else 1)


def test_rows_are_kept_as_often_as_one_in_p_and_their_order_statistics_are_right() -> None:
    p, g, n = 2, 16, 4000
    kept = draw(32, p, g, keyed.generator("many"), samples=n)
    frequency = torch.bincount(kept.flatten(), minlength=32) / n
    assert (frequency - 1 / p).abs().max() < 5 * math.sqrt(0.25 / n)
    m = g // p
    ranks = torch.arange(1, m + 1)
    mean = (kept[:, :m] + 1).double().mean(0)
    assert (mean - ranks * (g + 1) / (m + 1)).abs().max() < 0.005 * g


def test_all_six_patterns_of_a_tiny_block_appear() -> None:
    kept = draw(4, 2, 4, keyed.generator("tiny"), samples=300)
    assert {tuple(row) for row in kept.tolist()} == set(itertools.combinations(range(4), 2))


def test_with_the_weakest_grid_the_mean_over_draws_is_average_pooling_of_the_max_filter() -> None:
    x = maps(1, 2, 8, 8)
    n = 4000
    rows = draw(8, 2, 2, keyed.generator("rows"), samples=n)
    cols = draw(8, 2, 2, keyed.generator("cols"), samples=n)
    mean = sampled_max(x.expand(n, -1, -1, -1), rows, cols, 2).mean(0)
    z = max_filter(x, 2)
    expected = F.avg_pool2d(z, 2)[0]
    assert (mean - expected).abs().max() < 5 * z.std() / math.sqrt(n)
    torch.testing.assert_close(S3Pool2d(2, 2).eval()(x)[0], expected)


@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from(CASES),
    seed=st.integers(0, 10**6),
    compat=st.booleans(),
    nhwc=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    ties=st.booleans(),
)
def test_gathering_first_equals_filtering_first_bit_for_bit(
    case: tuple[int, int, int], seed: int, compat: bool, nhwc: bool, dtype: torch.dtype, ties: bool
) -> None:
    p, g, blocks = case
    size = g * blocks
    x = maps(2, 3, size, size, seed)
    x = (x.relu().round() if ties else x).to(dtype)
    if nhwc:
        x = x.to(memory_format=torch.channels_last)
    generator = keyed.generator("fused", seed)
    rows, cols = (draw(size, p, g, generator, author_compat=compat) for _ in range(2))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    fused = sampled_max(a, rows, cols, p)
    naive = max_filter(b, p, author_compat=compat).index_select(2, rows).index_select(3, cols)
    assert fused.shape == (2, 3, size // p, size // p)
    assert torch.equal(fused, naive)
    weight = torch.randint(-3, 4, fused.shape, generator=generator).to(dtype)
    (ga,), (gb,) = torch.autograd.grad(fused, a, weight), torch.autograd.grad(naive, b, weight)
    assert torch.equal(ga, gb)  # small whole numbers: sums are exact in any order
    if nhwc and size > p:
        assert fused.is_contiguous(memory_format=torch.channels_last)


def test_a_draw_for_each_sample_is_each_sample_with_its_own_draw() -> None:
    x = maps(5, 3, 12, 12)
    generator = keyed.generator("each")
    rows, cols = (draw(12, 2, 6, generator, samples=5) for _ in range(2))
    together = sampled_max(x, rows, cols, 2)
    alone = torch.cat([sampled_max(x[i : i + 1], rows[i], cols[i], 2) for i in range(5)])
    assert torch.equal(together, alone)
    assert len({tuple(r) for r in rows.tolist()}) > 1


def test_gradients_reach_only_the_maxima_of_chosen_windows() -> None:
    x = maps(2, 2, 8, 8, dtype=torch.float64).requires_grad_()
    generator = keyed.generator("grad")
    rows, cols = (draw(8, 2, 4, generator) for _ in range(2))
    assert torch.autograd.gradcheck(lambda t: sampled_max(t, rows, cols, 2), (x,))
    (grad,) = torch.autograd.grad(sampled_max(x, rows, cols, 2).sum(), x)
    allowed = torch.zeros_like(grad, dtype=torch.bool)
    for n, c, r, q in itertools.product(range(2), range(2), rows.tolist(), cols.tolist()):
        window = x[n, c, r : r + 2, q : q + 2]
        i, j = divmod(int(window.argmax()), window.shape[1])
        allowed[n, c, r + i, q + j] = True
    assert torch.equal(grad != 0, allowed)


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * 16, 4),
        )


def start(
    model: nn.Module, method: S3Pool, *, seed: int = 0, size: int = 16, **settings: bool
) -> tuple[Session, Tensor, Tensor]:
    x, y = maps(6, 3, size, size), torch.arange(6) % 4
    session = Session(model, SGD(model.parameters(), lr=0.01), [method], sample=(x, y), seed=seed, **settings)
    return session, x, y


def test_training_depends_on_the_seed_and_evaluation_on_nothing() -> None:
    losses = []
    for seed in (1, 1, 2):
        session, x, y = start(network(), S3Pool(grid=(8, 4)), seed=seed)
        first, second = (session.model.eval()(x) for _ in range(2))
        assert torch.equal(first, second)
        session.model.train()
        losses.append([session.step(x, y).item() for _ in range(3)])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[2][0]
    assert session.witness()["s3pool"]["random_poolings"] == 6
    assert session.effects["s3pool"].touched == {"2": "p=2, g=8 on 16x16", "5": "p=2, g=4 on 8x8"}


def test_rows_change_from_step_to_step_and_are_drawn_again_after_a_resume() -> None:
    session, x, y = start(network(), S3Pool())
    pool = session.model.get_submodule("2")
    seen = []
    for _ in range(4):
        session.step(x, y)
        seen.append((pool.rows.tolist(), pool.cols.tolist()))
    assert len({str(s) for s in seen}) == 4
    again, _, _ = start(network(), S3Pool())
    for _ in range(3):
        again.step(x, y)
    state = again.state_dict()
    assert not [k for k in state["model"] if "rows" in k]
    resumed, _, _ = start(network(), S3Pool())
    resumed.load_state_dict(state)
    resumed.step(x, y)
    pool = resumed.model.get_submodule("2")
    assert (pool.rows.tolist(), pool.cols.tolist()) == seen[3]


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("p", [2, 3])
def test_constant_maps_stay_constant(compat: bool, p: int) -> None:
    pool = S3Pool2d(p, 2 * p, author_compat=compat)
    x = torch.full((2, 3, 4 * p, 4 * p), -1.5)
    for mode in (True, False):
        torch.testing.assert_close(pool.train(mode)(x), torch.full((2, 3, 4, 4), -1.5))


def test_the_authors_rule_averages_the_unpadded_filter_without_counting_padding() -> None:
    x = maps(1, 1, 6, 6)
    z = max_filter(x, 2, author_compat=True)[0, 0]
    assert z.shape == (5, 5)
    got = S3Pool2d(2, 2, author_compat=True).eval()(x)[0, 0]
    groups = ([0], [1, 2], [3, 4])
    for i, j in itertools.product(range(3), range(3)):
        cells = [z[r, c] for r in groups[i] for c in groups[j]]
        torch.testing.assert_close(got[i, j], torch.stack(cells).mean())


def test_another_size_of_images_keeps_the_share_of_the_grid() -> None:
    session, _, _ = start(
        network()[:6].append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()), S3Pool(grid=0.5)
    )
    for size in (16, 24, 8):
        session.step(maps(6, 3, size, size), torch.arange(6) % 4)
        assert session.model.get_submodule("2").rows.numel() == size // 2


def test_grids_that_do_not_fit_are_refused_with_those_that_do() -> None:
    assert valid_grids(28, 28, 2) == [2, 4, 14, 28]
    with pytest.raises(
        SettingsError, match=r"2: grid 8 does not divide a map of 28x28; valid for p=2: 2, 4, 14, 28"
    ):
        start(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(784, 4)),
              S3Pool(grid=8), size=28)  # fmt: skip
    with pytest.raises(SettingsError, match=r"3 numbers for 2 layers: 2 \(16x16\), 5 \(8x8\)"):
        start(network(), S3Pool(grid=(8, 4, 2)))
    with pytest.raises(SettingsError, match=r"grid is 1\.5"):
        S3Pool(grid=1.5)
    with pytest.raises(SettingsError, match=r"grid is 1; .*strided_convs is 1"):
        S3Pool(grid=1, strided_convs=1)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="none"):
        S3Pool2d(2, 0.5)(maps(1, 1, 7, 7))


@pytest.mark.parametrize(
    ("pool", "size", "reason"),
    [
        (nn.MaxPool2d(3, 2), 15, "window 3 differs from its stride 2"),
        (nn.MaxPool2d(2, ceil_mode=True), 15, "ceil_mode"),
        (nn.MaxPool2d(2, padding=1), 16, "padding 1"),
        (nn.MaxPool2d(2), 15, "2 does not divide its map of 15x15"),
        (nn.MaxPool2d(16), 16, "whole map"),
        (nn.AdaptiveMaxPool2d(4), 16, "no fixed 2-D window"),
        (nn.MaxPool2d((2, 1)), 16, "differs|window"),
    ],
)
def test_other_poolings_are_left_alone_with_the_reason(pool: nn.Module, size: int, reason: str) -> None:
    model = nn.Sequential(pool, nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(NoEffectError, match=reason):
        start(model, S3Pool(), size=size)
    assert model[0] is pool


@pytest.mark.parametrize("method", [S3Pool(), S3Pool(author_compat=True), S3Pool(per_sample=True)])
def test_the_export_is_plain_and_computes_the_same(method: S3Pool) -> None:
    session, x, y = start(network(), method)
    for _ in range(2):
        session.step(x, y)
    plain = session.export()
    assert {type(m).__module__.split(".")[0] for m in plain.modules()} == {"torch"}
    with session.inference() as forward, torch.no_grad():
        assert torch.equal(plain(x), forward(x))


@pytest.mark.parametrize(("name", "blocks"), [("resnet18", 3), ("resnet8", 2)])
def test_strides_of_residual_blocks_become_pooling(name: str, blocks: int) -> None:
    model = models.build(name, seed=0, num_classes=4, in_channels=3, image_size=32)
    names = list(model.state_dict())
    session, x, y = start(model, S3Pool(strided_convs=True), size=32)
    touched = session.effects["s3pool"].touched
    assert len(touched) == blocks
    assert touched["layer2.0"].startswith("p=2, g=16 on 32x32, then conv1, downsample")
    assert list(session.state_dict()["model"]) == names
    shapes = session.shapes()
    assert shapes["layer2.0.conv1"][0][2:] == (16, 16)
    session.step(x, y)
    assert session.witness()["s3pool"]["random_poolings"] == blocks
    plain = session.export()
    assert not [n for n, m in plain.named_modules() if m._forward_pre_hooks or "s3pool" in n]
    with session.inference() as forward, torch.no_grad():
        torch.testing.assert_close(plain(x), forward(x))
        session.model.train()
    session.step(x, y)


def test_a_strided_block_that_would_change_its_shape_is_left_alone() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Conv2d(4, 4, 1, stride=(1, 1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    with pytest.raises(NoEffectError) as error:
        start(model, S3Pool(strided_convs=True), size=32)
    assert "0: skipped, it reads the images" in str(error.value)
    assert "1: skipped, pooled, and at stride 1, it would give a map of another size" in str(error.value)
    assert model[1].stride == (2, 2)
