"""A run as it lies in its folder: its weights alone, which run no code, or its network, built again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from hasten import models, registry
from hasten.checkpoint import Loaded, Store
from hasten.contract import Method, overrides
from hasten.devices import training_device
from hasten.errors import CheckpointError, HastenError, UnsupportedError
from hasten.exporting.trained import Trained
from hasten.optim.ema import EMA
from hasten.places import PLACES
from hasten.session import Session
from hasten.surgery.edits import Gate, from_json

# places whose methods say how the network is trained or executed, and leave nothing in it
_PASSING = frozenset(
    name for name, place in PLACES.items() if place.stage in ("batch", "loss", "update")
) | {"layout", "precision", "graph"}  # fmt: skip
_NETWORK = "network"  # the folder in which a comparison keeps the run of its winner


class StoredRun:
    """The newest good checkpoint of a run, or of the winner that a comparison kept.

    Raises CheckpointError if there is none in ``folder``.
    """

    def __init__(self, folder: Path) -> None:
        folder = Path(folder)
        self.folder = folder / _NETWORK if (folder / _NETWORK / "checkpoints").is_dir() else folder
        loaded = Store(self.folder / "checkpoints").load() if (self.folder / "checkpoints").is_dir() else None
        if loaded is None:
            raise CheckpointError(
                f"{folder} holds no good checkpoint; give the folder of a `hasten train` run, or of a `hasten compare` "
                f"that kept its network."
            )
        self.loaded: Loaded = loaded
        try:
            state, identity = loaded.parts["state"], loaded.recipe
            self.preprocessing: dict[str, Any] | None = state.get("data") or None
            self.accuracy: float | None = _accuracy(state)
            self.model: dict[str, Any] = identity["model"]
            self.recipe: dict[str, Any] = identity["recipe"]
            self.data: dict[str, Any] = identity["data"] if isinstance(identity["data"], dict) else {}
            self.method_rows: list[dict[str, Any]] = identity["methods"]
            self.methods: list[Method] = [method_from_json(row) for row in self.method_rows]
            self.structure: list[Any] = state.get("structure", [])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> HastenError:
        if isinstance(error, HastenError):
            return error
        return CheckpointError(
            f"{self.loaded.path} does not describe a run ({type(error).__name__}: {error})."
        )

    def weights(self) -> dict[str, Tensor] | None:
        """Return the weights as training left them, averaged where the recipe averages; no code is run.

        None where a method of the run keeps the weights in a form of its own until export.
        """
        if any(overrides(method, "export") and _leaves_something(method) for method in self.methods):
            return None
        if any(isinstance(from_json(edit), Gate) for edits in self.structure for edit in edits):
            return None
        weights = dict(self.loaded.parts["model"])
        average = self.loaded.parts["regimen"].get("ema", {}).get("average", {})
        for name, value in average.items():
            weights[name] = value.to(weights[name].dtype)
        return weights

    def trained(self, *, trust_code: bool = False, device: str | None = "cpu") -> Trained:
        """Return the network, built again.

        Raises UnsupportedError if the model was an object without a factory, or is code of the user's and
        ``trust_code`` is not given; CheckpointError for a checkpoint that does not describe a run.
        """
        where = training_device(device)
        if "object" in self.model:
            raise UnsupportedError(
                f"the model of this run was an object ({self.model['object']}) without a name or factory, so it cannot be "
                f"built again here; its weights can be written: hasten export {self.folder} net.safetensors. Or export in "
                f"the program that made it: hasten.export(result, 'net.pt2')."
            )
        try:
            return self._built(trust_code, where)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(error) from error

    def _built(self, trust_code: bool, device: str) -> Trained:
        parts, known = self.loaded.parts, self.preprocessing or {}
        net = models.from_recipe(self.model, trust_code=trust_code).make()
        channels = known.get("channels", self.model["in_channels"])
        height, width = known.get("size", [self.model["image_size"]] * 2)
        sample = torch.zeros(2, channels, height, width)
        trainable = [p for p in net.parameters() if p.requires_grad]
        session = Session(
            net, SGD(trainable, lr=0.0), [m for m in self.methods if _leaves_something(m)],
            sample=(sample, torch.zeros(2, dtype=torch.int64)), seed=self.loaded.recipe["seed"], total_samples=1,
            allow_no_effect=True,
        )  # fmt: skip
        session.surgery.replay(self.structure)
        session.model.load_state_dict(parts["model"])
        for method in session.methods:
            method.load_state_dict(parts[f"method-{method.spec.name}"])
        if "ema" in parts["regimen"]:
            ema = EMA(session.model)
            ema.load_state_dict(parts["regimen"]["ema"])
            ema.copy_to(session.model)
        return Trained(
            session.export().to(device), (channels, height, width), self.preprocessing, self.accuracy,
            self._precision(session), self.model, self.method_rows, self.recipe, self.structure, self.data, device,
        )  # fmt: skip

    @property
    def precision(self) -> str:
        """The number format in which the run was evaluated, as far as its methods tell without being built."""
        for method in self.methods:
            if "precision" in method.writes and not _leaves_something(method):
                return str(self.loaded.parts[f"method-{method.spec.name}"]["dtype_"])
        return "float32"

    def _precision(self, session: Session) -> str:
        """Return the number format of the rebuilt network's evaluation."""
        with session.inference():
            if torch.is_autocast_enabled("cpu"):
                return str(torch.get_autocast_dtype("cpu")).removeprefix("torch.")
        return self.precision


def load_run(folder: str | Path, *, trust_code: bool = False, device: str | None = "cpu") -> Trained:
    """Return the trained network of a run, from its newest checkpoint, on ``device`` (None: the accelerator).

    folder: of ``hasten train``, of ``fit(out=...)``, or of a comparison that kept its winner. The averaged weights are
    taken where the recipe has them. Raises CheckpointError if there is no good checkpoint, and UnsupportedError if the
    model is code of the user's and ``trust_code`` is not given, or cannot be built again.
    """
    return StoredRun(Path(folder)).trained(trust_code=trust_code, device=device)


load = load_run


def method_from_json(row: dict[str, Any]) -> Method:
    """Return the method that ``loop`` stored as ``{"name": ..., "settings": {...}}``."""
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in row["settings"].items()}
    return registry.method(row["name"], **settings)


def _accuracy(state: dict[str, Any]) -> float | None:
    """Return the accuracy of the very weights that were saved, or None where the last evaluation was of earlier ones."""
    if not (curve := state.get("curve")):
        return None
    _, samples, accuracy = curve[-1]
    return float(accuracy) if samples == state["counters"]["streamed"] else None


def _leaves_something(method: Method) -> bool:
    places = method.writes - _PASSING
    forward = {place for place in method.writes if PLACES[place].stage not in ("batch", "loss", "update")}
    return bool(places) or (bool(forward) and overrides(method, "export"))
