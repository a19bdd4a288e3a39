"""Parity with PennyLane (default.qubit, float64) to 1e-10: values and both gradients, on 200 circuits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qaa import arrays
from qaa.circuit import ANSATZE, GATES, ansatz
from strategies import Problem, random_circuit, random_problem

bridge = pytest.importorskip("pennylane_bridge", exc_type=ImportError)


def problem_number(index: int) -> Problem:
    """150 circuits of up to 30 gates from the whole table on 1 to 7 wires, then 50 ansätze of up to 3 layers."""
    rng = np.random.default_rng(index)
    if index < 150:
        n_wires = 1 + index % 7
        circuit = random_circuit(rng, n_wires, int(rng.integers(17, 31)), n_parameters=int(rng.integers(1, 13)))
    else:
        name = sorted(ANSATZE)[index % len(ANSATZE)]
        circuit = ansatz(name, int(rng.integers(1, 8)), int(rng.integers(1, 4)))
    return random_problem(rng, circuit, batch=3)


PROBLEMS = [problem_number(index) for index in range(200)]


@pytest.mark.parametrize("index", range(200))
def test_values_and_both_gradients(index: int) -> None:
    problem = PROBLEMS[index]
    arguments = (problem.circuit, problem.theta, problem.x)
    options: dict[str, Any] = {"normalize": problem.normalize}
    value = arrays.forward(*arguments, problem.readout, **options)
    gradients = arrays.backward(*arguments, problem.grad, problem.readout, **options)
    expected = bridge.features_and_gradients(*arguments, problem.grad, problem.readout, **options)
    for name, ours, theirs in zip(("features", "grad_theta", "grad_x"), (value, *gradients), expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10, err_msg=f"{name} of {problem}")


def test_the_200_circuits_cover_the_library() -> None:
    used = {gate.name for problem in PROBLEMS for gate in problem.circuit.gates}
    assert used == set(GATES)
    assert {(p.readout.kind, p.normalize) for p in PROBLEMS} == {
        (kind, normalize) for kind in ("expval", "probs", "state") for normalize in (True, False)
    }
    letters = {letter for p in PROBLEMS for string in p.readout.paulis for letter in string}
    assert letters == set("IXYZ")
    assert any(len(set(p.readout.paulis)) < len(p.readout.paulis) for p in PROBLEMS), "no repeated Pauli string"
    assert {p.circuit.n_wires for p in PROBLEMS} == set(range(1, 8))
    assert any(p.x.shape[1] not in (2**p.circuit.n_wires,) for p in PROBLEMS)
