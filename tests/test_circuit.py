"""Circuits and readouts as plain data: text round trips, messages, and ansätze that are what they say."""

from __future__ import annotations

import inspect
import pickle
from functools import reduce
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracle
from qaa.circuit import ANSATZE, GATES, MAX_WIRES, Circuit, Gate, Readout, ansatz
from strategies import circuits, readouts

# --------------------------------------------------------------------------------------------------------- text


@given(circuits())
def test_a_circuit_prints_as_text_that_parses_back(circuit: Circuit) -> None:
    assert Circuit.parse(str(circuit)) == circuit


@pytest.mark.parametrize("name", ANSATZE)
@pytest.mark.parametrize("n_wires", range(1, MAX_WIRES + 1))
def test_every_ansatz_prints_as_text_that_parses_back(name: str, n_wires: int) -> None:
    circuit = ansatz(name, n_wires, 2)
    assert Circuit.parse(str(circuit)) == circuit


@given(circuits())
def test_the_adjoint_of_a_circuit_is_its_inverse(circuit: Circuit) -> None:
    theta = np.random.default_rng(0).uniform(-np.pi, np.pi, circuit.parameter_shape)
    product = oracle.unitary(circuit.adjoint(), -theta) @ oracle.unitary(circuit, theta)
    np.testing.assert_allclose(product, np.eye(2**circuit.n_wires), atol=1e-13)
    assert circuit.adjoint().parameter_shape == circuit.parameter_shape


@given(circuits())
def test_circuits_are_values(circuit: Circuit) -> None:
    twin = Circuit(circuit.n_wires, list(circuit.gates), circuit.parameter_shape)  # type: ignore[arg-type]
    assert twin == circuit and hash(twin) == hash(circuit)
    assert pickle.loads(pickle.dumps(circuit)) == circuit
    with pytest.raises(AttributeError):
        circuit.n_wires = 3  # type: ignore[misc]


@given(st.data(), st.integers(1, 6))
def test_a_readout_prints_as_text_that_names_it(data: st.DataObject, n_wires: int) -> None:
    readout = data.draw(readouts(n_wires))
    text = str(readout)
    assert Readout.parse(text.split(",") if readout.kind == "expval" else text, n_wires) == readout
    assert Readout.parse(readout, n_wires) == readout


def test_a_scalar_theta_and_a_circuit_without_gates() -> None:
    assert Circuit(1, (), ()).n_parameters == 1
    assert Circuit(3, (), (0,)).n_parameters == 0
    for circuit in (Circuit(1, (), ()), Circuit(3, (), (0,)), Circuit(2, (Gate("RX", (1,), (0,)),), ())):
        assert Circuit.parse(str(circuit)) == circuit


def test_integers_of_other_libraries_become_plain_integers() -> None:
    gate = Gate("CRX", np.array([2, 0]), (np.int64(5),))  # type: ignore[arg-type]
    assert gate == Gate("CRX", (2, 0), (5,))
    assert all(type(i) is int for i in (*gate.wires, *gate.parameters))


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", GATES)
def test_every_gate_counts_its_wires_and_parameters(name: str) -> None:
    n_wires, n_parameters = GATES[name]
    wires, parameters = tuple(range(n_wires)), tuple(range(n_parameters))
    assert Gate(name, wires, parameters).name == name
    with pytest.raises(ValueError, match=rf"expected {n_wires} wire.*for {name}, received {n_wires + 1}"):
        Gate(name, (*wires, 7), parameters)
    with pytest.raises(
        ValueError, match=rf"expected {n_parameters} parameter.*for {name}, received {n_parameters + 1}"
    ):
        Gate(name, wires, (*parameters, 7))
    if n_wires == 2:
        with pytest.raises(ValueError, match=rf"expected different wires for {name}, received \(3, 3\)"):
            Gate(name, (3, 3), parameters)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gate("CCX", (0, 1)), r"expected a gate among X, .*received 'CCX'"),
        (lambda: Gate("X", (-1,)), r"expected wires to be integers of at least 0, received -1"),
        (lambda: Gate("X", cast(Any, (0.5,))), r"expected wires to be integers of at least 0, received 0\.5"),
        (lambda: Gate("X", (True,)), r"expected wires to be integers of at least 0, received True"),
        (lambda: Gate("RX", (0,), (-2,)), r"expected parameters to be integers of at least 0, received -2"),
        (lambda: Circuit(0, (), (1,)), r"expected n_wires to be an integer from 1 to 16, received 0"),
        (lambda: Circuit(17, (), (1,)), r"expected n_wires to be an integer from 1 to 16, received 17"),
        (lambda: Circuit(cast(Any, 2.0), (), (1,)), r"expected n_wires to be an integer from 1 to 16, received 2\.0"),
        (lambda: Circuit(True, (), (1,)), r"expected n_wires to be an integer from 1 to 16, received True"),
        (lambda: Circuit(2, (Gate("X", (2,)),), (1,)), r"expected wires below n_wires=2, received X on \(2,\)"),
        (lambda: Circuit(2, (Gate("CZ", (0, 5)),), (1,)), r"expected wires below n_wires=2, received CZ on \(0, 5\)"),
        (
            lambda: Circuit(2, (Gate("RX", (0,), (6,)),), (2, 3)),
            r"expected parameter indices below 6 \(theta of shape \(2, 3\)\), received RX with \(6,\)",
        ),
        (lambda: Circuit(2, (), (-1,)), r"expected parameter_shape to be integers of at least 0, received -1"),
        (lambda: Circuit.parse(""), r"expected 'wires N; theta SHAPE; GATE \.\.\.', received ''"),
        (lambda: Circuit.parse("wires 2"), r"expected 'wires N; theta SHAPE; GATE \.\.\.', received 'wires 2'"),
        (lambda: Circuit.parse("qubits 2; theta 1"), r"expected 'wires N;.*received 'qubits 2; theta 1'"),
        (lambda: Circuit.parse("wires two; theta 1"), r"expected 'wires N;.*received 'wires two; theta 1'.*two"),
        (lambda: Circuit.parse("wires 2; theta 1; FOO 0"), r"expected 'wires N;.*FOO"),
        (lambda: Circuit.parse("wires 2; theta 1; RX 0 t"), r"expected 'wires N;"),
        (lambda: Circuit.parse("wires 2; theta 1; "), r"expected 'wires N;"),
        (lambda: ansatz("rings", 3), r"expected an ansatz among ring, .*received 'rings'"),
        (lambda: ansatz("ring", 0), r"expected n_wires to be an integer from 1 to 16, received 0"),
        (lambda: ansatz("ring", 17), r"expected n_wires to be an integer from 1 to 16, received 17"),
        (lambda: ansatz("ring", 3, 0), r"expected n_layers to be an integer from 1 to 10000, received 0"),
        (
            lambda: ansatz("ring", 1) and ansatz("ring", True),
            r"expected n_wires to be an integer from 1 to 16, received True",
        ),
        (lambda: ansatz("ring", 3, 1.5), r"expected n_layers to be an integer from 1 to 10000, received 1\.5"),
        (
            lambda: ansatz("ring", 3, 2) and ansatz("ring", 3, 2.0),
            r"expected n_layers to be an integer from 1 to 10000, received 2\.0",
        ),
        (lambda: Readout.parse("x", 3), r"expected a readout 'z', 'probs', .*received 'x'"),
        (lambda: Readout.parse("probs[3]", 3), r"expected a readout 'z', 'probs', .*received 'probs\[3\]'"),
        (lambda: Readout.parse("probs[:9]", 3), r"expected between 1 and 8 outputs for readout 'probs'.*received 9"),
        (lambda: Readout.parse("state[:0]", 3), r"expected between 1 and 8 outputs for readout 'state'.*received 0"),
        (lambda: Readout.parse([], 3), r"expected at least one Pauli string in the readout, received none"),
        (lambda: Readout.parse(["ZZ"], 3), r"expected Pauli strings of 3 letters from I, X, Y, Z, received 'ZZ'"),
        (lambda: Readout.parse(["ZZA"], 3), r"expected Pauli strings of 3 letters from I, X, Y, Z, received 'ZZA'"),
        (lambda: Readout.parse(cast(Any, [3]), 3), r"expected Pauli strings of 3 letters from I, X, Y, Z, received 3"),
        (
            lambda: Readout.parse(Readout.parse("z", 2), 3),
            r"expected Pauli strings of 3 letters from I, X, Y, Z, received 'ZI'",
        ),
        (
            lambda: Readout.parse(Readout("probs", 8), 2),
            r"expected between 1 and 4 outputs for readout 'probs' on 2 wires, received 8",
        ),
        (lambda: Readout.parse(Readout("purity", 1), 2), r"expected .*readout.*received.*'purity'"),
        (lambda: Readout.parse(Readout("expval", 3, ("ZI",)), 2), r"expected .*received"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_bad_input_is_one_sentence_that_says_what_was_expected_and_received(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_things_of_the_wrong_type_are_type_errors() -> None:
    with pytest.raises(TypeError, match=r"expected gates to be qaa\.Gate, received str: 'X 0'"):
        Circuit(2, ("X 0",), (1,))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected a readout as a string or a list of Pauli strings, received int"):
        Readout.parse(3, 2)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------- ansätze


@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("n_wires", range(1, 6))
@pytest.mark.parametrize("name", ["basic_entangler", "strongly_entangling"])
def test_templates_equal_pennylanes(name: str, n_wires: int, n_layers: int) -> None:
    qml = pytest.importorskip("pennylane")
    template = {"basic_entangler": qml.BasicEntanglerLayers, "strongly_entangling": qml.StronglyEntanglingLayers}[name]
    circuit = ansatz(name, n_wires, n_layers)
    theta = np.random.default_rng(n_wires).uniform(-4, 4, circuit.parameter_shape)
    assert circuit.parameter_shape == template.shape(n_layers=n_layers, n_wires=n_wires)
    expected = qml.matrix(template, wire_order=range(n_wires))(theta, wires=range(n_wires))
    np.testing.assert_allclose(oracle.unitary(circuit, theta), expected, atol=1e-13)


@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("n_wires", range(1, 5))
def test_ring_is_its_formula(n_wires: int, n_layers: int) -> None:
    """RY and RZ on every wire, CNOT 0→1, 1→2, …, n-1→0, RY on every wire, written out with Kronecker products."""
    circuit = ansatz("ring", n_wires, n_layers)
    theta = np.random.default_rng(n_wires).uniform(-4, 4, (n_layers, n_wires, 3))
    assert circuit.parameter_shape == theta.shape

    def everywhere(name: str, angles: np.ndarray) -> np.ndarray:
        return reduce(np.kron, [oracle.gate_matrix(name, [angle]) for angle in angles])

    expected = np.eye(2**n_wires)
    for layer in theta:
        expected = everywhere("RZ", layer[:, 1]) @ everywhere("RY", layer[:, 0]) @ expected
        if n_wires > 1:
            for control in range(n_wires):
                wires = (control, (control + 1) % n_wires)
                expected = oracle.embed(oracle.FIXED["CNOT"], wires, n_wires) @ expected
        expected = everywhere("RY", layer[:, 2]) @ expected
    np.testing.assert_allclose(oracle.unitary(circuit, theta), expected, atol=1e-13)


def test_brick_is_its_list_of_gates() -> None:
    assert str(ansatz("brick", 4, 1)) == (
        "wires 4; theta 1x4x2; RY 0 t0; RY 1 t2; RY 2 t4; RY 3 t6; CZ 0 1; CZ 2 3; "
        "RY 0 t1; RY 1 t3; RY 2 t5; RY 3 t7; CZ 1 2"
    )


@pytest.mark.parametrize("n_layers", [1, 4])
@pytest.mark.parametrize("n_wires", range(1, 11))
@pytest.mark.parametrize("name", ANSATZE)
def test_every_parameter_of_an_ansatz_is_used_once(name: str, n_wires: int, n_layers: int) -> None:
    circuit = ansatz(name, n_wires, n_layers)
    used = [p for gate in circuit.gates for p in gate.parameters]
    assert sorted(used) == list(range(circuit.n_parameters))


def test_a_readout_of_a_list_of_strings_is_that_of_a_tuple() -> None:
    readout = Readout("expval", 2, ["ZI", "IZ"])  # type: ignore[arg-type]
    assert readout == Readout.parse("z", 2) and hash(readout) == hash(Readout.parse("z", 2))


def test_the_gate_table_is_known_to_the_oracle() -> None:
    for name, (n_wires, n_parameters) in GATES.items():
        assert oracle.gate_matrix(name, [0.1] * n_parameters).shape == (2**n_wires,) * 2


def test_public_names_carry_docstrings() -> None:
    for thing in (Gate, Circuit, Circuit.parse, Readout, Readout.parse, ansatz):
        assert inspect.getdoc(thing)
