"""The A/A test: the strong baseline's step against itself, before any claim is made."""

from __future__ import annotations

from hasten.comparison.arms import Arm
from hasten.comparison.worker import Workload
from hasten.loss import cross_entropy
from hasten.measure.paired import AA, paired_steps
from hasten.report.schema import Noise
from hasten.session import Session


def noise(workload: Workload, arm: Arm, seconds: float) -> Noise | None:
    """Time steps of ``arm`` in alternating chunks against each other; None if every block was disturbed."""
    from hasten import models
    from hasten.data import Loader
    from hasten.regimen import regimen, whiten

    train = workload.load().train
    net = models.resolve(workload.model, num_classes=len(train.classes), in_channels=train.shape[2],
                         image_size=train.shape[0], seed=0).make()  # fmt: skip
    whiten(net, train)
    loader = Loader(train, min(arm.recipe.batch_size, len(train)))
    batch = next(loader.epoch(0))
    course = regimen(arm.recipe, net, len(loader), len(loader))
    session = Session(net, course.optimizers, arm.methods, sample=(batch.inputs, batch.targets),
                      loss=cross_entropy(arm.recipe.label_smoothing), total_samples=10**12)  # fmt: skip
    course.attached()
    course.before_step(0)

    def step() -> None:
        session.step(batch.inputs, batch.targets, batch.index)

    result = paired_steps({"A": step}, baseline="A", seconds=seconds, chunk_s=(0.1, 0.3))
    ratio = result.ratios.get(AA)
    if ratio is None or ratio.n < 2:
        return None
    return {"ratio": ratio.ratio, "lo": ratio.low, "hi": ratio.high, "s": ratio.s, "ok": result.aa_ok}
