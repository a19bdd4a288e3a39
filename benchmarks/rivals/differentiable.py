"""A rival that is one differentiable torch function of the angles and the rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.task import Rival, Task


def differentiable(
    task: Task, features: Callable[[Tensor, Tensor], Tensor], note: str = "", rows: int | None = None
) -> Rival:
    """``features(theta, x)`` forward, and with the gradients of both arguments; of the first ``rows`` rows."""
    rows = rows or task.batch
    theta = torch.tensor(task.theta, requires_grad=True)
    x = torch.tensor(task.x[:rows], requires_grad=True)
    grad = torch.tensor(task.grad[:rows])

    def forward() -> Tensor:
        with torch.no_grad():
            return features(theta, x)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        value = features(theta, x)
        grad_theta, grad_x = torch.autograd.grad(value, (theta, x), grad.to(value.dtype))
        return value.detach(), grad_theta, grad_x

    return Rival(forward, step, rows, task.note(rows, note))


def pad_and_normalize(x: Tensor, n_wires: int) -> Tensor:
    """Rows of unit length, padded to ``2**n`` amplitudes."""
    return torch.nn.functional.pad(torch.nn.functional.normalize(x, dim=-1), (0, 2**n_wires - x.shape[-1]))


def expectations(state: Tensor, signs: Tensor) -> Tensor:
    """``<Z>`` on every wire of complex rows."""
    return (state.real**2 + state.imag**2) @ signs
