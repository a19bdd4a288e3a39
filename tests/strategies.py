"""Random circuits, readouts and inputs: seeded for plain tests, drawn by hypothesis for properties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from qaa.circuit import GATES, Circuit, Gate, Readout

Array = NDArray[Any]


@dataclass(frozen=True)
class Problem:
    """One call of the library: everything that ``forward`` and ``backward`` take, in float64."""

    circuit: Circuit
    theta: Array
    x: Array
    grad: Array
    readout: Readout
    normalize: bool

    def __str__(self) -> str:
        return f"{self.circuit} | {self.readout} | x {self.x.shape} | normalize={self.normalize}"


def random_circuit(rng: np.random.Generator, n_wires: int, n_gates: int, n_parameters: int = 8) -> Circuit:
    """Gates drawn evenly from the whole table; angles drawn from few parameters, so that some are shared, some unused.

    The first gates walk through a random order of the table: 17 gates or more contain each gate that fits.
    """
    names = [name for name in GATES if GATES[name][0] <= n_wires]
    order = [*rng.permutation(names), *rng.choice(names, n_gates)][:n_gates]
    gates = []
    for name in map(str, order):
        gate_wires, gate_parameters = GATES[name]
        wires = rng.choice(n_wires, gate_wires, replace=False)
        parameters = rng.integers(0, n_parameters, gate_parameters)
        gates.append(Gate(name, tuple(map(int, wires)), tuple(map(int, parameters))))
    shape = (2, n_parameters // 2) if n_parameters % 2 == 0 and rng.random() < 0.5 else (n_parameters,)
    return Circuit(n_wires, tuple(gates), shape)


def random_readout(rng: np.random.Generator, n_wires: int) -> Readout:
    """Any of the readouts; Pauli lists hold the identity and one string twice now and then."""
    kind = rng.choice(["z", "paulis", "probs", "state"])
    if kind == "z":
        return Readout.parse("z", n_wires)
    if kind == "paulis":
        strings = ["".join(rng.choice(list("IXYZ"), n_wires)) for _ in range(rng.integers(1, 2 * n_wires + 3))]
        if rng.random() < 0.5:
            strings += ["I" * n_wires, strings[0]]
        return Readout.parse(strings, n_wires)
    n_outputs = 2**n_wires if rng.random() < 0.5 else int(rng.integers(1, 2**n_wires + 1))
    return Readout(str(kind), n_outputs)


def random_grad(rng: np.random.Generator, readout: Readout, batch: int) -> Array:
    """A gradient at the features: complex for the state readout."""
    shape = (batch, readout.n_outputs)
    if readout.kind == "state":
        return rng.normal(size=shape) + 1j * rng.normal(size=shape)
    return rng.normal(size=shape)


def random_angles(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Angles over four turns, a third of them at multiples of a quarter turn, where rotations degenerate."""
    angles = rng.uniform(-4 * np.pi, 4 * np.pi, shape)
    special = rng.integers(-4, 5, shape) * (np.pi / 2)
    return np.where(rng.random(shape) < 1 / 3, special, angles)


def random_problem(
    rng: np.random.Generator,
    circuit: Circuit,
    readout: str | Sequence[str] | Readout | None = None,
    *,
    batch: int = 5,
    d: int | None = None,
    normalize: bool | None = None,
) -> Problem:
    """Normally distributed rows of random width ``d`` (more than half of the amplitudes) unless told otherwise."""
    n = circuit.n_wires
    d = int(rng.integers(2**n // 2 + (n > 1), 2**n + 1)) if d is None else d
    chosen = random_readout(rng, n) if readout is None else Readout.parse(readout, n)
    return Problem(
        circuit=circuit,
        theta=random_angles(rng, circuit.parameter_shape),
        x=rng.normal(size=(batch, d)),
        grad=random_grad(rng, chosen, batch),
        readout=chosen,
        normalize=bool(rng.integers(2)) if normalize is None else normalize,
    )


# --------------------------------------------------------------------------------------------------- hypothesis


@st.composite
def circuits(draw: st.DrawFn, max_wires: int = 6, max_gates: int = 24) -> Circuit:
    """Circuits over the whole gate table that shrink to few gates on few wires."""
    n_wires = draw(st.integers(1, max_wires))
    n_parameters = draw(st.integers(1, 6))
    names = st.sampled_from([name for name in GATES if GATES[name][0] <= n_wires])

    def gates(name: str) -> st.SearchStrategy[Gate]:
        gate_wires, gate_parameters = GATES[name]
        wires = st.permutations(range(n_wires)).map(lambda order: tuple(order[:gate_wires]))
        parameters = st.tuples(*[st.integers(0, n_parameters - 1)] * gate_parameters)
        return st.builds(Gate, st.just(name), wires, parameters)

    return Circuit(n_wires, tuple(draw(st.lists(names.flatmap(gates), max_size=max_gates))), (n_parameters,))


@st.composite
def readouts(draw: st.DrawFn, n_wires: int) -> Readout:
    """Readouts for ``n_wires`` wires; Pauli lists may repeat strings and hold the identity."""
    strings = st.text("IXYZ", min_size=n_wires, max_size=n_wires)
    kind = draw(st.sampled_from(["expval", "probs", "state"]))
    if kind == "expval":
        return Readout.parse(draw(st.lists(strings, min_size=1, max_size=6)), n_wires)
    return Readout(kind, draw(st.integers(1, 2**n_wires)))


@st.composite
def problems(draw: st.DrawFn, max_wires: int = 6, max_gates: int = 24, max_batch: int = 20) -> Problem:
    """Whole calls: structure is drawn (and shrinks), numbers come from one drawn seed."""
    circuit = draw(circuits(max_wires, max_gates))
    readout = draw(readouts(circuit.n_wires))
    return random_problem(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        circuit,
        readout,
        batch=draw(st.integers(1, max_batch)),
        d=draw(st.integers(1, 2**circuit.n_wires)),
        normalize=draw(st.booleans()),
    )
