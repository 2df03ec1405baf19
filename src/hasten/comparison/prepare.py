"""What is built once before anything trains, so that an error is one line and not fifteen failed runs."""

from __future__ import annotations

from typing import Any

import torch

from hasten.comparison.arms import Arm
from hasten.comparison.worker import Workload
from hasten.errors import HastenError, SettingsError
from hasten.measure.macs import macs
from hasten.report.schema import Settings
from hasten.run_identity import source_of


def built(workload: Workload, arm: Arm) -> tuple[Any, Settings, float]:
    """Return the data, the facts that all arms share, and the MACs of training on one sample.

    arm: whose batch size and epochs the facts name. Raises HastenError for data that cannot be read and for a model that
    cannot be built, whatever its own code raises.
    """
    data = workload.load()
    try:
        source = source_of(workload.model, data, 0)
        net = source.make()
    except HastenError:
        raise
    except Exception as error:
        raise SettingsError(f"the model cannot be built: {type(error).__name__}: {error}") from error
    height, width, channels = data.shape
    try:
        count = macs(net, torch.zeros(1, channels, height, width))
        forward, training = float(count.forward), float(count.training)
    except Exception as error:
        raise SettingsError(
            f"the model {source.label} cannot take an image of {height}x{width} with {channels} channels: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        ) from error
    settings: Settings = {
        "model": source.label, "params": sum(p.numel() for p in net.parameters()), "macs": forward,
        "dataset": data.name, "train": data.train_count, "test": data.test_count, "batch": arm.recipe.batch_size,
        "epochs": arm.recipe.epochs, "threads": workload.threads or torch.get_num_threads(),
    }  # fmt: skip
    return data, settings, training
