"""Times qaa and its rivals side by side: a table on standard output and ``reports/bench/results.json``.

Repeats are interleaved (every rival once, then again), so that a busy moment of the machine hits all of them; the
table shows medians. Every thread count runs in a process of its own, whose libraries start with that many threads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: qaa must be faster than every simulator; LoRA is a yardstick and carries no goal.
GOAL = 1.0
PASSES = ("forward", "forward + backward")


def seconds(call: Callable[[], Any], at_least: float) -> float:
    """Seconds of one call, averaged over as many calls as take ``at_least`` seconds together."""
    count, start = 0, time.perf_counter()
    while True:
        call()
        count += 1
        elapsed = time.perf_counter() - start
        if elapsed >= at_least:
            return elapsed / count


def measure(threads: int, repeats: int, task_options: dict[str, int]) -> list[dict[str, Any]]:
    """One entry per rival and pass, in this process."""
    import torch

    from benchmarks.rivals import Task, available, hold_to_oracle

    torch.set_num_threads(threads)
    task = Task(**task_options)
    rivals = available(task)
    errors = {rival.name: hold_to_oracle(task, rival) for rival in rivals if rival.simulates}
    times: dict[tuple[str, str], list[float]] = {(r.name, p): [] for r in rivals for p in PASSES}
    for _ in range(repeats):
        for rival in rivals:
            for which, call in zip(PASSES, (rival.forward, rival.step), strict=True):
                times[rival.name, which].append(seconds(call, at_least=0.03) / rival.rows)
    entries = []
    for which in PASSES:
        reference = statistics.median(times["qaa", which])
        adapter = statistics.median(times["qaa adapter", which])
        for rival in rivals:
            own = times[rival.name, which]
            median = statistics.median(own)
            entries.append(
                {
                    "name": rival.name,
                    "pass": which,
                    "threads": threads,
                    "microseconds_per_state": 1e6 * median,
                    "fastest": 1e6 * min(own),
                    "slowest": 1e6 * max(own),
                    "repeats": repeats,
                    "rows": rival.rows,
                    "ratio": median / (reference if rival.simulates else adapter),
                    "goal": GOAL if rival.simulates and rival.name != "qaa" else None,
                    "error": errors.get(rival.name),
                    "note": rival.note,
                }
            )
    return entries


def describe_machine() -> dict[str, Any]:
    import importlib.metadata

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    packages = ("torch", "numpy", "pennylane", "pennylane-lightning")
    return {
        "processor": model,
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


def print_table(entries: list[dict[str, Any]]) -> None:
    for which in PASSES:
        for threads in sorted({e["threads"] for e in entries}):
            print(f"\n{which}, {threads} thread{'s' if threads > 1 else ''}, microseconds per state")
            print(f"  {'':28s} {'median':>9s} {'fastest':>9s} {'slowest':>9s} {'ratio':>8s}  {'goal':6s} {'error':>8s}")
            for e in entries:
                if (e["pass"], e["threads"]) != (which, threads):
                    continue
                goal = "" if e["goal"] is None else "met" if e["ratio"] > e["goal"] else "MISSED"
                error = "" if e["error"] is None else f"{e['error']:.1e}"
                print(
                    f"  {e['name']:28s} {e['microseconds_per_state']:9.2f} {e['fastest']:9.2f} {e['slowest']:9.2f} "
                    f"{e['ratio']:7.2f}x  {goal:6s} {error:>8s}  {e['note']}"
                )
    print(
        "\nratio: time / time of qaa (last two rows: of the qaa adapter). goal: every simulator's ratio above "
        f"{GOAL:g}.\nerror: largest difference to the float64 oracle, features and gradients, relative to the largest."
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("reports/bench/results.json"), help="default: %(default)s")
    parser.add_argument("--threads", type=int, nargs="+", help="thread counts (default: 1 and all)")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repeats (default: %(default)s)")
    parser.add_argument("--wires", type=int, default=10)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    task = {"n_wires": options.wires, "width": options.width, "batch": options.batch}

    if options.in_process:
        json.dump(measure(options.threads[0], options.repeats, task), sys.stdout)
        return 0

    counts = options.threads or sorted({1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1})
    entries: list[dict[str, Any]] = []
    for threads in counts:
        command = [sys.executable, "-m", "benchmarks", "--in-process", "--threads", str(threads)]
        command += ["--repeats", str(options.repeats), "--wires", str(options.wires)]
        command += ["--width", str(options.width), "--batch", str(options.batch)]
        limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        result = subprocess.run(command, env={**os.environ, **limits}, stdout=subprocess.PIPE, text=True, check=True)
        entries += json.loads(result.stdout[result.stdout.index("[") :])
    print_table(entries)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"task": {**task, "circuit": "ring, 1 layer", "readout": "z", "dtype": "float32"}}
    report |= {"machine": describe_machine(), "results": entries}
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {options.output}")
    missed = [e["name"] for e in entries if e["goal"] is not None and e["ratio"] <= e["goal"]]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
