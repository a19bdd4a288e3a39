"""Qulacs: row by row in C++, complex128, with an adjoint sweep over its gates.

Its own ``backprop`` starts from ``|0…0>`` and undoes every gate; a first gate that prepares a row would have to be a
dense ``2**n x 2**n`` matrix, because its cheap ones have no inverse. The sweep below calls the same gates and needs
none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import qulacs
from qulacs.circuit import QuantumCircuitOptimizer
from qulacs.gate import CNOT, RotY, RotZ, Y, Z
from qulacs.state import inner_product

from benchmarks.task import Array, Rival, Task, embed, signs_of_z


def build(task: Task, rows: int = 64) -> Rival:
    """Wire 0 is Qulacs' highest qubit."""
    n, rows, signs = task.n_wires, min(rows, task.batch), signs_of_z(task.n_wires)
    x, grad = task.x[:rows].astype(float), task.grad[:rows].astype(float)
    rotations, paulis = {"RY": RotY, "RZ": RotZ}, {"RY": Y, "RZ": Z}
    optimizer = QuantumCircuitOptimizer()
    ket, bra, turned = (qulacs.QuantumState(n) for _ in range(3))

    def gates(sign: float) -> list[Any]:
        """The circuit's gates, or for sign -1 their inverses, in the circuit's order."""
        angles, built = sign * task.theta.ravel().astype(float), []
        for name, wires, position in task.gates:
            qubits = [n - 1 - w for w in wires]
            built.append(CNOT(*qubits) if name == "CNOT" else rotations[name](*qubits, angles[position]))
        return built

    def final_states() -> list[Array]:
        circuit = qulacs.QuantumCircuit(n)
        for gate in gates(1):
            circuit.add_gate(gate)
        optimizer.optimize_light(circuit)
        states = []
        for psi in embed(x, n):
            ket.load(psi)
            circuit.update_quantum_state(ket)
            states.append(ket.get_vector())
        return states

    def forward() -> Array:
        features: Array = np.abs(np.stack(final_states())) ** 2 @ signs
        return features

    def step() -> tuple[Array, Array, Array]:
        states = np.stack(final_states())
        bras = 2 * (grad @ signs.T) * states
        grad_theta, grad_unit = np.zeros(task.theta.size), np.empty((rows, task.width))
        sweep = []
        for (name, wires, position), inverse in zip(reversed(task.gates), reversed(gates(-1)), strict=True):
            sweep.append((inverse, paulis[name](n - 1 - wires[0]) if position >= 0 else None, position))
        for row in range(rows):
            ket.load(states[row])
            bra.load(bras[row])
            for inverse, pauli, position in sweep:
                if pauli is not None:
                    turned.load(ket)
                    pauli.update_quantum_state(turned)
                    grad_theta[position] += inner_product(bra, turned).imag / 2
                inverse.update_quantum_state(ket)
                inverse.update_quantum_state(bra)
            grad_unit[row] = bra.get_vector()[: task.width].real
        norm = np.linalg.norm(x, axis=1, keepdims=True)
        grad_x = (grad_unit - x * np.sum(x * grad_unit, axis=1, keepdims=True) / norm**2) / norm
        return np.abs(states) ** 2 @ signs, grad_theta.reshape(task.theta.shape), grad_x

    return Rival(forward, step, rows, f"rows one by one, {rows} of them, float64, adjoint sweep over its gates")
