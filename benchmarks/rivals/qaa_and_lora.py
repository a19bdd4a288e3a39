"""This library, and the yardstick that a user would otherwise run: LoRA, which simulates nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import qaa
import qaa.ops
from benchmarks import machine
from benchmarks.goals import multiply_adds
from benchmarks.rivals.differentiable import differentiable
from benchmarks.task import Rival, Task


def features(task: Task) -> Rival:
    """The circuit through its torch op."""
    circuit = qaa.ansatz("ring", task.n_wires, task.layers)
    return differentiable(task, lambda theta, x: qaa.ops.quantum_features(circuit, theta, x))


def angles_of_each_row(task: Task) -> Rival:
    """The same, computed as if every row had other angles."""
    circuit = qaa.ansatz("ring", task.n_wires, task.layers)

    def function(theta: Tensor, x: Tensor) -> Tensor:
        return qaa.ops.quantum_features(circuit, theta.expand(len(x), *theta.shape), x)

    return differentiable(task, function, "one set of angles for each row")


def nothing(task: Task) -> Rival:
    """What an autograd function in Python costs that computes nothing, with the same arguments and results."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, theta: Tensor, x: Tensor) -> Tensor:
            ctx.save_for_backward(theta, x)
            return torch.empty(x.shape[0], task.n_wires)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            theta, x = ctx.saved_tensors
            return torch.empty_like(theta), torch.empty_like(x)

    return differentiable(task, Nothing.apply, "computes nothing")


def kernel(task: Task) -> Rival:
    """The circuit through its NumPy functions, with as many threads as the process has: no autograd."""
    return _kernel(task, None)


def kernel_on_one_thread(task: Task) -> Rival:
    return _kernel(task, 1)


def _kernel(task: Task, threads: int | None) -> Rival:
    circuit = qaa.ansatz("ring", task.n_wires, task.layers)
    theta, x, grad = task.theta, task.x, task.grad

    def forward() -> Any:
        return qaa.arrays.forward(circuit, theta, x, threads=threads)

    def step() -> tuple[Any, Any, Any]:
        return forward(), *qaa.arrays.backward(circuit, theta, x, grad, threads=threads)

    return Rival(forward, step, task.batch, "NumPy entry points")


def multiply_adds_alone(task: Task) -> Rival:
    """As many multiply-adds as the plan counts, in registers: the machine's peak at the time."""
    run = machine.multiply_adds()
    forward, step = (task.batch * multiply_adds(task, which) for which in ("forward", "step"))
    note = "as many as the plan counts, in registers"
    return Rival(lambda: run(forward), lambda: (run(step), None, None), task.batch, note)


def adapter(task: Task) -> Rival:
    """The features, projected to width d and added to the frozen layer's output: all that LoRA does, and a bias."""
    circuit = qaa.ansatz("ring", task.n_wires, task.layers)
    random = torch.Generator().manual_seed(2)
    up, bias = torch.randn(task.width, task.n_wires, generator=random), torch.randn(task.width, generator=random)

    def function(base: Tensor, x: Tensor, theta: Tensor, up: Tensor, bias: Tensor) -> Tensor:
        return qaa.ops.project(base, qaa.ops.quantum_features(circuit, theta, x), up, bias, in_place=True)

    note = f"features, {task.n_wires} → {task.width}, bias, added in place; gradients of x, theta, V, c"
    return _adapter(task, function, (torch.from_numpy(task.theta), up, bias), note)


def lora(task: Task) -> Rival:
    """LoRA written as tightly as torch allows: two GEMMs, the second of them over the frozen layer's output."""
    weights, note = _lora_weights(task)
    return _adapter(task, lambda base, x, a, b: base.addmm_(x @ a.T, b.T), weights, f"{note}, addmm_")


def lora_in_peft(task: Task) -> Rival:
    """LoRA as PEFT's linear layer computes it: ``result + lora_B(lora_A(x)) * scaling``."""
    weights, note = _lora_weights(task)
    linear = torch.nn.functional.linear
    return _adapter(task, lambda base, x, a, b: base + linear(linear(x, a), b) * 2.0, weights, f"{note}, as in PEFT")


def _lora_weights(task: Task, rank: int = 8) -> tuple[list[Tensor], str]:
    random = torch.Generator().manual_seed(2)
    weights = [torch.randn(*shape, generator=random) for shape in ((rank, task.width), (task.width, rank))]
    return weights, f"yardstick, no simulator: {task.width} → {rank} → {task.width}; gradients of x, A, B"


def _adapter(task: Task, function: Callable[..., Tensor], weights: Any, note: str) -> Rival:
    """A whole adapter ``(base, x, *weights) → base + delta`` at width d, differentiated in all but the base."""
    leaves = [torch.tensor(np.array(w), requires_grad=True) for w in (task.x, *weights)]
    random = torch.Generator().manual_seed(1)
    base, grad = (torch.randn(task.x.shape, generator=random) for _ in range(2))

    def forward() -> Tensor:
        with torch.no_grad():
            return function(base.detach(), *leaves)

    def step() -> tuple[Any, Any, Any]:
        value = function(base.detach(), *leaves)  # some write over it, as they may over a layer's output
        gradients = torch.autograd.grad(value, leaves, grad)
        return value, gradients[1], gradients[0]

    return Rival(forward, step, task.batch, note)
