"""PennyLane: default.qubit with backpropagation through torch, and lightning.qubit with its adjoint."""

from __future__ import annotations

from typing import Any

import numpy as np
import pennylane as qml
import torch
from pennylane.devices import ExecutionConfig
from torch import Tensor

from benchmarks.rivals.differentiable import differentiable
from benchmarks.task import Rival, Task, embed


def _apply(task: Task, angles: Any) -> None:
    for name, wires, position in task.gates:
        if name == "CNOT":
            qml.CNOT(wires)
        else:
            getattr(qml, name)(angles[position], wires)


def default_qubit(task: Task) -> Rival:
    """Parameter broadcasting over the batch."""
    n = task.n_wires

    def function(angles: Tensor, x: Tensor) -> Any:
        qml.AmplitudeEmbedding(x, wires=range(n), pad_with=0.0, normalize=True)
        _apply(task, angles)
        return [qml.expval(qml.PauliZ(w)) for w in range(n)]

    node = qml.QNode(function, qml.device("default.qubit", wires=n), interface="torch", diff_method="backprop")

    def features(theta: Tensor, x: Tensor) -> Tensor:
        return torch.stack(node(theta.reshape(-1), x), -1)

    return differentiable(task, features, "batch broadcast, backprop", rows=task.rows(2**18))


def lightning_qubit(task: Task, rows: int = 32) -> Rival:
    """complex64; it simulates row by row, and its device is called with tapes that are already built, which is many
    times faster than a QNode for every row.
    """
    n, rows = task.n_wires, min(rows, task.batch)
    device = qml.device("lightning.qubit", wires=n, c_dtype=np.complex64)
    angles, grad = task.theta.ravel().astype(float), [tuple(g) for g in task.grad[:rows].astype(float)]
    order = [position for _, _, position in task.gates if position >= 0]  # as the tape's angles come

    def tape(state: np.ndarray[Any, Any]) -> Any:
        with qml.queuing.AnnotatedQueue() as queue:
            qml.StatePrep(state, wires=range(n), validate_norm=False)
            _apply(task, angles)
            for w in range(n):
                qml.expval(qml.PauliZ(w))
        script = qml.tape.QuantumScript.from_queue(queue)
        script.trainable_params = list(range(1, len(order) + 1))  # parameter 0 is the state
        return script

    tapes = tuple(tape(state) for state in embed(task.x[:rows].astype(float), n))
    config = ExecutionConfig(gradient_method="adjoint", use_device_gradient=True)

    def forward() -> Any:
        return np.array(device.execute(tapes))

    def step() -> tuple[Any, Any, None]:
        value, products = device.execute_and_compute_vjp(tapes, grad, config)
        grad_theta = np.empty(len(order))
        grad_theta[order] = np.sum(np.array(products), axis=0)
        return np.array(value), grad_theta.reshape(task.theta.shape), None

    note = f"rows one by one, {rows} of them, adjoint, tapes built beforehand; gradient of the angles only"
    return Rival(forward, step, rows, note)
