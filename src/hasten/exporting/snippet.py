"""Four lines that use an exported file, without hasten."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.exporting.stored import StoredRun
    from hasten.exporting.trained import Trained

_PROGRAM = """\
import json, torch
network, classes = torch.export.load({file!r}).module(), json.load(open({labels!r}))["classes"]
images = torch.zeros({shape}, dtype=torch.{dtype})  # {what}
print([classes[i] for i in network(images).argmax(1)])
"""
_ONNX = """\
import json, numpy, onnxruntime
network, classes = onnxruntime.InferenceSession({file!r}), json.load(open({labels!r}))["classes"]
images = numpy.zeros({shape}, "{dtype}")  # {what}
print([classes[i] for i in network.run(None, {{"images": images}})[0].argmax(1)])
"""
_WEIGHTS = """\
{imports}; from safetensors.torch import load_file
network = {build}
network.load_state_dict(load_file({file!r})); network.eval()
print(network(torch.zeros({shape})))  # {what}
"""


def snippet(out: Path, source: StoredRun | Trained, *, raw: bool) -> str:
    """Return the lines for the file ``out``; they run as they stand, and wait for images in place of the zeros."""
    known: dict[str, Any] = source.preprocessing or {}
    file, labels = str(out), str(out.with_suffix(".labels.json"))
    channels, (height, width) = _geometry(known, source.model)
    shape: tuple[Any, ...] = (1, channels, height, width)
    floats = "float32"
    normal = "your images, normalised as in training"
    if known.get("mean") is not None:
        numbers = (", ".join(f"{value:.4f}" for value in known[key]) for key in ("mean", "std"))
        normal = "(pixels / 255 - ({})) / ({}) of each channel".format(*numbers)
    if out.suffix == ".safetensors":
        imports, build = _builder(source.model)
        return _WEIGHTS.format(
            imports=imports, build=build, file=file, shape=", ".join(map(str, shape)), what=normal
        )
    onnx = out.suffix == ".onnx"
    kinds = "uint8" if onnx else "uint8, or floats in [0, 1]"
    what = normal if raw else f"your images: {kinds}; any number, height and width"
    text = (_ONNX if onnx else _PROGRAM).format(file=file, labels=labels, shape=shape if onnx else str(shape)[1:-1],
                                                dtype=floats if raw else "uint8", what=what)  # fmt: skip
    return text if known else text.replace("classes[i]", "int(i)")


def _geometry(known: dict[str, Any], model: dict[str, Any]) -> tuple[int, tuple[int, int]]:
    if known:
        return known["channels"], (known["size"][0], known["size"][1])
    side = model.get("image_size", 32)
    return model.get("in_channels", 3), (side, side)


def _builder(model: dict[str, Any]) -> tuple[str, str]:
    """Return the imports and the expression that build the network of a recipe of `hasten.models`."""
    kind, classes, channels = model.get("kind"), model.get("num_classes"), model.get("in_channels")
    if kind == "torchvision":
        return (
            "import torch, torchvision",
            f"torchvision.models.get_model({model['name']!r}, num_classes={classes})",
        )
    if kind == "timm":
        return (
            "import timm, torch",
            f"timm.create_model({model['name']!r}, num_classes={classes}, in_chans={channels})",
        )
    if kind == "name":
        return "import hasten, torch", (
            f"hasten.models.build({model['name']!r}, num_classes={classes}, in_channels={channels}, "
            f"image_size={model['image_size']})"
        )
    if kind == "code":
        where, _, name = str(model["target"]).rpartition(":")
        module = Path(where).stem if where.endswith(".py") else where
        return f"import torch; from {module} import {name}", f"{name}({_arguments(model, name)})"
    return "import torch", "...  # build your network here"


def _arguments(model: dict[str, Any], name: str) -> str:
    """Return what hasten calls the factory ``name`` with, read from its file; nothing in it is run."""
    try:
        body = ast.parse(Path(model["path"]).read_bytes()).body
    except (OSError, SyntaxError, ValueError, KeyError):
        return "..."
    found = next((node for node in body if getattr(node, "name", None) == name), None)
    if isinstance(found, ast.ClassDef):
        found = next((node for node in found.body if getattr(node, "name", None) == "__init__"), None)
    if not isinstance(found, ast.FunctionDef):
        return "..."
    names = [argument.arg for argument in (*found.args.args, *found.args.kwonlyargs)]
    return ", ".join(
        f"{key}={model[key]}" for key in ("num_classes", "in_channels", "image_size") if key in names
    )
