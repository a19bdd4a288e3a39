"""Circuits in OpenQASM 3, Qiskit and PennyLane: the oracle's unitary on the way out, and the way back."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import oracle
from qaa import Circuit, Gate, ansatz
from qaa.circuit import ANSATZE, GATES
from strategies import circuits, random_angles, random_circuit

SEEDS = range(8)
ATOL = 1e-12  # products of some thirty matrices in float64


def case(seed: int) -> tuple[Circuit, NDArray[Any]]:
    """17 gates or more of the whole table on 1 to 5 wires."""
    rng = np.random.default_rng(seed)
    circuit = random_circuit(rng, 1 + seed % 5, int(rng.integers(17, 31)))
    return circuit, random_angles(rng, circuit.parameter_shape)


def flat(circuit: Circuit) -> Circuit:
    """What an exchange keeps: a flat theta, and Rot as three gates."""
    gates: list[Gate] = []
    for gate in circuit.gates:
        if gate.name == "Rot":
            gates += [Gate(n, gate.wires, (p,)) for n, p in zip(("RZ", "RY", "RZ"), gate.parameters, strict=True)]
        else:
            gates.append(gate)
    return Circuit(circuit.n_wires, tuple(gates), (circuit.n_parameters,))


def little_endian(matrix: NDArray[Any]) -> NDArray[Any]:
    """The matrix with the bits of its indices in reverse: Qiskit's qubit 0 is the least significant bit."""
    n = len(matrix).bit_length() - 1
    order = [int(format(i, f"0{n}b")[::-1], 2) for i in range(len(matrix))]
    return matrix[np.ix_(order, order)]


def test_the_cases_hold_every_gate() -> None:
    assert {gate.name for seed in SEEDS for gate in case(seed)[0].gates} == set(GATES)


# ------------------------------------------------------------------------------------------------ OpenQASM 3


@settings(max_examples=50)
@given(circuits(), st.randoms(use_true_random=False))
def test_a_program_comes_back(circuit: Circuit, random: Any) -> None:
    parsed, theta = Circuit.from_openqasm3(circuit.to_openqasm3())
    assert parsed == flat(circuit)
    assert np.isnan(theta).all()
    angles = np.array([random.uniform(-10, 10) * 10 ** random.randint(-12, 12) for _ in range(circuit.n_parameters)])
    bound, theta = Circuit.from_openqasm3(circuit.to_openqasm3(angles))
    used = [parameter for gate in flat(circuit).gates for parameter in gate.parameters]
    assert theta.tolist() == angles[used].tolist()
    assert [(gate.name, gate.wires) for gate in bound.gates] == [(g.name, g.wires) for g in flat(circuit).gates]


@pytest.mark.parametrize("seed", SEEDS)
def test_qiskit_reads_our_programs(seed: int) -> None:
    pytest.importorskip("qiskit_qasm3_import")
    qiskit = pytest.importorskip("qiskit")
    circuit, theta = case(seed)
    expected = little_endian(oracle.unitary(circuit, theta))
    from qiskit import qasm3
    from qiskit.quantum_info import Operator

    bound = qasm3.loads(circuit.to_openqasm3(theta))
    np.testing.assert_allclose(Operator(bound).data, expected, rtol=0, atol=ATOL)
    unbound = qasm3.loads(circuit.to_openqasm3())
    values = {p: np.ravel(theta)[int(p.name.split("_")[1])] for p in unbound.parameters}
    np.testing.assert_allclose(Operator(unbound.assign_parameters(values)).data, expected, rtol=0, atol=ATOL)
    assert isinstance(bound, qiskit.QuantumCircuit)


@pytest.mark.parametrize("seed", SEEDS)
def test_we_read_qiskits_programs(seed: int) -> None:
    """Gates of Qiskit's own choosing, among them those that become products here."""
    pytest.importorskip("qiskit")
    from qiskit import QuantumCircuit, qasm3
    from qiskit.quantum_info import Operator

    rng = np.random.default_rng(seed)
    theirs = QuantumCircuit(3)
    one = ["x", "y", "z", "h", "s", "sdg", "t", "tdg", "sx", "rx", "ry", "rz", "p"]
    for name in map(str, rng.permutation([*one, "cx", "cz", "swap", "crx", "cry", "crz"] * 2)):
        angles = [float(rng.choice([np.pi / 4, -3 * np.pi / 2, rng.normal()]))] if name[-1] in "xyzp" else []
        angles = angles if name in ("rx", "ry", "rz", "p", "crx", "cry", "crz") else []
        qubits = rng.choice(3, 1 if name in one else 2, replace=False)
        getattr(theirs, name)(*angles, *map(int, qubits))
    circuit, theta = Circuit.from_openqasm3(qasm3.dumps(theirs))
    expected = little_endian(Operator(theirs).data)
    np.testing.assert_allclose(oracle.unitary(circuit, theta), expected, rtol=0, atol=1e-9)  # it writes pi/4 for near


def test_the_reference_parser_reads_our_programs() -> None:
    openqasm3 = pytest.importorskip("openqasm3")
    circuit, theta = case(7)
    n_gates = len(flat(circuit).gates)
    for text, n_inputs in ((circuit.to_openqasm3(), circuit.n_parameters), (circuit.to_openqasm3(theta), 0)):
        statements = openqasm3.parse(text).statements
        kinds = [type(statement).__name__ for statement in statements]
        assert kinds == ["Include", *["IODeclaration"] * n_inputs, "QubitDeclaration", *["QuantumGate"] * n_gates]


def test_expressions_mean_what_python_means() -> None:
    expressions = [
        "pi/2",
        "-π",
        "+2*pi",
        "2*-3.5",
        "1-2-3",
        "8/2./2",
        "-2**2",
        "2**-1",
        "2**3**2",
        "(1+.5)*τ",
        "1_0.5e-1",
    ]
    text = "qubit q;" + "".join(f"rz({e}) q;" for e in expressions)
    _, theta = Circuit.from_openqasm3(text)
    names = {"pi": np.pi, "π": np.pi, "τ": 2 * np.pi}
    np.testing.assert_array_equal(theta, [eval(e, names) for e in expressions])


def test_registers_comments_inputs_and_whole_registers() -> None:
    text = """
        OPENQASM 3.1; // the version
        include 'stdgates.inc'; /* two
        lines */
        input float[32] α; input float b;
        qubit[2] q; qubit r;
        h q; u1(b) r; CX q[1], r; rx(α) q; phase(α) q[0]; sx r[0];
    """
    circuit, theta = Circuit.from_openqasm3(text)
    assert str(circuit) == (
        "wires 3; theta 2; H 0; H 1; PhaseShift 2 t1; CNOT 1 2; RX 0 t0; RX 1 t0; PhaseShift 0 t0; H 2; S 2; H 2"
    )
    assert np.isnan(theta).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("OPENQASM 2.0;", "line 1: expected version 3 of OpenQASM, received '2.0'"),
        ('include "qelib1.inc";', 'line 1: expected "stdgates.inc", received \'"qelib1.inc"\''),
        ("", "line 1: expected a qubit register, received the end of the text"),
        ("qubit q;\n\nmeasure q;", "line 3: expected a statement of the supported subset"),
        ("qubit q; gphase(1.0);", "received 'gphase'"),
        ("qubit q; ctrl @ x q;", "received 'ctrl'"),
        ("qubit q; @", "received '@'"),
        ("qubit[0] q;", "line 1: expected one qubit or more, in all at most 16, received '0'"),
        ("qubit[n] q;", "line 1: expected a number of qubits, received 'n'"),
        ("qubit q; qubit q;", "expected a name of a register that is not in use, received 'q'"),
        ("input angle a;", "expected 'float', received 'angle'"),
        ("input float pi;", "expected a name of an input that is not in use, received 'pi'"),
        ("qubit q; x r;", "expected a declared qubit register, received 'r'"),
        ("qubit[2] q; x q[2];", "expected an index below 2, received '2'"),
        ("qubit[2] q; x q[0:1];", "expected ']', received ':'"),
        ("qubit[2] q; cx q;", "expected '[' and the index of one qubit, received ';'"),
        ("qubit[2] q; cx q[0];", "expected ',', received ';'"),
        ("qubit[2] q; cx q[1], q[1];", "expected different qubits for cx, received one twice"),
        ("qubit q; x q", "line 1: expected ';', received the end of the text"),
        ("qubit q; x(1.0) q;", "expected a declared qubit register, received '('"),
        ("qubit q; rx q;", "expected '(', received 'q'"),
        ("qubit q; rx(1.0, 2.0) q;", "expected ')', received ','"),
        ("input float a; qubit q;\nrx(2*a) q;", "line 2: expected an angle that is one input or an expression"),
        ("input float a; qubit q; rx(a + 1) q;", "expected an angle that is one input or an expression"),
        ("qubit q; rx(sin(1.0)) q;", "received 'sin'"),
        ("qubit q; rx(1/2) q;", "line 1: expected '/' beside a real number, received 1/2"),
        ("qubit q; rx(1/0.0) q;", "line 1: expected an angle with a value"),
        ("qubit q; rx((-1)**0.5) q;", "line 1: expected an angle with a value"),
        ("qubit q; rx(1e400) q;", "line 1: expected a finite angle, received inf"),
        ("qubit q; rx(9.0**9**9) q;", "line 1: expected an angle with a value"),
        (f"qubit q; rx({'(' * 10**5}1{')' * 10**5}) q;", "line 1: expected an angle with a value"),
        ("qubit[9] q;\nqubit[9] r;", "line 2: expected one qubit or more, in all at most 16, received '9'"),
        ("qubit[16] q; qubit r;", "expected one qubit or more, in all at most 16, received 'r'"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Circuit.from_openqasm3(text)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=40) | st.lists(st.sampled_from(["qubit", "q", ";", "rx", "(", ")", "1", "[", "]", "pi", "/"])))
def test_no_text_raises_anything_but_a_sentence(text: str | list[str]) -> None:
    try:
        Circuit.from_openqasm3(text if isinstance(text, str) else " ".join(text))
    except ValueError as error:
        assert "expected" in str(error)


def test_wrong_angles_are_refused() -> None:
    circuit = ansatz("ring", 2)
    with pytest.raises(ValueError, match=re.escape("expected theta of shape (1, 2, 3), received (6,)")):
        circuit.to_openqasm3(np.zeros(6))
    with pytest.raises(ValueError, match="expected theta of finite angles, received nan"):
        circuit.to_openqasm3(np.full((1, 2, 3), np.nan))
    with pytest.raises(TypeError, match="expected OpenQASM 3 as a str, received bytes"):
        Circuit.from_openqasm3(b"")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(ANSATZE))
def test_ansaetze_come_back(name: str) -> None:
    circuit = ansatz(name, 4, 2)
    assert Circuit.from_openqasm3(circuit.to_openqasm3())[0] == flat(circuit)


# ------------------------------------------------------------------------------------------------ Qiskit


@pytest.mark.parametrize("seed", SEEDS)
def test_the_unitary_in_qiskit(seed: int) -> None:
    pytest.importorskip("qiskit")
    from qiskit.quantum_info import Operator

    circuit, theta = case(seed)
    expected = little_endian(oracle.unitary(circuit, theta))
    np.testing.assert_allclose(Operator(circuit.to_qiskit(theta)).data, expected, rtol=0, atol=ATOL)
    np.testing.assert_allclose(
        Operator(circuit.to_qiskit(theta).reverse_bits()).data, oracle.unitary(circuit, theta), rtol=0, atol=ATOL
    )
    unbound = circuit.to_qiskit()
    values = {parameter: np.ravel(theta)[parameter.index] for parameter in unbound.parameters}
    np.testing.assert_allclose(Operator(unbound.assign_parameters(values)).data, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("seed", SEEDS)
def test_there_and_back_through_qiskit(seed: int) -> None:
    """Its exporter writes our gates under the names that it read; angles near multiples of pi lose some digits."""
    pytest.importorskip("qiskit")
    from qiskit import qasm3

    circuit, theta = case(seed)
    back, angles = Circuit.from_openqasm3(qasm3.dumps(circuit.to_qiskit(theta)))
    assert [(gate.name, gate.wires) for gate in back.gates] == [(g.name, g.wires) for g in flat(circuit).gates]
    used = [parameter for gate in flat(circuit).gates for parameter in gate.parameters]
    np.testing.assert_allclose(angles, np.ravel(theta)[used], rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------------------ PennyLane


@pytest.mark.parametrize("seed", SEEDS)
def test_the_unitary_in_pennylane_and_back(seed: int) -> None:
    qml = pytest.importorskip("pennylane")
    circuit, theta = case(seed)
    operations = circuit.to_pennylane(theta)
    expected = oracle.unitary(circuit, theta)
    wires = range(circuit.n_wires)
    actual = qml.matrix(qml.tape.QuantumScript(operations), wire_order=wires)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ATOL)

    back, angles = Circuit.from_pennylane(qml.tape.QuantumScript(operations), wire_order=wires)
    assert [(gate.name, gate.wires) for gate in back.gates] == [(gate.name, gate.wires) for gate in circuit.gates]
    assert angles.tolist() == [np.ravel(theta)[p] for gate in circuit.gates for p in gate.parameters]


def test_recording_and_derivatives_in_pennylane() -> None:
    qml = pytest.importorskip("pennylane")
    import torch

    circuit = ansatz("ring", 3, 2)
    theta = torch.tensor(random_angles(np.random.default_rng(0), circuit.parameter_shape), requires_grad=True)

    @qml.qnode(qml.device("default.qubit", wires=3), interface="torch", diff_method="backprop")
    def expectation(theta: Any) -> Any:
        circuit.to_pennylane(theta)
        return qml.expval(qml.Z(1))

    value = expectation(theta)
    value.backward()
    x, grad = np.eye(1, 8), np.array([[0.0, 1.0, 0.0]])
    np.testing.assert_allclose(value.item(), oracle.features(circuit, theta.detach().numpy(), x)[0, 1], atol=ATOL)
    np.testing.assert_allclose(theta.grad, oracle.vjp(circuit, theta.detach().numpy(), x, grad)[0], atol=ATOL)


def test_operations_of_pennylanes_own() -> None:
    """Templates and gates that are no gates here: the same unitary up to what a decomposition may change, the phase."""
    qml = pytest.importorskip("pennylane")
    rng = np.random.default_rng(1)
    weights = rng.normal(size=qml.StronglyEntanglingLayers.shape(n_layers=2, n_wires=3))
    operations = [
        qml.StronglyEntanglingLayers(weights, wires=[0, 1, 2]),
        qml.Toffoli([2, 0, 1]),
        qml.adjoint(qml.T(0)),
        qml.SX(1),
        qml.U1(0.3, 2),
        qml.IsingXX(0.7, [0, 2]),
        qml.ControlledPhaseShift(0.4, [1, 2]),
    ]
    tape = qml.tape.QuantumScript(operations, [qml.expval(qml.Z(0))])
    circuit, theta = Circuit.from_pennylane(tape)
    expected = qml.matrix(tape, wire_order=[0, 1, 2])
    overlap = np.trace(expected.conj().T @ oracle.unitary(circuit, theta)) / 8
    assert abs(overlap) == pytest.approx(1, abs=ATOL)


def test_wires_of_pennylane() -> None:
    qml = pytest.importorskip("pennylane")
    script = qml.tape.QuantumScript
    assert str(Circuit.from_pennylane(script([qml.CNOT([3, 1])]))[0]) == "wires 4; theta 0; CNOT 3 1"
    assert str(Circuit.from_pennylane(script([qml.CNOT(["b", "a"])]))[0]) == "wires 2; theta 0; CNOT 0 1"
    named = Circuit.from_pennylane(script([qml.CNOT(["b", "a"])]), wire_order=["a", "b", "c"])[0]
    assert str(named) == "wires 3; theta 0; CNOT 1 0"
    with pytest.raises(ValueError, match=re.escape("expected wires among ['a'], received CNOT on 'b'")):
        Circuit.from_pennylane(script([qml.CNOT(["b", "a"])]), wire_order=["a"])
    with pytest.raises(ValueError, match="expected operations on at least one wire, received none"):
        Circuit.from_pennylane(script([]))


def test_what_pennylane_has_and_we_have_not() -> None:
    qml = pytest.importorskip("pennylane")
    script = qml.tape.QuantumScript
    for operation in (qml.StatePrep(np.eye(1, 4)[0], [0, 1]), qml.AmplitudeEmbedding(np.eye(1, 4)[0], [0, 1])):
        with pytest.raises(ValueError, match=f"expected operations that .* received {operation.name}"):
            Circuit.from_pennylane(script([operation]))
    with pytest.raises(ValueError, match="received DepolarizingChannel"):
        Circuit.from_pennylane(script([qml.DepolarizingChannel(0.1, 0)]))
    with pytest.raises(ValueError, match=re.escape("expected one number per angle, received RX with (2,)")):
        Circuit.from_pennylane(script([qml.RX([0.1, 0.2], 0)]))
    with pytest.raises(TypeError, match="expected a pennylane QuantumScript or QuantumTape, received list"):
        Circuit.from_pennylane([qml.X(0)])
    with pytest.raises(ValueError, match=re.escape("expected theta of shape (1, 2), received (2,)")):
        ansatz("basic_entangler", 2).to_pennylane(np.zeros(2))


@pytest.mark.parametrize("package", ["qiskit", "pennylane"])
def test_a_missing_package_is_one_sentence(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    circuit = ansatz("ring", 2)
    with pytest.raises(ImportError, match=f"expected {package} to be installed .pip install {package}., received"):
        getattr(circuit, f"to_{package}")(np.zeros(circuit.parameter_shape))
