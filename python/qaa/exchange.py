"""Circuits in other languages: OpenQASM 3, Qiskit and PennyLane. The methods of :class:`qaa.Circuit` of those names.

Wire k is qubit k (OpenQASM, Qiskit) or wire k (PennyLane) everywhere. What differs is the index of an amplitude: wire 0
is its most significant bit here and in PennyLane, its least significant bit in Qiskit. Every gate has the same matrix
in all of them, so that unitaries agree to the global phase.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from qaa.arrays import real_array
from qaa.circuit import GATES, MAX_WIRES, Circuit, Gate

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

#: Our gates as OpenQASM's ``stdgates.inc`` and Qiskit's methods call them; Rot is written as RZ, RY, RZ.
QASM_NAMES = {
    "X": "x", "Y": "y", "Z": "z", "H": "h", "S": "s", "T": "t", "RX": "rx", "RY": "ry", "RZ": "rz", "PhaseShift": "p",
    "CNOT": "cx", "CZ": "cz", "SWAP": "swap", "CRX": "crx", "CRY": "cry", "CRZ": "crz",
}  # fmt: skip

#: Gates that are exact products of ours, applied first to last.
_PRODUCTS = {"sdg": ("Z", "S"), "tdg": ("Z", "S", "T"), "sx": ("H", "S", "H")}
_FROM_QASM: dict[str, tuple[str, ...]] = {
    **{theirs: (ours,) for ours, theirs in QASM_NAMES.items()},
    **_PRODUCTS,
    "phase": ("PhaseShift",),
    "u1": ("PhaseShift",),
    "CX": ("CNOT",),
}
_FROM_PENNYLANE: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in GATES},
    "PauliX": ("X",),
    "PauliY": ("Y",),
    "PauliZ": ("Z",),
    "Hadamard": ("H",),
    "Adjoint(S)": _PRODUCTS["sdg"],
    "Adjoint(T)": _PRODUCTS["tdg"],
    "SX": _PRODUCTS["sx"],
    "U1": ("PhaseShift",),
}


def flat_angles(circuit: Circuit, theta: ArrayLike) -> list[float]:
    """``theta.ravel()`` as finite floats; ``TypeError`` or ``ValueError`` if it holds or is something else."""
    angles = real_array("theta", theta).astype(np.float64)
    if angles.shape != circuit.parameter_shape:
        raise ValueError(f"expected theta of shape {circuit.parameter_shape}, received {angles.shape}")
    if not np.isfinite(angles).all():
        raise ValueError(f"expected theta of finite angles, received {angles[~np.isfinite(angles)][0]}")
    return [float(angle) for angle in angles.ravel()]


def _named_gates(circuit: Circuit) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Name in ``QASM_NAMES``, entries of theta and wires, gate after gate, Rot taken apart."""
    for gate in circuit.gates:
        if gate.name == "Rot":
            for name, parameter in zip(("rz", "ry", "rz"), gate.parameters, strict=True):
                yield name, (parameter,), gate.wires
        else:
            yield QASM_NAMES[gate.name], gate.parameters, gate.wires


class _Builder:
    """Gates and the angles that they use, collected one after the other."""

    def __init__(self) -> None:
        self.gates: list[Gate] = []
        self.theta: list[float] = []

    def add_angle(self, angle: float) -> int:
        """The index of a new entry of theta."""
        self.theta.append(angle)
        return len(self.theta) - 1

    def result(self, n_wires: int) -> tuple[Circuit, NDArray[np.float64]]:
        return Circuit(n_wires, tuple(self.gates), (len(self.theta),)), np.array(self.theta, np.float64)


# ---------------------------------------------------------------------------------------------------- OpenQASM 3


def to_openqasm3(circuit: Circuit, theta: ArrayLike | None = None) -> str:
    """See :meth:`qaa.Circuit.to_openqasm3`."""
    lines = ["OPENQASM 3.0;", 'include "stdgates.inc";']
    if theta is None:
        angles = [f"theta_{p}" for p in range(circuit.n_parameters)]
        lines += [f"input float[64] {angle};" for angle in angles]
    else:
        angles = [repr(angle) for angle in flat_angles(circuit, theta)]
    lines.append(f"qubit[{circuit.n_wires}] q;")
    for name, parameters, wires in _named_gates(circuit):
        arguments = f"({', '.join(angles[p] for p in parameters)})" if parameters else ""
        lines.append(f"{name}{arguments} {', '.join(f'q[{wire}]' for wire in wires)};")
    return "\n".join(lines) + "\n"


def from_openqasm3(text: str) -> tuple[Circuit, NDArray[np.float64]]:
    """See :meth:`qaa.Circuit.from_openqasm3`."""
    return _Parser(text).parse()


class _Token(NamedTuple):
    kind: str
    text: str
    line: int


_TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*|/\*.*?\*/)
      | (?P<number>(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][+-]?[0-9][0-9_]*)?)
      | (?P<name>[^\W\d]\w*)
      | (?P<string>"[^"\n]*"|'[^'\n]*')
      | (?P<symbol>\*\*|.)""",
    re.VERBOSE | re.DOTALL,
)
_CONSTANTS = {
    "pi": math.pi,
    "π": math.pi,
    "tau": math.tau,
    "τ": math.tau,
    "euler": math.e,
    "ℇ": math.e,
}


class _Parser:
    """A recursive-descent parser for the subset; each method consumes what it is named after."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise TypeError(f"expected OpenQASM 3 as a str, received {type(text).__name__}")
        self.tokens: list[_Token] = []
        line = 1
        for match in _TOKEN.finditer(text):
            if match.lastgroup != "space":
                self.tokens.append(_Token(str(match.lastgroup), match[0], line))
            line += match[0].count("\n")
        self.tokens.append(_Token("end", "the end of the text", line))
        self.position = 0
        self.n_wires = 0
        self.registers: dict[str, range] = {}
        self.inputs: dict[str, int] = {}
        self.builder = _Builder()

    def parse(self) -> tuple[Circuit, NDArray[np.float64]]:
        statements: dict[str, Callable[[], None]] = {
            "OPENQASM": self.version,
            "include": self.include,
            "input": self.input,
            "qubit": self.qubit,
        }
        while (token := self.next()).kind != "end":
            if token.text in statements:
                statements[token.text]()
            elif token.text in _FROM_QASM:
                self.gate(token)
            else:
                names = ", ".join([*statements, *_FROM_QASM])
                self.refuse(f"a statement of the supported subset ({names})", token)
        if not self.n_wires:
            self.refuse("a qubit register", self.tokens[-1])
        return self.builder.result(self.n_wires)

    # ------------------------------------------------------------------------------------------- tokens

    def refuse(self, expected: str, token: _Token) -> NoReturn:
        received = token.text if token.kind == "end" else repr(token.text)
        raise ValueError(f"line {token.line}: expected {expected}, received {received}")

    def peek(self) -> _Token:
        return self.tokens[self.position]

    def next(self) -> _Token:
        token = self.tokens[self.position]
        self.position += token.kind != "end"
        return token

    def accept(self, text: str) -> bool:
        if self.peek().text != text:
            return False
        self.next()
        return True

    def expect(self, text: str) -> None:
        if not self.accept(text):
            self.refuse(repr(text), self.peek())

    def integer(self, what: str) -> int:
        token = self.next()
        if not re.fullmatch("[0-9]{1,9}", token.text):
            self.refuse(what, token)
        return int(token.text)

    # ------------------------------------------------------------------------------------------- statements

    def version(self) -> None:
        token = self.next()
        if token.kind != "number" or token.text.split(".")[0] != "3":
            self.refuse("version 3 of OpenQASM", token)
        self.expect(";")

    def include(self) -> None:
        token = self.next()
        if token.text[1:-1] != "stdgates.inc" or token.kind != "string":
            self.refuse('"stdgates.inc"', token)
        self.expect(";")

    def input(self) -> None:
        self.expect("float")
        if self.accept("["):
            self.integer("a width in bits")
            self.expect("]")
        name = self.new_name("a name of an input")
        self.inputs[name] = self.builder.add_angle(math.nan)
        self.expect(";")

    def qubit(self) -> None:
        size, at = 1, self.peek()
        if self.accept("["):
            at = self.peek()
            size = self.integer("a number of qubits")
            self.expect("]")
        if not 1 <= size <= MAX_WIRES - self.n_wires:
            self.refuse(f"one qubit or more, in all at most {MAX_WIRES}", at)
        name = self.new_name("a name of a register")
        self.registers[name] = range(self.n_wires, self.n_wires + size)
        self.n_wires += size
        self.expect(";")

    def new_name(self, what: str) -> str:
        token = self.next()
        if token.kind != "name" or token.text in {*self.registers, *self.inputs, *_CONSTANTS, *_FROM_QASM}:
            self.refuse(f"{what} that is not in use", token)
        return token.text

    def gate(self, name: _Token) -> None:
        ours = _FROM_QASM[name.text]
        n_wires, n_parameters = GATES[ours[0]]
        parameters = []
        for position in range(n_parameters):
            self.expect("," if position else "(")
            parameters.append(self.angle())
        if n_parameters:
            self.expect(")")
        operands = []
        for position in range(n_wires):
            if position:
                self.expect(",")
            operands.append(self.operand(whole=n_wires == 1))
        if len({operand[0] for operand in operands}) != n_wires:
            raise ValueError(f"line {name.line}: expected different qubits for {name.text}, received one twice")
        self.expect(";")
        for wires in zip(*operands, strict=True):
            self.builder.gates += [Gate(gate, wires, tuple(parameters)) for gate in ours]

    def operand(self, whole: bool) -> Sequence[int]:
        """The wires of ``q[k]``, or of all of ``q`` where that is allowed."""
        token = self.next()
        if token.text not in self.registers:
            self.refuse("a declared qubit register", token)
        register = self.registers[token.text]
        if not self.accept("["):
            if not whole and len(register) > 1:
                self.refuse("'[' and the index of one qubit", self.peek())
            return register
        at = self.peek()
        index = self.integer("the index of a qubit")
        if index >= len(register):
            self.refuse(f"an index below {len(register)}", at)
        self.expect("]")
        return register[index : index + 1]

    # ------------------------------------------------------------------------------------------- angles

    def angle(self) -> int:
        """The entry of theta of one input, or of a new number."""
        token = self.peek()
        if token.text in self.inputs and self.tokens[self.position + 1].text in (",", ")"):
            return self.inputs[self.next().text]
        try:
            value = float(self.sum())
        except (ArithmeticError, ValueError, RecursionError) as error:
            if str(error).startswith("line "):
                raise
            raise ValueError(f"line {token.line}: expected an angle with a value, received {error}") from None
        if not math.isfinite(value):
            raise ValueError(f"line {token.line}: expected a finite angle, received {value}")
        return self.builder.add_angle(value)

    def sum(self) -> int | float:
        value = self.product()
        while self.peek().text in ("+", "-"):
            sign = 1 if self.next().text == "+" else -1
            value += sign * self.product()
        return value

    def product(self) -> int | float:
        value = self.signed()
        while self.peek().text in ("*", "/"):
            operator = self.next()
            factor = self.signed()
            if operator.text == "*":
                value *= factor
            elif isinstance(value, int) and isinstance(factor, int):  # OpenQASM would drop the remainder
                raise ValueError(f"line {operator.line}: expected '/' beside a real number, received {value}/{factor}")
            else:
                value /= factor
        return value

    def signed(self) -> int | float:
        sign = 1
        while self.peek().text in ("+", "-"):
            sign *= 1 if self.next().text == "+" else -1
        return sign * self.power()

    def power(self) -> int | float:
        base = self.number()
        return math.pow(base, self.signed()) if self.accept("**") else base

    def number(self) -> int | float:
        token = self.next()
        if token.kind == "number":
            return int(token.text) if token.text.replace("_", "").isdecimal() else float(token.text)
        if token.text in _CONSTANTS:
            return _CONSTANTS[token.text]
        if token.text != "(":
            self.refuse("an angle that is one input or an expression of numbers and pi", token)
        value = self.sum()
        self.expect(")")
        return value


# ---------------------------------------------------------------------------------------------------- Qiskit


def to_qiskit(circuit: Circuit, theta: ArrayLike | None = None) -> Any:
    """See :meth:`qaa.Circuit.to_qiskit`."""
    try:
        from qiskit import QuantumCircuit
        from qiskit.circuit import ParameterVector
    except ImportError as error:
        raise ImportError(f"expected qiskit to be installed (pip install qiskit), received: {error}") from None
    angles = list(ParameterVector("theta", circuit.n_parameters)) if theta is None else flat_angles(circuit, theta)
    result = QuantumCircuit(circuit.n_wires)
    for name, parameters, wires in _named_gates(circuit):
        getattr(result, name)(*(angles[p] for p in parameters), *wires)
    return result


# ---------------------------------------------------------------------------------------------------- PennyLane


def import_pennylane() -> Any:
    """The module ``pennylane``; ``ImportError`` in a sentence where it is not installed."""
    try:
        import pennylane
    except ImportError as error:
        raise ImportError(f"expected pennylane to be installed (pip install pennylane), received: {error}") from None
    return pennylane


def to_pennylane(circuit: Circuit, theta: Any) -> list[Any]:
    """See :meth:`qaa.Circuit.to_pennylane`."""
    qml = import_pennylane()
    shape = tuple(qml.math.shape(theta))
    if shape != circuit.parameter_shape:
        raise ValueError(f"expected theta of shape {circuit.parameter_shape}, received {shape}")
    angles = qml.math.reshape(theta, (circuit.n_parameters,))
    classes = {"H": qml.Hadamard, "X": qml.PauliX, "Y": qml.PauliY, "Z": qml.PauliZ}
    return [
        (classes.get(gate.name) or getattr(qml, gate.name))(*(angles[p] for p in gate.parameters), wires=gate.wires)
        for gate in circuit.gates
    ]


def from_pennylane(tape: Any, wire_order: Sequence[Any] | None = None) -> tuple[Circuit, NDArray[np.float64]]:
    """See :meth:`qaa.Circuit.from_pennylane`."""
    qml = import_pennylane()
    if not isinstance(tape, qml.tape.QuantumScript):
        raise TypeError(f"expected a pennylane QuantumScript or QuantumTape, received {type(tape).__name__}")
    index = wire_index(tape.wires if wire_order is None else qml.wires.Wires(wire_order), fixed=wire_order is not None)
    builder = _Builder()
    for operation in _known_operations(qml, tape.operations):
        missing = [wire for wire in operation.wires if wire not in index]
        if missing:
            raise ValueError(f"expected wires among {list(index)}, received {operation.name} on {missing[0]!r}")
        wires = tuple(index[wire] for wire in operation.wires)
        parameters = tuple(builder.add_angle(_number(qml, operation, angle)) for angle in operation.data)
        builder.gates += [Gate(gate, wires, parameters) for gate in _FROM_PENNYLANE[operation.name]]
    return builder.result(len(index))


def wire_index(wires: Any, fixed: bool) -> dict[Any, int]:
    """Label to wire; labels that are wires' numbers stand for themselves unless the order is ``fixed``."""
    labels = list(wires)
    if not labels:
        raise ValueError("expected operations on at least one wire, received none")
    if not fixed and all(isinstance(label, int) and label >= 0 for label in labels):
        labels = list(range(max(labels) + 1))
    return {label: wire for wire, label in enumerate(labels)}


def is_pennylane_gate(operation: Any) -> bool:
    """Whether a PennyLane operation is one of our gates, or an exact product of them."""
    return operation.name in _FROM_PENNYLANE


def _known_operations(qml: Any, operations: Sequence[Any]) -> Iterator[Any]:
    """The operations, those that are not in the table replaced by their decompositions."""
    for operation in operations:
        if is_pennylane_gate(operation):
            yield operation
        elif operation.has_decomposition and not isinstance(operation, qml.operation.StatePrepBase):
            yield from _known_operations(qml, operation.decomposition())
        else:
            names = ", ".join(_FROM_PENNYLANE)
            raise ValueError(f"expected operations that decompose into {names}, received {operation.name}")


def _number(qml: Any, operation: Any, angle: Any) -> float:
    if qml.math.shape(angle) != ():
        raise ValueError(f"expected one number per angle, received {operation.name} with {qml.math.shape(angle)}")
    return float(qml.math.unwrap([angle])[0])
