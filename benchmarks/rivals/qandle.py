"""qandle: the circuit split into subcircuits of a few wires, whose gates are small dense matrices."""

from __future__ import annotations

import qandle
import torch
from torch import Tensor

from benchmarks.rivals.differentiable import differentiable, expectations, pad_and_normalize
from benchmarks.task import Rival, Task, signs_of_z


def build(task: Task, wires_of_a_part: int = 3) -> Rival:
    n, signs = task.n_wires, torch.from_numpy(signs_of_z(task.n_wires))
    layers = [
        qandle.CNOT(*wires) if name == "CNOT" else getattr(qandle, name)(wires[0], name=f"angle {position}")
        for name, wires, position in task.gates
    ]
    circuit = qandle.Circuit(layers, num_qubits=n, split_max_qubits=wires_of_a_part)

    def features(theta: Tensor, x: Tensor) -> Tensor:
        values = {f"angle {position}": angle for position, angle in enumerate(theta.reshape(-1))}
        return expectations(circuit(pad_and_normalize(x, n).to(torch.complex64), **values), signs)

    return differentiable(task, features, f"split into parts of {wires_of_a_part} wires", rows=task.rows(2**18))
