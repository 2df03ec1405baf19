"""Models by name, object, file and module; and what a checkpoint's recipe may and may not bring in."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hasten.errors import SettingsError, UnknownName, UnsupportedError
from hasten.models import ModelSource, from_recipe, resolve

CODE = """
from pathlib import Path
import torch
from torch import nn
from neighbour import WIDTH

Path(__file__).with_name("was_imported").touch()

def net(num_classes, image_size=0):
    first = nn.Linear(image_size * image_size, WIDTH)
    return nn.Sequential(nn.Flatten(), first, nn.Linear(WIDTH, num_classes))

def needy(num_classes, depth):
    return nn.Linear(1, num_classes)

def wrong():
    return "a string"

constant = 3
"""


def toy(num_classes: int, in_channels: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_channels, 4, 1), nn.Flatten(), nn.LazyLinear(num_classes))


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 6\n")
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path / "mine.py"


@pytest.fixture
def user_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"userpkg{abs(hash(tmp_path)) % 10**8}"
    folder = tmp_path / name / "sub"
    folder.mkdir(parents=True)
    (tmp_path / name / "__init__.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
    )
    (folder / "__init__.py").write_text("")
    (folder / "nets.py").write_text(
        "from torch import nn\n\ndef net(**kw):\n    return nn.Linear(1, kw['num_classes'])\n"
    )
    monkeypatch.chdir(tmp_path)
    return name


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)


def rebuilt(source: ModelSource, **options: Any) -> ModelSource:
    """Send the recipe through JSON, as a checkpoint does."""
    assert source.recipe is not None
    return from_recipe(json.loads(json.dumps(source.recipe)), **options)


@pytest.mark.parametrize("name", ["resnet8", "resnet8-proj", "wrn-10-1", "record-small-muon"])
def test_a_name_is_rebuilt_with_the_same_weights(name: str) -> None:
    source = resolve(name, num_classes=5, in_channels=1, image_size=28, seed=4)
    model = source.make()
    assert source.label == name
    assert same(model, source.make())
    assert same(model, rebuilt(source).make())
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 5)


def test_a_module_is_copied_and_cannot_be_rebuilt() -> None:
    given = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    source = resolve(given)
    made = source.make()
    assert source.recipe is None
    assert source.module is given
    assert made is not given
    assert same(made, given)
    with torch.no_grad():
        made[0].weight.add_(1)
    assert not same(made, given)


def test_a_local_factory_gets_what_it_names_and_has_no_recipe() -> None:
    source = resolve(lambda num_classes: nn.Linear(2, num_classes), num_classes=7, seed=1)
    assert source.recipe is None
    assert source.make().weight.shape == (7, 2)
    assert same(source.make(), source.make())


def test_an_importable_factory_has_a_recipe() -> None:
    plain = resolve(toy, num_classes=3, seed=2)
    assert plain.recipe is not None
    assert plain.recipe["target"] == f"{__name__}:toy"
    assert plain.recipe["sha256"] == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    with pytest.raises(UnsupportedError, match="wants to run code"):
        rebuilt(plain)
    assert isinstance(rebuilt(plain, trust_code=True).make(), nn.Sequential)


def test_a_file_runs_for_the_user_and_only_on_trust_from_a_checkpoint(user_file: Path) -> None:
    mark = user_file.with_name("was_imported")
    source = resolve(f"{user_file}:net", num_classes=4, image_size=6, seed=3)
    assert mark.exists()
    assert str(user_file.parent) not in sys.path
    model = source.make()
    assert model[1].in_features == 36
    mark.unlink()
    digest = hashlib.sha256(user_file.read_bytes()).hexdigest()
    with pytest.raises(UnsupportedError) as refusal:
        rebuilt(source)
    assert digest in str(refusal.value)
    assert str(user_file) in str(refusal.value)
    assert not mark.exists()
    assert same(rebuilt(source, trust_code=True).make(), model)


def test_a_relative_file_is_remembered_by_its_full_path(
    user_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(user_file.parent)
    source = resolve("mine.py:net", num_classes=2, image_size=3)
    assert source.recipe is not None
    assert source.recipe["target"] == f"{user_file}:net"


def test_a_changed_file_is_told_before_it_runs_on_trust(user_file: Path) -> None:
    source = resolve(f"{user_file}:net", num_classes=4, image_size=6)
    user_file.write_text(CODE + "\n# edited\n")
    with pytest.warns(UserWarning, match="changed since the checkpoint"):
        rebuilt(source, trust_code=True)


def test_a_package_is_not_imported_to_refuse_it(user_package: str) -> None:
    target = f"{user_package}.sub.nets:net"
    path = Path.cwd() / user_package / "sub" / "nets.py"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    recipe = {
        "kind": "code", "target": target, "path": str(path), "sha256": digest,
        "num_classes": 3, "in_channels": 3, "image_size": 8, "seed": 0,
    }  # fmt: skip
    with pytest.raises(UnsupportedError) as refusal:
        from_recipe(recipe)
    assert str(path) in str(refusal.value)
    assert digest in str(refusal.value)
    assert not (Path.cwd() / user_package / "ran").exists()
    assert user_package not in sys.modules
    assert from_recipe(recipe, trust_code=True).make().out_features == 3
    assert resolve(target, num_classes=9).make().out_features == 9


@pytest.mark.parametrize("target", ["os:system", "subprocess:run", "builtins:exec", "../../evil.py:net"])
def test_hostile_targets_in_a_checkpoint_are_refused(target: str) -> None:
    geometry = {"num_classes": 3, "in_channels": 3, "image_size": 8, "seed": 0}
    with pytest.raises(UnsupportedError, match="wants to run code"):
        from_recipe({"kind": "code", "target": target, "path": "", "sha256": "", **geometry})
    with pytest.raises(UnknownName):
        from_recipe({"kind": "name", "name": target, **geometry})


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "pickle"},
        {"extra": 1},
        {"name": 3},
        {"kind": None},
        {"num_classes": "3"},
        {"num_classes": 10**12},
    ],
)
def test_damaged_recipes_are_refused(change: dict[str, Any]) -> None:
    recipe = {
        "kind": "name",
        "name": "lenet",
        "num_classes": 3,
        "in_channels": 3,
        "image_size": 32,
        "seed": 0,
    }
    assert isinstance(from_recipe(recipe).make(), nn.Module)
    with pytest.raises(SettingsError):
        from_recipe({**recipe, **change})


def test_mistakes_say_what_to_do(user_file: Path) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'resnet18'"):
        resolve("resnet-18")
    with pytest.raises(SettingsError, match=r"no factory 'nett'; it has .*net"):
        resolve(f"{user_file}:nett")
    with pytest.raises(SettingsError, match="no factory 'constant'"):
        resolve(f"{user_file}:constant")
    with pytest.raises(SettingsError, match="there is no file"):
        resolve(f"{user_file}x/none.py:net")
    with pytest.raises(SettingsError, match="no module"):
        resolve("no_such_package.nets:net")
    with pytest.raises(SettingsError, match=r"file\.py:factory"):
        resolve("a b:c d")
    with pytest.raises(SettingsError, match="int"):
        resolve(3)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="needs depth"):
        resolve(f"{user_file}:needy").make()
    with pytest.raises(SettingsError, match="returned str"):
        resolve(f"{user_file}:wrong").make()


def test_an_error_in_the_users_code_passes_through(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import a_module_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        resolve(f"{tmp_path / 'broken.py'}:net")


class FakeLibrary:
    """Stands in for torchvision or timm, which tests must not need."""

    def __init__(self) -> None:
        self.models = self
        self.asked: list[Any] = []

    def list_models(self, module: Any = None) -> list[str]:
        return ["resnet18", "convnet"]

    def get_model(self, name: str, weights: Any, num_classes: int) -> nn.Module:
        assert weights is None
        return nn.Linear(2, num_classes)

    def create_model(self, name: str, pretrained: bool, num_classes: int, in_chans: int) -> nn.Module:
        assert pretrained is False
        return nn.Linear(in_chans, num_classes)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_extras_build_their_own_names_and_nothing_else(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLibrary()
    monkeypatch.setitem(sys.modules, library, fake)
    monkeypatch.setitem(sys.modules, f"{library}.models", fake)
    source = resolve(f"{library}:convnet", num_classes=6, seed=1)
    assert source.make().out_features == 6
    assert same(source.make(), rebuilt(source).make())
    for name in ("hf-hub:someone/thing", "local-dir:/tmp/x", "resnet19"):
        with pytest.raises(UnknownName):
            resolve(f"{library}:{name}")
    if library == "torchvision":
        with pytest.raises(UnsupportedError, match="3 channels"):
            resolve("torchvision:convnet", in_channels=1)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_missing_extra_names_its_install_command(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UnsupportedError, match=rf"pip install 'hasten\[{library}\]'"):
        resolve(f"{library}:resnet18")
