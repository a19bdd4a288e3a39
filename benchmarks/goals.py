"""What the project promises about speed, as a list that reads the measurements."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.driver import Measurement
from benchmarks.machine import Peak
from benchmarks.rivals import RIVALS
from benchmarks.task import Task
from qaa import ansatz
from qaa.program import program

PASSES = {"forward": "forward", "step": "forward + backward"}


@dataclass(frozen=True)
class Goal:
    """A promise and what was measured.

    ``at_best`` is what would be measured if qaa took :func:`least_seconds` and the others what they took; where torch's
    own functions are a part of what is timed, it is what they take alone.
    """

    name: str
    threads: int
    measured: float
    limit: float
    at_most: bool
    unit: str = ""
    detail: str = ""
    at_best: float | None = None

    @property
    def met(self) -> bool:
        return self._meets(self.measured)

    @property
    def is_beyond(self) -> bool:
        """Whether it is missed at best: no code could meet it with these operations or functions."""
        return self.at_best is not None and not self._meets(self.at_best)

    @property
    def verdict(self) -> str:
        return "met" if self.met else "beyond" if self.is_beyond else "MISSED"

    def _meets(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


def least_seconds(peak: Peak | None, task: Task, which: str, is_adapter: bool = False) -> float | None:
    """For a state: the operations of the plan at the machine's peak of multiply-adds.

    A whole adapter also multiplies by V, and in a step by its transpose and for its gradient. Traffic is left out: rows
    of a case may stay in a cache from one repeat to the next.
    """
    if peak is None:
        return None
    operations = multiply_adds(task, which)
    if is_adapter:
        operations += (3 if which == "step" else 1) * task.width * task.n_wires
    return operations / peak.multiply_adds_per_second


def median(m: Measurement) -> float:
    """Seconds per state."""
    return statistics.median(s for s in m.samples if s is not None)


def ratio(m: Measurement, reference: Measurement) -> float:
    """The median, over the repeats that both took part in, of one's time over the other's."""
    pairs = zip(m.samples, reference.samples, strict=True)
    ratios = [a / b for a, b in pairs if a is not None and b is not None]
    return statistics.median(ratios) if ratios else median(m) / median(reference)


class Results:
    """Measurements of one thread count, found by case, rival and pass."""

    def __init__(self, measurements: list[Measurement], threads: int, peak: Peak | None) -> None:
        self.measurements = [m for m in measurements if m.threads == threads]
        self.peak = peak

    def at_the_peak(self, ours: Measurement, other: Measurement, is_adapter: bool = False) -> float | None:
        """Our least time over what another took."""
        least = least_seconds(self.peak, ours.task, ours.which, is_adapter)
        return None if least is None else least / median(other)

    def find(self, case: str, rival: str, which: str, layers: int | None = None) -> Measurement | None:
        for m in self.measurements:
            if (m.case, m.rival, m.which) == (case, rival, which) and layers in (None, m.task.layers):
                return m
        return None

    def of_kind(self, case: str, which: str, kind: str) -> list[Measurement]:
        return [m for m in self.measurements if (m.case, m.which, RIVALS[m.rival].kind) == (case, which, kind)]


def goals(measurements: list[Measurement], peaks: dict[int, Peak | None]) -> list[Goal]:
    """Every goal that the measurements can decide."""
    found: list[Goal] = []
    for threads in sorted({m.threads for m in measurements}):
        results = Results(measurements, threads, peaks.get(threads))
        for section in (_lora, _layers, _rivals, _precision, _square, _finetuning, _overhead, _threads, _share_of_peak):
            found += section(results, threads)
    return found


def _lora(results: Results, threads: int) -> Iterator[Goal]:
    for lora, name in (("LoRA r = 8", "LoRA"), ("LoRA r = 8, addmm_", "LoRA by addmm_")):
        kernel, theirs = (results.find("adapter", rival, "forward") for rival in ("qaa", lora))
        if kernel and theirs:
            at_best = results.at_the_peak(kernel, theirs)
            measured = ratio(kernel, theirs)
            yield Goal(f"kernel / {name}, forward, n = 10", threads, measured, 0.8, True, "x", at_best=at_best)
        for case in ("adapter", "adapter, 11 wires", "adapter, 12 wires"):
            ours, theirs = (results.find(case, rival, "step") for rival in ("qaa adapter", lora))
            if ours and theirs:
                text = f"adapter / {name}, forward + backward, n = {ours.task.n_wires}"
                at_best = results.at_the_peak(ours, theirs, is_adapter=True)
                yield Goal(text, threads, ratio(ours, theirs), 0.75, True, "x", at_best=at_best)


def _layers(results: Results, threads: int) -> Iterator[Goal]:
    for which, text in PASSES.items():
        first = results.find("layers", "qaa", which, layers=1)
        for layers in (2, 4):
            more = results.find("layers", "qaa", which, layers=layers)
            if first and more:
                further = (ratio(more, first) - 1) / (layers - 1)
                least, least_of_first = (least_seconds(results.peak, m.task, which) for m in (more, first))
                at_best = (least / least_of_first - 1) / (layers - 1) if least and least_of_first else None
                name = f"each further layer / first, {text}, L = {layers}"
                yield Goal(name, threads, further, 1.2, True, "x", at_best=at_best)


def _rivals(results: Results, threads: int) -> Iterator[Goal]:
    for case in ("rivals", "rivals, 11 wires", "rivals, 12 wires"):
        limits = (("by hand", 20.0), ("library", 50.0))
        for which, text in PASSES.items():
            ours = results.find(case, "qaa", which)
            if ours is None:
                continue
            where = f"{text}, n = {ours.task.n_wires}"
            for kind, limit in limits:
                if others := results.of_kind(case, which, kind):
                    fastest = min(others, key=median)
                    name = f"fastest {kind} / qaa, {where}"
                    yield _of_rival(results, name, threads, fastest, ours, limit, fastest.rival)
            if pennylane := results.find(case, "PennyLane default.qubit", which):
                yield _of_rival(results, f"default.qubit / qaa, {where}", threads, pennylane, ours, 250)
    for case in ("rivals, one state", "rivals, 4 wires"):
        for which, text in PASSES.items():
            ours = results.find(case, "qaa", which)
            others = [m for kind in ("by hand", "library") for m in results.of_kind(case, which, kind)]
            if ours and others:
                fastest = min(others, key=median)
                where = f"{text}, n = {ours.task.n_wires}, B = {ours.task.batch}"
                yield Goal(f"fastest rival / qaa, {where}", threads, ratio(fastest, ours), 1, False, "x", fastest.rival)


def _of_rival(
    results: Results, name: str, threads: int, rival: Measurement, ours: Measurement, limit: float, detail: str = ""
) -> Goal:
    inverse = results.at_the_peak(ours, rival)
    at_best = None if inverse is None else 1 / inverse
    return Goal(name, threads, ratio(rival, ours), limit, False, "x", detail, at_best)


def _precision(results: Results, threads: int) -> Iterator[Goal]:
    ours = results.find("precision", "qaa", "step")
    if ours and ours.errors and ours.errors.theta is not None:
        name = f"relative error of the angles' gradient, B = {ours.task.batch}"
        yield Goal(name, threads, ours.errors.theta, 1e-6, True)


def _square(results: Results, threads: int) -> Iterator[Goal]:
    ours, mlp = (results.find("SQUARE", f"SQUARE, {name}", "step") for name in ("qaa", "MLP"))
    if ours and mlp:
        scaled = results.find("SQUARE", "SQUARE, MLP behind 16 factors", "step")  # the cheapest layer in front of it
        at_best = ratio(scaled, mlp) if scaled else None
        yield Goal("SQUARE's training step / MLP's", threads, ratio(ours, mlp), 1.0, True, "x", at_best=at_best)


def _finetuning(results: Results, threads: int) -> Iterator[Goal]:
    for case, where in (("fine-tuning", ""), ("fine-tuning, 1,024 tokens", ", 1,024 tokens")):
        lora, of_equal_rank = (results.find(case, f"fine-tuning, LoRA r = {r}", "step") for r in (8, 4))
        for name in ("QAA paper", "QAA paper, one circuit for q and v", "QAA default", "QAA compact"):
            ours = results.find(case, f"fine-tuning, {name}", "step")
            if ours and lora:
                yield Goal(f"fine-tuning step{where}, {name} / LoRA", threads, ratio(ours, lora), 1.05, True, "x")
                memory = ours.peak_bytes / lora.peak_bytes
                yield Goal(f"fine-tuning memory{where}, {name} / LoRA", threads, memory, 1.0, True, "x")
        for name in ("QAA default", "QAA compact"):
            ours = results.find(case, f"fine-tuning, {name}", "step")
            if ours and of_equal_rank:
                relative = ratio(ours, of_equal_rank)
                yield Goal(f"fine-tuning step{where}, {name} / LoRA r = 4", threads, relative, 1.02, True, "x")


def _overhead(results: Results, threads: int) -> Iterator[Goal]:
    small, kernel = (results.find("overhead", name, "step") for name in ("qaa", "qaa kernel"))
    if small and kernel:
        overhead = small.task.batch * (median(small) - median(kernel)) * 1e6
        where = f"n = {small.task.n_wires}, B = {small.task.batch}"
        empty = results.find("overhead", "an empty autograd function", "step")
        at_best = empty.task.batch * median(empty) * 1e6 if empty else None
        name = f"forward + backward beside the kernels, {where}"
        yield Goal(name, threads, overhead, 60, True, "µs", at_best=at_best)


def _threads(results: Results, threads: int) -> Iterator[Goal]:
    for which, text in PASSES.items():
        one, all_ = (results.find("threads", f"qaa kernel{name}", which) for name in (" on one thread", ""))
        if one and all_ and threads == 2:
            yield Goal(f"two threads / one, {text}", threads, ratio(one, all_), 1.8, False, "x")


def _share_of_peak(results: Results, threads: int) -> Iterator[Goal]:
    """Of the gate passes: what layers 3 and 4 add holds no embedding and no readout. The detail has everything.

    The peak is that of the same repeat.
    """
    for which, text in PASSES.items():
        one, two, four = (results.find("layers", "qaa", which, layers=layers) for layers in (1, 2, 4))
        bare = [results.find("layers", "multiply-adds alone", which, layers=layers) for layers in (1, 2, 4)]
        if not (two and four and bare[1] and bare[2]):
            continue
        samples = zip(bare[1].samples, bare[2].samples, two.samples, four.samples, strict=True)
        shares = [(b4 - b2) / (q4 - q2) for b2, b4, q2, q4 in samples if b2 and b4 and q2 and q4]
        detail = f"one layer with its ends: {100 * ratio(bare[0], one):.0f} %" if one and bare[0] else ""
        name = f"share of the multiply-add peak in the gate passes, {text}, n = {two.task.n_wires}"
        yield Goal(name, threads, 100 * statistics.median(shares), 50, False, "%", detail)


def multiply_adds(task: Task, which: str) -> float:
    """That the plan counts for one state; backward repeats forward but for the values of strings, which it is given."""
    plan = program(ansatz("ring", task.n_wires, task.layers), "z", True).plan
    forward, backward, _ = plan.operations(task.width)
    return float(forward if which == "forward" else forward + backward)
