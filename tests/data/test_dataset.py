"""The interface that DataSet gives to training: parts, loaders, identity, preprocessing."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from hasten.data import Crop, DataSet, Images
from hasten.errors import DataError

from .writers import cycle, pixels


def make(n: int = 100, seed: int = 0) -> DataSet:
    images = [
        Images(pixels(k, 6, 5, 3, s), cycle(k, 4), tuple("abcd")) for k, s in ((n, seed), (40, seed + 9))
    ]
    return DataSet("mine", images[0], images[1], True)


def rows(images: Images) -> list[bytes]:
    return sorted(row.tobytes() for row in images.pixels)


def test_hold_out_cuts_a_stratified_part_from_training_and_keeps_the_test_part() -> None:
    data = make()
    held = data.hold_out(0.2, seed=3)
    assert held.validation is not None
    assert (data.has_validation, held.has_validation) == (False, True)
    assert rows(held.test) == rows(data.test)
    assert sorted(rows(held.train) + rows(held.validation)) == rows(data.train)
    assert np.bincount(held.validation.labels).tolist() == [5, 5, 5, 5]
    assert held.validation.mean == held.train.mean == held.test.mean != data.train.mean
    assert rows(held.validation) == rows(data.hold_out(0.2, seed=3).validation)  # type: ignore[arg-type]
    assert rows(held.validation) != rows(data.hold_out(0.2, seed=4).validation)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="validation part already: 20"):
        held.hold_out()
    with pytest.raises(DataError, match=r"between 0 and 1, got 1\.0"):
        data.hold_out(1.0)
    few = replace(data, train=Images(pixels(5, 6, 5, 3), np.array([0, 0, 1, 2, 3]), tuple("abcd")))
    with pytest.raises(DataError, match="one training image of class 'b', 'c', 'd' is too few"):
        few.hold_out()


def test_loaders_of_the_parts() -> None:
    data = make().hold_out(0.2)
    assert (data.train_count, data.test_count, data.shape, data.owns_augmentation) == (
        80,
        40,
        (6, 5, 3),
        False,
    )
    loader = data.training(16, seed=2, augment=(Crop(1),))
    assert (len(loader), loader.batch_size, loader.samples) == (5, 16, 80)
    seen = torch.cat([batch.index for batch in loader.epoch(0) if batch.index is not None])
    assert sorted(seen.tolist()) == list(range(80))
    for part, images in (("test", data.test), ("validation", data.validation), ("train", data.train)):
        assert images is not None
        loader = data.evaluation(part)
        batches = list(loader.epoch(0))
        assert torch.equal(torch.cat([batch.targets for batch in batches]), torch.from_numpy(images.labels))
        mean, std = np.array(data.train.mean), np.array(data.train.std)
        want = (images.pixels / 255 - mean) / std
        got = torch.cat([batch.inputs for batch in batches]).permute(0, 2, 3, 1)
        np.testing.assert_allclose(got.numpy(), want, atol=1e-5)
    with pytest.raises(DataError, match="no part 'validation'; it has train, test"):
        make().evaluation("validation")


def test_evaluation_batches_of_large_images_are_small() -> None:
    x = np.zeros((400, 200, 200, 3), np.uint8)
    x[::2] = 1
    images = Images(x, cycle(400, 2), ("a", "b"))
    assert DataSet("big", images, images, True).evaluation().batch_size == 2**25 // 120_000


def test_any_change_of_the_content_changes_the_identity() -> None:
    data = make()
    base = json.dumps(data.identity(), sort_keys=True)
    assert json.dumps(make().identity(), sort_keys=True) == base
    seen = {base}
    for part in ("train", "test"):
        images: Images = getattr(data, part)
        one_pixel, one_label = images.pixels.copy(), images.labels.copy()
        one_pixel[17, 3, 2, 1] ^= 1
        one_label[17] = (one_label[17] + 1) % 4
        for changed in (replace(images, pixels=one_pixel), replace(images, labels=one_label)):
            seen.add(json.dumps(replace(data, **{part: changed}).identity(), sort_keys=True))
    seen.add(json.dumps(replace(data, name="other").identity(), sort_keys=True))
    seen.add(json.dumps(replace(data, resize=6).identity(), sort_keys=True))
    seen.add(json.dumps(data.hold_out().identity(), sort_keys=True))
    names = tuple("abce")
    renamed = replace(data, train=replace(data.train, classes=names), test=replace(data.test, classes=names))
    seen.add(json.dumps(renamed.identity(), sort_keys=True))
    assert len(seen) == 9


def test_preprocessing_says_what_a_deployed_network_needs() -> None:
    data = make()
    told = json.loads(json.dumps(data.preprocessing()))
    assert told["classes"] == list("abcd")
    assert (told["size"], told["channels"], told["resize"]) == ([6, 5], 3, None)
    x = torch.from_numpy(data.test.pixels).float() / 255
    by_hand = (x - torch.tensor(told["mean"])) / torch.tensor(told["std"])
    (batch,) = data.evaluation().epoch(0)
    torch.testing.assert_close(batch.inputs.permute(0, 2, 3, 1), by_hand, atol=1e-5, rtol=0)
    flat = np.full((8, 4, 4, 1), 9, np.uint8)
    grey = Images(flat, cycle(8, 2), ("a", "b"))
    assert DataSet("flat", grey, grey, True).preprocessing()["std"] == [1 / 255]
