"""Pure NumPy: Kronecker products forward, and the adjoint written out."""

from __future__ import annotations

import numpy as np

from benchmarks.task import Array, Rival, Task, blocks_of_ry, embed, ring_of_cnots, signs_of_z


def kronecker(task: Task) -> Rival:
    """Parts ``(parts, rows, 2**n)`` are one real array before the first phase and two, Re and Im, after it.

    The adjoint undoes the circuit on the state and on its cotangent; rotations commute within their layer, so that all
    derivatives of a layer of RY are read from one pair of arrays.
    """
    n, rows = task.n_wires, task.rows(2**16)
    theta, x, grad = task.theta, task.x[:rows], task.grad[:rows]
    left = n // 2
    shape = (-1, 2**left, 2 ** (n - left))
    source, signs = ring_of_cnots(n), signs_of_z(n)
    back = np.argsort(source)

    def matrices(angles: Array) -> tuple[Array, Array]:
        c, s = np.cos(angles / 2), np.sin(angles / 2)
        rotations = np.stack((np.stack((c, -s), -1), np.stack((s, c), -1)), -2)
        total = [np.ones((1, 1), np.float32), np.ones((1, 1), np.float32)]
        for w, rotation in enumerate(rotations):
            side = 0 if w < left else 1
            total[side] = np.kron(total[side], rotation)
        return total[0], total[1]

    def rotate(a: Array, b: Array, parts: Array) -> Array:
        """``A S B^T`` for every row S of shape ``(2**left, 2**right)``."""
        turned: Array = (a @ (parts.reshape(shape) @ b.T)).reshape(parts.shape)
        return turned

    def phases(layer: int) -> tuple[Array, Array]:
        phase = -signs @ theta[layer, :, 1] / 2
        return np.cos(phase), np.sin(phase)

    def run(psi: Array) -> Array:
        first, *others = blocks_of_ry(theta)
        parts = rotate(*matrices(first), psi[None])
        for layer, angles in enumerate(others):
            c, s = phases(layer)
            turned = np.empty((2, *psi.shape), np.float32)
            np.multiply(parts[0], c, out=turned[0])
            np.multiply(parts[0], s, out=turned[1])
            if layer > 0:
                turned[0] -= parts[1] * s
                turned[1] += parts[1] * c
            parts = rotate(*matrices(angles), turned[..., source])
        return parts

    def derivatives_of_ry(bra: Array, ket: Array) -> Array:
        """``<bra| d/da RY(a) ket>`` on every wire, which is ``<bra| -iY/2 ket>`` with the rotated ket."""
        gradients = np.empty(n, np.float32)
        for w in range(n):
            b, k = (v.reshape(-1, 2, 2 ** (n - 1 - w)) for v in (bra, ket))
            gradients[w] = float(np.vdot(b[:, 1], k[:, 0])) - float(np.vdot(b[:, 0], k[:, 1]))
        return gradients / 2

    def forward() -> Array:
        value: Array = np.sum(run(embed(x, n)) ** 2, axis=0) @ signs
        return value

    def step() -> tuple[Array, Array, Array]:
        norm = np.linalg.norm(x, axis=1, keepdims=True)
        psi = embed(x, n)
        ket = run(psi)
        value = np.sum(ket**2, axis=0) @ signs
        bra = 2 * (grad @ signs.T) * ket
        grad_theta = np.zeros_like(theta)
        blocks = blocks_of_ry(theta)
        for layer in reversed(range(task.layers)):
            turns = derivatives_of_ry(bra, ket)  # of the sum of two angles, so of each of them
            grad_theta[layer, :, 2] += turns
            if layer + 1 < task.layers:
                grad_theta[layer + 1, :, 0] += turns
            a, b = matrices(blocks[layer + 1])
            ket, bra = rotate(a.T, b.T, ket)[..., back], rotate(a.T, b.T, bra)[..., back]
            overlap = np.sum(bra[0] * ket[1] - bra[1] * ket[0], axis=0)  # Re <bra| -iZ/2 ket> = signs * Im / 2
            grad_theta[layer, :, 1] = overlap @ signs / 2
            c, s = phases(layer)
            ket = np.stack((c * ket[0] + s * ket[1], c * ket[1] - s * ket[0]))
            bra = np.stack((c * bra[0] + s * bra[1], c * bra[1] - s * bra[0]))
            if layer == 0:  # the state is real here, and so is what matters of its cotangent
                ket, bra = ket[:1], bra[:1]
        grad_theta[0, :, 0] += derivatives_of_ry(bra, ket)
        a, b = matrices(blocks[0])
        grad_unit = rotate(a.T, b.T, bra)[0, :, : task.width]
        unit = psi[:, : task.width]
        grad_x = (grad_unit - unit * np.sum(unit * grad_unit, axis=1, keepdims=True)) / norm
        return value, grad_theta, grad_x

    return Rival(forward, step, rows, task.note(rows, "adjoint written out"))
