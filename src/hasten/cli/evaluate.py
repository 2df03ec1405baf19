"""``hasten evaluate``: how often a trained network is right on labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli.output import program_output, say, say_json, starting

if TYPE_CHECKING:
    from hasten.data import Images
    from hasten.exporting import Trained


def evaluate(
    run: Annotated[
        Path, typer.Argument(help="Folder of a `hasten train` run, or of a comparison that kept its network.")
    ],
    data: Annotated[str, typer.Argument(help="Name of a data set, folder of class folders, or .npz file.")],
    root: Annotated[str | None, typer.Option(help="Folder that holds the data set's files.")] = None,
    size: Annotated[
        int | None,
        typer.Option(help="Side in pixels to which images are brought; the run's where not given."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; the accelerator if there is one where not given.")
    ] = None,
    trust_code: Annotated[
        bool, typer.Option(help="Import the model's own file or package, named in the run.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Print the accuracy on the test images of DATA, in all and of each class; classes are matched by name.

    Where DATA has no test part, all its images count, unless the network was trained on them.
    """
    starting(f"Reading {run}")
    with program_output(json):
        from hasten.exporting import load

        trained = load(run, trust_code=trust_code, device=device)
        name, images = _test_images(trained, data, root, size)
        found = measured(trained, images)
    if json:
        say_json({"run": str(run), "data": name, **found})
        return
    say(f"{name}: accuracy {100 * found['accuracy']:.2f}% ({found['right']:,} of {found['count']:,} images)")
    for label, row in found["classes"].items():
        say(f"  {label:24} {100 * row['accuracy']:6.2f}%  ({row['right']:,} of {row['count']:,})")
    if trained.accuracy is not None:
        say(f"The run itself: {100 * trained.accuracy:.2f}%")


def _test_images(trained: Trained, data: str, root: str | None, size: int | None) -> tuple[str, Images]:
    from hasten.data import DataSet, as_data
    from hasten.data.held import held_note
    from hasten.errors import DataError

    resize = trained.known.get("resize")
    if size is None and resize is not None and Path(data).is_dir():
        size = trained.known["size"][0]
    found = as_data(data, root=root, size=size)
    if not isinstance(found, DataSet):
        raise DataError(f"{data} is a stream of batches; evaluate needs images.")
    own = found.identity()["content"] == trained.data.get("content")
    if held_note(found.test_count) in found.notes and not own:  # all of them are new to the network
        return f"{data}, all of its images", _joined(found.train, found.test)
    return found.name, found.test


def _joined(a: Images, b: Images) -> Images:
    import numpy as np

    from hasten.data import Images

    return Images(np.concatenate([a.pixels, b.pixels]), np.concatenate([a.labels, b.labels]), a.classes)


def measured(trained: Trained, images: Images) -> dict[str, Any]:
    """Return, for JSON, accuracy, right answers and count on ``images``, in all and by class.

    Raises DataError for classes that the network does not know, or other channels.
    """
    import numpy as np

    from hasten.errors import DataError

    if unknown := [name for name in images.classes if name not in trained.classes]:
        raise DataError(
            f"the network does not know {len(unknown)} of the data's classes: {', '.join(unknown[:8])}. It knows: "
            f"{', '.join(trained.classes[:20])}{', ...' if len(trained.classes) > 20 else ''}."
        )
    if images.shape[2] != trained.shape[0]:
        raise DataError(
            f"the network takes {trained.shape[0]} channels, and the data have {images.shape[2]}."
        )
    meant = np.array([trained.classes.index(name) for name in images.classes])[images.labels]
    answers = np.concatenate(
        [trained.logits(images.pixels[i : i + 500].transpose(0, 3, 1, 2)).argmax(1).numpy()
         for i in range(0, len(images), 500)]
    )  # fmt: skip
    right = answers == meant
    classes = {}
    for label, name in enumerate(trained.classes):
        own = right[meant == label]
        if len(own):
            classes[name] = {"accuracy": float(own.mean()), "right": int(own.sum()), "count": len(own)}
    return {
        "accuracy": float(right.mean()),
        "right": int(right.sum()),
        "count": len(right),
        "classes": classes,
    }


def add_to(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(evaluate)
