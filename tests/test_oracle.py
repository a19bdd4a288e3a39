"""The oracle itself: textbook matrices, analytic states, finite differences, parameter shifts and PennyLane."""

from __future__ import annotations

from functools import reduce
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings

import oracle
from qaa.circuit import GATES, Circuit, Gate, Readout, ansatz
from strategies import Problem, problems, random_circuit, random_problem

PARAMETRIC = [name for name, (_, n_parameters) in GATES.items() if n_parameters]
ANGLES = [0.7, -1.9, 2.6]


def one_gate(name: str, n_wires: int, wires: tuple[int, ...]) -> Circuit:
    n_parameters = GATES[name][1]
    return Circuit(n_wires, (Gate(name, wires, tuple(range(n_parameters))),), (n_parameters,))


# ------------------------------------------------------------------------------------------------------- gates


@pytest.mark.parametrize("name", GATES)
def test_every_gate_has_a_unitary_matrix_of_its_size(name: str) -> None:
    n_wires, n_parameters = GATES[name]
    matrix = oracle.gate_matrix(name, ANGLES[:n_parameters])
    assert matrix.shape == (2**n_wires, 2**n_wires)
    np.testing.assert_allclose(matrix @ matrix.conj().T, np.eye(2**n_wires), atol=1e-15)


@pytest.mark.parametrize("name", GATES)
def test_every_gate_has_pennylanes_matrix(name: str) -> None:
    qml = pytest.importorskip("pennylane")
    names = {"X": "PauliX", "Y": "PauliY", "Z": "PauliZ", "H": "Hadamard"}
    n_wires, n_parameters = GATES[name]
    operation = getattr(qml, names.get(name, name))(*ANGLES[:n_parameters], wires=range(n_wires))
    np.testing.assert_allclose(oracle.gate_matrix(name, ANGLES[:n_parameters]), operation.matrix(), atol=1e-15)


@pytest.mark.parametrize("name", PARAMETRIC)
def test_derivatives_of_gates_are_their_difference_quotients(name: str) -> None:
    n_parameters, step = GATES[name][1], 1e-5
    for k in range(n_parameters):
        up, down = ANGLES[:n_parameters], ANGLES[:n_parameters]
        up[k] += step
        down[k] -= step
        quotient = (oracle.gate_matrix(name, up) - oracle.gate_matrix(name, down)) / (2 * step)
        np.testing.assert_allclose(oracle.gate_matrix(name, ANGLES[:n_parameters], k), quotient, atol=1e-10)


def test_relations_between_gates() -> None:
    m = oracle.gate_matrix
    np.testing.assert_allclose(m("T") @ m("T"), m("S"), atol=1e-15)
    np.testing.assert_allclose(m("S") @ m("S"), m("Z"), atol=1e-15)
    np.testing.assert_allclose(m("H") @ m("X") @ m("H"), m("Z"), atol=1e-15)
    np.testing.assert_allclose(m("X") @ m("Y"), 1j * m("Z"), atol=1e-15)
    np.testing.assert_allclose(m("PhaseShift", [np.pi / 4]), m("T"), atol=1e-15)
    np.testing.assert_allclose(m("RX", [np.pi]), -1j * m("X"), atol=1e-15)
    np.testing.assert_allclose(m("RY", [2 * np.pi]), -np.eye(2), atol=1e-15)
    np.testing.assert_allclose(m("Rot", ANGLES), m("RZ", [2.6]) @ m("RY", [-1.9]) @ m("RZ", [0.7]), atol=1e-15)
    np.testing.assert_allclose(m("CRX", [np.pi]) @ np.diag([1, 1, 1j, 1j]), m("CNOT"), atol=1e-15)


def test_an_unknown_gate_is_an_error() -> None:
    with pytest.raises(ValueError, match="CCX"):
        oracle.gate_matrix("CCX", [0.1])


@pytest.mark.parametrize("name", GATES)
def test_contracting_axes_equals_kronecker_products_on_any_wires(name: str) -> None:
    rng = np.random.default_rng(0)
    n_wires, n_parameters = GATES[name]
    matrix = oracle.gate_matrix(name, ANGLES[:n_parameters])
    states = rng.normal(size=(16, 3)) + 1j * rng.normal(size=(16, 3))
    for wires in permutations(range(4), n_wires):
        expected = oracle.embed(matrix, wires, 4) @ states
        np.testing.assert_allclose(oracle.apply(matrix, wires, states), expected, atol=1e-14)


def test_wire_0_is_the_most_significant_bit_and_the_control_comes_first() -> None:
    rows = np.eye(8)  # row b is the basis state |b>
    flipped = oracle.features(one_gate("X", 3, (0,)), np.zeros(0), rows, "state")
    np.testing.assert_array_equal(flipped.argmax(1), [b ^ 0b100 for b in range(8)])
    controlled = oracle.features(one_gate("CNOT", 3, (2, 0)), np.zeros(0), rows, "state")
    np.testing.assert_array_equal(controlled.argmax(1), [b ^ (0b100 if b & 0b001 else 0) for b in range(8)])
    z = oracle.features(Circuit(3, (), ()), np.zeros(()), rows, "z")
    np.testing.assert_array_equal(z[0b011], [1, -1, -1])


# ----------------------------------------------------------------------------------------------- analytic cases


def test_one_rotated_qubit() -> None:
    circuit = one_gate("RY", 1, (0,))
    for angle in np.linspace(-7, 7, 11):
        theta, x = np.array([angle]), np.array([[3.0]])
        paulis = ["X", "Y", "Z", "I"]
        expected = [[np.sin(angle), 0, np.cos(angle), 1]]
        np.testing.assert_allclose(oracle.features(circuit, theta, x, paulis), expected, atol=1e-15)
        grad_theta, grad_x = oracle.vjp(circuit, theta, x, np.array([[0.0, 0, 1, 0]]), paulis)
        np.testing.assert_allclose(grad_theta, [-np.sin(angle)], atol=1e-15)
        np.testing.assert_allclose(grad_x, [[0.0]], atol=1e-15)  # only the direction of x counts


def test_a_bell_pair() -> None:
    circuit = Circuit.parse("wires 2; theta 1; H 0; CNOT 0 1; RZ 0 t0")
    paulis = ["XX", "YY", "XY", "ZZ", "ZI", "IZ"]
    for phase in (0.0, 0.4, np.pi / 2):
        value = oracle.features(circuit, np.array([phase]), np.array([[2.0]]), paulis)
        c, s = np.cos(phase), np.sin(phase)
        np.testing.assert_allclose(value, [[c, -c, s, 1, 0, 0]], atol=1e-15)
    probabilities = oracle.features(circuit, np.array([0.3]), np.array([[2.0]]), "probs")
    np.testing.assert_allclose(probabilities, [[0.5, 0, 0, 0.5]], atol=1e-15)


def test_the_gradient_of_the_norm() -> None:
    """Without gates ``<Z>`` is ``(a^2 - b^2) / (a^2 + b^2)``, or its numerator without normalization."""
    circuit, (a, b) = Circuit(1, (), ()), (0.6, -1.7)
    x, grad, squared = np.array([[a, b]]), np.ones((1, 1)), a**2 + b**2
    _, grad_x = oracle.vjp(circuit, np.zeros(()), x, grad, "z")
    np.testing.assert_allclose(grad_x, [[4 * a * b**2 / squared**2, -4 * b * a**2 / squared**2]], atol=1e-15)
    _, grad_x = oracle.vjp(circuit, np.zeros(()), x, grad, "z", normalize=False)
    np.testing.assert_allclose(grad_x, [[2 * a, -2 * b]], atol=1e-15)


def test_zero_rows_are_no_states() -> None:
    circuit = ansatz("ring", 2)
    theta, x = np.full(circuit.parameter_shape, 0.3), np.zeros((2, 3))
    for readout in ("z", "probs", "state"):
        value = oracle.features(circuit, theta, x, readout)
        assert not value.any()
        grad_theta, grad_x = oracle.vjp(circuit, theta, x, np.ones_like(value), readout)
        assert not grad_theta.any() and not grad_x.any()


def test_extreme_rows_have_the_features_of_their_direction() -> None:
    circuit = ansatz("ring", 3)
    theta, x = np.full(circuit.parameter_shape, 0.3), np.arange(1.0, 9.0)[None]
    for scale in (1e-300, 1e300):
        expected = oracle.features(circuit, theta, x)
        np.testing.assert_allclose(oracle.features(circuit, theta, scale * x), expected, atol=1e-14)


# --------------------------------------------------------------------------------------------------- properties


def loss(problem: Problem, theta: np.ndarray, x: np.ndarray) -> float:
    """L with ``dL/dfeatures = grad`` (``dL/dRe + i dL/dIm`` for complex features)."""
    value = oracle.features(problem.circuit, theta, x, problem.readout, normalize=problem.normalize)
    return float(np.sum(problem.grad.conj() * value).real)


@settings(max_examples=60)
@given(problems(max_wires=4, max_gates=12, max_batch=3))
def test_gradients_are_difference_quotients(problem: Problem) -> None:
    """Along one random direction of (theta, x) at a time, with a five-point formula."""
    rng = np.random.default_rng(1)
    arguments = (problem.circuit, problem.theta, problem.x, problem.grad, problem.readout)
    grad_theta, grad_x = oracle.vjp(*arguments, normalize=problem.normalize)
    for move_theta, move_x in ((1, 0), (0, 1)):
        v = move_theta * rng.normal(size=problem.theta.shape)
        w = move_x * rng.normal(size=problem.x.shape)
        h = 1e-3 * min(1, float(np.min(oracle.norm(problem.x))))  # stay away from x = 0
        at = [loss(problem, problem.theta + k * h * v, problem.x + k * h * w) for k in (-2, -1, 1, 2)]
        quotient = (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h)
        derivative = np.sum(grad_theta * v) + np.sum(grad_x * w)
        scale = 1 + np.abs(problem.grad).sum() * (1 + (problem.x**2).sum()) / min(
            1, float(oracle.norm(problem.x).min())
        )
        assert abs(derivative - quotient) < 1e-8 * scale


@pytest.mark.parametrize("name", ["RX", "RY", "RZ", "PhaseShift"])
def test_gradients_are_parameter_shifts(name: str) -> None:
    """For these gates ``df/dt = (f(t + pi/2) - f(t - pi/2)) / 2`` exactly, whatever surrounds them."""
    rng = np.random.default_rng(2)
    for _ in range(5):
        around = random_circuit(rng, 3, 8)
        gates = tuple(Gate(g.name, g.wires, tuple(p + 1 for p in g.parameters)) for g in around.gates)
        gates = (*gates[:4], Gate(name, (1,), (0,)), *gates[4:])
        problem = random_problem(rng, Circuit(3, gates, (around.n_parameters + 1,)), ["XYZ", "ZIY"], normalize=True)
        grad_theta, _ = oracle.vjp(problem.circuit, problem.theta, problem.x, problem.grad, problem.readout)
        shift = np.zeros_like(problem.theta)
        shift[0] = np.pi / 2
        expected = (
            loss(problem, problem.theta + shift, problem.x) - loss(problem, problem.theta - shift, problem.x)
        ) / 2
        assert abs(grad_theta[0] - expected) < 1e-12


@settings(max_examples=40)
@given(problems(max_wires=5, max_gates=16, max_batch=3))
def test_features_are_those_of_the_dense_unitary(problem: Problem) -> None:
    u = oracle.unitary(problem.circuit, problem.theta)
    np.testing.assert_allclose(u @ u.conj().T, np.eye(len(u)), atol=1e-13)
    psi = np.zeros((len(problem.x), len(u)))
    psi[:, : problem.x.shape[1]] = problem.x
    if problem.normalize:
        psi /= np.linalg.norm(psi, axis=1, keepdims=True)
    phi = psi @ u.T
    k, readout = problem.readout.n_outputs, problem.readout
    if readout.kind == "expval":
        observables = [reduce(np.kron, [oracle.PAULI[letter] for letter in p]) for p in readout.paulis]
        expected = np.stack([np.einsum("bi,ij,bj->b", phi.conj(), m, phi).real for m in observables], axis=1)
    else:
        expected = phi[:, :k] if readout.kind == "state" else np.abs(phi[:, :k]) ** 2
    value = oracle.features(problem.circuit, problem.theta, problem.x, readout, normalize=problem.normalize)
    np.testing.assert_allclose(value, expected, atol=1e-12 * (1 + np.abs(expected).max()))


def test_a_shared_parameter_collects_the_derivatives_of_its_gates() -> None:
    shared = Circuit.parse("wires 2; theta 1; RX 0 t0; CRY 0 1 t0; Rot 1 t0 t0 t0")
    apart = Circuit.parse("wires 2; theta 5; RX 0 t0; CRY 0 1 t1; Rot 1 t2 t3 t4")
    rng = np.random.default_rng(3)
    x, grad = rng.normal(size=(4, 3)), rng.normal(size=(4, 2))
    together, _ = oracle.vjp(shared, np.array([0.8]), x, grad)
    separate, _ = oracle.vjp(apart, np.full(5, 0.8), x, grad)
    assert abs(together[0] - separate.sum()) < 1e-14


def test_single_precision_costs_single_precision() -> None:
    """``dtype=complex64`` really computes in float32: errors of its size, and not of another."""
    problem = random_problem(np.random.default_rng(4), ansatz("ring", 5, 2), "z", batch=16, normalize=True)
    exact = oracle.features(problem.circuit, problem.theta, problem.x, problem.readout)
    single = oracle.features(problem.circuit, problem.theta, problem.x, problem.readout, dtype=np.complex64)
    assert single.dtype == np.float32
    assert 1e-9 < np.abs(single - exact).max() < 1e-5


def test_pennylane_computes_the_same() -> None:
    bridge = pytest.importorskip("pennylane_bridge", exc_type=ImportError)
    rng = np.random.default_rng(5)
    for _ in range(40):
        n_wires = int(rng.integers(1, 6))
        problem = random_problem(rng, random_circuit(rng, n_wires, 18), batch=2)
        arguments = (problem.circuit, problem.theta, problem.x, problem.grad, problem.readout)
        value = oracle.features(*arguments[:3], problem.readout, normalize=problem.normalize)
        gradients = oracle.vjp(*arguments, normalize=problem.normalize)
        expected = bridge.features_and_gradients(*arguments, normalize=problem.normalize)
        for ours, theirs in zip((value, *gradients), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-11, err_msg=str(problem))


def test_an_unknown_readout_is_an_error() -> None:
    with pytest.raises(ValueError, match="purity"):
        oracle.read(Readout("purity", 1), np.ones((2, 1), complex))
