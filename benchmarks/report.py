"""Tables on standard output, and everything that was measured as JSON."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.driver import Measurement
from benchmarks.goals import PASSES, Goal, median, ratio
from benchmarks.machine import Peak

TIME = ", microseconds per state"
LEGEND = """
ratio: time / time of the case's first rival, the median over repeats. spread: (slowest - fastest) / median.
at best: what would be measured if qaa took no longer than its counted operations do at the machine's peak, or than
torch's own functions in it; a goal that is missed at best is beyond.
error: largest difference to the float64 oracle, features and gradients, relative to the largest exact number.
d theta: ||difference|| / ||exact|| of the angles' gradient."""


def print_case(measurements: list[Measurement]) -> None:
    """The measurements of one case and one thread count: a table for each pass."""
    for which in PASSES:
        rows = [m for m in measurements if m.which == which]
        if not rows:
            continue
        timed = bool(rows[0].samples)
        if not timed and which == "forward":
            continue  # errors are of both passes
        first, threads = rows[0], f"{rows[0].threads} thread{'s' if rows[0].threads > 1 else ''}"
        tasks = {m.task for m in rows}
        title = f"{first.case} ({first.task})" if len(tasks) == 1 else first.case
        unit = "" if not timed else ", microseconds per step" if first.errors is None and first.rows == 1 else TIME
        print(f"\n{title}: {PASSES[which] if timed else 'errors'}, {threads}{unit}")
        print(f"  {'':31s} {'median':>9s} {'spread':>7s} {'ratio':>8s} {'error':>8s} {'d theta':>8s}")
        for m in sorted(rows, key=median) if timed and len(tasks) == 1 else rows:
            times = f"{1e6 * median(m):9.3g} {_spread(m):6.0%} {ratio(m, first):7.3g}x" if timed else f"{'':26s}"
            largest = "" if m.errors is None else f"{m.errors.largest:.1e}"
            theta = "" if m.errors is None or m.errors.theta is None else f"{m.errors.theta:.1e}"
            note = m.note if len(tasks) == 1 else f"{m.task}; {m.note}"
            print(f"  {m.rival:31s} {times} {largest:>8s} {theta:>8s}  {note}".rstrip())


def _spread(m: Measurement) -> float:
    samples = [s for s in m.samples if s is not None]
    return (max(samples) - min(samples)) / statistics.median(samples)


def print_goals(goals: list[Goal]) -> None:
    """One line a goal."""
    print(LEGEND)
    if not goals:
        return
    print(f"\n{'goal':70s} {'threads':>7s} {'measured':>10s} {'limit':>10s} {'at best':>10s}")
    for goal in goals:
        name = goal.name + (f" ({goal.detail})" if goal.detail else "")
        limit = f"{'<=' if goal.at_most else '>='} {goal.limit:g} {goal.unit}".rstrip()
        measured = f"{goal.measured:.3g} {goal.unit}".rstrip()
        at_best = "" if goal.at_best is None else f"{goal.at_best:.3g} {goal.unit}".rstrip()
        print(f"{name:70s} {goal.threads:7d} {measured:>10s} {limit:>10s} {at_best:>10s}  {goal.verdict}")
    beyond = sum(goal.is_beyond and not goal.met for goal in goals)
    print(f"{sum(goal.met for goal in goals)} of {len(goals)} goals met, {beyond} of the others beyond")


def write(
    path: Path,
    measurements: list[Measurement],
    goals: list[Goal],
    *,
    machine: dict[str, Any],
    peaks: dict[int, Peak | None],
    versions: dict[str, dict[str, str]],
    left_out: dict[str, str],
) -> None:
    """Machine, versions, every sample and every goal."""
    report = {
        "machine": machine,
        "peaks": {threads: None if peak is None else asdict(peak) for threads, peak in peaks.items()},
        "versions": versions,
        "left_out": left_out,
        "goals": [{**asdict(goal), "met": goal.met} for goal in goals],
        "results": [{**asdict(m), "median": median(m) if any(m.samples) else None} for m in measurements],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")


def read(path: Path) -> list[dict[str, Any]]:
    """The results that :func:`write` wrote."""
    results: list[dict[str, Any]] = json.loads(path.read_text())["results"]
    return results
