"""pyqtorch: its batched state vector (the batch is the last axis), differentiated by torch."""

from __future__ import annotations

import pyqtorch
import torch
from torch import Tensor

from benchmarks.rivals.differentiable import differentiable, expectations, pad_and_normalize
from benchmarks.task import Rival, Task, signs_of_z


def build(task: Task) -> Rival:
    n, signs = task.n_wires, torch.from_numpy(signs_of_z(task.n_wires))
    operations = [
        pyqtorch.CNOT(*wires) if name == "CNOT" else getattr(pyqtorch, name)(wires[0], f"angle {position}")
        for name, wires, position in task.gates
    ]
    circuit = pyqtorch.QuantumCircuit(n, operations).to(dtype=torch.complex64)

    def features(theta: Tensor, x: Tensor) -> Tensor:
        state = pad_and_normalize(x, n).to(torch.complex64).T.reshape(*[2] * n, len(x))
        values = {f"angle {position}": angle for position, angle in enumerate(theta.reshape(-1, 1))}
        return expectations(pyqtorch.run(circuit, state, values).reshape(2**n, -1).T, signs)

    return differentiable(task, features, rows=task.rows(2**20))
