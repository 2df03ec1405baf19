"""Crafted checkpoints and folders: nothing outside is read, written or run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hasten.checkpoint import Store, claim_folder, safe_name
from hasten.checkpoint.files import Files
from hasten.checkpoint.manifest import MANIFEST
from hasten.errors import CheckpointError

from .faulty import Simulated
from .trees import RECIPE, equal, state


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and give it the checksum that fits, as an attacker would."""
    body = json.loads((folder / MANIFEST).read_text())
    del body["sha256"]
    change(body)
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({**body, "sha256": digest}, sort_keys=True, indent=1) + "\n")


def plant(folder: Path, name: str, data: bytes) -> None:
    """Put a file into a checkpoint and list it rightly."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(data)
    relist(folder, name, data)


def relist(folder: Path, name: str, data: bytes) -> None:
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    forge(folder, lambda body: body["files"].update({name: entry}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    store = Store(tmp_path / "run", files=Simulated())
    for step in (1, 2):
        store.save(step, state(step), RECIPE)
    (tmp_path / "secret").write_bytes(b"{}")
    return tmp_path / "run"


def header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


def outside(name: str) -> Callable[[Path], None]:
    return lambda folder: relist(folder, name, b"{}")


def listed(**change: Any) -> Callable[[Path], None]:
    return lambda folder: forge(folder, lambda body: body.update(change))


def content(name: str, data: bytes | str) -> Callable[[Path], None]:
    return lambda folder: plant(folder, name, data.encode() if isinstance(data, str) else data)


def link(name: str, target: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        if name != MANIFEST:
            relist(folder, name, b"{}")

    return act


def pipe(folder: Path) -> None:
    (folder / "recipe.json").unlink()
    os.mkfifo(folder / "recipe.json")


def sparse(folder: Path) -> None:
    os.truncate(folder / "state.json", 1 << 40)  # one terabyte that takes no space


def part(skeleton: str) -> Callable[[Path], None]:
    return content("state.json", f'{{"step":2,"parts":{{"model":{skeleton}}}}}')


ATTACKS = {
    "parent": outside("../../secret"),
    "absolute": outside("/etc/passwd"),
    "folder inside": outside("sub/secret"),
    "dots": outside(".."),
    "empty name": outside(""),
    "nul": outside("a\0b"),
    "backslash": outside("..\\secret"),
    "lists itself": outside(MANIFEST),
    "link": link("recipe.json", "../../secret"),
    "link to manifest": link(MANIFEST, "../step-000001/manifest.json"),
    "pipe": pipe,
    "sparse terabyte": sparse,
    "another step": listed(step=7),
    "step is text": listed(step="2"),
    "no files": listed(files={}),
    "files is a list": listed(files=["state.json"]),
    "entry is text": listed(files={"state.json": "x"}),
    "size is text": listed(files={"state.json": {"size": "5", "sha256": ""}}),
    "format 0": listed(format=0),
    "format is true": listed(format=True),
    "no environment": listed(environment=None),
    "pickle for tensors": content("model.safetensors", b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR."),
    "extra pickle": content("data.pkl", b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR."),
    "header too long": content("model.safetensors", (1 << 60).to_bytes(8, "little")),
    "header is no JSON": content("model.safetensors", header("{")),
    "offsets outside": content(
        "model.safetensors", header('{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}')
    ),
    "huge shape": content(
        "model.safetensors",
        header('{"w":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'),
    ),
    "import string": part('{"$import":"os:system"}'),
    "part is a list": part("[]"),
    "part is text": part('"x"'),
    "part with a path": content("state.json", '{"step":2,"parts":{"../../secret":{}}}'),
    "deep JSON": content("state.json", "[" * 100_000 + "]" * 100_000),
    "deep state": part('{"a":' * 250 + "1" + "}" * 250),
    "nan in JSON": part('{"a":NaN}'),
    "too big a number": part('{"a":1e999}'),
    "endless digits": part('{"a":' + "9" * 10_000 + "}"),
    "key twice": part('{"a":1,"a":2}'),
    "not UTF-8": content("state.json", b"\xff\xfe\xfd"),
    "recipe is a list": content("recipe.json", "[]"),
    "recipe with a tensor": content("recipe.json", '{"a":{"$tensor":"a"}}'),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_crafted_checkpoint_is_set_aside(
    root: Path, tmp_path: Path, attack: Callable[[Path], None]
) -> None:
    attack(root / "step-000002")
    seen = sorted(
        path for path in tmp_path.rglob("*") if "quarantine" not in str(path) and "000002" not in str(path)
    )
    opened: list[Path] = []

    class Watching(Files):
        def before(self, operation: str, path: Path) -> None:
            opened.append(path)

    loaded = Store(root, files=Watching()).load()
    assert loaded is not None
    assert loaded.step == 1
    assert equal(loaded.parts, state(1))
    assert "step-000002 is damaged" in loaded.warnings[0]
    assert all(Path(os.path.normpath(path)).is_relative_to(root) for path in opened)
    left = sorted(path for path in tmp_path.rglob("*") if "quarantine" not in str(path))
    assert left == seen


def test_a_newer_format_is_named_and_left_alone(root: Path) -> None:
    forge(root / "step-000002", lambda body: body.update(format=2))
    with pytest.raises(CheckpointError, match=r"format 2.*install a newer"):
        Store(root).load()
    assert (root / "step-000002").is_dir()


def test_the_forgery_itself_is_sound(root: Path) -> None:
    """Unchanged content with a new checksum loads: the attacks above fail for their own reason."""
    forge(root / "step-000002", lambda body: None)
    plant(root / "step-000002", "recipe.json", b'{"lr":1}')
    assert Store(root).load({"lr": 1}).step == 2  # type: ignore[union-attr]


def test_links_are_no_checkpoints_and_not_followed_when_removed(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "step-000002", tmp_path / "elsewhere")
    (root / "step-000009").symlink_to(tmp_path / "elsewhere")
    (root / ".trash-00000000").symlink_to(tmp_path / "elsewhere")
    (root / ".staging-00000000").mkdir()
    (root / ".staging-00000000" / "in").symlink_to(tmp_path / "elsewhere")
    store = Store(root)
    assert store.load().step == 2  # type: ignore[union-attr]
    assert store.save(3, state(3), RECIPE)
    assert len(list((tmp_path / "elsewhere").iterdir())) == 6
    assert not list(root.glob(".*"))
    with pytest.raises(CheckpointError, match="is a link"):
        Store(root / "step-000009")


def test_a_linked_quarantine_is_not_used(root: Path, tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    (root / "quarantine").symlink_to(tmp_path / "away")
    (root / "step-000002" / MANIFEST).unlink()
    assert "could not be moved" in Store(root).load().warnings[0]  # type: ignore[union-attr]
    assert not list((tmp_path / "away").iterdir())


def test_only_the_owner_can_read_a_checkpoint(root: Path) -> None:
    for path in root.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize("name", ["a", "Run_1.2-x", "a" * 128, "..."])
def test_names_that_are_allowed(name: str) -> None:
    assert safe_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a b", "ü", "a\n", "a\0", "$x", "a" * 129, "a:b", "*"]
)
def test_names_that_are_not(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"A-Z a-z 0-9"):
        safe_name(name)


def test_a_folder_is_claimed_once_and_again(tmp_path: Path) -> None:
    made = claim_folder(tmp_path / "new" / "run")
    (made / "something").write_text("ours")
    assert claim_folder(made) == made
    (tmp_path / "empty").mkdir()
    assert (claim_folder(tmp_path / "empty", "hasten report") / ".hasten").is_file()
    assert sorted(path.name for path in made.iterdir()) == [".hasten", "something"]
    assert claim_folder("inside", root=tmp_path) == tmp_path / "inside"


def test_folders_that_are_refused_and_left_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "out").symlink_to("/")
    (tmp_path / "marked").mkdir()
    (tmp_path / "marked" / ".hasten").symlink_to(tmp_path / "file")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / ".hasten").write_text("[]")
    claim_folder(tmp_path / "report", "hasten report")
    before = sorted(tmp_path.rglob("*.*"))
    for given, message in {
        "foreign": "not the folder of a hasten run.*thesis.tex",
        "file": "it is a file|exists|Not a directory",
        "file/below": "Not a directory|file",
        "link": "is a link",
        "marked": "cannot use",
        "strange": "not a mark",
        "report": "holds a 'hasten report'",
        "bad name": "not allowed",
        "bad\nname": "not allowed",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            claim_folder(tmp_path / given)
    for given in ("../x", "/tmp/elsewhere-entirely", "out/tmp/x"):
        with pytest.raises(CheckpointError, match=r"outside|'\.\.'"):
            claim_folder(given, root=tmp_path)
    assert sorted(tmp_path.rglob("*.*")) == before


def test_a_folder_that_cannot_be_written_is_refused_with_the_reason(tmp_path: Path) -> None:
    class ReadOnly(Files):
        def before(self, operation: str, path: Path) -> None:
            if operation in ("create", "mkdir"):
                raise PermissionError(13, "Permission denied", str(path))

    claim_folder(tmp_path / "run")
    for name in ("run", "new"):
        with pytest.raises(CheckpointError, match=r"Permission denied.*can write to"):
            claim_folder(tmp_path / name, files=ReadOnly())
