"""The compiled core against the oracle: values, the gradient at the angles and the gradient at the input.

How far apart may they be? Every result has a natural size that follows from the definitions, whatever the circuit,
because U is unitary: with lambda the cotangent at the final state and psi the embedded state,

    features   ||psi||^2, or ||psi|| for amplitudes
    grad_x     ||lambda||, divided by ||x|| if the state is normalized
    grad_theta sum over the batch of ||lambda|| ||psi||

In float64 the difference must stay below 1e-12 of that, plus what rounding every angle once costs (a library may add
angles up), ``eps sum |angle|``, which counts for huge angles only. In float32 it may be four times what float32 costs
the plain formulas: the larger of the oracle's own error when it runs in complex64 on the same problem, and of a random
walk of one rounding error per gate, ``eps sqrt(gates + wires)``, which guards against a lucky oracle.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

import oracle
from qaa import _core, arrays, program
from qaa.circuit import ANSATZE, GATES, Circuit, Gate, Readout, ansatz
from strategies import Array, Problem, problems, random_circuit, random_problem

LANES = [0, 1, 7, 8, 9, 15, 16, 17, 33, 100]  # around the widths of vector registers
DTYPES = [np.float64, np.float32]
NAMES = ("features", "grad_theta", "grad_x")
MULTIPLE = 4


def cast(problem: Problem, dtype: Any) -> Problem:
    """The problem with its numbers rounded to ``dtype``, so that the oracle sees what the core sees."""
    grad = problem.grad.astype(np.result_type(dtype, np.complex64) if np.iscomplexobj(problem.grad) else dtype)
    return replace(problem, theta=problem.theta.astype(dtype), x=problem.x.astype(dtype), grad=grad)


def solve(problem: Problem, threads: int | None = None) -> tuple[Array, Array, Array]:
    """``(features, grad_theta, grad_x)`` by the core."""
    arguments = (problem.circuit, problem.theta, problem.x)
    value = arrays.forward(*arguments, problem.readout, normalize=problem.normalize, threads=threads)
    gradients = arrays.backward(*arguments, problem.grad, problem.readout, normalize=problem.normalize, threads=threads)
    return value, *gradients


def solve_with_strings(problem: Problem, threads: int = 1) -> tuple[Array, Array, Array]:
    """As :func:`solve`, but the backward call is given the values of strings that the forward call has written,
    as autograd does with large batches."""
    plan = program.program(problem.circuit, problem.readout, problem.normalize).plan
    theta, x, grad = problem.theta.astype(np.float64), problem.x, np.ascontiguousarray(problem.grad)
    features, grad_theta, grad_x = np.empty_like(grad), np.empty_like(theta), np.empty_like(x)
    strings = np.full((len(x), plan.n_strings), np.nan, np.float64 if x.dtype == np.float64 else np.float32)
    angles = theta.ctypes.data, _core.Scalar.float64
    rows, values = arrays._const_matrix(x), arrays._matrix(strings)
    _core.forward(plan, *angles, rows, arrays._matrix(features), threads, 1, values)
    _core.backward(
        plan,
        *angles,
        rows,
        arrays._const_matrix(grad),
        grad_theta.ctypes.data,
        arrays._matrix(grad_x),
        threads,
        1,
        arrays._const_matrix(strings),
    )
    return features, grad_theta.astype(problem.theta.dtype), grad_x


def solve_by_oracle(problem: Problem, dtype: Any = np.complex128) -> tuple[Array, Array, Array]:
    """``(features, grad_theta, grad_x)`` by the oracle, in the arithmetic of ``dtype``."""
    arguments = (problem.circuit, problem.theta, problem.x)
    options: dict[str, Any] = {"normalize": problem.normalize, "dtype": dtype}
    value = oracle.features(*arguments, problem.readout, **options)
    return value, *oracle.vjp(*arguments, problem.grad, problem.readout, **options)


def natural_sizes(problem: Problem) -> tuple[Array, Array, Array]:
    """The sizes of the module's docstring: ``(batch, 1)``, a scalar, ``(batch, 1)``."""
    psi = oracle.embed_amplitudes(problem.circuit, problem.x.astype(float), problem.normalize)
    phi = oracle.run(problem.circuit, problem.theta, psi)[-1]
    bra = np.linalg.norm(oracle.cotangent(problem.readout, phi, problem.grad), axis=0)[:, None]
    size = np.linalg.norm(psi, axis=0)[:, None]
    length = oracle.norm(problem.x.astype(float)) if problem.normalize else np.ones_like(size)
    per_length = np.divide(bra, length, out=np.zeros_like(bra), where=length != 0)
    return (size if problem.readout.kind == "state" else size**2), np.sum(bra * size), per_length


def relative_error(ours: Array, exact: Array, size: Array, rounding: Array | float = 0) -> float:
    """max |ours - exact| / size beyond ``rounding``; 0 / 0 counts as 0, and NaN and Inf never agree."""
    assert ours.shape == exact.shape
    difference = np.asarray(np.abs(ours.astype(exact.dtype) - exact))
    difference = np.where(np.isnan(difference), np.inf, np.maximum(difference - rounding, 0))
    return float(np.max(np.divide(difference, size, out=np.zeros_like(difference), where=difference != 0), initial=0))


def check(problem: Problem, dtype: Any, threads: int | None = None) -> None:
    """The core's three results have the right shapes and dtypes and are as close to the oracle as promised."""
    problem = cast(problem, dtype)
    ours = solve(problem, threads)
    complex_dtype = np.result_type(dtype, np.complex64)
    assert ours[0].dtype == (complex_dtype if problem.readout.kind == "state" else dtype), problem
    assert ours[1].dtype == ours[2].dtype == dtype, problem
    kept = None
    if problem.readout.kind == "expval":
        kept = solve_with_strings(problem, threads or 1)
        np.testing.assert_array_equal(kept[0], ours[0])
    assert_accurate(problem, ours, dtype, kept=kept)


def assert_accurate(
    problem: Problem,
    ours: tuple[Array, Array, Array],
    dtype: Any,
    storage: Any = None,
    kept: tuple[Array, Array, Array] | None = None,
) -> None:
    """The results, and ``kept`` ones, are as close to the oracle as arithmetic in ``dtype`` allows, and one rounding to
    ``storage``."""
    exact = solve_by_oracle(problem)
    single = solve_by_oracle(problem, np.complex64) if dtype == np.float32 else exact
    walk = np.finfo(np.float32).eps * np.sqrt(len(problem.circuit.gates) + problem.circuit.n_wires)
    angles = [abs(float(problem.theta.flat[p])) for gate in problem.circuit.gates for p in gate.parameters]
    in_double = 1e-12 + np.finfo(np.float64).eps * sum(angles)
    sizes = natural_sizes(problem)
    for values in (ours,) if kept is None else (ours, kept):
        for name, value, reference, plain, size in zip(NAMES, values, exact, single, sizes, strict=True):
            allowed = in_double if dtype == np.float64 else MULTIPLE * max(relative_error(plain, reference, size), walk)
            rounding: Array | float = 0
            if storage is not None and name != "grad_theta":
                info = ml_dtypes.finfo(storage)
                rounding = float(info.eps) / 2 * np.abs(reference) + float(info.smallest_subnormal)
            error = relative_error(value, reference, size, rounding)
            assert error <= allowed, f"{name}, {np.dtype(dtype)}: error {error:.2g} > {allowed:.2g} for {problem}"


# ---------------------------------------------------------------------------------------------- gates, one by one


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GATES)
def test_every_gate_on_every_wire(name: str, dtype: Any) -> None:
    """On up to 5 wires, between rotations that make the state complex and all amplitudes different."""
    gate_wires, gate_parameters = GATES[name]
    rng = np.random.default_rng(0)
    for n in range(gate_wires, 6):
        for first in range(n):
            wires = (first, *(int(w) for w in rng.permutation([w for w in range(n) if w != first])))[:gate_wires]
            scramble = [Gate("Rot", (w,), (3 * w, 3 * w + 1, 3 * w + 2)) for w in range(n)]
            gate = Gate(name, wires, tuple(range(3 * n, 3 * n + gate_parameters)))
            circuit = Circuit(n, (*scramble, gate, *scramble), (3 * n + gate_parameters,))
            check(random_problem(rng, circuit, batch=3), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GATES)
def test_every_gate_alone(name: str, dtype: Any) -> None:
    """As the only gate of a circuit, where plans can simplify most, and on all ordered pairs of three wires."""
    gate_wires, gate_parameters = GATES[name]
    rng = np.random.default_rng(1)
    for a in range(3):
        for b in [w for w in range(3) if w != a] if gate_wires == 2 else [None]:
            wires = (a,) if b is None else (a, b)
            circuit = Circuit(3, (Gate(name, wires, tuple(range(gate_parameters))),), (gate_parameters,))
            for readout in ("z", ["XYZ", "YXI", "IIX", "ZYY"], "probs", "state"):
                check(random_problem(rng, circuit, readout, batch=2), dtype)


ANGLES = [0.0, -0.0, np.pi / 2, np.pi, 3 * np.pi / 2, 2 * np.pi, 3 * np.pi, 4 * np.pi, -np.pi, -2 * np.pi]
ANGLES += [1e-20, 1e-8, np.pi + 1e-7, np.nextafter(np.pi, 4), 1e3, -1e6, 1e9 + 0.25]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in GATES if GATES[name][1]])
def test_special_and_huge_angles(name: str, dtype: Any) -> None:
    gate_wires, gate_parameters = GATES[name]
    rng = np.random.default_rng(2)
    scramble = [Gate("Rot", (w,), (3 * w, 3 * w + 1, 3 * w + 2)) for w in range(2)]
    gate = Gate(name, tuple(range(gate_wires)), tuple(range(6, 6 + gate_parameters)))
    for gates in ((gate,), (*scramble, gate), (*scramble, gate, gate, *scramble)):
        problem = random_problem(rng, Circuit(2, gates, (6 + gate_parameters,)), batch=2)
        for angle in ANGLES:
            theta = problem.theta.copy()
            theta[6:] = angle
            check(replace(problem, theta=theta), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("angle", [0.0, np.pi / 2, np.pi, 2 * np.pi, 1e6])
@pytest.mark.parametrize("name", ANSATZE)
def test_all_angles_of_an_ansatz_special_at_once(name: str, angle: float, dtype: Any) -> None:
    rng = np.random.default_rng(3)
    for readout in ("z", "state"):
        problem = random_problem(rng, ansatz(name, 5, 2), readout, batch=3)
        check(replace(problem, theta=np.full_like(problem.theta, angle)), dtype)


# ------------------------------------------------------------------------------------------- circuits and readouts


@settings(max_examples=150)
@given(problems())
def test_random_circuits_in_double(problem: Problem) -> None:
    check(problem, np.float64)


@settings(max_examples=150)
@given(problems())
def test_random_circuits_in_single(problem: Problem) -> None:
    check(problem, np.float32)


READOUTS = ["z", "paulis", "probs", "probs[:K]", "state", "state[:K]"]


def readout_of(kind: str, n: int, rng: np.random.Generator) -> Readout:
    if kind == "paulis":
        strings = ["".join(rng.choice(list("IXYZ"), n)) for _ in range(n + 2)]
        return Readout.parse(["I" * n, *strings, strings[0]], n)
    return Readout.parse(kind.replace("K", str(max(1, 2**n * 5 // 8))), n)


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("n", range(1, 11))
@pytest.mark.parametrize("name", ANSATZE)
def test_every_ansatz_and_readout(name: str, n: int, readout: str) -> None:
    rng = np.random.default_rng([n, READOUTS.index(readout)])
    for n_layers in (1, 2) if n < 9 else (1,):
        circuit = ansatz(name, n, n_layers)
        problem = random_problem(rng, circuit, readout_of(readout, n, rng), batch=5)
        problem = replace(problem, theta=rng.uniform(-4, 4, circuit.parameter_shape))
        for dtype in DTYPES:
            check(problem, dtype)


@pytest.mark.parametrize("n", range(11, 17))
def test_up_to_16_wires(n: int) -> None:
    rng = np.random.default_rng(n)
    name = sorted(ANSATZE)[n % len(ANSATZE)]
    for circuit in (ansatz(name, n, 1), random_circuit(rng, n, 17)):
        for readout in ("z", "state[:100]", ["X" * n, "Y" + "I" * (n - 2) + "Z"]):
            check(random_problem(rng, circuit, readout, batch=2, normalize=True), np.float32)
    check(random_problem(rng, ansatz(name, n, 1), "probs", batch=1), np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", LANES)
def test_batches_around_the_lanes(batch: int, dtype: Any) -> None:
    rng = np.random.default_rng(batch)
    for n in (1, 3, 6):
        for circuit in (random_circuit(rng, n, 17), ansatz("ring", n)):
            for readout in ("z", "probs", "state"):
                check(random_problem(rng, circuit, readout, batch=batch), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_of_the_input(dtype: Any) -> None:
    """d from 1 to 2**n: narrower rows are padded with zeros, also when whole wires stay |0>."""
    rng = np.random.default_rng(4)
    for n in (1, 2, 5):
        for d in range(1, 2**n + 1):
            check(random_problem(rng, ansatz("ring", n), "z", batch=9, d=d), dtype)
    for d in (1, 2, 511, 513, 768, 1000):
        check(random_problem(rng, ansatz("ring", 10), "z", batch=3, d=d), dtype)


def test_a_circuit_without_gates_and_one_without_parameters() -> None:
    rng = np.random.default_rng(5)
    for circuit in (Circuit(3, (), ()), Circuit(3, (), (0,)), Circuit.parse("wires 3; theta 0; H 0; CNOT 0 2; T 2")):
        for readout in ("z", ["XYZ", "III"], "probs", "state"):
            for dtype in DTYPES:
                check(random_problem(rng, circuit, readout), dtype)


def test_parameters_that_are_shared_and_parameters_that_are_unused() -> None:
    circuit = Circuit.parse(
        "wires 3; theta 2x3; RY 0 t4; CNOT 0 1; RY 1 t4; CRZ 1 2 t4; Rot 2 t4 t1 t1; PhaseShift 0 t1"
    )
    rng = np.random.default_rng(6)
    for readout in ("z", ["XXY"], "probs", "state"):
        problem = random_problem(rng, circuit, readout)
        for dtype in DTYPES:
            check(problem, dtype)
        _, grad_theta, _ = solve(problem)
        unused = np.ones((2, 3), bool)
        unused.flat[[1, 4]] = False
        assert not grad_theta[unused].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", ["RY", "CRY", "RX"])
def test_hundreds_of_layers_neither_overflow_nor_lose_precision(gate: str, dtype: Any) -> None:
    """1500 rotations with small cosines and no diagonal between them: running products of cosines leave float32."""
    n, n_layers = 5, 300
    rng = np.random.default_rng(7)
    for low, high in ((0.0, 2 * np.pi), (1.5, 1.65), (3.0, 3.2)):
        gates = []
        for layer in range(n_layers):
            for w in range(n):
                wires = (w,) if GATES[gate][0] == 1 else (w, (w + 2) % n)
                gates.append(Gate(gate, wires, (layer * n + w,)))
            gates += [Gate("CNOT", (w, (w + 1) % n)) for w in range(n)]
        circuit = Circuit(n, tuple(gates), (n_layers, n))
        problem = random_problem(rng, circuit, "z", batch=3)
        check(replace(problem, theta=rng.uniform(low, high, (n_layers, n))), dtype)


def test_a_thousand_features() -> None:
    rng = np.random.default_rng(8)
    strings = ["".join(rng.choice(list("IXYZ"), 6)) for _ in range(1000)]
    for dtype in DTYPES:
        check(random_problem(rng, ansatz("strongly_entangling", 6, 2), strings, batch=9), dtype)


def test_many_pauli_strings_of_one_kind() -> None:
    """All strings of Z only, of X only, of Y only: the ones that are read out together."""
    rng = np.random.default_rng(9)
    for n in (1, 3, 5):
        for letter in "XYZ":
            strings = ["".join(letter if m >> w & 1 else "I" for w in range(n)) for m in range(2**n)]
            for circuit in (ansatz("ring", n), random_circuit(rng, n, 20)):
                for dtype in DTYPES:
                    check(random_problem(rng, circuit, strings, batch=5), dtype)


@pytest.mark.parametrize("n", [2, 4])
def test_all_pauli_strings_at_once(n: int) -> None:
    """More strings with signs than the adjoint applies in one pass, which leaves some to passes of their own."""
    rng = np.random.default_rng(10)
    strings = ["".join(letters) for letters in product("IXYZ", repeat=n)]
    for circuit in (ansatz("ring", n, 2), Circuit(n, (), (0,)), random_circuit(rng, n, 20)):
        for dtype in DTYPES:
            for batch in (1, 9):
                check(random_problem(rng, circuit, strings, batch=batch), dtype)


# ------------------------------------------------------------------------------------------- the gradient's accuracy


def test_the_gradient_of_a_long_batch_keeps_its_digits() -> None:
    """Sums over 4096 rows in float32 must not lose more than the rows themselves do."""
    rng = np.random.default_rng(10)
    problem = cast(random_problem(rng, ansatz("ring", 4), "z", batch=4096, normalize=True), np.float32)
    _, grad_theta, _ = solve(problem)
    _, exact, _ = solve_by_oracle(problem)
    per_row = natural_sizes(problem)[1] / 4096
    error = np.abs(grad_theta - exact).max()
    rounding_of_the_result = np.abs(exact).max() * np.finfo(np.float32).eps
    assert error <= MULTIPLE * np.finfo(np.float32).eps * np.sqrt(4096) * per_row + rounding_of_the_result


# ---------------------------------------------------------------------------------------------------- special values


def special_problems() -> Iterator[Problem]:
    rng = np.random.default_rng(11)
    for circuit in (ansatz("ring", 4, 2), random_circuit(rng, 4, 20), Circuit(4, (), ())):
        for readout in ("z", ["XYZI", "IIII", "YIIX"], "probs[:5]", "state", "state[:3]"):
            for normalize in (True, False):
                yield random_problem(rng, circuit, readout, batch=20, d=13, normalize=normalize)


@pytest.mark.parametrize("dtype", [*DTYPES, np.float16])
def test_zero_rows_give_zeros(dtype: Any) -> None:
    for problem in (cast(p, dtype) for p in special_problems()):
        problem.x[[0, 5, 19]] = 0
        value, grad_theta, grad_x = solve(problem)
        assert not value[[0, 5, 19]].any()
        if problem.normalize or problem.readout.kind != "state":
            assert not grad_x[[0, 5, 19]].any()
        assert np.isfinite(value).all() and np.isfinite(grad_theta).all() and np.isfinite(grad_x).all()
        others = np.delete(np.arange(20), [0, 5, 19])
        without = replace(problem, x=problem.x[others], grad=problem.grad[others])
        size = natural_sizes(without)[1]
        tolerance = 1e-12 if dtype == np.float64 else 1e-2 if dtype == np.float16 else 1e-5
        assert relative_error(grad_theta, solve(without)[1].astype(float), size) <= tolerance, problem


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_of_only_zero_rows(dtype: Any) -> None:
    for problem in (cast(p, dtype) for p in special_problems()):
        problem.x[:] = 0
        value, grad_theta, _grad_x = solve(problem)
        assert not value.any() and not grad_theta.any()
        check(problem, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, np.float16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_stay_in_their_row(bad: float, dtype: Any) -> None:
    for problem in (cast(p, dtype) for p in special_problems()):
        clean_value, _, clean_grad_x = solve(problem)
        x = problem.x.copy()
        rows = [0, 6, 17]
        x[rows, [0, 7, 12]] = bad
        value, grad_theta, grad_x = solve(replace(problem, x=x))
        others = np.delete(np.arange(20), rows)
        np.testing.assert_array_equal(value[others], clean_value[others])
        np.testing.assert_array_equal(grad_x[others], clean_grad_x[others])
        if problem.circuit.gates and problem.normalize:
            assert not np.isfinite(value[rows]).any(), problem
            assert not np.isfinite(grad_x[rows]).any(), problem
            assert np.isnan(grad_theta).any(), problem


EXPONENTS: dict[Any, list[float]] = {
    np.float32: [-44, -40, -38, -30, -20, 18, 20, 30, 37.5],
    np.float64: [-300, -200, -160, 153, 160, 307],
}


@pytest.mark.parametrize(("dtype", "exponent"), [(dtype, e) for dtype in DTYPES for e in EXPONENTS[dtype]])
def test_tiny_and_huge_rows_have_the_features_of_their_direction(dtype: Any, exponent: float) -> None:
    """Rows near both ends of the range, denormal ones too, between ordinary rows."""
    for problem in special_problems():
        if not problem.normalize:
            continue
        x = problem.x.copy()
        x[::2] *= 10.0**exponent
        problem = cast(replace(problem, x=x), dtype)
        with np.errstate(over="ignore"):
            value, _, grad_x = solve(problem)
            exact = solve_by_oracle(problem)
            sizes = natural_sizes(problem)
            tolerance = 1e-12 if dtype == np.float64 else 1e-5
            assert relative_error(value, exact[0], sizes[0]) < tolerance, problem
            # gradients at x are of size 1 / ||x||: compare those that the dtype can hold
            fits = np.abs(exact[2]) < np.finfo(dtype).max / 2
            smallest = np.finfo(dtype).smallest_normal
            difference = np.abs(grad_x.astype(float) - exact[2]) - 2 * smallest
            assert (difference <= tolerance * sizes[2])[fits].all(), problem
            assert not np.isnan(grad_x).any(), problem


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [-30, -15, 15, 30])
def test_unnormalized_amplitudes_are_linear_over_the_whole_range(exponent: int, dtype: Any) -> None:
    for problem in special_problems():
        if problem.normalize or problem.readout.kind != "state":
            continue
        check(replace(problem, x=problem.x * 10.0**exponent), dtype)
        check(replace(problem, grad=problem.grad * 10.0**exponent), dtype)


def test_an_angle_that_is_nan_makes_every_result_nan() -> None:
    problem = random_problem(np.random.default_rng(12), ansatz("ring", 3), "z")
    problem.theta[0, 1, 0] = np.nan
    value, grad_theta, grad_x = solve(problem)
    assert np.isnan(value).any() and np.isnan(grad_theta).any() and np.isnan(grad_x).any()


def test_half_precision_is_rounded_once() -> None:
    """float16 in and out with arithmetic in float32: the result is the rounded float32 result."""
    rng = np.random.default_rng(13)
    for readout in ("z", ["XYZXY"], "probs"):
        problem = cast(random_problem(rng, ansatz("ring", 5), readout, batch=9, normalize=True), np.float16)
        half = solve(problem)
        single = solve(cast(problem, np.float32))
        for ours, wide in zip(half, single, strict=True):
            assert ours.dtype == np.float16
            np.testing.assert_array_equal(ours, wide.astype(np.float16))
    problem = random_problem(rng, ansatz("ring", 5), "state", batch=9)
    half_x = problem.x.astype(np.float16)
    value = arrays.forward(problem.circuit, problem.theta, half_x, "state", normalize=problem.normalize)
    assert value.dtype == np.complex64


def test_float16_rows_may_have_a_norm_that_float16_cannot_hold() -> None:
    x = np.full((3, 8), 60000, np.float16)
    value = arrays.forward(ansatz("ring", 3), np.zeros((1, 3, 3)), x, "probs")
    np.testing.assert_array_equal(value, np.full((3, 8), 0.125, np.float16))


# ------------------------------------------------------------------------------- threads, rows, instruction sets, plans


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 9, 100, 1000])
def test_results_do_not_depend_on_the_number_of_threads(batch: int, dtype: Any) -> None:
    rng = np.random.default_rng(14)
    for circuit in (ansatz("ring", 6), random_circuit(rng, 6, 20)):
        for readout in ("z", "probs", "state[:7]"):
            problem = cast(random_problem(rng, circuit, readout, batch=batch), dtype)
            one = solve(problem, threads=1)
            for threads in (2, 3, 64, None):
                for name, ours, expected in zip(NAMES, solve(problem, threads), one, strict=True):
                    np.testing.assert_array_equal(ours, expected, err_msg=f"{name}, {threads} threads, {problem}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours(dtype: Any) -> None:
    rng = np.random.default_rng(15)
    for circuit in (ansatz("ring", 5), random_circuit(rng, 5, 20)):
        problem = cast(random_problem(rng, circuit, batch=37), dtype)
        value, _, grad_x = solve(problem)
        for row in (0, 8, 21, 36):
            others = np.arange(37) != row
            x, grad = problem.x.copy(), problem.grad.copy()
            x[others], grad[others] = x[others][::-1] * 3, 1
            changed_value, _, changed_grad_x = solve(replace(problem, x=x, grad=grad))
            np.testing.assert_array_equal(changed_value[row], value[row])
            np.testing.assert_array_equal(changed_grad_x[row], grad_x[row])


def test_the_same_call_gives_the_same_bits() -> None:
    problem = cast(random_problem(np.random.default_rng(16), ansatz("ring", 8), "z", batch=300), np.float32)
    first, second = solve(problem), solve(problem)
    for ours, again in zip(first, second, strict=True):
        np.testing.assert_array_equal(ours, again)


def sweep(seeds: range = range(20)) -> int:
    """Six problems for every seed, over gates, ansätze, readouts, widths and batches; returns how many."""
    count = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        n = 1 + seed % 7
        circuits = [random_circuit(rng, n, int(rng.integers(1, 40)), n_parameters=int(rng.integers(1, 9)))]
        circuits.append(ansatz(sorted(ANSATZE)[seed % 4], n, 1 + seed % 3))
        circuits.append(ansatz("ring", n, 1))
        for circuit in circuits:
            batch, d = int(rng.choice(LANES[1:])), int(rng.integers(1, 2**n + 1))
            problem = random_problem(rng, circuit, batch=batch, d=d)
            for dtype in DTYPES:
                check(problem, dtype)
                count += 1
    return count


@pytest.mark.parametrize("readout", ["z", "probs", "state[:4]"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_how_many_come_with_it(dtype: Any, readout: str) -> None:
    """In small batches a vector holds several amplitudes of a row, so that sums are taken in another order."""
    rng = np.random.default_rng(7)
    for n_wires, d in ((3, 7), (6, 50)):
        circuit = ansatz("ring", n_wires, 2)
        theta, x = rng.uniform(-3, 3, circuit.parameter_shape), rng.standard_normal((40, d)).astype(dtype)
        features = arrays.forward(circuit, theta, x, readout)
        grad = rng.standard_normal(features.shape).astype(features.dtype)
        _, grad_x = arrays.backward(circuit, theta, x, grad, readout)
        for batch in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33):
            few = arrays.forward(circuit, theta, x[:batch], readout)
            _, few_grad_x = arrays.backward(circuit, theta, x[:batch], grad[:batch], readout)
            np.testing.assert_allclose(few, features[:batch], rtol=0, atol=4 * np.finfo(dtype).eps)
            np.testing.assert_allclose(few_grad_x, grad_x[:batch], rtol=0, atol=32 * np.finfo(dtype).eps)


def runs_here(isa: str) -> bool:
    """Whether the core offers an instruction set on this machine, from the error that names those it does."""
    code = "import qaa; print(qaa._core.instruction_set())"
    environment = {**os.environ, "QAA_ISA": isa}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return result.returncode == 0 and result.stdout.strip() == isa


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "neon"])
def test_every_instruction_set_of_this_machine(isa: str) -> None:
    if not runs_here(isa):
        pytest.skip(f"this machine or build has no {isa}")
    code = "import qaa, test_kernels; print(qaa._core.instruction_set(), test_kernels.sweep())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "QAA_ISA": isa},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == [isa, "120"]


def test_the_machines_instruction_sets_are_found() -> None:
    """Skipping a path must not be silent: what NumPy finds on this processor, the core must run."""
    features = np._core._multiarray_umath.__cpu_features__  # type: ignore[attr-defined]
    wanted = ["baseline"]
    wanted += ["avx2"] if features.get("AVX2") and features.get("FMA3") else []
    wanted += ["avx512"] if features.get("AVX512_SKX") else []
    wanted += ["neon"] if features.get("ASIMD") else []
    assert [isa for isa in wanted if not runs_here(isa)] == []


def test_an_unknown_instruction_set_is_an_error_that_names_the_known_ones() -> None:
    code = "import numpy, qaa; qaa.arrays.forward(qaa.ansatz('ring', 1), numpy.zeros((1, 1, 3)), numpy.ones((1, 2)))"
    environment = {**os.environ, "QAA_ISA": "mmx"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "expected QAA_ISA to be one of" in result.stderr and "received 'mmx'" in result.stderr


REWRITES = ("fuse", "rename", "absorb", "expand", "real", "tangent", "link")


@pytest.fixture
def switch_off(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Sequence[str]], None]]:
    """A function that switches rewrites of the plan compiler off; it forgets the plans that were made before."""

    def forget() -> None:
        for cached in (program._plan, program._program, program._parsed):
            cached.cache_clear()

    def switch(rewrites: Sequence[str]) -> None:
        monkeypatch.setenv("QAA_PLAN_WITHOUT", ",".join(rewrites))
        forget()

    yield switch
    forget()


# every subset without "link", which is about the readout alone and meets the others one by one and all at once
SUBSETS = [c for k in range(1, 8) for c in combinations(REWRITES, k) if "link" not in c or len(c) in (1, 2, 7)]


@pytest.mark.parametrize("without", SUBSETS, ids=",".join)
def test_every_rewrite_of_the_plan_can_be_switched_off(
    without: tuple[str, ...], switch_off: Callable[[Sequence[str]], None]
) -> None:
    """The same answers with any subset of the plan compiler's rewrites, so that each rewrite is proved by itself."""
    assert set(REWRITES) == set(program.REWRITES)
    switch_off(without)
    assert sweep(range(20, 28)) == 48


@pytest.mark.parametrize("rotate_radix", [1, 2, 3, 4])
def test_diagonals_behind_a_real_state_move_into_the_strings(
    rotate_radix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real gates, phases, real gates: strings of neighbours, in classes of one sign, imaginary, alone; all widths."""
    make = _core.Plan
    monkeypatch.setattr(_core, "Plan", lambda *args, **options: make(*args, rotate_radix=rotate_radix, **options))
    program._plan.cache_clear()
    rng = np.random.default_rng(18)
    real, phases = ("RY", "CNOT", "X", "SWAP", "H", "Z"), ("RZ", "PhaseShift", "CRZ", "S", "T", "CZ")
    for case in range(60):
        n = int(rng.integers(1, 9))
        gates, n_parameters = [], 0
        for names, count in ((real, 2 * n), (phases, int(rng.integers(1, 2 * n + 1))), (real[:4], 2 * n)):
            for name in rng.choice([name for name in names if GATES[name][0] <= n], count):
                wires, parameters = GATES[name]
                of_gate = tuple(range(n_parameters, n_parameters + parameters))
                gates.append(Gate(str(name), tuple(int(w) for w in rng.permutation(n)[:wires]), of_gate))
                n_parameters += parameters
        circuit = Circuit(n, tuple(gates), (n_parameters,))
        readout = "z" if case % 2 else readout_of("paulis", n, rng)
        for dtype in DTYPES:
            check(random_problem(rng, circuit, readout, batch=9), dtype)
    for n in range(1, 11):
        check(random_problem(rng, ansatz("ring", n), "z", batch=9), np.float32)
    program._plan.cache_clear()


@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("readout", ["z", "probs[:5]", "state[:5]"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_beyond_the_rows_end_are_left_out_and_nothing_is_missed(
    n_layers: int, readout: str, dtype: type
) -> None:
    """Rows of any width have the features and gradients of the same rows with zeros behind them."""
    rng = np.random.default_rng(19)
    for n, widths in ((3, range(1, 8)), (7, (1, 16, 17, 65, 100, 127)), (10, (1, 300, 513, 576, 768, 1009))):
        circuit = ansatz("ring", n, n_layers)
        for width in widths:
            for normalize in (True, False):
                problem = random_problem(rng, circuit, readout, batch=17, normalize=normalize)
                x = np.zeros_like(problem.x, shape=(17, 2**n))
                x[:, :width] = rng.standard_normal((17, width))
                padded = solve(cast(replace(problem, x=x), dtype))
                short = solve(cast(replace(problem, x=np.ascontiguousarray(x[:, :width])), dtype))
                scale = 1e-12 if dtype is np.float64 else 2e-5
                for a, b in zip(short, (*padded[:2], padded[2][:, :width]), strict=True):
                    np.testing.assert_allclose(a, b, rtol=0, atol=scale * max(1, np.abs(b).max()))


def test_rewrites_do_something(switch_off: Callable[[Sequence[str]], None]) -> None:
    """Switching one off is no empty gesture: the plan differs, or the roundings of a result do."""
    circuit = ansatz("ring", 3, 2)
    plans = {}
    for rewrite in ("", "fuse", "rename", "absorb"):
        switch_off([rewrite])
        plans[rewrite] = str(program.program(circuit, "z", True).plan)
        switch_off([rewrite])
        assert str(program.program(circuit, "z", True).plan) == plans[rewrite], "compiling is not deterministic"
    assert len(set(plans.values())) == 4
    switch_off(["expand"])
    assert "diagonal" in str(program.program(ansatz("ring", 3, 1), "z", True).plan)
    switch_off([])
    assert "diagonal" not in str(program.program(ansatz("ring", 3, 1), "z", True).plan)
    # tangents are chosen when the angles are known; "real" leaves out work on zeros, which no result shows
    problem = cast(random_problem(np.random.default_rng(17), ansatz("ring", 8), "z", batch=9), np.float32)
    switch_off([])
    with_all = solve(problem)[0]
    for rewrite in ("tangent", "link"):
        switch_off([rewrite])
        assert (solve(problem)[0] != with_all).any(), rewrite


def test_the_core_holds_the_same_gate_table() -> None:
    assert {name: tuple(counts) for name, *counts in _core.gate_table()} == GATES


def test_operations_are_counted_from_the_plan() -> None:
    """n = 10, d = 768, by hand, for one layer and for two: forward, backward with values of strings, reading them."""
    n, amplitudes, d = 10, 1024, 768
    tree = 2 * amplitudes + 3 * (amplitudes // 8 - 1)
    # The state stays real: norm, RY, <Z...Z>, <X...X>; then the same for the bra, RY's overlaps, RY undone, rows.
    forward, reading = d + n * amplitudes, tree + n * amplitudes // 2
    bra = 2 * amplitudes + n * amplitudes
    backward = forward + bra + 2 * n * amplitudes + 2 * d
    counted = program.program(ansatz("ring", n, 1), "z", True).plan.operations(d)
    assert counted == (forward + reading, backward, reading)
    # norm, RY, RZ, RY of a complex state, RZ, <Z...Z>, <X...X>
    forward = d + n * amplitudes + 2 * amplitudes + 2 * n * amplitudes + 4 * amplitudes
    reading = tree + 2 * amplitudes + n * amplitudes
    bra = 3 * amplitudes + 2 * n * amplitudes
    second = 4 * amplitudes + 2 * amplitudes + tree + 2 * 2 * n * amplitudes  # the ket is kept
    first = 6 * amplitudes + amplitudes + tree + 2 * n * amplitudes
    backward = forward + bra + second + first + 2 * d
    counted = program.program(ansatz("ring", n, 2), "z", True).plan.operations(d)
    assert counted == (forward + reading, backward, reading)
