"""Plain torch: gate by gate, as Kronecker products, and as one dense unitary."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.rivals.differentiable import differentiable, expectations, pad_and_normalize
from benchmarks.task import Rival, Task, blocks_of_ry, ring_of_cnots, signs_of_z


def gate_by_gate(task: Task) -> Rival:
    """A statevector as most people write it: complex64, one small einsum for every gate."""
    n, gates, signs = task.n_wires, task.gates, torch.from_numpy(signs_of_z(task.n_wires))

    def features(theta: Tensor, x: Tensor) -> Tensor:
        state = pad_and_normalize(x, n).to(torch.complex64)
        angles = theta.reshape(-1)
        for name, wires, position in gates:
            if name == "CNOT":
                control, target = (1 + w for w in wires)
                tensor = state.reshape(-1, *[2] * n)
                off, on = tensor.unbind(control)
                on = on.flip(target - (target > control))
                state = torch.stack((off, on), control).reshape(x.shape[0], -1)
                continue
            half = angles[position] / 2
            c, s = torch.cos(half), torch.sin(half)
            tensor = state.reshape(x.shape[0], 2 ** wires[0], 2, -1)
            if name == "RY":
                matrix = torch.stack((c, -s, s, c)).reshape(2, 2).to(torch.complex64)
                state = torch.einsum("ij,bajc->baic", matrix, tensor).reshape(x.shape[0], -1)
            else:
                phases = torch.stack((torch.complex(c, -s), torch.complex(c, s)))
                state = (tensor * phases[None, None, :, None]).reshape(x.shape[0], -1)
        return expectations(state, signs)

    return differentiable(task, features, rows=task.rows(2**18))


class Circuit:
    """``ring`` on real rows: a layer of RY is two small real GEMMs, all RZ one diagonal, the CNOTs one gather."""

    def __init__(self, n_wires: int) -> None:
        self.left = n_wires // 2
        self.source = torch.from_numpy(ring_of_cnots(n_wires))
        self.signs = torch.from_numpy(signs_of_z(n_wires))

    def __call__(self, theta: Tensor, real: Tensor) -> Tensor:
        """Real and imaginary parts, stacked; real until the first phase."""
        first, *others = blocks_of_ry(theta)
        parts = self._rotate(first, real)
        for layer, angles in enumerate(others):
            phase = -self.signs @ theta[layer, :, 1] / 2
            c, s = torch.cos(phase), torch.sin(phase)
            if layer == 0:
                turned = torch.stack((parts * c, parts * s))
            else:
                turned = torch.stack((parts[0] * c - parts[1] * s, parts[0] * s + parts[1] * c))
            parts = self._rotate(angles, turned[..., self.source])
        return parts

    def _rotate(self, angles: Tensor, state: Tensor) -> Tensor:
        """(A (x) B) applied to rows of ``2**n`` real amplitudes: ``A S B^T`` for S of shape ``(2**left, 2**right)``."""
        a, b = _kronecker_of_ry(angles[: self.left]), _kronecker_of_ry(angles[self.left :])
        s = state.reshape(-1, a.shape[0], b.shape[0])
        return (a @ (s @ b.T)).reshape(state.shape)


def _kronecker_of_ry(angles: Tensor) -> Tensor:
    c, s = torch.cos(angles / 2), torch.sin(angles / 2)
    rotations = torch.stack((torch.stack((c, -s), -1), torch.stack((s, c), -1)), -2)
    total = rotations[0]
    for rotation in rotations[1:]:
        total = torch.kron(total, rotation)
    return total


def kronecker(task: Task) -> Rival:
    """The fastest form that plain torch allows, but for the compiler."""
    return differentiable(task, _kronecker(task), rows=task.rows(2**17))


def kronecker_compiled(task: Task) -> Rival:
    return differentiable(task, _compiled(_kronecker(task)), rows=task.rows(2**17))


def _compiled(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """For one shape. Tasks share the function's code, which the compiler would leave to Python after eight of them."""
    torch._dynamo.config.recompile_limit = 1000
    compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(function, dynamic=False)
    return compiled


def _kronecker(task: Task) -> Callable[[Tensor, Tensor], Tensor]:
    circuit = Circuit(task.n_wires)

    def features(theta: Tensor, x: Tensor) -> Tensor:
        re, im = circuit(theta, pad_and_normalize(x, task.n_wires))
        value: Tensor = (re**2 + im**2) @ circuit.signs
        return value

    return features


def dense(task: Task) -> Rival:
    """The unitary, built once a call by sending the identity through the circuit, then one GEMM for the whole batch."""
    return differentiable(task, _dense(task))


def dense_compiled(task: Task) -> Rival:
    return differentiable(task, _compiled(_dense(task)))


def _dense(task: Task) -> Callable[[Tensor, Tensor], Tensor]:
    circuit, identity = Circuit(task.n_wires), torch.eye(task.width, 2**task.n_wires)

    def features(theta: Tensor, x: Tensor) -> Tensor:
        rows = circuit(theta, identity)  # row i: real and imaginary part of U |i>
        x = torch.nn.functional.normalize(x, dim=-1)
        value: Tensor = ((x @ rows[0]) ** 2 + (x @ rows[1]) ** 2) @ circuit.signs
        return value

    return features
