"""The order of methods and their conflicts follow from what they read and write, never from how they were given."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from hasten.contract import Effect, Method, MethodSpec
from hasten.errors import ConflictError, UnknownName
from hasten.places import PLACES, circle, ordered

MANY = [name for name, place in PLACES.items() if place.rule != "one"]
ONE = [name for name, place in PLACES.items() if place.rule == "one"]


def fake(name: str, writes: set[str], reads: set[str] = frozenset(), **more: Any) -> Method:  # type: ignore[assignment]
    """Return a method that only has a name and places."""

    @dataclass(kw_only=True, eq=False)
    class Fake(Method):
        spec: ClassVar[MethodSpec] = MethodSpec(name=name, title="", paper="", saves="samples", acts="",
                                                writes=frozenset(writes), reads=frozenset(reads), **more)  # fmt: skip

        def attach(self, session: Any) -> Effect:
            return Effect({"all": "nothing"})

    return Fake()


def names(methods: list[Method]) -> list[str]:
    return [m.spec.name for m in methods]


def random_methods(r: random.Random) -> list[Method]:
    """Return 2 to 7 methods whose reads and writes hold no circle: each reads only what earlier ones write."""
    methods: list[Method] = []
    ones = r.sample(ONE, len(ONE))
    for i in range(r.randint(2, 7)):
        writes = set(r.sample(MANY, r.randint(0, 2)))
        if ones and r.random() < 0.4:
            writes.add(ones.pop())
        readable = {p for m in methods for p in m.writes}
        # nothing that an earlier one reads may be written now, or two would read each other
        writes -= {p for m in methods for p in m.reads}
        reads = set(r.sample(sorted(readable), min(len(readable), r.randint(0, 2)))) - writes
        methods.append(fake(f"m{i}", writes, reads))
    return methods


def test_a_writer_comes_before_its_readers_whatever_order_was_given() -> None:
    readers = 0
    for seed in range(300):
        r = random.Random(seed)
        methods = random_methods(r)
        expected = names(ordered(methods))
        assert sorted(expected) == sorted(names(methods))
        for _ in range(6):
            shuffled = r.sample(methods, len(methods))
            assert names(ordered(shuffled)) == expected, seed
        for writer in methods:
            for reader in methods:
                if writer is not reader and writer.writes & reader.reads:
                    readers += 1
                    assert expected.index(writer.spec.name) < expected.index(reader.spec.name), seed
    assert readers > 300


def test_without_reads_the_order_is_that_of_the_step() -> None:
    r = random.Random(1)
    for _ in range(100):
        places = r.sample(list(PLACES), 6)
        methods = [fake(f"writes {place}", {place}) for place in places]
        steps = sorted(places, key=list(PLACES).index)
        assert names(ordered(methods)) == [f"writes {place}" for place in steps]


@pytest.mark.parametrize("length", [2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_a_circle_is_refused_and_only_its_members_are_named(length: int, seed: int) -> None:
    places = random.Random(seed).sample(MANY, length + 2)
    ring = [fake(f"ring{i}", {places[i]}, {places[(i + 1) % length]}) for i in range(length)]
    behind = fake("behind", {places[-1]}, {places[0]})
    before = fake("before", {places[-2]})
    methods = random.Random(seed).sample([*ring, behind, before], length + 2)
    with pytest.raises(ConflictError, match="no order exists; drop one of them") as caught:
        ordered(methods)
    assert all(m.spec.name in str(caught.value) for m in ring)
    assert "behind" not in str(caught.value)
    assert "before" not in str(caught.value)
    assert sorted(names(circle([*ring, behind]))) == sorted(names(ring))


@pytest.mark.parametrize("place", ONE)
def test_a_place_for_one_method_refuses_two(place: str) -> None:
    with pytest.raises(ConflictError) as caught:
        ordered([fake("first", {place}), fake("second", {place})])
    text = str(caught.value)
    assert "first" in text
    assert "second" in text
    assert repr(place) in text
    assert PLACES[place].meaning in text
    assert "keep one of the two" in text


@pytest.mark.parametrize("place", MANY)
def test_other_places_take_two(place: str) -> None:
    assert len(ordered([fake("first", {place}), fake("second", {place})])) == 2


def test_an_excluded_place_is_refused_with_its_reason_in_either_order() -> None:
    a = fake("sampler", {"x"}, excludes=frozenset({"batch"}), excludes_reason="Twice would bias it.")
    b = fake("cutter", {"batch"})
    for methods in ([a, b], [b, a]):
        with pytest.raises(
            ConflictError, match=r"sampler cannot run with cutter.*'batch'.*Twice would bias it\."
        ):
            ordered(methods)


def test_a_method_given_twice_is_refused_and_all_problems_come_at_once() -> None:
    twice = [fake("a", {"x"}), fake("a", {"x"}), fake("b", {"update"}), fake("c", {"update"})]
    with pytest.raises(ConflictError) as caught:
        ordered(twice)
    assert "a is given twice" in str(caught.value)
    assert "b and c both decide" in str(caught.value)


def test_an_unknown_place_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'gradients'"):
        fake("wrong", {"gradient"})
