"""Settings are checked against their annotations, once, whatever they come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

import hasten
from hasten.cli.config import method_from, recipe_from
from hasten.contract import Method, MethodSpec
from hasten.errors import HastenError, SettingsError
from hasten.recipe import Recipe
from hasten.registry import available, method, method_class
from hasten.settings import hints_of, methods_from, settings_from

# a value that no annotation of this kind allows
WRONG: dict[Any, list[Any]] = {
    bool: ["no", 1, None],
    int: [2.5, True, "3"],
    float: [float("nan"), True, "x"],
    str: [3],
}


def wrong_settings(cls: type) -> Iterator[tuple[str, Any]]:
    for name, hint in hints_of(cls).items():
        for value in WRONG.get(hint, []):
            yield name, value


@pytest.mark.parametrize("name", available())
def test_a_setting_of_the_wrong_type_is_refused_with_its_name(name: str) -> None:
    tried = 0
    for setting, value in wrong_settings(method_class(name)):
        with pytest.raises(SettingsError) as caught:
            method(name, **{setting: value})
        assert setting in str(caught.value)
        tried += 1
    assert tried >= 3


def test_so_is_one_of_the_recipe() -> None:
    tried = 0
    for setting, value in wrong_settings(Recipe):
        with pytest.raises(SettingsError, match="recipe: ") as caught:
            Recipe().with_(**{setting: value})
        assert f"{setting} (={value!r}) must be" in str(caught.value)
        tried += 1
    assert tried >= 25


@pytest.mark.parametrize("word", ["no", "off", "false", "False", "NO"])
def test_words_for_false_switch_off(word: str) -> None:
    recipe = recipe_from("strong", [f"nesterov={word}", f"decay_norms={word}"])
    assert recipe.nesterov is False
    assert recipe.decay_norms is False
    assert method_from(f"early_instance_filtering:use_uncertain={word}").use_uncertain is False


@pytest.mark.parametrize("word", ["yes", "on", "true", "True", "ON"])
def test_words_for_true_switch_on(word: str) -> None:
    assert recipe_from("plain", [f"nesterov={word}"]).nesterov is True


def test_such_words_stay_words_where_a_setting_is_text() -> None:
    assert settings_from("augment=no,schedule=on", "recipe", Recipe) == {"augment": "no", "schedule": "on"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("selective_backprop:history=2.5", "history"),
        ("selective_backprop:prime_epochs=nan", "prime_epochs"),
        ("early_instance_filtering:warmup=nan", "warmup"),
        ("approximate_tensor_ops:weights_only=maybe", "weights_only"),
        ("approximate_tensor_ops:scheme=best", "best"),
    ],
)
def test_what_used_to_switch_things_on_is_refused(text: str, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        method_from(text)
    assert words in str(caught.value)


def test_every_method_accepts_its_own_defaults_and_printed_settings() -> None:
    for name in available():
        made = method(name)
        assert method(name, **made.settings()).settings() == made.settings()


def test_annotations_of_every_shape() -> None:
    @dataclass(kw_only=True, eq=False)
    class Made(Method):
        """Nothing."""

        spec: ClassVar[MethodSpec] = MethodSpec(
            name="made", title="t", paper="p", saves="memory", acts="a", writes=frozenset()
        )
        pair: tuple[int, int] = (1, 2)
        several: tuple[str, ...] = ()
        either: float | None = None
        table: dict[str, int] | None = None

    Made(pair=(3, 4), several=("a",), either=2, table={"x": 1})
    Made(pair=[3, 4])  # type: ignore[arg-type]
    for wrong in (
        {"pair": (1,)},
        {"pair": (1, 2.5)},
        {"several": "ab"},
        {"either": "x"},
        {"table": {"x": "y"}},
    ):
        with pytest.raises(SettingsError, match=f"{next(iter(wrong))} "):
            Made(**wrong)  # type: ignore[arg-type]


def test_methods_by_name() -> None:
    found = methods_from(["mixed_precision", "actnn:bits=4", hasten.method("s3pool")])
    assert [m.spec.name for m in found] == ["mixed_precision", "actnn", "s3pool"]
    assert found[1].bits == 4
    assert [m.spec.name for m in methods_from("mixed_precision")] == ["mixed_precision"]
    with pytest.raises(SettingsError, match=r"is the class; give MixedPrecision\(\) or 'mixed_precision'"):
        methods_from([method_class("mixed_precision")])
    with pytest.raises(SettingsError, match="3 is a int"):
        methods_from([3])
    with pytest.raises(HastenError, match="Did you mean 'actnn'"):
        methods_from(["actn"])


def test_meanings_of_all_recipe_settings_are_told() -> None:
    from hasten.recipe import MEANING

    assert list(MEANING) == [f.name for f in dataclasses.fields(Recipe)]
