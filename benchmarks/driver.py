"""Runs cases: one process for every rival and thread count, repeats interleaved across all of them.

Every rival once, then every rival again: a busy moment of the machine hits all of them. A process is held to as many
processors as it may have threads, because not every library reads the usual environment variables. A rival that
crashes, answers wrongly or takes too long is reported and dropped.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from benchmarks.cases import Case
from benchmarks.correctness import Errors, hold_to_oracle
from benchmarks.environments import ROOT, python_of
from benchmarks.rivals import RIVALS
from benchmarks.task import Task


@dataclass(frozen=True)
class Effort:
    """How long is measured.

    Args:
        repeats: interleaved repeats.
        at_least: seconds that one sample takes, at least, and the warm-up before it.
        wake_up: seconds that this warm-up takes, at least, where there are several threads.
        build_limit, time_limit: seconds after which a process that builds, or times one sample, is given up.
    """

    repeats: int = 7
    at_least: float = 0.03
    wake_up: float = 0.2
    build_limit: float = 150.0
    time_limit: float = 30.0


@dataclass
class Measurement:
    """One pass of one rival in one case.

    Args:
        which: "forward" or "step", which is forward and backward.
        samples: seconds per state, one for each repeat; None where it sat out.
        rows: states of one call.
        errors: against the oracle; None for a yardstick.
        peak_bytes: the most memory that the process has held so far.
    """

    case: str
    rival: str
    task: Task
    threads: int
    which: str
    rows: int
    note: str
    errors: Errors | None
    samples: list[float | None] = field(default_factory=list)
    peak_bytes: int = 0


class LostError(Exception):
    """A rival that cannot be timed, and why."""


class Worker:
    """A process of :mod:`benchmarks.worker`."""

    def __init__(self, rival: str, threads: int) -> None:
        environment = RIVALS[rival].environment
        python = python_of(environment)
        if python is None:
            raise LostError(f"environment {environment!r} is not installed")
        variables = dict(os.environ)
        if environment != "own":
            variables.pop("PYTHONPATH", None)
        for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR"):
            variables[f"{name}_NUM_THREADS"] = str(threads)
        variables["JAX_PLATFORMS"] = "cpu"
        if threads == 1:
            variables["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        with _held_to(threads):
            self.process = subprocess.Popen(
                [str(python), "-m", "benchmarks.worker"],
                cwd=ROOT,
                env=variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                text=True,
            )

    def ask(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        """The reply; ``LostError`` after ``limit`` seconds, when the process dies or when it reports an error."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise LostError(self._last_words()) from None
        if not select.select([self.process.stdout], [], [], limit)[0]:
            self.process.kill()
            raise LostError(f"no reply to {request['do']!r} within {limit:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise LostError(self._last_words())
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise LostError(reply["error"])
        return reply

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            assert stream is not None
            stream.close()

    def _last_words(self) -> str:
        code = self.process.wait()
        self.log.seek(0)
        lines = self.log.read().strip().splitlines()
        return f"ended with {code}: {lines[-1][:200] if lines else 'no message'}"


@contextmanager
def _held_to(threads: int) -> Iterator[None]:
    """Processes started here have so many processors; on Linux this is about the calling thread and its children."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


class Driver:
    """Workers of one thread count, kept alive from case to case."""

    def __init__(self, threads: int, effort: Effort) -> None:
        self.threads, self.effort = threads, effort
        self.workers: dict[str, Worker] = {}
        self.turns: defaultdict[str, Lock] = defaultdict(Lock)  # tasks of one rival are built one after another
        self.versions: dict[str, dict[str, str]] = {}
        self.left_out: dict[str, str] = {}

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers.values():
            worker.close()

    def run(self, name: str, case: Case) -> list[Measurement]:
        """Builds, checks and times every unit of a case that can run here."""
        print(f"{name}, {self.threads} thread{'s' if self.threads > 1 else ''}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(min(self.threads, 4)) as pool:
            builds = [
                pool.submit(self._build, name, rival, task, Path(folder) / f"{i}.npz")
                for i, (rival, task) in enumerate(case.units)
            ]
            measurements = [measurement for build in builds for measurement in build.result()]
        if case.timed:
            for repeat in range(self.effort.repeats):
                for measurement in measurements:
                    measurement.samples.append(self._sample(measurement, repeat, case.budget))
        for measurement in measurements:
            if measurement.rival in self.workers:
                reply = self._ask(measurement.rival, measurement.task, {"do": "memory"}, self.effort.time_limit)
                measurement.peak_bytes = reply["bytes"] if reply else 0
                self._ask(measurement.rival, measurement.task, {"do": "forget"}, self.effort.time_limit)
        return [m for m in measurements if not case.timed or any(m.samples)]

    def _build(self, case: str, rival: str, task: Task, answer: Path) -> list[Measurement]:
        entry = RIVALS[rival]
        request = {"do": "build", "rival": rival, "answer": str(answer) if entry.simulates else None}
        reply = self._ask(rival, task, request, self.effort.build_limit, case)
        if reply is None:
            return []
        self.versions[entry.environment] = reply["versions"]
        errors = None
        if entry.simulates:
            try:
                with np.load(answer) as arrays:
                    errors = hold_to_oracle(task, reply["rows"], dict(arrays))
            except AssertionError as error:
                self._leave_out(rival, case, f"wrong: {error}")
                return []
        return [
            Measurement(case, rival, task, self.threads, which, reply["rows"], reply["note"], errors)
            for which in reply["passes"]
        ]

    def _sample(self, m: Measurement, repeat: int, budget: float) -> float | None:
        spent = sum(m.rows * sample for sample in m.samples if sample is not None)
        if (repeat > 0 and spent > budget) or m.rival not in self.workers:
            return None
        at_least = self.effort.at_least
        warm_up = max(at_least, self.effort.wake_up) if self.threads > 1 else at_least
        request = {"do": "time", "which": m.which, "warm_up": warm_up, "at_least": at_least}
        reply = self._ask(m.rival, m.task, request, self.effort.time_limit, m.case)
        return None if reply is None else reply["seconds"] / m.rows

    def _ask(
        self, rival: str, task: Task, request: dict[str, Any], limit: float, case: str = ""
    ) -> dict[str, Any] | None:
        """The rival's reply; None after reporting why there is none and ending the process."""
        with self.turns[rival]:
            try:
                if rival not in self.workers:
                    self.workers[rival] = Worker(rival, self.threads)
                return self.workers[rival].ask({**request, "task": asdict(task)}, limit)
            except LostError as reason:
                self._leave_out(rival, case, str(reason))
                if worker := self.workers.pop(rival, None):
                    worker.close()
                return None

    def _leave_out(self, rival: str, case: str, reason: str) -> None:
        if self.left_out.get(rival) != reason:
            print(f"  left out: {rival}: {reason}", file=sys.stderr, flush=True)
        self.left_out[rival] = reason
