"""One training step of SQUARE's classifier, and of the multilayer perceptron that it competes with.

SQUARE embeds 16 numbers into four wires, runs ``ring`` and reads ``[probs, <Z>]``; a 20 → 8 → 1 head with tanh learns
from them: :class:`qaa.nn.Square`. The perceptron is 16 → 8 → 1. float64, Adam.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.task import Rival, Task
from qaa.nn import Square


def with_circuit(task: Task) -> Rival:
    """The circuit, then the head."""
    return _training(task, Square(2**task.n_wires, 1, task.n_wires, task.layers), "circuit, 20 → 8 → 1")


def mlp(task: Task) -> Rival:
    """The rival: a head on the 16 numbers themselves."""
    return _training(task, _head(task), "16 → 8 → 1")


def scaled_mlp(task: Task) -> Rival:
    """The head behind the cheapest trainable layer that there is, one factor for each input: what any layer costs."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factors = nn.Parameter(torch.ones(2**task.n_wires))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factors

    return _training(task, nn.Sequential(Scale(), _head(task)), "16 factors, 16 → 8 → 1")


def _head(task: Task) -> nn.Module:
    return nn.Sequential(nn.Linear(2**task.n_wires, 8), nn.Tanh(), nn.Linear(8, 1))


def _training(task: Task, model: nn.Module, note: str) -> Rival:
    model = model.double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, target = torch.from_numpy(task.x).double(), torch.from_numpy(task.grad[:, :1]).double()

    def forward() -> Tensor:
        with torch.no_grad():
            result: Tensor = model(x)
            return result

    def step() -> tuple[Tensor, None, None]:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss, None, None

    return Rival(forward, step, 1, f"{note}; a batch of {task.batch}, loss, backward, Adam")
