"""Times qaa and its rivals side by side, compares them with the goals, and writes ``reports/bench/results.json``.

The flow: cases.py (what) → driver.py and worker.py (processes, taking turns) → correctness.py (the oracle) → goals.py →
report.py. Exit status 0, unless ``--check`` is given and a goal is missed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import environments, machine, report
from benchmarks.cases import CASES, Case, made_small, with_rivals
from benchmarks.driver import Driver, Effort, Measurement
from benchmarks.goals import Goal, goals
from benchmarks.rivals import SIMULATORS


def run(cases: dict[str, Case], thread_counts: list[int], effort: Effort, output: Path) -> list[Goal]:
    """Every case with every thread count that it asks for; prints tables and goals and writes the JSON."""
    measurements: list[Measurement] = []
    peaks: dict[int, machine.Peak | None] = {}
    versions: dict[str, dict[str, str]] = {}
    left_out: dict[str, str] = {}
    for threads in thread_counts:
        peaks[threads] = machine.peak(threads)
        with Driver(threads, effort) as driver:
            for name, case in cases.items():
                if case.threads == "each" or (case.threads == "one") == (threads == 1):
                    of_case = driver.run(name, case)
                    report.print_case(of_case)
                    sys.stdout.flush()
                    measurements += of_case
        versions |= driver.versions
        left_out |= driver.left_out
    found = goals(measurements, peaks)
    report.print_goals(found)
    report.write(
        output,
        measurements,
        found,
        machine=machine.describe(),
        peaks=peaks,
        versions=versions,
        left_out=left_out,
    )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", metavar="CASE", choices=CASES, help=f"of: {'; '.join(CASES)}")
    names = "; ".join(SIMULATORS)
    parser.add_argument("--rivals", nargs="+", metavar="RIVAL", choices=SIMULATORS, help=f"simulators, of: {names}")
    parser.add_argument("--threads", type=int, nargs="+", help="thread counts (default: 1 and all)")
    parser.add_argument("--repeats", type=int, default=Effort.repeats, help="interleaved (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("reports/bench/results.json"), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="small batches, two repeats: does it run?")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a goal is missed")
    parser.add_argument("--install", action="store_true", help="make missing environments of rivals first")
    options = parser.parse_args(arguments)
    if options.install:
        environments.make_missing()
    cases = {name: with_rivals(CASES[name], options.rivals) for name in options.cases or CASES}
    effort = Effort(repeats=options.repeats)
    if options.quick:
        cases = {name: made_small(case) for name, case in cases.items()}
        effort = Effort(repeats=2, at_least=0.002, wake_up=0.0)
    thread_counts = options.threads or sorted({1, machine.processors()})
    found = run(cases, thread_counts, effort, options.output)
    return 1 if options.check and not all(goal.met for goal in found) else 0


if __name__ == "__main__":
    sys.exit(main())
