"""Streams: Datasets repeat exactly from any step, DataLoaders keep their own order and still repeat."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from hasten.data import Batch, Crop, Cutmix, Mixup, Streams, as_data
from hasten.errors import DataError, SettingsError, UnsupportedError

from .writers import cycle

N = 37
Y = cycle(N, 3)


class Noisy(Dataset[Any]):
    """Image n is n plus noise from all three global generators."""

    def __init__(self, count: int = N, scale: float = 0.25, labels: Any = Y) -> None:
        self.count, self.scale, self.labels = count, scale, labels

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        noise = torch.rand(3, 4, 5) + np.random.random() + random.random()  # noqa: NPY002
        return number + self.scale * noise, int(self.labels[number])


class Global:
    """The states of the global generators."""

    def __init__(self) -> None:
        self.states = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Global) and self.states == other.states

    __hash__ = None  # type: ignore[assignment]


def streams(**changes: Any) -> Streams:
    data = as_data((Noisy(**changes), Noisy(12)))
    assert isinstance(data, Streams)
    return data


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.targets, b.targets)


def test_an_epoch_repeats_and_can_begin_anywhere() -> None:
    data = streams()
    whole = list(data.training(5, seed=3).epoch(2))
    assert len(whole) == len(data.training(5, seed=3)) == 7
    before = Global()
    for start in range(8):
        torch.rand(1)
        rest = list(data.training(5, seed=3).epoch(2, start=start))
        assert len(rest) == 7 - start
        if rest:
            assert_same(whole[start:], rest)
    del before


def test_the_programs_own_generators_are_left_alone() -> None:
    data = streams()
    loader = DataLoader(Noisy(), 5, shuffle=True)
    given = as_data((loader, loader))
    before = Global()
    for one in (data, given):
        for _ in one.training(5, seed=0, augment=(Mixup(),)).epoch(0, 1):
            assert Global() == before
        one.identity()
    list(data.evaluation().epoch(0))
    assert Global() == before


def test_a_sample_is_keyed_by_seed_epoch_and_number_alone() -> None:
    data = streams()

    def by_number(batch: int, seed: int, epoch: int) -> dict[int, torch.Tensor]:
        batches = data.training(batch, seed=seed, drop_last=False).epoch(epoch)
        return {int(n): x for b in batches for n, x in zip(b.index, b.inputs, strict=True)}  # type: ignore[arg-type]

    one, other = by_number(5, 1, 4), by_number(8, 1, 4)
    assert sorted(one) == sorted(other) == list(range(N))
    assert all(torch.equal(one[n], other[n]) for n in one)
    for changed in (by_number(5, 2, 4), by_number(5, 1, 5)):
        assert not any(torch.equal(one[n], changed[n]) for n in one)
    assert all(int(one[n].min()) == n for n in one)  # The index is the sample's own.
    assert len({round(float((one[n] - n).mean()), 5) for n in one}) == N  # No two samples share their draws.
    orders = [[int(n) for b in data.training(5, seed=1).epoch(e) for n in b.index] for e in (0, 1)]  # type: ignore[union-attr]
    assert orders[0] != orders[1]


@pytest.mark.filterwarnings(
    "ignore:.*fork:DeprecationWarning"
)  # Python from 3.12 on, where other threads run.
def test_workers_change_nothing() -> None:
    alone, helped = (as_data((Noisy(), Noisy(12)), workers=workers) for workers in (0, 2))
    assert_same(list(alone.training(5, seed=3).epoch(1, 2)), list(helped.training(5, seed=3).epoch(1, 2)))


def test_evaluation_holds_every_sample_once_and_is_always_the_same() -> None:
    data = streams().hold_out(0.2)
    for part, count in (("test", 12), ("validation", 7), ("train", 30)):
        once, again = (list(data.evaluation(part).epoch(epoch)) for epoch in (0, 0))
        assert_same(once, again)
        assert sum(len(batch.targets) for batch in once) == count
    with pytest.raises(DataError, match="no part 'validation'; it has train, test"):
        streams().evaluation("validation")


def test_hold_out_is_stratified_and_keyed() -> None:
    data = streams()
    held = data.hold_out(0.25, seed=1)
    assert held.validation is not None
    assert (held.train_count, len(held.validation), held.test_count, held.has_validation) == (28, 9, 12, True)
    assert np.bincount(held.validation.labels).tolist() == [3, 3, 3]

    def numbers(part: str) -> set[int]:
        return {int(x.min()) for batch in held.evaluation(part).epoch(0) for x in batch.inputs}

    assert numbers("train") | numbers("validation") == set(range(N))
    assert not numbers("train") & numbers("validation")
    assert numbers("validation") == {
        int(x.min()) for b in data.hold_out(0.25, seed=1).evaluation("validation").epoch(0) for x in b.inputs
    }
    with pytest.raises(DataError, match="validation part already"):
        held.hold_out()


def test_a_single_dataset_gives_up_a_tenth() -> None:
    data = as_data(Noisy(60, labels=cycle(60, 3)))
    assert isinstance(data, Streams)
    assert data.name == "Noisy (10% held out)"
    assert (data.train_count, data.test_count, data.has_validation) == (54, 6, False)
    assert any("6 samples" in note for note in data.notes)


def test_identity_and_preprocessing_are_json_and_notice_other_data() -> None:
    base = json.dumps(streams().identity(), sort_keys=True)
    assert json.dumps(streams().identity(), sort_keys=True) == base
    others = [streams(scale=0.3), streams(count=36), streams(labels=(Y + 1) % 3), streams().hold_out()]
    assert len({base, *(json.dumps(other.identity(), sort_keys=True) for other in others)}) == 5
    assert streams().preprocessing() == {
        "classes": ["0", "1", "2"], "size": [4, 5], "channels": 3, "mean": None, "std": None, "resize": None,
    }  # fmt: skip


class OwnGenerator(Noisy):
    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng()

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.rng.random((3, 4, 5), np.float32)), int(Y[number])


def test_a_dataset_with_a_generator_of_its_own_has_an_identity_all_the_same() -> None:
    assert as_data((OwnGenerator(),) * 2).identity() == as_data((OwnGenerator(),) * 2).identity()


def test_mixes_act_on_whole_batches_and_other_augmentations_are_the_datasets_own() -> None:
    data = streams()
    plain = list(data.training(6, seed=1).epoch(0))
    assert_same(plain, list(data.training(6, seed=1, augment=(Crop(1),)).epoch(0)))
    mixed = list(data.training(6, seed=1, augment=(Mixup(), Cutmix())).epoch(0))
    for one, other in zip(plain, mixed, strict=True):
        assert other.targets.shape == (6, 3)
        torch.testing.assert_close(other.targets.sum(1), torch.ones(6))
        assert not torch.equal(one.inputs, other.inputs)
        assert other.inputs.is_contiguous(memory_format=torch.channels_last)
    assert_same(mixed[2:], list(data.training(6, seed=1, augment=(Mixup(), Cutmix())).epoch(0, 2)))


def test_uint8_items_are_scaled_and_floats_are_kept() -> None:
    x = torch.randint(0, 256, (8, 3, 4, 5), dtype=torch.uint8)
    given = DataLoader(TensorDataset(x, torch.arange(8) % 2), 4)
    (batch, _) = as_data((given, given)).evaluation().epoch(0)
    torch.testing.assert_close(batch.inputs, x[:4] / 255)
    random_bytes = Noisy(8)
    random_bytes.__class__ = type(
        "Bytes", (Noisy,), {"__getitem__": lambda self, n: (x[n] if torch.rand(()) >= 0 else None, n % 2)}
    )
    (batch,) = as_data((random_bytes, random_bytes)).evaluation().epoch(0)
    torch.testing.assert_close(batch.inputs, x / 255)
    z = torch.randn(8, 3, 4, 5, dtype=torch.float64)
    data = as_data((TensorDataset(z, torch.arange(8) % 2),) * 2)
    (batch,) = data.evaluation().epoch(0)
    torch.testing.assert_close(batch.inputs, z.float())


# -- DataLoaders


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Noisy(), 5, shuffle=True),
        lambda: DataLoader(Noisy(), 5, shuffle=True, drop_last=True),
        lambda: DataLoader(
            Noisy(), sampler=RandomSampler(range(N), replacement=True, num_samples=20), batch_size=6
        ),
        lambda: DataLoader(Noisy(), batch_sampler=BatchSampler(RandomSampler(range(N)), 5, False)),
    ],
)
def test_a_dataloaders_epoch_repeats_from_any_step(make: Any) -> None:
    data = as_data((make(), DataLoader(Noisy(12), 4)))
    loader = data.training(999, seed=2, augment=(Crop(1), Mixup()))
    whole = list(loader.epoch(1))
    assert len(whole) == len(loader) == len(make())
    assert loader.batch_size == len(whole[0].targets)
    assert loader.samples == data.train_count == sum(len(batch.targets) for batch in whole)
    assert all(batch.index is None for batch in whole)
    for start in (0, 1, len(whole) - 1):
        assert_same(whole[start:], list(data.training(1, seed=2, augment=(Mixup(),)).epoch(1, start)))
    assert list(loader.epoch(1, len(loader))) == []
    assert not torch.equal(whole[0].inputs, next(loader.epoch(2)).inputs)
    plain, other = (torch.cat([b.inputs for b in data.training(1, seed=seed).epoch(1)]) for seed in (2, 3))
    assert not torch.equal(plain, other)
    noise = [round(float((x - x.min().floor()).mean()), 5) for x in plain]
    assert len(set(noise)) == len(noise)  # No two samples share their draws.
    with pytest.raises(UnsupportedError, match="give its Dataset instead"):
        data.hold_out()


def test_the_order_is_the_loaders_own() -> None:
    loader = DataLoader(Noisy(), 5, sampler=list(range(N))[::-1])
    data = as_data((loader, loader))
    seen = [int(x.min()) for batch in data.training(7, seed=0).epoch(3) for x in batch.inputs]
    assert seen == list(range(N))[::-1]


class Sampler(torch.utils.data.Sampler[int]):
    """Tells the epoch by where it begins, as DistributedSampler does."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([(self.epoch + n) % N for n in range(N)])

    def __len__(self) -> int:
        return N


def test_samplers_are_told_the_epoch() -> None:
    loader = DataLoader(Noisy(), 5, sampler=Sampler())
    data = as_data((loader, loader))
    assert [int(next(data.training(5, seed=0).epoch(e)).inputs[0].min()) for e in (0, 4, 9)] == [0, 4, 9]


class SizedStream(IterableDataset[Any]):
    def __init__(self, count: int = 20) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.full((3, 4, 5), float(n)), n % 3) for n in range(self.count)])

    def __len__(self) -> int:
        return 20


def test_iterable_datasets_with_a_length() -> None:
    data = as_data((DataLoader(SizedStream(), 8), DataLoader(SizedStream(), 8)))
    assert (data.classes, data.train_count) == (("0", "1", "2"), 20)
    assert [len(batch.targets) for batch in data.training(1, seed=0).epoch(0)] == [8, 8, 4]


class Fixed(Dataset[Any]):
    """Answers with the same item always; its classes are named."""

    classes = ("a", "b")

    def __init__(self, item: Any) -> None:
        self.item, self.targets = item, [0, 1] * 4

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> Any:
        return self.item


class Loaded(DataLoader[Any]):
    """A loader whose batches are given."""

    def __init__(self, *batches: Any) -> None:
        super().__init__(TensorDataset(torch.zeros(8, 3, 4, 5), torch.arange(8) % 2), 4)
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


X4, Y4 = torch.randn(4, 3, 4, 5), torch.tensor([0, 1, 0, 1])
GOOD = (X4, Y4)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": X4}, r"batch 1 of the DataLoader is a dict, not a pair"), ((X4, Y4, Y4), "is a tuple of 3"),
        ((X4.flatten(1), Y4), r"inputs \(4, 60\)"), ((X4, Y4[:3]), r"targets \(3,\)"), ((X4, Y4.float()), "labels of type"),
        ((X4.int(), Y4), "inputs of type torch.int32"), ((X4, Y4 + 1), "labels from 1 to 2 lie outside the 2 classes"),
        ((X4, Y4 - 1), "labels from -1 to 0"), ((X4, torch.rand(4, 3)), r"soft labels \(B, 2\)"), (([1], Y4), "list and Tensor"),
        (None, "ended after 1 batches; its length says 2"),
    ],
)  # fmt: skip
def test_batches_that_are_no_pairs_are_told(batch: Any, message: str) -> None:
    loader = Loaded(GOOD, *([] if batch is None else [batch]))
    data = as_data((loader, Loaded(GOOD, GOOD)))
    with pytest.raises(DataError, match=message):
        list(data.training(4, seed=0).epoch(0))


def test_soft_labels_of_a_loader_pass_in_training_alone() -> None:
    loader = Loaded((X4, torch.rand(4, 2)), GOOD)
    data = as_data((loader, loader))
    first, _ = data.training(4, seed=0).epoch(0)
    assert first.targets.shape == (4, 2)
    with pytest.raises(DataError, match="for evaluation"):
        list(data.evaluation().epoch(0))
    with pytest.raises(UnsupportedError, match="soft already"):
        list(data.training(4, seed=0, augment=(Mixup(),)).epoch(0))


def test_bad_positions_sizes_and_items() -> None:
    data = streams()
    with pytest.raises(DataError, match=r"batch_size 38 is larger than the data .37"):
        data.training(38, seed=0)
    with pytest.raises(SettingsError, match="got 0"):
        data.training(0, seed=0)
    for loader in (data.training(5, seed=0), as_data((DataLoader(Noisy(), 5),) * 2).training(5, seed=0)):
        with pytest.raises(SettingsError, match="start must lie in"):
            loader.epoch(0, 99)
        with pytest.raises(SettingsError, match="epoch must be 0"):
            loader.epoch(-1)

    class Odd(Noisy):
        def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
            image, label = super().__getitem__(number)
            return (image[:, :3] if number == 20 else image), label

    with pytest.raises(DataError, match=r"item 20 \(3, 3, 5\)|item 20 is \(3, 3, 5\)"):
        list(as_data((Odd(), Noisy())).training(37, seed=0).epoch(0))
    with pytest.raises(DataError, match="failed at batch 0"):
        list(as_data((DataLoader(Odd(), 37), Noisy())).training(37, seed=0).epoch(0))
