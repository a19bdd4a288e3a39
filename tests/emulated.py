"""The CUDA kernels on an emulated device, and how their results are checked.

``python tests/emulated.py LIBRARY [--few]`` runs a selection of the checks of ``test_cuda_kernels``; that is how builds
with sanitizers are tested.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import cuda_tools
from qaa.circuit import Readout
from strategies import Array, Problem, random_circuit, random_problem
from test_kernels import assert_accurate

DTYPES = [np.dtype(name) for name in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)]  # enum Scalar
KINDS = ["expval", "probs", "state"]  # enum ReadoutKind
READOUTS = ["z", "paulis", "probs", "state"]
SHARED_BYTES = 227 * 1024  # that a block may have at most
_LIBC = ctypes.CDLL(None)

Results = tuple[Array, Array, Array]  # features, gradient at theta, gradient at x


class Launch(NamedTuple):
    kernel: str
    threads: int  # of a block
    shared_bytes: int  # of dynamic shared memory


class Device:
    """A library of tests/cuda/driver.cpp. Its "device" memory is that of NumPy."""

    def __init__(self, library: Path) -> None:
        self._path = library
        self._library = ctypes.CDLL(str(library))
        self._library.qaa_plan.restype = ctypes.c_void_p
        for name in ("qaa_error", "qaa_emulator_launches", "qaa_known_source"):
            getattr(self._library, name).restype = ctypes.c_char_p

    def schedule(self, seed: int, shared_bytes: int = SHARED_BYTES) -> None:
        """Chooses the schedule of all launches from now on, and the shared memory of a block."""
        self._library.qaa_emulator_seed(ctypes.c_uint64(seed))
        self._library.qaa_emulator_shared_limit(ctypes.c_size_t(shared_bytes))

    def launches(self) -> set[Launch]:
        """What was launched since the last call."""
        lines = self._library.qaa_emulator_launches().decode().splitlines()
        return {Launch(kernel, int(threads), int(shared)) for kernel, threads, shared in (x.split("\t") for x in lines)}

    def solve(
        self,
        problem: Problem,
        dtype: Any,
        without: str = "",
        padding: int = 0,
        offset: int = 0,
        known: Path | None = None,
        groups: int = 1,
    ) -> Results:
        """The results for rows of ``dtype``, ``padding`` numbers apart; nothing between them may change.

        With several groups theta has angles for each, one after the other, and x may have the rows of one for all.
        The first row starts ``offset`` numbers after a 256-byte boundary. ``without`` names rewrites of the plan. With
        a folder ``known``, by kernels that are compiled for this circuit alone, in that folder.
        """
        plan = self._plan(problem, without)
        if known is not None:
            self._library.qaa_use_kernels(plan, *self._known_kernels(plan, DTYPES.index(np.dtype(dtype)), known))
        is_double = dtype == np.float64
        theta = np.ascontiguousarray(problem.theta, np.float64 if is_double else np.float32)
        x = Rows(problem.x, dtype, padding, offset)
        grad = Rows(_reals(problem.grad), dtype, padding, offset)
        features = Rows(np.full(grad.shape, np.nan), dtype, padding, offset)
        grad_x = Rows(np.full((len(problem.grad), x.shape[1]), np.nan), dtype, padding, offset)
        grad_theta = np.full_like(theta, np.nan)
        scalar = DTYPES.index(np.dtype(dtype))
        rows = (x.pointer, *x.shape, x.stride, scalar, len(problem.grad), groups)
        call = (plan, _pointer(theta), DTYPES.index(theta.dtype), *rows)
        try:
            self._run("qaa_forward", *call, features.pointer, features.stride, scalar)
            gradients = (_pointer(grad_theta), grad_x.pointer, grad_x.stride)
            self._run("qaa_backward", *call, grad.pointer, grad.stride, scalar, *gradients)
        finally:
            self._library.qaa_plan_free(plan)
        value = features.take()
        if problem.readout.kind == "state":
            value = value.astype(theta.dtype).view(np.complex128 if is_double else np.complex64)
        return value, grad_theta, grad_x.take()

    def _plan(self, problem: Problem, without: str) -> ctypes.c_void_p:
        circuit, readout = problem.circuit, problem.readout
        gates = (f"{g.name} {_words(g.wires)} : {_words(g.parameters)}" for g in circuit.gates)
        plan = self._library.qaa_plan(
            circuit.n_wires,
            circuit.n_parameters,
            ";".join(gates).encode(),
            KINDS.index(readout.kind),
            readout.n_outputs,
            _words(readout.paulis).encode(),
            problem.normalize,
            without.encode(),
        )
        assert plan, self._library.qaa_error().decode()
        return ctypes.c_void_p(plan)

    def known_sources(self, problem: Problem, dtype: Any) -> list[str]:
        """Forward and adjoint: what follows the kernels' headers where they are compiled for this circuit alone."""
        plan = self._plan(problem, "")
        try:
            return list(self._sources(plan, DTYPES.index(np.dtype(dtype))))
        finally:
            self._library.qaa_plan_free(plan)

    def _sources(self, plan: ctypes.c_void_p, scalar: int) -> Iterator[str]:
        for backward in (0, 1):
            source = self._library.qaa_known_source(plan, scalar, backward).decode()
            assert source, "expected a circuit that can have kernels of its own"
            yield source

    def _known_kernels(self, plan: ctypes.c_void_p, scalar: int, folder: Path) -> Iterator[ctypes.c_void_p]:
        for source in self._sources(plan, scalar):
            library = ctypes.CDLL(str(cuda_tools.compile_known(source, self._path, folder)))
            yield ctypes.cast(library.qaa_known_kernel, ctypes.c_void_p)

    def _run(self, function: str, *arguments: Any) -> None:
        words = (ctypes.c_int64(a) if isinstance(a, int) else a for a in arguments)
        assert getattr(self._library, function)(*words) == 0, self._library.qaa_error().decode()


class Rows:
    """A matrix whose rows lie apart, with numbers in between that ``take`` finds unchanged; its last row is the end."""

    def __init__(self, values: Array, dtype: Any, padding: int, offset: int) -> None:
        batch, width = self.shape = values.shape
        self.stride = width + padding
        self._memory = _aligned(offset + max(batch * self.stride - padding, 0), dtype)
        self._memory[:] = 7
        start = self._memory[offset:]
        self.pointer = _pointer(start)
        strides = (self.stride * start.itemsize, start.itemsize)
        self._rows = np.lib.stride_tricks.as_strided(start, self.shape, strides)
        self._rows[...] = values

    def take(self) -> Array:
        values = self._rows.copy()
        self._rows[...] = 7
        assert np.all(self._memory == 7), "a kernel wrote between the rows"
        return values


def _aligned(n: int, dtype: Any) -> Array:
    """``n`` numbers in an allocation of exactly their size that starts as aligned as a GPU's allocations do."""
    address, n_bytes = ctypes.c_void_p(), max(n, 1) * np.dtype(dtype).itemsize
    assert _LIBC.posix_memalign(ctypes.byref(address), ctypes.c_size_t(256), ctypes.c_size_t(n_bytes)) == 0
    memory = (ctypes.c_uint8 * n_bytes).from_address(address.value or 0)
    weakref.finalize(memory, _LIBC.free, address)
    return np.frombuffer(memory, np.uint8).view(dtype)[:n]


def _pointer(values: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(values.ctypes.data)


def _words(items: Any) -> str:
    return " ".join(map(str, items))


def _reals(values: Array) -> Array:
    """Complex numbers as pairs."""
    return np.ascontiguousarray(values).view(values.real.dtype) if np.iscomplexobj(values) else values


# ------------------------------------------------------------------------------------------------------ checks


def draw(seed: int, n_wires: int, kind: str, **options: Any) -> Problem:
    """A problem with gates from the whole table; 20 rows of few wires fill more than one block, 3 of many wires do."""
    rng = np.random.default_rng([seed, n_wires, READOUTS.index(kind)])
    circuit = options.pop("circuit", None) or random_circuit(rng, n_wires, int(rng.integers(17, 30)))
    readout: Any = kind
    if kind == "paulis":
        readout = ["".join(rng.choice(list("IXYZ"), n_wires)) for _ in range(rng.integers(1, min(2 * n_wires, 10)))]
        readout += ["I" * n_wires, readout[0]]
    elif kind != "z":
        readout = Readout(kind, int(rng.integers(1, 2**n_wires + 1)))
    batch = options.pop("batch", 4 + 2 ** max(1, 8 - n_wires))
    return random_problem(rng, circuit, readout, batch=batch, **options)


def rounded(problem: Problem, dtype: Any) -> Problem:
    """The problem with its numbers rounded to what a call in ``dtype`` sees, in the arithmetic of that call."""
    work = np.float64 if dtype == np.float64 else np.float32
    grad = _reals(problem.grad).astype(dtype).astype(work)
    if np.iscomplexobj(problem.grad):
        grad = grad.view(np.result_type(work, np.complex64))
    return replace(problem, theta=problem.theta.astype(work), x=problem.x.astype(dtype).astype(work), grad=grad)


def check(
    device: Device,
    problem: Problem,
    dtype: Any,
    seeds: range = range(1),
    shared_bytes: int = SHARED_BYTES,
    **layout: Any,
) -> None:
    """The device's results are close to the oracle, and under every schedule the same to the last bit.

    ``layout`` is what ``Device.solve`` takes.
    """
    problem = rounded(problem, dtype)
    first: Results | None = None
    for seed in seeds:
        device.schedule(seed, shared_bytes)
        results = device.solve(problem, dtype, **layout)
        if first is None:
            first = results
            storage = dtype if np.dtype(dtype).itemsize == 2 else None
            assert_accurate(problem, results, problem.theta.dtype, storage)
        for value, again in zip(first, results, strict=True):
            assert np.array_equal(value, again), f"schedule {seed} gives other bits for {problem}"
    assert first is not None


def selection(few: bool) -> Iterator[tuple[Problem, Any, dict[str, Any]]]:
    """Every kernel, readout and dtype with odd layouts; or few cases, where a check takes seconds."""
    widths = [(3, SHARED_BYTES), (10, SHARED_BYTES), (10, 0), (3, 0)]
    if not few:
        widths += [(n, SHARED_BYTES) for n in (1, 6, 7, 8, 9, 11, 12)] + [(9, 4096), (11, 4096)]
    for i, (n_wires, shared_bytes) in enumerate(widths):
        for j, kind in enumerate(READOUTS):
            if few and i % 2 != j % 2:
                continue
            problem = draw(100 + i, n_wires, kind, batch=4 if n_wires > 8 else 36)
            layout = {"padding": (i + j) % 3, "offset": j % 2, "shared_bytes": shared_bytes}
            dtype = DTYPES[3] if few and j > 1 else DTYPES[(i + j + j // 2) % (3 if few else 4)]
            yield problem, dtype, layout


def main() -> None:
    device = Device(Path(sys.argv[1]))
    count = 0
    for problem, dtype, layout in selection(few="--few" in sys.argv):
        check(device, problem, dtype, range(count % 8, count % 8 + 1), **layout)
        count += 1
    print(f"{count} checks passed with {len({launch.kernel for launch in device.launches()})} kernels")


if __name__ == "__main__":
    main()
