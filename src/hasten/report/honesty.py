"""What weakens the numbers: what the data itself says, then the notes of whoever measured."""

from __future__ import annotations

from hasten.report.derived import all_runs, excess, full_runs, parts
from hasten.report.schema import Noise, ReportData
from hasten.report.words import bracket, listed, pairs, percent, plain, seconds, times, visible

_BLOCKS_SHOWN = 12


def honesty(data: ReportData) -> list[tuple[bool, str]]:
    """Return (weakens the claim, sentence)."""
    runs = all_runs(data)
    found = [_seeds(data), _noise(data["aa"]), _dropped(data)]
    failed = sum(run["failure"] is not None for run in runs)
    if failed:
        found.append(
            (True, f"Runs that failed: {failed} of {len(runs)}. A failed run never reached the target.")
        )
    resumed = sum(run["resumed"] for run in runs)
    if resumed:
        found.append((True, f"Runs that were interrupted and went on from their checkpoint: {resumed}."))
    if data["verdict"]["best_of"] > 1 and data["verdict"]["claim"] is not None:
        said = f"The claim names the best of {data['verdict']['best_of']} arms; its interval is widened for that."
        found.append((False, said))
    late = max((excess(run) for run in runs if run["failure"] is None), default=0.0)
    if late > 0.05:
        found.append(
            (True, f"The parts of a run exceed its wall time by up to {seconds(late)}: a clock is wrong.")
        )
    whole = [run for arm in data["arms"] for run in full_runs(arm) if run["seconds"]["total"] > 0]
    rest = max((parts(run)["other"] / run["seconds"]["total"] for run in whole), default=0.0)
    if rest > 0.1:
        found.append((True, f"Up to {percent(rest)} of a run is in no named part."))
    return found + [(False, plain(note)) for note in data["notes"]]


def _seeds(data: ReportData) -> tuple[bool, str]:
    seeds = sorted({run["seed"] for run in all_runs(data)})
    if not seeds:
        return True, "No run was made."
    text = f"Seeds: {len(seeds)} ({listed([str(seed) for seed in seeds], 20)})."
    if len(seeds) == 1:
        return True, f"{text} One seed gives no interval, so nothing is claimed."
    return len(seeds) < 5, text + (
        " Few: the intervals are wide. Ten make a figure to publish." if len(seeds) < 5 else ""
    )


def _noise(aa: Noise | None) -> tuple[bool, str]:
    if aa is None:
        return True, "No A/A test was run: how much the machine alone changes a time is not known."
    said = f"{aa['n']} pairs of whole runs of {visible(aa['arm'])} against themselves (A/A test): "
    said += (
        f"{times(aa['ratio'])} {bracket(aa['lo'], aa['hi'])}, sd of a pair {percent(aa['s'])}; the interval "
    )
    return not aa["ok"], said + (
        "holds 1, as it must." if aa["ok"] else "does not hold 1, so nothing is claimed."
    )


def _dropped(data: ReportData) -> tuple[bool, str]:
    said = "Blocks in which something else used the machine"
    blocks = [f"block {block['block']}: {plain(block['reason'])}" for block in data["dropped"]]
    if not blocks:
        return False, f"{said}: none."
    more = f"; and {len(blocks) - _BLOCKS_SHOWN} more" if len(blocks) > _BLOCKS_SHOWN else ""
    total = len({run["block"] for run in all_runs(data)} | {block["block"] for block in data["dropped"]})
    shown = "; ".join(blocks[:_BLOCKS_SHOWN])
    return (
        len(blocks) == total,
        f"{said}: {len(blocks)} of {total}, and the times of the runs it met are left out ({shown}{more}).",
    )


def facts(data: ReportData) -> list[tuple[str, str]]:
    """Return what the comparison ran on, as rows of text."""
    return [*pairs(data["settings"].get("extra", {})), *pairs(data["environment"])]
