"""Drawings: every gate is there, in an order that means the same."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings

import oracle
from qaa import Circuit, Gate, ansatz
from qaa.circuit import GATES
from qaa.drawing import columns
from strategies import circuits, random_angles, random_circuit

SVG = "{http://www.w3.org/2000/svg}"

EVERY_GATE = Circuit(
    4,
    (
        *(Gate(name, wire % 4) for wire, name in enumerate("XYZHST")),
        Gate("RX", 0, 0),
        Gate("RY", 1, 1),
        Gate("RZ", 2, 2),
        Gate("PhaseShift", 3, 3),
        Gate("Rot", 2, (0, 1, 5)),
        Gate("CNOT", (3, 0)),
        Gate("CZ", (1, 2)),
        Gate("SWAP", (2, 0)),
        Gate("CRX", (0, 1), 0),
        Gate("CRY", (3, 2), 1),
        Gate("CRZ", (2, 0), 2),
    ),
    (2, 3),
)

EXPECTED = """\
0: ─X─────────S──────────────────RX(θ[0,0])────────⊕───×─────●──────RZ(θ[0,2])─
                                                   │   │     │          │
1: ─Y─────────T──────────────────RY(θ[0,1])────────┼─●─┼─RX(θ[0,0])─────┼──────
                                                   │ │ │                │
2: ─Z─────RZ(θ[0,2])─────Rot(θ[0,0],θ[0,1],θ[1,2])─┼─●─×─RY(θ[0,1])─────●──────
                                                   │         │
3: ─H─PhaseShift(θ[1,0])───────────────────────────●─────────●─────────────────"""


def test_the_text_of_every_gate() -> None:
    assert {gate.name for gate in EVERY_GATE.gates} == set(GATES)
    assert EVERY_GATE.draw() == EXPECTED
    assert EVERY_GATE.draw() == Circuit.parse(str(EVERY_GATE)).draw("text")


@settings(max_examples=50)
@given(circuits(max_wires=4))
def test_columns_are_the_same_circuit(circuit: Circuit) -> None:
    placed = columns(circuit)
    for column in placed:
        spans = [set(range(min(gate.wires), max(gate.wires) + 1)) for gate in column]
        assert sum(map(len, spans)) == len(set().union(*spans))
    again = Circuit(circuit.n_wires, tuple(gate for column in placed for gate in column), circuit.parameter_shape)
    theta = random_angles(np.random.default_rng(0), circuit.parameter_shape)
    np.testing.assert_allclose(oracle.unitary(again, theta), oracle.unitary(circuit, theta), rtol=0, atol=1e-12)


@settings(max_examples=50)
@given(circuits())
def test_text_has_a_row_for_each_wire_and_all_names(circuit: Circuit) -> None:
    lines = circuit.draw().split("\n")
    rows = lines[::2]
    assert len(lines) == 2 * circuit.n_wires - 1
    assert len(set(map(len, rows))) == 1
    assert [row.split(":")[0] for row in rows] == [str(wire) for wire in range(circuit.n_wires)]
    drawn = re.findall(r"[A-Za-z]+|[●⊕×]", "".join(row.split(":")[1] for row in rows))
    symbols = {"CNOT": "●⊕", "CZ": "●●", "SWAP": "××"}
    expected: list[str] = []
    for gate in circuit.gates:
        expected += symbols.get(gate.name, ["●", gate.name[1:]] if len(gate.wires) == 2 else [gate.name])
    assert sorted(drawn) == sorted(expected)


@settings(max_examples=20)
@given(circuits())
def test_svg_is_one_image_that_asks_for_nothing(circuit: Circuit) -> None:
    text = circuit.draw("svg")
    root = ElementTree.fromstring(text)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    gates = root.findall(f"{SVG}g")
    assert sorted(g.find(f"{SVG}title").text.split()[0] for g in gates) == sorted(g.name for g in circuit.gates)  # type: ignore[union-attr]
    assert re.findall(r"(?:href|url|src|@import|script)", text) == []
    for box in root.iter(f"{SVG}rect"):
        left, top = float(box.get("x", 0)), float(box.get("y", 0))
        assert left >= 0 and top >= 0
        assert left + float(box.attrib["width"]) <= width and top + float(box.attrib["height"]) <= height
    assert text == Circuit.parse(str(circuit)).draw("svg")


def test_svg_names_angles_by_their_index() -> None:
    text = ansatz("ring", 2, 2).draw("svg")
    assert re.findall(r"θ\[\d,\d,\d\]", text)[-1] == "θ[1,1,2]"
    assert len(set(re.findall(r"θ\[[\d,]+\]", text))) == 12
    deep = random_circuit(np.random.default_rng(0), 16, 60)
    ElementTree.fromstring(deep.draw("svg"))


def test_other_outputs_are_refused() -> None:
    with pytest.raises(ValueError, match="expected output 'text' or 'svg', received 'png'"):
        ansatz("ring", 2).draw("png")
