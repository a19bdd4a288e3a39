"""The rivals of this environment under pytest-benchmark: ``pytest benchmarks --benchmark-only``.

Times are of one call; see ``rows`` where rows are simulated one by one. ``python -m benchmarks`` compares all rivals,
in environments of their own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("pytest_benchmark")

from benchmarks.correctness import hold_to_oracle
from benchmarks.rivals import RIVALS, SIMULATORS
from benchmarks.task import Rival, Task
from benchmarks.worker import PASSES, answer_of

TASK = Task(in_parts=False)
NAMES = [name for name in ("qaa", *SIMULATORS, "qaa adapter", "LoRA r = 8") if RIVALS[name].environment == "own"]


@cache
def built(name: str) -> tuple[Rival, float | None]:
    """The rival and its error, once it has passed the oracle."""
    rival = RIVALS[name].build(TASK)
    answer = answer_of(rival)
    return rival, hold_to_oracle(TASK, rival.rows, answer).largest if RIVALS[name].simulates else None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", PASSES)
def test_speed(benchmark: Any, which: str, name: str) -> None:
    try:
        rival, error = built(name)
    except ImportError as missing:
        pytest.skip(str(missing))
    benchmark.group = which
    benchmark.extra_info.update(rows=rival.rows, note=rival.note, error=error)
    benchmark.pedantic(getattr(rival, which), rounds=5, warmup_rounds=1)
