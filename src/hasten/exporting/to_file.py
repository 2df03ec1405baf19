"""``hasten.export``: a run or a result as a file, with its labels beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from hasten.errors import SettingsError, UnsupportedError
from hasten.exporting.formats import SUFFIXES, write_onnx, write_program, write_weights
from hasten.exporting.snippet import snippet
from hasten.exporting.stored import StoredRun
from hasten.exporting.trained import Trained, labels

if TYPE_CHECKING:
    from hasten.loop import Result


@dataclass(frozen=True)
class Exported:
    """What was written. error: largest difference from the network's outputs, None for weights. labels: the file with the
    class names, and what is in it. snippet: lines that use the file. notes: what a user should know."""

    path: Path
    labels_path: Path
    labels: dict[str, Any]
    error: float | None
    snippet: str
    notes: tuple[str, ...] = ()


def export(
    run: str | Path | Trained | Result, path: str | Path, raw: bool = False, *, trust_code: bool = False
) -> Exported:
    """Write the network of a run to ``path``, and what it must be used with to ``NAME.labels.json`` beside it.

    run: folder of a run, or what ``fit`` or ``load`` returned. path: ends in ``.pt2`` (a program of torch.export, which
    runs wherever PyTorch does), ``.onnx`` (needs the extra ``onnx``), or ``.safetensors`` (the weights alone). Programs
    take pixels (N, C, H, W), uint8 or floating point in [0, 1], of any height and width, and give logits; with ``raw``
    they take normalised images of the network's size. trust_code: import the model's own file, named in the run;
    weights alone need it only where a method of the run keeps them in a form of its own.

    Raises UnsupportedError where this cannot be written, with what can; SettingsError for another ending.
    """
    out = Path(path)
    if out.suffix not in SUFFIXES:
        raise SettingsError(
            f"cannot tell what to write from {out.name!r}: end it in .pt2, .onnx or .safetensors."
        )
    source: StoredRun | Trained
    if isinstance(run, str | Path):
        source = StoredRun(Path(run))
    else:
        source = run if isinstance(run, Trained) else trained_from(run)
    weights_only = out.suffix == ".safetensors"
    weights = source.weights() if isinstance(source, StoredRun) and weights_only else None
    if weights is None:
        source = source if isinstance(source, Trained) else source.trained(trust_code=trust_code)
        weights = source.network.state_dict()
    told = labels(source.preprocessing, source.accuracy, source.model, source.precision)
    inside = told | {"input": "normalised" if raw or weights_only else "pixels"}

    def write(file: Path) -> float | None:
        if weights_only:
            write_weights(weights, inside, file)
            return None
        assert isinstance(source, Trained)
        writer = write_onnx if out.suffix == ".onnx" else write_program
        return writer(source, inside, file, raw=raw)

    error = _published(out, write)
    labels_path = out.with_suffix(".labels.json")
    text = json.dumps(told, indent=2) + "\n"
    _published(labels_path, lambda file: file.write_text(text, encoding="utf-8"))
    return Exported(
        out, labels_path, inside, error, snippet(out, source, raw=raw), tuple(_notes(source, out.suffix, raw))
    )


def _notes(source: StoredRun | Trained, suffix: str, raw: bool) -> Iterator[str]:
    if source.accuracy is None:
        yield "the run was stopped after its last evaluation, so the accuracy of these weights is not known"
    if (raw or suffix == ".onnx") and source.precision != "float32":
        yield (
            f"computes in float32; the run's accuracy was measured in {source.precision}, so that an image or two may "
            f"differ (.pt2 with pixels keeps {source.precision})"
        )
    elif suffix == ".pt2" and any(row["settings"].get("compile") for row in _rows(source)):
        yield "the run's accuracy was measured by a compiled network, so that an image or two may differ"
    if suffix == ".safetensors" and source.structure:
        yield "training changed the network's shape: the factory's network does not take these weights; .pt2 is whole"


def _rows(source: StoredRun | Trained) -> list[dict[str, Any]]:
    return source.method_rows if isinstance(source, StoredRun) else source.methods


def trained_from(result: Result) -> Trained:
    """Return the network of what ``fit`` returned. Raises UnsupportedError where that has none."""
    if result.model is None:
        raise UnsupportedError(
            "this result has no model (it was made in another process); give its run's folder."
        )
    known = result.preprocessing
    if not known:
        raise UnsupportedError("this result does not tell its preprocessing; give the folder of the run.")
    witness = result.witness.get("mixed_precision", {})
    low = [name for name in ("bfloat16", "float16") if f"forward_{name}" in witness]
    return Trained(
        result.model, (known["channels"], *known["size"]), known, result.accuracy, low[0] if low else "float32",
        {"kind": "object", "name": type(result.model).__name__},
        [{"name": name, "settings": {}} for name in result.witness],
    )  # fmt: skip


def _published(out: Path, write: Callable[[Path], Any]) -> Any:
    """Return what ``write`` does for a file aside, which then takes the place of ``out``: whole or not at all."""
    with _reasons(out), TemporaryDirectory(prefix=".hasten-", dir=out.parent) as aside:
        found = write(Path(aside) / out.name)  # the same name, which some formats keep inside
        os.replace(Path(aside) / out.name, out)
    return found


@contextmanager
def _reasons(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as failure:
        raise UnsupportedError(f"cannot write {out}: {failure.strerror or failure}.") from failure
    except SafetensorError as failure:
        raise UnsupportedError(f"cannot write {out}: {failure}.") from failure
