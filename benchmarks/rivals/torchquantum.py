"""TorchQuantum: its batched device with functional gates, differentiated by torch."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals.differentiable import differentiable, expectations, pad_and_normalize
from benchmarks.task import Rival, Task, signs_of_z


def _import() -> Any:
    """The library without its image data sets, which would need torchvision."""
    sys.modules["torchquantum.dataset"] = ModuleType("torchquantum.dataset")
    import torchquantum.functional

    return torchquantum


def build(task: Task) -> Rival:
    torchquantum = _import()
    n, gates, signs = task.n_wires, task.gates, torch.from_numpy(signs_of_z(task.n_wires))

    def features(theta: Tensor, x: Tensor) -> Tensor:
        device = torchquantum.QuantumDevice(n_wires=n, bsz=len(x))
        device.states = pad_and_normalize(x, n).to(torch.complex64).reshape(-1, *[2] * n)
        angles = theta.reshape(-1, 1, 1)
        for name, wires, position in gates:
            gate = getattr(torchquantum.functional, name.lower())
            if name == "CNOT":
                gate(device, wires=list(wires))
            else:
                gate(device, wires=list(wires), params=angles[position])
        return expectations(device.states.reshape(len(x), -1), signs)

    return differentiable(task, features, rows=task.rows(2**18))
