"""The one table of methods: where each lives, and the settings with which every cross-cutting test runs it.

Adding a method is one file and one row here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """Where a method's class is, and its canonical settings for the conformance suite's small network.

    ``limit`` are settings under which training must equal plain training bit for bit, or None where none exist.
    """

    where: str
    settings: dict[str, Any] = field(default_factory=dict)
    limit: dict[str, Any] | None = None


METHODS: dict[str, Row] = {
    "mixed_precision": Row(
        "hasten.methods.forward.mixed_precision:MixedPrecision", {"dtype": "bfloat16", "force": True}
    ),
    "limited_precision": Row(
        "hasten.methods.forward.limited_precision:LimitedPrecision", limit={"until": 0.0}
    ),
    "approximate_tensor_ops": Row(
        "hasten.methods.products.approximate_tensor_ops:ApproximateTensorOps", limit={"ratio": 1.0}
    ),
    "error_map_pruning": Row(
        "hasten.methods.products.error_map_pruning:ErrorMapPruning", limit={"keep": 1.0}
    ),
    "gradient_approximation": Row(
        "hasten.methods.products.gradient_approximation:GradientApproximation",
        {"exact_epochs": 0, "stop_fraction": 1.0},
        {"exact_epochs": 1000, "measure_every": 0},
    ),
    "activation_gradient_pruning": Row(
        "hasten.methods.products.activation_gradient_pruning:ActivationGradientPruning",
        {"n_f": 2},
        {"p": 0.0, "kernel": "dense"},
    ),
    "adaptive_deep_reuse": Row(
        "hasten.methods.products.adaptive_deep_reuse:AdaptiveDeepReuse",
        {"kernel": "native", "max_error": 1.0},
        {"kernel": "dense"},
    ),
    "actnn": Row("hasten.methods.products.actnn:ActNN", {"every": 3}, {"level": "L0"}),
    "early_instance_filtering": Row(
        "hasten.methods.samples.early_instance_filtering:EarlyInstanceFiltering",
        {"warmup": 2, "min_keep": 4, "round_to": 16},
        {"min_keep": 1_000_000},
    ),
    "selective_backprop": Row(
        "hasten.methods.samples.selective_backprop:SelectiveBackprop",
        {"prime_epochs": 0, "beta": 1.0},
        {"beta": 0.0},
    ),
    "importance_sampling": Row(
        "hasten.methods.samples.importance_sampling:ImportanceSampling", {"tau_th": 0.05}, {"tau_th": 1e9}
    ),
    "standardization_loss": Row("hasten.methods.loss.standardization_loss:StandardizationLoss"),
    "knowledge_distillation": Row(
        "hasten.methods.loss.knowledge_distillation:KnowledgeDistillation", {"at": 0.3}, {"soft_weight": 0.0}
    ),
    "prunetrain": Row(
        "hasten.methods.structure.prunetrain:PruneTrain",
        {"interval": 1, "lam": 0.1, "tau": 0.05, "min_channels": 16},
        {"r": 0.0, "lam": None},
    ),
    "net2net": Row(
        "hasten.methods.structure.net2net:Net2Net",
        {"narrow": 0.5, "at": (0.25, 0.6)},
        {"narrow": 1.0, "widen": 2.0, "at": (1.0,)},
    ),
    "resrep": Row(
        "hasten.methods.structure.resrep:ResRep",
        {
            "target": 0.5,
            "lam": 0.1,
            "momentum": 0.9,
            "every": 4,
            "granularity": 1000,
            "warmup": 0.0,
            "threshold": 0.9999,
            "relative": True,
        },
    ),
    "aofp": Row(
        "hasten.methods.structure.aofp:AOFP",
        {"theta": 0.5, "h": 2, "warmup": 0, "target": 0.3, "surgery_every": 0.05},
        {"theta": 0.0},
    ),
    "structured_sparsity_learning": Row(
        "hasten.methods.structure.structured_sparsity_learning:StructuredSparsityLearning",
        {
            "filter": 0.3,
            "channel": 0.3,
            "shape": 0.05,
            "regularise": 0.5,
            "proximal": True,
            "round_to": 8,
            "min_channels": 16,
            "threshold": 1e-3,
        },
        {"filter": 0.0, "channel": 0.0, "shape": 0.0},
    ),
    "adaptive_channel_layer_pruning": Row(
        "hasten.methods.structure.adaptive_channel_layer_pruning:AdaptiveGatePruning",
        {"g_c": 2.0, "target": 0.7, "k": 2.0, "patience": 0, "min_channels": 16},
        {"g_c": 0.0, "g_b": 0.0},
    ),
    "s3pool": Row("hasten.methods.forward.s3pool:S3Pool"),
}
