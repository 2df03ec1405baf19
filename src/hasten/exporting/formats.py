"""The three kinds of file: weights (.safetensors), a program of torch.export (.pt2), and ONNX (.onnx)."""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from hasten.errors import UnsupportedError
from hasten.exporting.pixels import Pixels
from hasten.exporting.trained import Trained

SUFFIXES = (".pt2", ".safetensors", ".onnx")
LABELS = "labels.json"  # name of the metadata inside a .pt2 file
CHECKED = 8  # inputs on which a program is compared with the network it was made from


def write_weights(weights: Mapping[str, Any], labels: dict[str, Any], file: Path) -> None:
    """Write tensors with ``labels`` in the header, every value as JSON."""
    if other := [name for name, value in weights.items() if not isinstance(value, Tensor)]:
        raise UnsupportedError(
            f"the state of this network holds {', '.join(other[:3])}, no tensor, which .safetensors cannot keep; write .pt2."
        )
    header = {"format": "pt"} | {key: json.dumps(value) for key, value in labels.items()}
    # cloned, because the format refuses tensors that share memory, as tied weights do
    save_file(
        {name: value.detach().cpu().clone().contiguous() for name, value in weights.items()}, file, header
    )


def write_program(trained: Trained, labels: dict[str, Any], file: Path, *, raw: bool) -> float:
    """Write a program of torch.export and return the largest difference between its outputs and the network's.

    The batch size is open, and for pixels height and width, too. Raises UnsupportedError where torch.export cannot
    follow the network.
    """
    program, subject = traced(trained, raw=raw)
    with quiet():
        torch.export.save(program, file, extra_files={LABELS: json.dumps(labels, indent=2)})
        loaded = torch.export.load(file).module()
    return largest_error(subject, loaded, inputs(trained, raw=raw))


def write_onnx(trained: Trained, labels: dict[str, Any], file: Path, *, raw: bool) -> float:
    """Write ONNX and return the largest difference between what onnxruntime computes from it and the network's outputs.

    It computes in float32, and pixels are uint8. Raises UnsupportedError without the extra, or where a converter fails.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ImportError as error:
        raise UnsupportedError(
            f"ONNX files need onnx, onnxscript and onnxruntime ({error}): pip install 'hasten[onnx]', or write .pt2."
        ) from error
    program, subject = traced(trained, raw=raw, precision="float32")
    with quiet():
        try:
            converted = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"],
                                           output_names=["logits"])  # fmt: skip
            assert converted is not None
        except Exception as error:  # the converter raises whatever its parts raise
            raise UnsupportedError(
                f"this network cannot be converted to ONNX ({reason(error)}); write .pt2 or .safetensors instead."
            ) from error
        converted.model.metadata_props.update({key: json.dumps(value) for key, value in labels.items()})
        for node in converted.model.graph.all_nodes():
            node.metadata_props.clear()  # file names and lines of the machine it was made on
        converted.save(str(file))
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])

    return largest_error(subject, run, inputs(trained, raw=raw))


def traced(trained: Trained, *, raw: bool, precision: str | None = None) -> tuple[ExportedProgram, nn.Module]:
    """Return the program and the network on the CPU that it was traced from. Raises UnsupportedError."""
    network = copy.deepcopy(trained.network).cpu()
    net = network if raw else Pixels(network, trained.known, precision or trained.precision).eval()
    channels, height, width = trained.shape
    batch = Dim("batch", min=1, max=2**16)
    if raw:
        example, shapes = trained.sample(), {0: batch}
    else:  # another size than the network's, or the tracer would take it as given
        example = torch.zeros(2, channels, height + 3, width + 5, dtype=torch.uint8)
        shapes = {0: batch, 2: Dim("height", min=2, max=2**16), 3: Dim("width", min=2, max=2**16)}
    with quiet():
        try:
            program = torch.export.export(net, (example,), dynamic_shapes=(shapes,))
        except Exception as error:  # whatever the network's own code raises when it is traced
            raise UnsupportedError(
                f"torch.export cannot follow this network's forward ({reason(error)}); its weights can be written as they "
                f"are: give a file that ends in .safetensors."
            ) from error
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)  # file names and lines of the machine it was made on
    return program, net


def inputs(trained: Trained, *, raw: bool) -> list[Tensor]:
    """Return batches of random inputs, ``CHECKED`` in all; pixels of the network's size, and of two others."""
    g = torch.Generator().manual_seed(0)
    channels, height, width = trained.shape
    if raw:
        return [torch.rand(CHECKED, channels, height, width, generator=g)]
    sizes = [(4, height, width), (1, 2 * height + 1, width + 2), (CHECKED - 5, height + 7, 2 * width + 3)]
    return [torch.randint(0, 256, (n, channels, h, w), generator=g, dtype=torch.uint8) for n, h, w in sizes]


def largest_error(
    a: Callable[[Tensor], Tensor], b: Callable[[Tensor], Tensor], batches: list[Tensor]
) -> float:
    """Return the largest difference between the outputs of ``a`` and ``b``."""
    with torch.no_grad():
        return max(float((a(x).float() - b(x).float()).abs().max()) for x in batches)


def reason(error: BaseException) -> str:
    """Return the first telling line of an error of PyTorch's."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    first = lines[1] if lines[0].startswith("Constraints violated") and len(lines) > 1 else lines[0]
    return first.split(". ")[0].rstrip(".")[:200]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what exporters print, log and warn of away from the user, who gets one line of what matters."""
    with ExitStack() as stack:
        for redirect in (redirect_stdout, redirect_stderr):
            stack.enter_context(redirect(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, before)
        yield
