"""Every competitor computes the same thing: the features of one batch, and their gradients.

The task is one QAA adapter's circuit: ``n`` wires, rows of width ``d`` padded to ``2**n`` and normalized, ``ring`` with
one layer, ``<Z>`` on every wire, float32, gradients with respect to the angles and the rows. Each rival is written in
the best form we know for it, and :func:`hold_to_oracle` must pass before it is timed. LoRA is no simulator: it is the
yardstick that a user would otherwise run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qaa.ops
from qaa import ansatz

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracle

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, eq=False)
class Task:
    """One batch through one layer of ``ring``, read out as <Z> on every wire, with the gradient at the features."""

    n_wires: int = 10
    width: int = 768
    batch: int = 1024
    seed: int = 0
    theta: torch.Tensor = field(init=False)
    x: torch.Tensor = field(init=False)
    grad: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        object.__setattr__(self, "theta", torch.rand(1, self.n_wires, 3, generator=generator) * 2 * math.pi - math.pi)
        object.__setattr__(self, "x", torch.randn(self.batch, self.width, generator=generator))
        object.__setattr__(self, "grad", torch.randn(self.batch, self.n_wires, generator=generator))

    @property
    def circuit(self) -> qaa.Circuit:
        return ansatz("ring", self.n_wires, 1)


@dataclass(frozen=True)
class Rival:
    """A competitor, ready to run.

    Args:
        name: as in the table.
        forward: computes the features ``(rows, n_wires)``.
        step: computes ``(features, grad_theta, grad_x)``; ``grad_x`` is None where the rival has no such gradient.
        rows: how many of the batch's rows one call computes.
        simulates: False for the yardstick.
        note: what a reader of the table must know.
    """

    name: str
    forward: Callable[[], torch.Tensor]
    step: Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]
    rows: int
    simulates: bool = True
    note: str = ""


def _differentiable(
    name: str, task: Task, features: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], note: str = ""
) -> Rival:
    """A rival that is one differentiable torch function of ``(theta, x)``."""
    theta, x = task.theta.clone().requires_grad_(), task.x.clone().requires_grad_()

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return features(theta, x)

    def step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        value = features(theta, x)
        grad_theta, grad_x = torch.autograd.grad(value, (theta, x), task.grad.to(value.dtype))
        return value, grad_theta, grad_x

    return Rival(name, forward, step, rows=task.batch, note=note)


# --------------------------------------------------------------------------------------------------------- qaa


def qaa_ops(task: Task) -> Rival:
    """This library, through its torch op."""
    circuit = task.circuit
    return _differentiable("qaa", task, lambda theta, x: qaa.ops.quantum_features(circuit, theta, x))


# --------------------------------------------------------------------------------------------------- plain torch


def _ring_of_cnots(n_wires: int) -> torch.Tensor:
    """``source[i]``: the amplitude that the CNOTs 0→1, 1→2, …, n-1→0 bring to index i."""
    index = np.arange(2**n_wires)
    source = index.copy()
    for control in range(n_wires):
        target = (control + 1) % n_wires
        control_is_on = index >> (n_wires - 1 - control) & 1
        source = source[index ^ (control_is_on << (n_wires - 1 - target))]
    return torch.from_numpy(source)


def _signs_of_z(n_wires: int) -> torch.Tensor:
    """``(2**n, n)``: the eigenvalue of Z on every wire."""
    bits = np.arange(2**n_wires)[:, None] >> np.arange(n_wires)[::-1] & 1
    return torch.from_numpy(1.0 - 2.0 * bits).float()


def _pad_and_normalize(x: torch.Tensor, n_amplitudes: int) -> torch.Tensor:
    return torch.nn.functional.pad(torch.nn.functional.normalize(x, dim=-1), (0, n_amplitudes - x.shape[-1]))


def torch_gate_by_gate(task: Task) -> Rival:
    """A statevector as most people write it: complex64, one small einsum for every gate."""
    n, signs = task.n_wires, _signs_of_z(task.n_wires)
    gates = task.circuit.gates

    def features(theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        state = _pad_and_normalize(x, 2**n).to(torch.complex64)
        angles = theta.reshape(-1)
        for gate in gates:
            if gate.name == "CNOT":
                control, target = (1 + w for w in gate.wires)
                tensor = state.reshape(-1, *[2] * n)
                off, on = tensor.unbind(control)
                on = on.flip(target - (target > control))
                state = torch.stack((off, on), control).reshape(x.shape[0], -1)
                continue
            half = angles[gate.parameters[0]] / 2
            c, s = torch.cos(half), torch.sin(half)
            tensor = state.reshape(x.shape[0], 2 ** gate.wires[0], 2, -1)
            if gate.name == "RY":
                matrix = torch.stack((c, -s, s, c)).reshape(2, 2).to(torch.complex64)
                state = torch.einsum("ij,bajc->baic", matrix, tensor).reshape(x.shape[0], -1)
            else:
                phases = torch.stack((torch.complex(c, -s), torch.complex(c, s)))
                state = (tensor * phases[None, None, :, None]).reshape(x.shape[0], -1)
        return (state.real**2 + state.imag**2) @ signs

    return _differentiable("torch, gate by gate", task, features)


def torch_kronecker(task: Task, compiled: bool) -> Rival:
    """The fastest form that plain torch allows: a layer of RY is two small real GEMMs, all RZ one diagonal, the CNOTs
    one gather; real until the first phase.
    """
    n, left = task.n_wires, task.n_wires // 2
    source, signs = _ring_of_cnots(n), _signs_of_z(n)

    def kronecker_of_ry(angles: torch.Tensor) -> torch.Tensor:
        c, s = torch.cos(angles / 2), torch.sin(angles / 2)
        rotations = torch.stack((torch.stack((c, -s), -1), torch.stack((s, c), -1)), -2)
        total = rotations[0]
        for rotation in rotations[1:]:
            total = torch.kron(total, rotation)
        return total

    def layer_of_ry(angles: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """(A (x) B) applied to rows of ``2**n`` real amplitudes: ``A S B^T`` for S of shape ``(2**left, 2**right)``."""
        a, b = kronecker_of_ry(angles[:left]), kronecker_of_ry(angles[left:])
        s = state.reshape(-1, a.shape[0], b.shape[0])
        return (a @ (s @ b.T)).reshape(state.shape)

    def features(theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        real = layer_of_ry(theta[0, :, 0], _pad_and_normalize(x, 2**n))
        phase = -signs @ theta[0, :, 1] / 2
        parts = torch.stack((real * torch.cos(phase), real * torch.sin(phase)))[..., source]
        parts = layer_of_ry(theta[0, :, 2], parts)
        return (parts[0] ** 2 + parts[1] ** 2) @ signs

    name = "torch, Kronecker" + (", compiled" if compiled else "")
    return _differentiable(name, task, torch.compile(features, dynamic=False) if compiled else features)


# ----------------------------------------------------------------------------------------------------- PennyLane


def pennylane_default_qubit(task: Task) -> Rival:
    """default.qubit with parameter broadcasting over the batch, differentiated by torch backpropagation."""
    import pennylane as qml

    n = task.n_wires

    def function(theta: torch.Tensor, x: torch.Tensor) -> Any:
        qml.AmplitudeEmbedding(x, wires=range(n), pad_with=0.0, normalize=True)
        _ring_in_pennylane(qml, theta, n)
        return [qml.expval(qml.PauliZ(w)) for w in range(n)]

    node = qml.QNode(function, qml.device("default.qubit", wires=n), interface="torch", diff_method="backprop")
    return _differentiable(
        "PennyLane default.qubit", task, lambda theta, x: torch.stack(node(theta, x), -1), "batch broadcast, backprop"
    )


def pennylane_lightning(task: Task, rows: int = 64) -> Rival:
    """lightning.qubit (C++), complex64, adjoint; it simulates row by row, so fewer rows are timed.

    The device is called with tapes that are already built, which is many times faster than a QNode for every row.
    """
    import pennylane as qml
    from pennylane.devices import ExecutionConfig

    n = task.n_wires
    device = qml.device("lightning.qubit", wires=n, c_dtype=np.complex64)
    states = _pad_and_normalize(task.x[:rows].double(), 2**n).numpy()
    theta, grad = task.theta.double().numpy(), [tuple(g) for g in task.grad[:rows].double().numpy()]

    def tape(state: np.ndarray) -> Any:
        with qml.queuing.AnnotatedQueue() as queue:
            qml.StatePrep(state, wires=range(n), validate_norm=False)
            _ring_in_pennylane(qml, theta, n)
            for w in range(n):
                qml.expval(qml.PauliZ(w))
        script = qml.tape.QuantumScript.from_queue(queue)
        script.trainable_params = list(range(1, 3 * n + 1))  # parameter 0 is the state
        return script

    tapes = tuple(tape(state) for state in states)
    config = ExecutionConfig(gradient_method="adjoint", use_device_gradient=True)
    order = [3 * w + k for w in range(n) for k in (0, 1)] + [3 * w + 2 for w in range(n)]  # as the tape's angles come

    def forward() -> torch.Tensor:
        return torch.from_numpy(np.array(device.execute(tapes)))

    def step() -> tuple[torch.Tensor, torch.Tensor, None]:
        value, products = device.execute_and_compute_vjp(tapes, grad, config)
        grad_theta = np.empty(3 * n)
        grad_theta[order] = np.sum(np.array(products), axis=0)
        return torch.from_numpy(np.array(value)), torch.from_numpy(grad_theta.reshape(1, n, 3)), None

    note = f"{rows} rows, adjoint, tapes built beforehand; gradient of the angles only"
    return Rival("PennyLane lightning.qubit", forward, step, rows=rows, note=note)


def _ring_in_pennylane(qml: Any, theta: Any, n: int) -> None:
    for w in range(n):
        qml.RY(theta[0, w, 0], wires=w)
        qml.RZ(theta[0, w, 1], wires=w)
    for w in range(n):
        qml.CNOT(wires=(w, (w + 1) % n))
    for w in range(n):
        qml.RY(theta[0, w, 2], wires=w)


# ---------------------------------------------------------------------------------------------------- yardsticks


def _adapter(name: str, task: Task, function: Callable[..., torch.Tensor], weights: Iterable[Any], note: str) -> Rival:
    """A whole adapter ``(base, x, *weights) -> base + delta`` at width d, differentiated in all but the base."""
    generator = torch.Generator().manual_seed(1)
    leaves = [task.x.clone().requires_grad_(), *(w.clone().requires_grad_() for w in weights)]
    base, grad = (torch.randn(task.x.shape, generator=generator) for _ in range(2))

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return function(base, *leaves)

    def step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        value = function(base, *leaves)
        gradients = torch.autograd.grad(value, leaves, grad)
        return value, gradients[1], gradients[0]

    return Rival(name, forward, step, rows=task.batch, simulates=False, note=note)


def qaa_adapter(task: Task) -> Rival:
    """The features, projected to width d and added to the frozen layer's output: all that LoRA does."""
    circuit = task.circuit
    up = torch.randn(task.width, task.n_wires, generator=torch.Generator().manual_seed(2))

    def adapter(base: torch.Tensor, x: torch.Tensor, theta: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return qaa.ops.project(base, qaa.ops.quantum_features(circuit, theta, x), up)

    return _adapter("qaa adapter", task, adapter, (task.theta, up), f"features, {task.n_wires} -> {task.width}, add")


def lora(task: Task, rank: int = 8) -> Rival:
    """Two GEMMs, ``d -> rank -> d``, the second of them onto the frozen layer's output."""
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(*shape, generator=generator) for shape in ((task.width, rank), (rank, task.width)))
    note = f"yardstick, no simulator: {task.width} -> {rank} -> {task.width}, add"
    return _adapter(f"torch LoRA r={rank}", task, lambda base, x, a, b: torch.addmm(base, x @ a, b), (a, b), note)


def available(task: Task) -> list[Rival]:
    """All rivals that can run here, qaa first; what is missing is named on standard error."""
    builders: list[Callable[[], Rival]] = [
        lambda: qaa_ops(task),
        lambda: torch_gate_by_gate(task),
        lambda: torch_kronecker(task, compiled=False),
        lambda: torch_kronecker(task, compiled=True),
        lambda: pennylane_default_qubit(task),
        lambda: pennylane_lightning(task),
        lambda: qaa_adapter(task),
        lambda: lora(task),
    ]
    rivals = []
    for build in builders:
        try:
            rival = build()
            rival.step()  # compiles, allocates, and shows what does not run here
            rivals.append(rival)
        except (ImportError, RuntimeError) as error:
            print(f"left out: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
    return rivals


# -------------------------------------------------------------------------------------------------- correctness


@lru_cache(maxsize=4)
def _exact(task: Task, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, the sum of grad_theta, and grad_x of the first ``rows`` rows, by the oracle, some rows at a time."""
    theta, x, grad = (t.double().numpy() for t in (task.theta, task.x[:rows], task.grad[:rows]))
    chunks = [slice(i, i + 128) for i in range(0, rows, 128)]
    value = np.concatenate([oracle.features(task.circuit, theta, x[c]) for c in chunks])
    gradients = [oracle.vjp(task.circuit, theta, x[c], grad[c]) for c in chunks]
    return value, np.sum([g for g, _ in gradients], axis=0), np.concatenate([g for _, g in gradients])


def hold_to_oracle(task: Task, rival: Rival, tolerance: float = 1e-3) -> float:
    """The largest error of the rival's features and gradients, each relative to the largest exact number.

    The tolerance finds wrong formulas and leaves room for what long sums in float32 lose; the table shows the errors.

    Raises:
        AssertionError: the error exceeds ``tolerance``.
    """
    exact_value, exact_theta, exact_x = _exact(task, rival.rows)
    value, grad_theta, grad_x = rival.step()
    pairs = [(rival.forward(), exact_value), (value, exact_value), (grad_theta, exact_theta)]
    if grad_x is not None:
        pairs.append((grad_x, exact_x))
    errors = [np.abs(ours.detach().double().numpy() - exact).max() / np.abs(exact).max() for ours, exact in pairs]
    error = float(max(errors))
    assert error < tolerance, f"{rival.name}: error {error:.2g} exceeds {tolerance:.2g}"
    return error
