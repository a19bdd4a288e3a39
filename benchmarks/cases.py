"""What is timed. The rivals of a case take turns; the first one is what the others are compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.rivals import SIMULATORS
from benchmarks.task import Task


@dataclass(frozen=True)
class Case:
    """Rivals and their tasks, timed in turns.

    Args:
        units: pairs of a rival's name and its task.
        threads: "each" thread count that is asked for, only "one", or only "all" if that is more than one.
        timed: False to compare errors alone.
        budget: seconds after which one pass of one rival sits out the remaining repeats.
    """

    units: tuple[tuple[str, Task], ...]
    threads: str = "each"
    timed: bool = True
    budget: float = 1.0


def _adapters(task: Task, *others: str) -> Case:
    return Case(tuple((rival, task) for rival in ("LoRA r = 8", "LoRA r = 8, addmm_", "qaa adapter", *others)))


def _rivals(task: Task, threads: str = "each") -> Case:
    return Case(tuple((rival, task) for rival in ("qaa", "qaa kernel", *SIMULATORS)), threads)


CASES = {
    "adapter": _adapters(Task(10, 768, 4096), "qaa"),
    "adapter, 11 wires": _adapters(Task(11, 2048, 1024)),
    "adapter, 12 wires": _adapters(Task(12, 4096, 512)),
    "layers": Case(
        tuple((rival, Task(10, 768, 1024, layers)) for rival in ("qaa", "multiply-adds alone") for layers in (1, 2, 4))
    ),
    "angles of each row": Case(
        tuple(
            (rival, task)
            for task in (Task(4, 16, 4096), Task(10, 768, 1024), Task(10, 768, 1024, layers=4))
            for rival in ("qaa", "qaa, angles of each row", "PennyLane default.qubit")
        )
    ),
    "threads": Case(
        (("qaa kernel on one thread", Task(10, 768, 4096)), ("qaa kernel", Task(10, 768, 4096))), threads="all"
    ),
    "overhead": Case(
        (
            ("qaa", Task(4, 16, 64)),
            ("an empty autograd function", Task(4, 16, 64)),
            ("qaa kernel", Task(4, 16, 64 * 256)),
        ),
        threads="one",
    ),
    "rivals": _rivals(Task(10, 768, 1024)),
    "rivals, 11 wires": _rivals(Task(11, 2048, 256)),
    "rivals, 12 wires": _rivals(Task(12, 4096, 256, layers=2)),
    "rivals, one state": _rivals(Task(10, 768, 1), threads="one"),
    "rivals, 4 wires": _rivals(Task(4, 16, 64), threads="one"),
    "precision": Case(
        tuple(
            (rival, Task(10, 768, 4096, in_parts=False)) for rival in ("qaa", *SIMULATORS) if "compiled" not in rival
        ),
        threads="one",
        timed=False,
    ),
    "SQUARE": Case(
        tuple((rival, Task(4, 16, 64)) for rival in ("SQUARE, MLP", "SQUARE, MLP behind 16 factors", "SQUARE, qaa")),
        threads="one",
    ),
    "sixty layers": Case(
        tuple(
            (f"sixty layers, {method}", Task(10, 576, 2))
            for method in ("LoRA r = 8", "LoRA r = 4", "QAA default", "QAA compact")
        ),
    ),
    **{
        # a step of the smaller batch is the dearer one for an adapter whose circuit is evaluated once a step
        f"fine-tuning{name}": Case(
            tuple(
                (f"fine-tuning, {method}", Task(10, 576, sequences))
                for method in (
                    "LoRA r = 8",
                    "LoRA r = 4",
                    "QAA paper",
                    "QAA paper, one circuit for q and v",
                    "QAA default",
                    "QAA compact",
                )
            ),
            budget=6.0 * sequences,
        )
        for name, sequences in (("", 2), (", 1,024 tokens", 16))
    },
}


def with_rivals(case: Case, names: list[str] | None) -> Case:
    """The case without the simulators that are not named; what they are compared with stays."""
    if names is None:
        return case
    kept = tuple((rival, task) for rival, task in case.units if rival in names or rival not in SIMULATORS)
    return replace(case, units=kept)


def made_small(case: Case) -> Case:
    """The case with a sixteenth of every batch, to try the suite out."""
    units = ((rival, replace(task, batch=max(1, task.batch // 16))) for rival, task in case.units)
    return replace(case, units=tuple(units))
