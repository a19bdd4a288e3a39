"""Qiskit Aer: one circuit a row on its state vector simulator, complex64; the angles by the parameter-shift rule."""

from __future__ import annotations

from typing import Any

import numpy as np
from qiskit import QuantumCircuit, transpile
from qiskit.circuit import ParameterVector
from qiskit_aer import AerSimulator

from benchmarks.task import Array, Rival, Task, embed, signs_of_z


def build(task: Task, rows: int = 16) -> Rival:
    """Wire 0 is Qiskit's highest qubit. Aer has no adjoint, but binds many sets of angles to a circuit in one call."""
    n, rows, signs = task.n_wires, min(rows, task.batch), signs_of_z(task.n_wires)
    angles, grad = task.theta.ravel().astype(float), task.grad[:rows].astype(float)
    names = ParameterVector("angle", len(angles))
    simulator = AerSimulator(method="statevector", precision="single", runtime_parameter_bind_enable=True)

    def circuit(psi: Array) -> Any:
        built = QuantumCircuit(n)
        built.set_statevector(psi)
        for name, wires, position in task.gates:
            qubits = [n - 1 - w for w in wires]
            if name == "CNOT":
                built.cx(*qubits)
            else:
                getattr(built, name.lower())(names[position], *qubits)
        built.save_probabilities()
        return built

    circuits = transpile(
        [circuit(psi) for psi in embed(task.x[:rows].astype(float), n)], simulator, optimization_level=0
    )

    def run(sets_of_angles: Array) -> Array:
        """Features ``(rows, sets, n)`` for sets of angles ``(sets, parameters)``."""
        binds = dict(zip(names, sets_of_angles.T.tolist(), strict=True))
        result = simulator.run(circuits, parameter_binds=[binds] * rows).result()
        values = [result.data(i)["probabilities"] for i in range(rows * len(sets_of_angles))]
        features: Array = np.stack(values).reshape(rows, len(sets_of_angles), -1) @ signs
        return features

    def forward() -> Array:
        return run(angles[None])[:, 0]

    def step() -> tuple[Array, Array, None]:
        shifts = np.pi / 2 * np.eye(len(angles))
        values = run(np.concatenate((angles[None], angles + shifts, angles - shifts)))
        plus, minus = np.split(values[:, 1:], 2, axis=1)
        grad_theta = np.einsum("rk,rpk->p", grad, plus - minus) / 2
        return values[:, 0], grad_theta.reshape(task.theta.shape), None

    return Rival(forward, step, rows, f"rows one by one, {rows} of them, parameter shift; gradient of the angles only")
