"""The rivals under pytest-benchmark: ``pytest benchmarks --benchmark-only``; times are of one call, see ``rows``."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("pytest_benchmark")

from benchmarks.rivals import Rival, Task, available, hold_to_oracle

TASK = Task()
RIVALS = available(TASK)


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.name)
@pytest.mark.parametrize("which", ["forward", "forward + backward"])
def test_speed(benchmark: Any, which: str, rival: Rival) -> None:
    benchmark.group = which
    benchmark.extra_info.update(rows=rival.rows, note=rival.note)
    if rival.simulates:
        benchmark.extra_info["error"] = hold_to_oracle(TASK, rival)
    benchmark.pedantic(rival.forward if which == "forward" else rival.step, rounds=5, warmup_rounds=1)
