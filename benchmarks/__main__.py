"""List the benchmarks, run one, or run the smoke form of all: ``python -m benchmarks [NAME] [--smoke]``.

A benchmark is a module here with ``CLAIM`` (one line), ``MINUTES`` (on 2 cores) and ``main(smoke)``. It stores its
result under ``benchmarks/results`` and continues where it was stopped; a smoke run stores nothing there.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import time
from pathlib import Path

import benchmarks
from benchmarks.common import LEFT_OUT

HELPERS = ("common", "trained")
"""Modules that benchmarks share."""


def names() -> list[str]:
    """Return the names of all benchmarks."""
    found = (m.name for m in pkgutil.iter_modules(benchmarks.__path__))
    return sorted(name for name in found if not name.startswith("_") and name not in HELPERS)


def main() -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(prog="make bench BENCH=NAME", description=__doc__)
    parser.add_argument("name", nargs="?", choices=names(), metavar="NAME")
    parser.add_argument("--smoke", action="store_true", help="a short form that only shows that it runs")
    parser.add_argument(
        "--without", action="append", default=[], metavar="PART", help="leave out a part, such as accuracy"
    )
    options = parser.parse_args()
    LEFT_OUT.update(options.without)
    if options.name is None and not options.smoke:
        print(f"{'name':28} {'minutes':>7}  claim")
        for name in names():
            module = importlib.import_module(f"benchmarks.{name}")
            print(f"{name:28} {module.MINUTES:>7}  {module.CLAIM}")
        print("run one with: make bench BENCH=NAME")
        return 0
    for name in [options.name] if options.name else names():
        begun = time.perf_counter()
        importlib.import_module(f"benchmarks.{name}").main(options.smoke)
        print(
            f"{name}: {'smoke form ' if options.smoke else ''}done in {time.perf_counter() - begun:.0f} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    Path("benchmarks/results").mkdir(parents=True, exist_ok=True)
    sys.exit(main())
