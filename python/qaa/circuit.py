"""Circuits as plain data: gates on wires, ansätze, and what is read out at the end.

Nothing in this module computes a state. A :class:`Circuit` names gates, wires and the entries of the
parameter array ``theta`` that the gates use; a :class:`Readout` names what is measured. Both are immutable,
hashable and print themselves as text that parses back, so that they can travel through configuration files
and through compiled graphs.

Conventions (the same as PennyLane's): wire 0 is the most significant bit of an amplitude's index, angles are in
radians, and a rotation about the Pauli operator P is ``R_P(theta) = exp(-i theta P / 2)``.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

MAX_WIRES = 16
MAX_LAYERS = 10_000
MAX_PARAMETERS = 2**31 - 1  # entries of theta; the compiled core counts them in 32 bits

#: name -> (number of wires, number of parameters); the compiled core holds the same table and a test compares them.
GATES: dict[str, tuple[int, int]] = {
    "X": (1, 0),
    "Y": (1, 0),
    "Z": (1, 0),
    "H": (1, 0),
    "S": (1, 0),
    "T": (1, 0),
    "RX": (1, 1),
    "RY": (1, 1),
    "RZ": (1, 1),
    "PhaseShift": (1, 1),
    "Rot": (1, 3),
    "CNOT": (2, 0),
    "CZ": (2, 0),
    "SWAP": (2, 0),
    "CRX": (2, 1),
    "CRY": (2, 1),
    "CRZ": (2, 1),
}


@dataclass(frozen=True, slots=True)
class Gate:
    """One gate: its name, the wires it acts on, and the entries of ``theta.ravel()`` that are its angles.

    For a controlled gate the control wire comes first. Two gates may name the same entry of ``theta`` (a shared
    parameter); their derivatives then add up.

    Example:
        >>> Gate("CRX", wires=(0, 2), parameters=(5,))
        Gate(name='CRX', wires=(0, 2), parameters=(5,))
    """

    name: str
    wires: tuple[int, ...]
    parameters: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in GATES:
            raise ValueError(f"expected a gate among {', '.join(GATES)}, received {self.name!r}")
        object.__setattr__(self, "wires", _indices("wires", self.wires))
        object.__setattr__(self, "parameters", _indices("parameters", self.parameters))
        n_wires, n_parameters = GATES[self.name]
        if len(self.wires) != n_wires:
            raise ValueError(f"expected {n_wires} wire(s) for {self.name}, received {len(self.wires)}: {self.wires}")
        if len(set(self.wires)) != n_wires:
            raise ValueError(f"expected different wires for {self.name}, received {self.wires}")
        if len(self.parameters) != n_parameters:
            raise ValueError(
                f"expected {n_parameters} parameter(s) for {self.name}, received {len(self.parameters)}: "
                f"{self.parameters}"
            )

    def __str__(self) -> str:
        return " ".join([self.name, *map(str, self.wires), *(f"t{p}" for p in self.parameters)])


@dataclass(frozen=True)
class Circuit:
    """A parameterized quantum circuit U(theta) on ``n_wires`` wires, as a list of gates in order of application.

    Args:
        n_wires: number of wires n, 1 to 16; states have ``2**n_wires`` amplitudes.
        gates: the gates, first applied first.
        parameter_shape: the shape that ``theta`` must have; gates index ``theta.ravel()``.

    Raises:
        ValueError: a wire is outside ``range(n_wires)``, or a parameter is outside ``theta``.

    Example:
        >>> bell = Circuit(2, (Gate("RY", (0,), (0,)), Gate("CNOT", (0, 1))), parameter_shape=(1,))
        >>> print(bell)
        wires 2; theta 1; RY 0 t0; CNOT 0 1
        >>> Circuit.parse(str(bell)) == bell
        True
    """

    n_wires: int
    gates: tuple[Gate, ...]
    parameter_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_wires", check_count("n_wires", self.n_wires, MAX_WIRES))
        if not isinstance(self.gates, Iterable):
            raise TypeError(f"expected gates to be a sequence of qaa.Gate, received {type(self.gates).__name__}")
        object.__setattr__(self, "gates", tuple(self.gates))
        object.__setattr__(self, "parameter_shape", _indices("parameter_shape", self.parameter_shape))
        n_parameters = self.n_parameters
        if n_parameters > MAX_PARAMETERS:
            raise ValueError(f"expected theta of at most {MAX_PARAMETERS} entries, received {self.parameter_shape}")
        for gate in self.gates:
            if not isinstance(gate, Gate):
                raise TypeError(f"expected gates to be qaa.Gate, received {type(gate).__name__}: {gate!r}")
            if gate.wires and max(gate.wires) >= self.n_wires:
                raise ValueError(f"expected wires below n_wires={self.n_wires}, received {gate.name} on {gate.wires}")
            if gate.parameters and max(gate.parameters) >= n_parameters:
                raise ValueError(
                    f"expected parameter indices below {n_parameters} (theta of shape {self.parameter_shape}), "
                    f"received {gate.name} with {gate.parameters}"
                )
        object.__setattr__(self, "_hash", hash((self.n_wires, self.gates, self.parameter_shape)))
        shape = "x".join(map(str, self.parameter_shape))
        text = "; ".join([f"wires {self.n_wires}", f"theta {shape}", *map(str, self.gates)])
        object.__setattr__(self, "_text", text)

    def __hash__(self) -> int:  # computed once: circuits are keys of the plan cache, on every call
        return self._hash  # type: ignore[attr-defined, no-any-return]

    def __reduce__(self) -> tuple[type[Circuit], tuple[int, tuple[Gate, ...], tuple[int, ...]]]:
        return Circuit, (self.n_wires, self.gates, self.parameter_shape)  # a hash of strings is this process's own

    @property
    def n_parameters(self) -> int:
        """Number of entries of ``theta``."""
        return math.prod(self.parameter_shape)

    def __str__(self) -> str:
        return self._text  # type: ignore[attr-defined, no-any-return]

    def adjoint(self) -> Circuit:
        r"""The circuit V with :math:`U(\theta)^\dagger = V(-\theta)`: the gates backwards, in terms of the same angles.

        S and T, the two fixed gates that are not their own inverses, become ``S Z`` and ``T S Z``.

        Example:
            >>> print(Circuit(1, (Gate("Rot", (0,), (0, 1, 2)), Gate("S", 0)), (3,)).adjoint())
            wires 1; theta 3; S 0; Z 0; Rot 0 t2 t1 t0
        """
        inverses = {"S": ("S", "Z"), "T": ("T", "S", "Z")}
        gates = [
            Gate(name, gate.wires, gate.parameters[::-1])
            for gate in reversed(self.gates)
            for name in inverses.get(gate.name, (gate.name,))
        ]
        return Circuit(self.n_wires, tuple(gates), self.parameter_shape)

    @staticmethod
    def parse(text: str) -> Circuit:
        """The circuit whose ``str`` is ``text``; raises ``ValueError`` naming the first statement that is no gate.

        As in C++, words are separated by spaces, and numbers have the digits 0 to 9 alone.
        """
        if not isinstance(text, str):
            raise TypeError(f"expected a circuit as a str, received {type(text).__name__}")
        statements = [[word for word in part.split(" ") if word] for part in text.split(";")]
        try:
            if [statement[:1] for statement in statements[:2]] != [["wires"], ["theta"]]:
                raise ValueError
            n_wires, shape = (" ".join(statement[1:]) for statement in statements[:2])
            gates = tuple(_parsed_gate(statement) for statement in statements[2:])
            parameter_shape = tuple(_parsed_number(length) for length in shape.split("x")) if shape else ()
            return Circuit(_parsed_number(n_wires), gates, parameter_shape)
        except ValueError as error:
            detail = f": {error}" if str(error) else ""
            raise ValueError(f"expected 'wires N; theta SHAPE; GATE ...', received {text[:80]!r}{detail}") from None

    # ------------------------------------------------------------------------------------------- other languages

    def draw(self, output: str = "text") -> str:
        """A drawing: wires are rows from wire 0 down, time runs to the right, angles are named by their index in theta.

        Args:
            output: ``"text"`` for lines of Unicode characters, which are not folded; ``"svg"`` for a self-contained
                image, for example ``IPython.display.SVG(circuit.draw("svg"))``.

        Returns:
            The drawing as a ``str``; equal circuits have equal drawings.

        Raises:
            ValueError: ``output`` is something else.

        Example:
            >>> print(ansatz("ring", n_wires=3).draw())
            0: ─RY(θ[0,0,0])─RZ(θ[0,0,1])─●───⊕─RY(θ[0,0,2])─
                                          │   │
            1: ─RY(θ[0,1,0])─RZ(θ[0,1,1])─⊕─●─┼─RY(θ[0,1,2])─
                                            │ │
            2: ─RY(θ[0,2,0])─RZ(θ[0,2,1])───⊕─●─RY(θ[0,2,2])─
        """
        from qaa.drawing import draw

        return draw(self, output)

    def to_openqasm3(self, theta: ArrayLike | None = None) -> str:
        """The circuit as an OpenQASM 3 program over ``stdgates.inc``; qubit ``q[k]`` is wire k.

        Args:
            theta: angles in radians, shape ``parameter_shape``, written as numbers with all their digits. By default
                they stay open: entry i of ``theta.ravel()`` becomes ``input float[64] theta_i``.

        Returns:
            The program's text. ``Rot(a, b, c)`` is written as ``rz(a)``, ``ry(b)``, ``rz(c)``.

        Raises:
            ValueError: theta has another shape, or an angle is not finite.

        Source: OpenQASM 3 (Cross et al., ACM Transactions on Quantum Computing 3(3), 2022).

        Example:
            >>> bell = Circuit(2, (Gate("RY", 0, 0), Gate("CNOT", (0, 1))), parameter_shape=(1,))
            >>> print(bell.to_openqasm3(), end="")
            OPENQASM 3.0;
            include "stdgates.inc";
            input float[64] theta_0;
            qubit[2] q;
            ry(theta_0) q[0];
            cx q[0], q[1];
        """
        from qaa.exchange import to_openqasm3

        return to_openqasm3(self, theta)

    @staticmethod
    def from_openqasm3(text: str) -> tuple[Circuit, NDArray[np.float64]]:
        """The circuit of an OpenQASM 3 program, and its angles.

        The subset: ``OPENQASM 3``, ``include "stdgates.inc"``, ``input float``, one or more ``qubit`` registers (wires
        are numbered in order of declaration), comments, and the gates x, y, z, h, s, sdg, t, tdg, sx, rx, ry, rz, p
        (or phase, u1), cx (or CX), cz, swap, crx, cry, crz. A gate on one qubit may name a whole register. An angle is
        one input or an expression of numbers, ``pi``, ``tau`` and ``euler`` with ``+ - * / **`` and parentheses.
        sdg, tdg and sx become products of Z, S, T and H, exactly; nothing is dropped.

        Returns:
            ``(circuit, theta)``: theta, float64 of shape ``(n,)`` in radians, holds inputs and numbers in the order of
            the text. An input is one entry however often it is used, and NaN until a value is put there. Of a program
            by :meth:`to_openqasm3` without angles, the circuit is the original one with a flat ``parameter_shape``
            (and Rot as three gates).

        Raises:
            ValueError: the text holds anything else; the sentence names the line.

        Example:
            >>> circuit, theta = Circuit.from_openqasm3("qubit[2] q; h q; rx(-pi / 4) q[1];")
            >>> print(circuit, theta)
            wires 2; theta 1; H 0; H 1; RX 1 t0 [-0.78539816]
            >>> Circuit.from_openqasm3("qubit q; ry(pi / 0) q;")
            Traceback (most recent call last):
            ValueError: line 1: expected an angle with a value, received float division by zero
        """
        from qaa.exchange import from_openqasm3

        return from_openqasm3(text)

    def to_qiskit(self, theta: ArrayLike | None = None) -> Any:
        """The circuit as a Qiskit ``QuantumCircuit``; qubit k is wire k.

        The unitary is the same to the global phase, but Qiskit counts amplitudes the other way round: qubit 0 is the
        least significant bit of its index, wire 0 the most significant one of ours (``reverse_bits()`` turns it).

        Args:
            theta: angles in radians, shape ``parameter_shape``. By default they stay open, as the elements of a
                ``ParameterVector`` named theta whose index is that of ``theta.ravel()``.

        Returns:
            ``qiskit.QuantumCircuit``; ``Rot(a, b, c)`` is ``rz(a)``, ``ry(b)``, ``rz(c)``. The way back is
            ``Circuit.from_openqasm3(qiskit.qasm3.dumps(circuit))``.

        Raises:
            ImportError: Qiskit is not installed.
            ValueError: theta has another shape, or an angle is not finite.

        Example:
            >>> bell = Circuit(2, (Gate("RY", 0, 0), Gate("CNOT", (0, 1))), parameter_shape=(1,))
            >>> [(gate.name, gate.operation.params) for gate in bell.to_qiskit([0.5]).data]
            [('ry', [0.5]), ('cx', [])]
        """
        from qaa.exchange import to_qiskit

        return to_qiskit(self, theta)

    def to_pennylane(self, theta: Any) -> list[Any]:
        """The gates as PennyLane operations on wires ``0 ... n_wires - 1``, queued where PennyLane is recording.

        Args:
            theta: angles in radians, shape ``parameter_shape``, of any kind that PennyLane computes with (NumPy, torch,
                JAX, ...); derivatives pass through.

        Returns:
            The operations, first applied first.

        Raises:
            ImportError: PennyLane is not installed.
            ValueError: theta has another shape.

        Example:
            >>> import pennylane as qml, qaa
            >>> @qml.qnode(qml.device("default.qubit", wires=2))
            ... def expectation(theta):
            ...     qaa.ansatz("basic_entangler", n_wires=2).to_pennylane(theta)
            ...     return qml.expval(qml.Z(0))
            >>> round(float(expectation([[0.0, 0.5]])), 4)
            1.0
        """
        from qaa.exchange import to_pennylane

        return to_pennylane(self, theta)

    @staticmethod
    def from_pennylane(tape: Any, wire_order: Sequence[Any] | None = None) -> tuple[Circuit, NDArray[np.float64]]:
        """The circuit of a PennyLane tape's operations, and its angles; measurements are left out.

        Operations of other names than ours, templates among them, are replaced by PennyLane's own decomposition, which
        may change the global phase.

        Args:
            tape: ``pennylane.tape.QuantumScript`` or ``QuantumTape``; of a QNode, what
                ``qml.workflow.construct_tape(node)(...)`` returns.
            wire_order: labels of wire 0, 1, ...; by default labels that are integers from 0 stand for themselves, and
                others are numbered in the order in which the tape uses them.

        Returns:
            ``(circuit, theta)``; theta, float64 of shape ``(n,)`` in radians, has an entry for each angle of each gate.

        Raises:
            ImportError: PennyLane is not installed.
            TypeError: ``tape`` is something else.
            ValueError: an operation is no product of our gates, or is broadcast over several angles.

        Example:
            >>> import pennylane as qml
            >>> template = qml.BasicEntanglerLayers([[1.0, 2.0]], wires=[0, 1])
            >>> tape = qml.tape.QuantumScript([qml.RX(0.5, 0), qml.adjoint(qml.S(1)), template])
            >>> circuit, theta = Circuit.from_pennylane(tape)
            >>> print(circuit, theta)
            wires 2; theta 3; RX 0 t0; Z 1; S 1; RX 0 t1; RX 1 t2; CNOT 0 1 [0.5 1.  2. ]
        """
        from qaa.exchange import from_pennylane

        return from_pennylane(tape, wire_order)


def _parsed_gate(words: list[str]) -> Gate:
    if not words:
        raise ValueError("expected a gate between semicolons, received ''")
    name, *operands = words
    wires = tuple(_parsed_number(operand) for operand in operands if operand[0] != "t")
    return Gate(name, wires, tuple(_parsed_number(operand[1:]) for operand in operands if operand[0] == "t"))


def _parsed_number(text: str) -> int:
    """As the core reads it, where ``int`` takes signs, underscores and the digits of every script."""
    digits = text.lstrip("0") or text[:1]
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 10 or int(digits) >= 2**32:
        raise ValueError(f"expected an integer from 0 to {2**32 - 1}, received {shown(text)}")
    return int(digits)


@dataclass(frozen=True, slots=True)
class Readout:
    """What is computed from the final state, as a value: a kind, and the operators or the count that it needs.

    ============================  ==================  ==============================================
    specification                 kind                outputs per state
    ============================  ==================  ==============================================
    ``"z"``                       ``"expval"``        ``<Z_k>`` for every wire, shape ``(n_wires,)``
    ``["ZIII", "XXII"]``          ``"expval"``        ``<P_k>`` for every Pauli string, wire 0 first
    ``"probs"``, ``"probs[:K]"``  ``"probs"``         ``|phi_b|**2`` for ``b < 2**n_wires`` or ``b < K``
    ``"state"``, ``"state[:K]"``  ``"state"``         complex amplitudes ``phi_b``
    ============================  ==================  ==============================================

    ``"state[:1/q]"`` and ``"probs[:1/q]"`` take that part of the amplitudes, whatever their number:
    ``K = 2**n_wires / q`` for a power of two q.

    Example:
        >>> Readout.parse("z", n_wires=2)
        Readout(kind='expval', n_outputs=2, paulis=('ZI', 'IZ'))
        >>> Readout.parse("probs[:3]", n_wires=2).n_outputs, Readout.parse("state[:1/2]", n_wires=10).n_outputs
        (3, 512)
    """

    kind: str
    n_outputs: int
    paulis: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.paulis, list):
            object.__setattr__(self, "paulis", tuple(self.paulis))
        if isinstance(self.n_outputs, bool) or not hasattr(self.n_outputs, "__index__"):
            raise ValueError(f"expected n_outputs to be an integer, received {shown(self.n_outputs)}")
        object.__setattr__(self, "n_outputs", operator.index(self.n_outputs))

    @staticmethod
    def parse(readout: str | Sequence[str] | Readout, n_wires: int) -> Readout:
        """The readout named by ``readout`` for ``n_wires`` wires; raises ``ValueError`` if it names none."""
        check_count("n_wires", n_wires, MAX_WIRES)
        if isinstance(readout, Readout):
            _check_readout(readout, n_wires)
            return readout
        if isinstance(readout, str):
            if readout == "z":
                each = ("I" * k + "Z" + "I" * (n_wires - k - 1) for k in range(n_wires))
                return Readout("expval", n_wires, tuple(each))
            match = re.fullmatch(r"(probs|state)(?:\[:(1/)?([0-9]{1,9})\])?", readout)
            if match is None:
                raise ValueError(
                    "expected a readout 'z', 'probs', 'probs[:K]', 'probs[:1/q]', 'state', 'state[:K]', "
                    f"'state[:1/q]' or a list of Pauli strings, received {shown(readout)}"
                )
            n_outputs = 2**n_wires if match[3] is None else int(match[3])
            if match[2]:
                if n_outputs == 0 or 2**n_wires % n_outputs:
                    raise ValueError(
                        f"expected q of {match[1]}[:1/q] to be a power of two up to {2**n_wires} on {n_wires} wires, "
                        f"received {shown(readout)}"
                    )
                n_outputs = 2**n_wires // n_outputs
            parsed = Readout(match[1], n_outputs)
        elif isinstance(readout, Sequence):  # a set has no order
            paulis = tuple(readout)
            parsed = Readout("expval", len(paulis), paulis)
        else:
            raise TypeError(
                f"expected a readout as a string or a list of Pauli strings, received {type(readout).__name__}"
            )
        _check_readout(parsed, n_wires)
        return parsed

    def __str__(self) -> str:
        return ",".join(self.paulis) if self.kind == "expval" else f"{self.kind}[:{self.n_outputs}]"


def _check_readout(readout: Readout, n_wires: int) -> None:
    if readout.kind not in ("expval", "probs", "state"):
        raise ValueError(f"expected a readout of kind 'expval', 'probs' or 'state', received {readout.kind!r}")
    if readout.kind == "expval":
        if not readout.paulis:
            raise ValueError("expected at least one Pauli string in the readout, received none")
        if readout.n_outputs != len(readout.paulis):
            raise ValueError(
                f"expected n_outputs={len(readout.paulis)}, one per Pauli string, received {readout.n_outputs}"
            )
        for pauli in readout.paulis:
            if not isinstance(pauli, str) or len(pauli) != n_wires or set(pauli) - set("IXYZ"):
                raise ValueError(f"expected Pauli strings of {n_wires} letters from I, X, Y, Z, received {pauli!r}")
    elif not 1 <= readout.n_outputs <= 2**n_wires:
        raise ValueError(
            f"expected between 1 and {2**n_wires} outputs for readout {readout.kind!r} on {n_wires} wires, "
            f"received {readout.n_outputs}"
        )


def shown(value: object) -> str:
    """``repr(value)``, cut off where it is long: it may come from a stranger."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a {type(value).__name__} without a text"
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def check_circuit(circuit: object) -> None:
    """Raises ``TypeError`` unless ``circuit`` is a :class:`Circuit`."""
    if not isinstance(circuit, Circuit):
        raise TypeError(f"expected circuit to be a qaa.Circuit, received {type(circuit).__name__}")


def is_number(value: object) -> bool:
    """Whether ``value`` is a real number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_count(what: str, count: object, limit: int) -> int:
    """``count`` as an ``int`` (NumPy has integers of its own); ``ValueError`` unless it is one from 1 to ``limit``."""
    try:
        number = 0 if isinstance(count, bool) else operator.index(count)  # type: ignore[arg-type]
    except TypeError:
        number = 0
    if not 1 <= number <= limit:
        raise ValueError(f"expected {what} to be an integer from 1 to {limit}, received {shown(count)}")
    return number


def _indices(what: str, values: int | Iterable[int]) -> tuple[int, ...]:
    if not isinstance(values, Iterable):
        values = (values,)
    values = tuple(values)
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 0:
            raise ValueError(f"expected {what} to be integers of at least 0, received {value!r}")
    return tuple(value.__index__() for value in values)


# ---------------------------------------------------------------------------------------------------- ansätze


def _ring(n: int, layers: int) -> tuple[list[Gate], tuple[int, ...]]:
    """RY, RZ on every wire; CNOT 0→1, 1→2, …, n-1→0; RY on every wire. ``theta[l, w] = (RY, RZ, RY)``."""
    gates = []
    for layer in range(layers):
        at = [3 * (layer * n + w) for w in range(n)]
        for w in range(n):
            gates += [Gate("RY", (w,), (at[w],)), Gate("RZ", (w,), (at[w] + 1,))]
        if n > 1:
            gates += [Gate("CNOT", (w, (w + 1) % n)) for w in range(n)]
        gates += [Gate("RY", (w,), (at[w] + 2,)) for w in range(n)]
    return gates, (layers, n, 3)


def _basic_entangler(n: int, layers: int) -> tuple[list[Gate], tuple[int, ...]]:
    """RX on every wire, then a ring of CNOTs (one CNOT for two wires), as PennyLane's ``BasicEntanglerLayers``."""
    gates = []
    for layer in range(layers):
        gates += [Gate("RX", (w,), (layer * n + w,)) for w in range(n)]
        gates += [Gate("CNOT", (w, (w + 1) % n)) for w in range(n if n > 2 else n - 1)]
    return gates, (layers, n)


def _strongly_entangling(n: int, layers: int) -> tuple[list[Gate], tuple[int, ...]]:
    """Rot on every wire, then CNOTs w → w + r with r = 1, 2, …, as PennyLane's ``StronglyEntanglingLayers``."""
    gates = []
    for layer in range(layers):
        at = [3 * (layer * n + w) for w in range(n)]
        gates += [Gate("Rot", (w,), (at[w], at[w] + 1, at[w] + 2)) for w in range(n)]
        if n > 1:
            distance = layer % (n - 1) + 1
            gates += [Gate("CNOT", (w, (w + distance) % n)) for w in range(n)]
    return gates, (layers, n, 3)


def _brick(n: int, layers: int) -> tuple[list[Gate], tuple[int, ...]]:
    """RY on every wire, CZ on pairs (0,1), (2,3), …; RY on every wire, CZ on pairs (1,2), (3,4), …."""
    gates = []
    for layer in range(layers):
        for half in range(2):
            gates += [Gate("RY", (w,), (2 * (layer * n + w) + half,)) for w in range(n)]
            gates += [Gate("CZ", (w, w + 1)) for w in range(half, n - 1, 2)]
    return gates, (layers, n, 2)


ANSATZE: dict[str, Callable[[int, int], tuple[list[Gate], tuple[int, ...]]]] = {
    "ring": _ring,
    "basic_entangler": _basic_entangler,
    "strongly_entangling": _strongly_entangling,
    "brick": _brick,
}


def ansatz(name: str, n_wires: int, n_layers: int = 1) -> Circuit:
    """A circuit of ``n_layers`` equal layers.

    =========================  ==========================  =========================================================
    ``name``                   ``theta``                   one layer
    =========================  ==========================  =========================================================
    ``"ring"`` (default PQC)   ``(n_layers, n_wires, 3)``  RY, RZ on every wire; CNOT 0→1→…→n-1→0; RY on every wire
    ``"basic_entangler"``      ``(n_layers, n_wires)``     RX on every wire; CNOT ring
    ``"strongly_entangling"``  ``(n_layers, n_wires, 3)``  Rot on every wire; CNOT w→w+r, r = 1 + layer mod (n-1)
    ``"brick"``                ``(n_layers, n_wires, 2)``  RY; CZ on even pairs; RY; CZ on odd pairs
    =========================  ==========================  =========================================================

    ``ring`` is the circuit of SQUARE (Roh et al.), ``basic_entangler`` and ``strongly_entangling`` are PennyLane's
    templates of those names.

    Raises:
        ValueError: the name is unknown, or a count is out of range.

    Example:
        >>> circuit = ansatz("ring", n_wires=3, n_layers=2)
        >>> circuit.parameter_shape, len(circuit.gates)
        ((2, 3, 3), 24)
    """
    if not isinstance(name, str) or name not in ANSATZE:
        raise ValueError(f"expected an ansatz among {', '.join(ANSATZE)}, received {shown(name)}")
    return _ansatz(name, check_count("n_wires", n_wires, MAX_WIRES), check_count("n_layers", n_layers, MAX_LAYERS))


@lru_cache(maxsize=256)
def _ansatz(name: str, n_wires: int, n_layers: int) -> Circuit:
    gates, shape = ANSATZE[name](n_wires, n_layers)
    return Circuit(n_wires, tuple(gates), shape)
