"""What the kernels' accesses to memory cost: bank conflicts and sectors, counted from their own loads and stores."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuda_tools
from emulated import DTYPES, Device, draw, rounded
from qaa.circuit import ansatz
from strategies import Problem


@dataclass(frozen=True)
class Request:
    """All requests of one load or store; see tests/cuda/trace.cpp."""

    address: int
    memory: str
    access: str
    size: int
    requests: int
    transactions: int
    at_best: int


class Tracer:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._device = Device(path)
        self._library = ctypes.CDLL(str(path))
        self._library.qaa_trace.restype = ctypes.c_char_p

    def trace(self, problem: Problem, dtype: Any) -> list[Request]:
        """Of one call of forward and one of backward."""
        self._library.qaa_trace()
        self._device.schedule(0)
        self._device.solve(rounded(problem, dtype), dtype)
        lines = self._library.qaa_trace().decode().splitlines()
        return [Request(int(a), m, w, *map(int, numbers)) for a, m, w, *numbers in (line.split() for line in lines)]

    def source(self, request: Request) -> str:
        """Where it is, for messages."""
        maps = Path("/proc/self/maps").read_text().splitlines()
        base = next(int(line.split("-")[0], 16) for line in maps if line.endswith(self._path.name))
        command = ["addr2line", "-e", self._path, hex(request.address - base - 1)]
        return cuda_tools.run(command).stdout.strip().split("/")[-1]


@pytest.fixture(scope="module")
def tracer(emulated_objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Tracer:
    return Tracer(cuda_tools.link_traced(emulated_objects, tmp_path_factory.mktemp("traced")))


def problems(n_wires: int) -> Iterator[Problem]:
    """The circuit of adapters, and random ones, whose frames are any linear maps."""
    for kind in ("z", "state"):
        yield draw(0, n_wires, kind, circuit=ansatz("ring", n_wires, 2), batch=1, d=2**n_wires)
        yield draw(1, n_wires, kind, batch=1, d=2**n_wires)


@pytest.mark.parametrize("n_wires", [9, 10, 11, 13])
def test_shared_memory_has_hardly_any_bank_conflicts(tracer: Tracer, n_wires: int) -> None:
    """Of float32 states, where a block or a warp holds one: at most 5 % more passes than there are requests."""
    for problem in problems(n_wires):
        requests = [r for r in tracer.trace(problem, np.float32) if r.memory == "shared"]
        assert sum(r.requests for r in requests) > 1000 >> max(0, 10 - n_wires)
        worst = max(requests, key=lambda r: r.transactions - r.at_best)
        total, at_best = sum(r.transactions for r in requests), sum(r.at_best for r in requests)
        report = f"{total} passes instead of {at_best}, most of them for {worst} at {tracer.source(worst)}: {problem}"
        assert total <= 1.05 * at_best, report


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_move_in_whole_sectors(tracer: Tracer, dtype: Any) -> None:
    """Aligned rows are read and written 16 bytes per lane: x by each of the two kernels, the gradient at x once."""
    problem = draw(2, 11, "z", batch=2, d=2048)
    requests = [r for r in tracer.trace(problem, dtype) if r.memory == "global" and r.size == 16]
    bytes_of = Counter[str]()
    for r in requests:
        assert r.transactions == r.at_best, f"{r} at {tracer.source(r)}"
        bytes_of[r.access] += 32 * r.at_best
    row = 2 * 2048 * np.dtype(dtype).itemsize
    assert bytes_of["read"] >= 2 * row
    assert bytes_of["write"] >= row
