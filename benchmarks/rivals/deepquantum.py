"""DeepQuantum: its batched state vector, with the angles as data, differentiated by torch."""

from __future__ import annotations

import deepquantum
import torch
from torch import Tensor

from benchmarks.rivals.differentiable import differentiable, expectations
from benchmarks.task import Rival, Task, signs_of_z


def build(task: Task) -> Rival:
    n, signs = task.n_wires, torch.from_numpy(signs_of_z(task.n_wires))
    circuit, order = deepquantum.QubitCircuit(n), []
    for name, wires, position in task.gates:
        if name == "CNOT":
            circuit.cnot(*wires)
        else:
            getattr(circuit, name.lower())(*wires, encode=True)
            order.append(position)

    def features(theta: Tensor, x: Tensor) -> Tensor:
        state = circuit.amplitude_encoding(x)
        return expectations(circuit(theta.reshape(-1)[order], state).squeeze(-1), signs)

    return differentiable(task, features, rows=task.rows(2**18))
