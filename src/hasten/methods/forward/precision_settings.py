"""What may be wrong with the settings of limited precision, each said with what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hasten.methods.forward.fixed_format import ROUNDINGS, format_problems
from hasten.methods.forward.precision_schedule import FORMATS, KINDS, Policy, schedule_problems

ALLOWED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("policy", KINDS),
    ("rounding", ROUNDINGS),
    ("rounding_activations", ROUNDINGS),
    ("scale", ("fixed", "running")),
    ("kernel", ("dense", "native", "auto")),
)
NARROW = 16
"""Words of fixed-point products on the CPU's 16-bit dot products."""


def settings_problems(given: Mapping[str, Any], policies: Callable[[], list[Policy]]) -> list[str]:
    """Return every setting that is out of range; ``policies`` is asked only where the settings that make them are good."""
    found = [p for name in FORMATS for p in format_problems(name, given[name])]
    found += [
        f"{name} is {given[name]!r}; allowed: {', '.join(map(repr, values))}."
        for name, values in ALLOWED
        if given[name] not in values
    ]
    if not 0.0 <= given["until"] <= 1.0:
        found.append(f"until is {given['until']}; allowed: a share of the run, from 0 to 1.")
    if not 0.0 < given["decay"] < 1.0:
        found.append(f"decay is {given['decay']}; allowed: between 0 and 1.")
    if not isinstance(given["master"], bool):
        found.append(f"master is {given['master']!r}; allowed: True or False.")
    patience, schedule = given["patience"], given["schedule"]
    if patience is not None and not (type(patience) is int and patience >= 1):
        found.append(f"patience is {patience!r}; allowed: whole numbers from 1, or None.")
    if schedule is not None:
        if patience is not None:
            found.append("schedule and patience both say when to switch; give one of the two.")
        found += schedule_problems(schedule)
    if given["kernel"] == "native" and not found:
        long = [n for p in policies() for n in FORMATS[:3] if p.emulated and getattr(p, n).wl > NARROW]
        if long:
            found.append(
                f"kernel='native' has words of up to {NARROW} bits; {', '.join(dict.fromkeys(long))} have more."
            )
    return found
