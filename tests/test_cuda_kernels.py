"""The CUDA kernels, compiled by the host's compiler and run on the emulated device of tests/cuda/emulator.h.

Every check runs under several schedules; results must be within the tolerances of the CPU core (``test_kernels``) and
must not depend on the schedule in a single bit. In these builds a grid has at most three blocks, so that blocks go
through several rows.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cuda_tools
from emulated import DTYPES, READOUTS, SHARED_BYTES, Device, check, draw, rounded
from qaa.circuit import GATES, Circuit, Gate, ansatz
from strategies import random_problem

SEEDS = range(8)
ROOT = cuda_tools.ROOT


@pytest.fixture(scope="module")
def device(emulated_library: Path) -> Device:
    return Device(emulated_library)


# ------------------------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", READOUTS)
@pytest.mark.parametrize("n_wires", range(1, 12))
def test_every_width_readout_and_dtype(device: Device, n_wires: int, kind: str, dtype: Any) -> None:
    check(device, draw(0, n_wires, kind), dtype, SEEDS)


@pytest.mark.parametrize("kind", READOUTS)
@pytest.mark.parametrize("n_wires", range(12, 17))
def test_many_wires(device: Device, n_wires: int, kind: str) -> None:
    """Every dtype at some width, and from 15 wires on states that do not fit into shared memory."""
    dtype = DTYPES[(n_wires + READOUTS.index(kind)) % 4]
    check(device, draw(0, n_wires, kind, batch=4 if n_wires < 15 else 2), dtype, SEEDS[n_wires % 4 :: 4])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", READOUTS)
@pytest.mark.parametrize("n_wires", [3, 9, 10, 11])
def test_states_in_global_memory(device: Device, n_wires: int, kind: str, dtype: Any) -> None:
    """As for more wires than shared memory holds: first without room for states, then without any for sums either."""
    problem = draw(1, n_wires, kind)
    for shared_bytes in (4096, 0):
        check(device, problem, dtype, SEEDS, shared_bytes)


@pytest.mark.parametrize("without", ["fuse", "absorb", "real", "fuse,absorb,real"])
@pytest.mark.parametrize("n_wires", [1, 2, 4, 6, 8, 9, 10, 12])
def test_without_rewrites(device: Device, n_wires: int, without: str) -> None:
    for kind in READOUTS:
        check(device, draw(2, n_wires, kind), np.float64, without=without)


@pytest.mark.parametrize("name", GATES)
def test_every_gate_on_every_wire(device: Device, name: str) -> None:
    """Between rotations that make the state complex and all amplitudes different."""
    n_gate_wires, n_gate_parameters = GATES[name]
    rng = np.random.default_rng(3)
    for n in (3, 6, 10):
        for first in range(n):
            wires = (first, *(int(w) for w in rng.permutation([w for w in range(n) if w != first])))[:n_gate_wires]
            scramble = [Gate("Rot", (w,), (3 * w, 3 * w + 1, 3 * w + 2)) for w in range(n)]
            gate = Gate(name, wires, tuple(range(3 * n, 3 * n + n_gate_parameters)))
            circuit = Circuit(n, (*scramble, gate, *scramble), (3 * n + n_gate_parameters,))
            check(device, random_problem(rng, circuit, batch=2), np.float64, SEEDS[first % 8 :][:1])


@pytest.mark.parametrize("n_wires", [1, 5, 8, 10, 11])
def test_the_default_circuit(device: Device, n_wires: int) -> None:
    """The ansatz that adapters use, at the widths of language models where there is one."""
    width = {10: 768, 11: 2048}.get(n_wires, 2**n_wires)
    for layers in (1, 2):
        circuit = ansatz("ring", n_wires, layers)
        for dtype in DTYPES:
            check(device, draw(4, n_wires, "z", circuit=circuit, d=width, batch=7), dtype, SEEDS[:2])


# ------------------------------------------------------------------------------------- kernels of one circuit


@pytest.mark.parametrize(
    ("n_wires", "kind", "dtype", "layers"),
    [
        (9, "paulis", np.float16, None),
        (10, "z", ml_dtypes.bfloat16, 1),
        (10, "z", np.float32, 3),
        (10, "paulis", np.float32, None),
        (11, "state", np.float32, 2),
        (12, "probs", ml_dtypes.bfloat16, None),
        (13, "z", np.float32, 1),
    ],
)
def test_kernels_of_one_circuit(
    device: Device, tmp_path: Path, n_wires: int, kind: str, dtype: Any, layers: int | None
) -> None:
    """The circuit as constants: default circuits, and any gates; also by half turns, whose cosine is too small."""
    options = {} if layers is None else {"circuit": ansatz("ring", n_wires, layers)}
    for batch in (9, 2):  # more rows than a block has, and fewer
        problem = draw(9, n_wires, kind, batch=batch, **options)
        check(device, problem, dtype, SEEDS[:3], known=tmp_path, padding=batch % 4, offset=8 * (batch % 2))
    steep = problem.theta.copy()
    steep.flat[::3] = np.pi
    steep.flat[1::7] = np.pi + 1e-3
    check(device, replace(problem, theta=steep), dtype, SEEDS[:1], known=tmp_path)
    assert {launch.kernel for launch in device.launches()} >= {"qaa_known_kernel"}


# ------------------------------------------------------------------------------------- rows and memory


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_wires", [2, 7, 10])
def test_any_layout_of_rows(device: Device, n_wires: int, dtype: Any) -> None:
    """Rows that start anywhere and lie any distance apart, of any width; between them nothing is written."""
    for kind in READOUTS:
        for padding, offset, d in ((0, 1, 2**n_wires), (1, 0, 2**n_wires - 1), (8, 0, 2**n_wires), (3, 5, 1)):
            check(device, draw(5, n_wires, kind, d=d), dtype, padding=padding, offset=offset)


@pytest.mark.parametrize("kind", READOUTS)
@pytest.mark.parametrize("n_wires", [3, 8, 10])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_do_not_touch_each_other(device: Device, n_wires: int, kind: str, dtype: Any) -> None:
    """Alone, among others, or beside rows of zeros, NaN, infinity and tiny numbers: a row has the same bits."""
    problem = rounded(draw(6, n_wires, kind, batch=12, normalize=True), dtype)
    device.schedule(0)
    together = device.solve(problem, dtype)
    spoiled = problem.x.copy()
    spoiled[1], spoiled[3], spoiled[5, 0], spoiled[7] = 0, np.nan, np.inf, problem.x[7] * 1e-30
    mixed = device.solve(replace(problem, x=spoiled), dtype)
    for r in range(12):
        alone = device.solve(replace(problem, x=problem.x[r : r + 1], grad=problem.grad[r : r + 1]), dtype)
        for which in (0, 2):
            assert np.array_equal(alone[which][0], together[which][r])
            if r not in (1, 3, 5, 7):
                assert np.array_equal(mixed[which][r], together[which][r])
    for which in (0, 2):
        assert np.all(mixed[which][1] == 0), "a zero row has zero features and gradients"
        assert np.all(np.isnan(mixed[which][3])), "a row with NaN is NaN"
        assert np.all(np.isfinite(mixed[which][7]))


@pytest.mark.parametrize("shared_bytes", [SHARED_BYTES, 4096])
@pytest.mark.parametrize("n_wires", [3, 7, 10])
@pytest.mark.parametrize(("kind", "dtype"), [("z", np.float32), ("paulis", np.float64), ("state", np.float32)])
def test_groups_have_the_bits_of_calls_of_their_own(
    device: Device, n_wires: int, kind: str, dtype: Any, shared_bytes: int
) -> None:
    """Groups of rows with angles of their own, with rows of x of their own and with the same."""
    groups, batch = 4, 5 if n_wires > 3 else 300  # more rows than three blocks hold
    problem = rounded(draw(10, n_wires, kind, batch=groups * batch), dtype)
    thetas = np.stack([problem.theta * (1 + g) for g in range(groups)])
    device.schedule(3, shared_bytes)
    for x in (problem.x, problem.x[:batch]):
        together = device.solve(replace(problem, theta=thetas, x=x), dtype, padding=2, groups=groups)
        for g in range(groups):
            rows = slice(g * batch, (g + 1) * batch)
            own = replace(problem, theta=thetas[g], x=x[rows] if len(x) > batch else x, grad=problem.grad[rows])
            value, grad_theta, grad_x = device.solve(own, dtype, padding=2)
            assert np.array_equal(together[0][rows], value)
            assert np.array_equal(together[1][g], grad_theta)
            assert np.array_equal(together[2][rows], grad_x)


def test_a_grid_takes_so_many_groups(device: Device) -> None:
    limit = 65_535  # of a grid's second dimension
    problem = draw(12, 1, "z", batch=limit + 1)
    thetas = np.stack([problem.theta] * (limit + 1))
    with pytest.raises(AssertionError, match="expected 1 to 65535 groups of rows on a GPU, received 65536"):
        device.solve(replace(problem, theta=thetas), np.float32, groups=limit + 1)


@pytest.mark.parametrize("n_wires", [4, 10])
def test_no_rows(device: Device, n_wires: int) -> None:
    features, grad_theta, grad_x = device.solve(draw(7, n_wires, "z", batch=0), np.float32)
    assert features.size == grad_x.size == 0
    assert np.all(grad_theta == 0)


# ------------------------------------------------------------------------------------- completeness, sanitizers


def test_every_kernel_ran(device: Device, emulated_library: Path) -> None:
    """Checks of two widths in two precisions launch each kernel that the library has."""
    symbols = cuda_tools.run(["nm", "-C", "--defined-only", emulated_library]).stdout
    kernels = set(re.findall(r"(void qaa::cuda::\w+_kernel<.*\)$)", symbols, re.MULTILINE))
    assert len(kernels) == 20
    device.launches()
    for dtype in (np.float32, np.float64):
        for n_wires, shared_bytes in ((4, SHARED_BYTES), (4, 0), (10, SHARED_BYTES), (10, 0)):
            check(device, draw(8, n_wires, "z"), dtype, shared_bytes=shared_bytes)
    assert kernels == {launch.kernel for launch in device.launches()}


@pytest.mark.parametrize(("sanitizer", "options", "n_checks"), [("asan", [], 52), ("tsan", ["--few"], 8)])
def test_sanitizers_see_nothing(
    emulated_objects: list[Path], tmp_path: Path, sanitizer: str, options: list[str], n_checks: int
) -> None:
    """Address and undefined behaviour, or races: to ThreadSanitizer each CUDA thread is a thread."""
    library = cuda_tools.link_kernels(emulated_objects, tmp_path, sanitizer)
    result = cuda_tools.sanitized([sys.executable, ROOT / "tests/emulated.py", library, *options], sanitizer)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert f"{n_checks} checks passed with 20 kernels" in result.stdout
