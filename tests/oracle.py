"""What the core must compute, written to be obvious: NumPy, complex128, one textbook formula after another.

Nothing here is shared with the core but the plain data of :mod:`qaa.circuit`. The definitions::

    psi = pad(x) / ||x||                  (normalize=True; the zero row stays zero)   or   psi = pad(x)
    phi = U(theta) psi,                   U = G_last ... G_1 G_0
    f_k = <phi| P_k |phi>                 expval of a Pauli string, letter 0 on wire 0
    f_b = |phi_b|^2                       probs
    f_b = phi_b                           state

Wire 0 is the most significant bit of an amplitude's index; angles are radians. ``unitary`` builds U from Kronecker
products of full-size matrices. ``features`` and ``vjp`` contract the same small matrices with the axes of the state
tensor, so that 16 wires are still possible; ``test_oracle.py`` holds the two against each other.

Every function takes ``dtype``: with ``numpy.complex64`` the same formulas are evaluated in single precision, which is
how the tests know what float32 arithmetic costs an implementation that has nothing to hide.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qaa.circuit import Circuit, Readout

Array = NDArray[Any]
ReadoutLike = str | Sequence[str] | Readout

PAULI: dict[str, Array] = {
    "I": np.array([[1, 0], [0, 1]], complex),
    "X": np.array([[0, 1], [1, 0]], complex),
    "Y": np.array([[0, -1j], [1j, 0]], complex),
    "Z": np.array([[1, 0], [0, -1]], complex),
}

#: Matrices of the gates without parameters; for two wires the first one is the more significant bit.
FIXED: dict[str, Array] = {
    "X": PAULI["X"],
    "Y": PAULI["Y"],
    "Z": PAULI["Z"],
    "H": np.array([[1, 1], [1, -1]], complex) / np.sqrt(2),
    "S": np.array([[1, 0], [0, 1j]], complex),
    "T": np.array([[1, 0], [0, np.exp(1j * np.pi / 4)]], complex),
    "CNOT": np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], complex),
    "CZ": np.diag([1, 1, 1, -1]).astype(complex),
    "SWAP": np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], complex),
}


# ------------------------------------------------------------------------------------------------------- gates


def gate_matrix(name: str, angles: Sequence[float] = (), derivative: int | None = None) -> Array:
    """The matrix of a gate, or its derivative with respect to ``angles[derivative]``.

    ``R_P(t) = cos(t/2) I - i sin(t/2) P``, ``PhaseShift(t) = diag(1, e^{it})``,
    ``Rot(a, b, c) = RZ(c) RY(b) RZ(a)``, and a controlled gate is ``|0><0| (x) I + |1><1| (x) gate``.
    """
    if name in FIXED:
        return FIXED[name]
    if name == "Rot":
        factors = [
            gate_matrix(axis, [angle], 0 if derivative == position else None)
            for position, (axis, angle) in enumerate(zip(("RZ", "RY", "RZ"), angles, strict=True))
        ]
        return factors[2] @ factors[1] @ factors[0]
    (angle,) = angles
    if name == "PhaseShift":
        phase = np.exp(1j * angle)
        return np.diag([1, phase] if derivative is None else [0, 1j * phase])
    if name in ("CRX", "CRY", "CRZ"):
        control_is_0, control_is_1 = np.diag([1, 0]), np.diag([0, 1])
        idle = PAULI["I"] if derivative is None else 0 * PAULI["I"]
        return np.kron(control_is_0, idle) + np.kron(control_is_1, gate_matrix(name[1:], angles, derivative))
    if name in ("RX", "RY", "RZ"):
        cos, sin = np.cos(angle / 2), np.sin(angle / 2)
        if derivative is not None:
            cos, sin = -sin / 2, cos / 2
        rotation: Array = cos * PAULI["I"] - 1j * sin * PAULI[name[1]]
        return rotation
    raise ValueError(f"the oracle knows no gate {name!r}")


def embed(matrix: Array, wires: Sequence[int], n_wires: int) -> Array:
    """The ``2**n x 2**n`` matrix of a small matrix on ``wires`` and the identity elsewhere, by Kronecker products.

    ``matrix = sum_ab matrix[a, b] |a><b|``, and ``|a><b|`` is a product of ``|a_w><b_w|``, one for every wire.
    """
    total = np.zeros((2**n_wires, 2**n_wires), matrix.dtype)
    bits = list(product((0, 1), repeat=len(wires)))
    for (row, row_bits), (column, column_bits) in product(enumerate(bits), repeat=2):
        factors = [PAULI["I"]] * n_wires
        for wire, row_bit, column_bit in zip(wires, row_bits, column_bits, strict=True):
            factors[wire] = np.outer(np.eye(2)[row_bit], np.eye(2)[column_bit])
        if matrix[row, column] != 0:
            total += matrix[row, column] * reduce(np.kron, factors)
    return total


def apply(matrix: Array, wires: Sequence[int], states: Array) -> Array:
    """``embed(matrix, wires, n) @ states`` for states in columns, contracting only the axes of ``wires``."""
    n_wires, k = states.shape[0].bit_length() - 1, len(wires)
    tensor = states.reshape((2,) * n_wires + states.shape[1:])
    small = matrix.astype(states.dtype).reshape((2,) * (2 * k))
    contracted = np.tensordot(small, tensor, axes=(range(k, 2 * k), wires))
    return np.moveaxis(contracted, range(k), wires).reshape(states.shape)


# ----------------------------------------------------------------------------------------------------- circuits


def unitary(circuit: Circuit, theta: Array) -> Array:
    """U(theta), shape ``(2**n, 2**n)``: the product of the full-size matrices of the gates."""
    total = np.eye(2**circuit.n_wires, dtype=complex)
    for gate in circuit.gates:
        angles = [float(np.ravel(theta)[p]) for p in gate.parameters]
        total = embed(gate_matrix(gate.name, angles), gate.wires, circuit.n_wires) @ total
    return total


def norm(x: Array) -> Array:
    """``||x||`` of every row, shape ``(batch, 1)``; squares are taken of entries of at most 1, so none overflows."""
    largest = np.max(np.abs(x), axis=1, keepdims=True, initial=0)
    scaled = np.divide(x, largest, out=np.zeros_like(x), where=largest > 0)
    length: Array = largest * np.sqrt(np.sum(scaled**2, axis=1, keepdims=True))
    return length


def embed_amplitudes(circuit: Circuit, x: Array, normalize: bool = True, dtype: Any = np.complex128) -> Array:
    """The columns psi, shape ``(2**n, batch)``, of the rows of ``x``."""
    x = np.asarray(x, np.dtype(dtype).type(0).real.dtype)
    if normalize:
        length = norm(x)
        x = np.divide(x, length, out=np.zeros_like(x), where=length != 0)
    psi = np.zeros((2**circuit.n_wires, x.shape[0]), dtype)
    psi[: x.shape[1]] = x.T
    return psi


def run(circuit: Circuit, theta: Array, psi: Array) -> list[Array]:
    """The states before the first gate, after it, ..., after the last gate."""
    states = [psi]
    for gate in circuit.gates:
        angles = [float(np.ravel(theta)[p]) for p in gate.parameters]
        states.append(apply(gate_matrix(gate.name, angles), gate.wires, states[-1]))
    return states


def pauli(string: str, states: Array) -> Array:
    """The Pauli string, letter k on wire k, applied to states in columns."""
    for wire, letter in enumerate(string):
        states = apply(PAULI[letter], [wire], states)
    return states


def read(readout: Readout, phi: Array) -> Array:
    """The features ``(batch, K)`` of states in columns."""
    if readout.kind == "expval":
        return np.stack([np.sum(phi.conj() * pauli(p, phi), axis=0).real for p in readout.paulis], axis=1)
    if readout.kind == "probs":
        return (np.abs(phi[: readout.n_outputs]) ** 2).T
    if readout.kind == "state":
        return phi[: readout.n_outputs].T
    raise ValueError(f"the oracle knows no readout {readout.kind!r}")


def cotangent(readout: Readout, phi: Array, grad: Array) -> Array:
    """lambda, in columns, with ``dL = Re <lambda | d phi>`` when ``grad = dL/df`` (``dL/dRe f + i dL/dIm f``).

    expval: ``2 sum_k grad_k P_k phi``; probs: ``2 grad_b phi_b``; state: ``grad_b``.
    """
    total = np.zeros_like(phi)
    if readout.kind == "expval":
        for weights, string in zip(grad.T, readout.paulis, strict=True):
            total += 2 * weights * pauli(string, phi)
    elif readout.kind == "probs":
        total[: readout.n_outputs] = 2 * grad.T * phi[: readout.n_outputs]
    else:
        total[: readout.n_outputs] = grad.T
    return total


def features(
    circuit: Circuit,
    theta: Array,
    x: Array,
    readout: ReadoutLike = "z",
    *,
    normalize: bool = True,
    dtype: Any = np.complex128,
) -> Array:
    """The features ``(batch, K)`` of the rows of ``x``."""
    phi = run(circuit, theta, embed_amplitudes(circuit, x, normalize, dtype))[-1]
    return read(Readout.parse(readout, circuit.n_wires), phi)


def vjp(
    circuit: Circuit,
    theta: Array,
    x: Array,
    grad: Array,
    readout: ReadoutLike = "z",
    *,
    normalize: bool = True,
    dtype: Any = np.complex128,
) -> tuple[Array, Array]:
    """The gradients of L with respect to ``theta`` and ``x`` when ``grad`` is the gradient of L at the features.

    The product rule, gate by gate: ``d phi = sum_g G_last ... (dG_g) ... G_0 psi``, where dG is the derivative of the
    gate's matrix, so ``dL/dtheta = sum Re <lambda_g| dG_g |psi_g>`` with psi_g the state before the gate (kept, not
    recomputed) and lambda_g the cotangent pulled back through all gates after it.
    """
    real = np.dtype(dtype).type(0).real.dtype
    x = np.asarray(x, real)
    grad = np.asarray(grad).astype(dtype if np.iscomplexobj(grad) else real)
    states = run(circuit, theta, embed_amplitudes(circuit, x, normalize, dtype))
    bra = cotangent(Readout.parse(readout, circuit.n_wires), states[-1], grad)

    grad_theta = np.zeros(circuit.n_parameters, real)
    for gate, before in zip(reversed(circuit.gates), reversed(states[:-1]), strict=True):
        angles = [float(np.ravel(theta)[p]) for p in gate.parameters]
        for position, parameter in enumerate(gate.parameters):
            moved = apply(gate_matrix(gate.name, angles, derivative=position), gate.wires, before)
            grad_theta[parameter] += np.sum(bra.conj() * moved).real
        bra = apply(gate_matrix(gate.name, angles).conj().T, gate.wires, bra)

    grad_psi = bra.real.T[:, : x.shape[1]]
    if not normalize:
        return grad_theta.reshape(circuit.parameter_shape), grad_psi
    length = norm(x)
    inverse = np.divide(1, length, out=np.zeros_like(length), where=length != 0)
    unit = x * inverse
    tangential = grad_psi - unit * np.sum(unit * grad_psi, axis=1, keepdims=True)
    return grad_theta.reshape(circuit.parameter_shape), tangential * inverse
