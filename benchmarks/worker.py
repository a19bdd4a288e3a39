"""A process of its own for one rival: ``python -m benchmarks.worker``, JSON lines in and out.

``{"do": "build", "rival": …, "task": …, "answer": file}``: builds the rival, runs it, writes what it computed.
``{"do": "time", "task": …, "which": "forward" | "step", "warm_up": s, "at_least": s}``: seconds of one
call.
``{"do": "forget", "task": …}``: frees a rival that was built. ``{"do": "memory"}``: the most memory held so far.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.rivals import RIVALS
from benchmarks.task import Rival, Task

PASSES = ("forward", "step")
PACKAGES = (
    "numpy",
    "torch",
    "jax",
    "jaxlib",
    "pennylane",
    "pennylane-lightning",
    "tensorcircuit-ng",
    "deepquantum",
    "pyqtorch",
    "qandle",
    "torchquantum",
    "qulacs",
    "qiskit",
    "qiskit-aer",
    "transformers",
    "peft",
)


def seconds(call: Callable[[], Any], warm_up: float, at_least: float) -> float:
    """Seconds of one call, averaged over as many as take ``at_least`` seconds together, after ``warm_up`` seconds.

    This process has slept while others were timed: its data are out of the caches, and its threads may wake up on one
    and the same core and wait for each other there for a tenth of a second (docs/performance.md). A call that takes the
    whole warm-up alone is not repeated.
    """
    for limit in (warm_up, at_least):
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < limit:
            call()
            count += 1
        if count == 1:
            break
    return elapsed / count


def versions() -> dict[str, str]:
    """Of those packages that are installed here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def as_array(value: Any) -> np.ndarray[Any, Any]:
    """Of a torch tensor, a JAX array or a NumPy array."""
    return np.asarray(value.detach() if hasattr(value, "detach") else value)


def answer_of(rival: Rival) -> dict[str, Any]:
    """Everything that the oracle can check; also compiles, allocates, and shows what does not run here."""
    answer = {}
    if rival.forward is not None:
        answer["forward"] = as_array(rival.forward())
    if rival.step is not None:
        for name, value in zip(("features", "theta", "x"), rival.step(), strict=True):
            if value is not None:
                answer[name] = as_array(value)
    return answer


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not come between the replies
    built: dict[Task, Rival] = {}

    def reply(request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "memory":  # in kilobytes, but on macOS in bytes
            unit = 1 if sys.platform == "darwin" else 1024
            return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
        task = Task(**request["task"])
        if request["do"] == "forget":
            built.pop(task, None)
            gc.collect()
            return {}
        if request["do"] == "time":
            call = getattr(built[task], request["which"])
            return {"seconds": seconds(call, request["warm_up"], request["at_least"])}
        rival = RIVALS[request["rival"]].build(task)
        answer = answer_of(rival)
        if request["answer"] is not None:
            np.savez(request["answer"], **answer)
        built[task] = rival
        passes = [name for name in PASSES if getattr(rival, name) is not None]
        return {"rows": rival.rows, "note": rival.note, "passes": passes, "versions": versions()}

    for line in sys.stdin:
        try:
            print(json.dumps(reply(json.loads(line))), file=replies)
        except Exception as error:  # whatever a library raises is the driver's to report
            text = (str(error).strip().splitlines() or [""])[0]
            print(json.dumps({"error": f"{type(error).__name__}: {text[:200]}"}), file=replies)


if __name__ == "__main__":
    main()
