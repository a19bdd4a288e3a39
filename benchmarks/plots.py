"""Cost per state against wires, layers and batch: ``python -m benchmarks.plots --sweep`` measures and draws.

The points go to ``reports/bench/sweep.json``, the figures beside it as SVG and PNG; without ``--sweep`` the points that
are there are drawn. A rival that takes too long at one point sits out the dearer ones. The roofline is what the plan's
multiply-adds at the machine's peak, or the rows' bytes at its bandwidth, would cost: whichever is more.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.cases import Case
from benchmarks.driver import Driver, Effort
from benchmarks.goals import PASSES, least_seconds, median
from benchmarks.rivals import RIVALS, SIMULATORS
from benchmarks.task import Task

#: What varies: its name, the axis' label, and the tasks from cheap to dear.
AXES = {
    "n_wires": ("wires n, rows of width 2ⁿ; one layer, batch 256", [Task(n, 2**n, 256) for n in (4, 6, 8, 10, 12)]),
    "layers": ("layers L; n = 10, width 768, batch 256", [Task(10, 768, 256, layers) for layers in (1, 2, 4, 8)]),
    "batch": ("batch B; n = 10, width 768, one layer", [Task(10, 768, batch) for batch in (1, 8, 64, 512, 4096)]),
}
EFFORT = Effort(repeats=3, at_least=0.02, build_limit=120, time_limit=20)
#: Seconds of one call, above which a rival sits out the rest of an axis.
TOO_LONG = 1.0
#: Every point compiles anew; the dense unitary gains little by that.
DEFAULT_RIVALS = [name for name in SIMULATORS if name != "torch, dense unitary, compiled"]


def sweep(rivals: Iterable[str], threads: int, axes: dict[str, Any]) -> dict[str, Any]:
    """Every rival along every axis."""
    peak = machine.peak(threads)
    points = []
    with Driver(threads, EFFORT) as driver:
        for axis, (_, tasks) in axes.items():
            still = list(rivals)
            for task in tasks:
                measured = driver.run(f"{axis}: {task}", Case(tuple((rival, task) for rival in still)))
                slow = {m.rival for m in measured if median(m) * m.rows > TOO_LONG}
                still = [m.rival for m in measured if m.which == "forward" and m.rival not in slow]
                for m in measured:
                    points.append({"axis": axis, "seconds": median(m), **asdict(m)})
    return {
        "machine": machine.describe(),
        "threads": threads,
        "peak": None if peak is None else asdict(peak),
        "roofline": [] if peak is None else list(_roofline(peak, axes)),
        "points": points,
    }


def _roofline(peak: machine.Peak, axes: dict[str, Any]) -> Iterable[dict[str, Any]]:
    for axis, (_, tasks) in axes.items():
        for task in tasks:
            for which in PASSES:
                # forward reads a row and writes its features; a step also reads the row again, the gradient at the
                # features, and writes the gradient of the row
                numbers = task.width + task.n_wires if which == "forward" else 3 * task.width + 2 * task.n_wires
                seconds = max(least_seconds(peak, task, which) or 0.0, 4 * numbers / peak.read_bytes_per_second)
                yield {"axis": axis, "task": asdict(task), "which": which, "seconds": seconds}


def draw(data: dict[str, Any], folder: Path) -> None:
    """One figure an axis, forward on the left and forward + backward on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.fonttype"] = "none"
    for axis, (label, _) in AXES.items():
        points = [p for p in data["points"] if p["axis"] == axis]
        if not points:
            continue
        figure, panels = plt.subplots(1, 2, figsize=(13, 6), sharey=True, layout="constrained")
        for panel, (which, title) in zip(panels, PASSES.items(), strict=True):
            for rival in RIVALS:
                line = sorted(
                    (p["task"][axis], 1e6 * p["seconds"]) for p in points if (p["rival"], p["which"]) == (rival, which)
                )
                if line:
                    panel.plot(*zip(*line, strict=True), **_style(rival), label=rival)
            roof = [r for r in data["roofline"] if (r["axis"], r["which"]) == (axis, which)]
            if roof:
                line = sorted((r["task"][axis], 1e6 * r["seconds"]) for r in roof)
                style = {"color": "black", "linestyle": (0, (2, 2)), "linewidth": 1.2}
                panel.plot(*zip(*line, strict=True), **style, label="roofline")
            panel.set(title=title, xlabel=label, yscale="log")
            values = sorted({p["task"][axis] for p in points})
            if axis != "n_wires":
                panel.set_xscale("log", base=2)
            panel.set_xticks(values, [str(value) for value in values])
            panel.tick_params(axis="x", which="minor", bottom=False)
            panel.grid(True, which="major", alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("microseconds per state")
        handles, labels = panels[0].get_legend_handles_labels()
        order = sorted(range(len(handles)), key=lambda i: -handles[i].get_ydata()[-1])
        figure.legend(
            [handles[i] for i in order], [labels[i] for i in order], loc="outside right center", frameon=False
        )
        threads = f"{data['threads']} thread{'s' if data['threads'] > 1 else ''}"
        figure.suptitle(f"Cost per state, {threads}, {data['machine']['processor']}", fontsize=11)
        for ending in ("svg", "png"):
            figure.savefig(folder / f"cost_per_{axis}.{ending}", dpi=130)
            print(f"written to {folder / f'cost_per_{axis}.{ending}'}")
        plt.close(figure)


def _style(rival: str) -> dict[str, Any]:
    """qaa stands out; what is written by hand is dashed, libraries are solid, each with a colour and a marker."""
    if RIVALS[rival].kind == "qaa":
        return {"color": "#c1121f", "linewidth": 2.6, "marker": "o", "markersize": 6, "zorder": 5}
    same_kind = [name for name in SIMULATORS if RIVALS[name].kind == RIVALS[rival].kind]
    number = same_kind.index(rival)
    if RIVALS[rival].kind == "by hand":
        colours = ["#bcbd22", "#7f7f7f", "#17becf", "#1f77b4", "#d6a2e8", "#9467bd", "#2ca02c"]
        return {"color": colours[number % 7], "linestyle": "--", "marker": "sDv^<>P"[number % 7], "markersize": 4.5}
    colours = ["#0b6e4f", "#e07a1f", "#f2b705", "#3d5a80", "#8d99ae", "#b56576", "#6d597a", "#386fa4", "#a98467"]
    return {"color": colours[number % 9], "marker": "oXshpd*H8"[number % 9], "markersize": 4.5, "linewidth": 1.3}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sweep", action="store_true", help="measure first; without it the points that are there are drawn"
    )
    parser.add_argument("--rivals", nargs="+", metavar="RIVAL", choices=SIMULATORS, default=DEFAULT_RIVALS)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("reports/bench"), help="default: %(default)s")
    options = parser.parse_args()
    path = options.folder / "sweep.json"
    if options.sweep:
        axes = {axis: AXES[axis] for axis in options.axes}
        options.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(sweep(["qaa", *options.rivals], options.threads, axes), indent=1) + "\n")
    draw(json.loads(path.read_text()), options.folder)


if __name__ == "__main__":
    main()
