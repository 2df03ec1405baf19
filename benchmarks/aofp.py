"""AOFP on trained networks: MACs and accuracy beside training on without it, and what scoring costs in a step.

The authors search with h = 1000 steps a half, theta = 0.01 and up to 600 epochs, and fine-tune for 600 more. Here the
whole run has some hundred steps, so that h is shorter and theta larger; both are said with every figure.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.common import Step, build, claim, pairs, ratio_claim, real_images, session_step, store, strong
from benchmarks.trained import RESNET56, VGG16, Start
from hasten.contract import Method
from hasten.measure.macs import macs
from hasten.methods.structure.aofp import AOFP

CLAIM = "aofp: ResNet-56 at 50%, VGG-16 at 35% of the MACs, <= 0.5 points below training on; scoring <= 20% of a step"
MINUTES = 35


@dataclass(frozen=True)
class Plan:
    """A trained network and the settings it is pruned with; ``target`` of them is the share of MACs to keep.

    longer: how often as long a second pruned run is, since its steps are shorter; 0 for none.
    alone: whether its runs had the machine to themselves, so that their seconds can be told.
    """

    start: Start
    method: AOFP
    longer: float = 0.0
    alone: bool = False


PLANS = (
    Plan(RESNET56, AOFP(target=0.5, theta=0.15, h=36, warmup=10, every=2, share=0.25), 1.5),
    Plan(VGG16, AOFP(target=0.35, theta=0.3, h=10, warmup=10, every=1, share=0.25), 2.25, alone=True),
)


def main(smoke: bool = False) -> None:
    """Prune both networks, time the scoring, and store everything."""
    runs = [pruned(plan, smoke) for plan in PLANS]
    steps = [overhead(plan, net, smoke) for plan, (_, _, net) in zip(PLANS, runs, strict=True)]
    claims = [row for _, rows, *_ in [*runs, *steps] for row in rows]
    values = {
        plan.start.model: {**run, **step}
        for plan, (run, *_), (step, _) in zip(PLANS, runs, steps, strict=True)
    }
    store("aofp", {"claim": CLAIM, **values}, smoke, claims)


# -- accuracy
def pruned(plan: Plan, smoke: bool) -> tuple[dict[str, Any], list[dict[str, Any]], nn.Module]:
    """Train a base and go on from it with and without AOFP; return the figures, a claim for each length, the network."""
    method = AOFP(target=plan.method.target, theta=100.0, h=2, warmup=0, share=0.25) if smoke else plan.method
    start = plan.start
    base = start.base(smoke)
    control = start.on("control", base, [], smoke)
    runs = {"base": base, "control": control, "pruned": start.on("aofp", base, [method], smoke)}
    if plan.longer:
        runs["pruned longer"] = start.on("aofp", base, [method], smoke, plan.longer)
    x = torch.zeros(1, 3, 32, 32)
    count = {name: macs(net, x).forward for name, run in runs.items() if (net := run.model) is not None}
    claims = []
    for name in list(runs)[2:]:
        ours, share = runs[name], count[name] / count["base"]
        epochs = start.epochs * (plan.longer if name == "pruned longer" else 1.0)
        text = (
            f"{share:.3f} of the MACs at {100 * ours.accuracy:.2f}% after {epochs:g} epochs (trained on without it for "
            f"{start.epochs:g} epochs {100 * control.accuracy:.2f}%, base {100 * base.accuracy:.2f}%), one seed; {start}; "
            f"h={method.h}, theta={method.theta:g}, every={method.every}, share={method.share:g} (authors: h=1000, "
            f"theta=0.01, up to 600 epochs, then 600 more)"
        )
        if name == "pruned longer" and plan.alone:
            text += (
                f"; {ours.seconds_train:.0f} s of training against {control.seconds_train:.0f} s without it"
            )
        fair = name == "pruned" or plan.alone  # a longer run may only count where its time was measured
        met = share <= method.target and control.accuracy - ours.accuracy <= 0.005 and fair
        claims.append(claim("aofp", f"{start.model} on CIFAR-10 from a trained base", text,
                            target=f"<= {method.target:g} of the MACs, at most 0.5 points lost", met=met))  # fmt: skip
    values = {
        "settings": repr(method), "macs": count, "accuracy": {name: run.accuracy for name, run in runs.items()},
        "witness": {name: run.witness["aofp"] for name, run in runs.items() if "aofp" in run.witness},
    }  # fmt: skip
    net = runs["pruned"].model
    assert net is not None
    return values, claims, net


# -- time
def repeated(step: Step, times: int) -> Step:
    """Return ``times`` steps as one, so that every timed piece holds the same number of scored ones."""

    def steps() -> None:
        for _ in range(times):
            step()

    return steps


def overhead(plan: Plan, net: nn.Module, smoke: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Time training steps with and without a search that masks nothing, and those of the pruned network."""
    given = plan.method
    x, y = real_images(32 if smoke else 128)
    searching = AOFP(target=given.target, theta=0.0, h=given.every * 2, warmup=0, every=given.every, share=given.share,
                     patience=10**6)  # fmt: skip
    ours: dict[str, list[Method]] = {"strong": [], "scoring": [searching]}
    arms = {
        name: repeated(session_step(build(plan.start.model), x, y, [strong(), *methods]), given.every)
        for name, methods in ours.items()
    }
    arms["pruned"] = repeated(session_step(copy.deepcopy(net), x, y, [strong()]), given.every)
    for _ in range(3):  # every layer has begun to search after h steps
        arms["scoring"]()
    timed = pairs(
        f"{given.every} steps of {plan.start.model}, batch 128",
        arms,
        baseline="strong",
        seconds=40,
        smoke=smoke,
    )
    if "scoring" not in timed["ratios"]:
        return {"steps": timed}, []
    ratio = timed["ratios"]["scoring"]
    text = f"{1 / ratio['ratio']:.3f}x the time of a step ({ratio['text']}), every={given.every}, share={given.share:g}"
    row = claim("aofp", f"a training step of {plan.start.model} with scoring in all layers, batch 128", text,
                target="<= 1.2x", met=timed["aa_ok"] and 1 / ratio["ratio"] <= 1.2)  # fmt: skip
    what = f"a training step of {plan.start.model} when pruned, batch 128"
    return {"steps": timed}, [row, ratio_claim("aofp", what, timed, "pruned")]
