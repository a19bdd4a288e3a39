"""Plain JAX, batched and jitted: the same Kronecker products as in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.task import Rival, Task, blocks_of_ry, ring_of_cnots, signs_of_z


def kronecker(task: Task) -> Rival:
    """Real until the first phase; a layer of RY is two small real GEMMs, all RZ one diagonal, the CNOTs one gather."""
    n, left = task.n_wires, task.n_wires // 2
    source, signs = jnp.asarray(ring_of_cnots(n)), jnp.asarray(signs_of_z(n))

    def kronecker_of_ry(angles: Any) -> Any:
        total = jnp.ones((1, 1))
        for angle in angles:
            c, s = jnp.cos(angle / 2), jnp.sin(angle / 2)
            total = jnp.kron(total, jnp.stack((jnp.stack((c, -s)), jnp.stack((s, c)))))
        return total

    def rotate(angles: Any, parts: Any) -> Any:
        a, b = kronecker_of_ry(angles[:left]), kronecker_of_ry(angles[left:])
        s = parts.reshape(-1, a.shape[0], b.shape[0])
        return (a @ (s @ b.T)).reshape(parts.shape)

    def features(theta: Any, x: Any) -> Any:
        unit = x / jnp.linalg.norm(x, axis=1, keepdims=True)
        first, *others = blocks_of_ry(theta)
        parts = rotate(first, jnp.pad(unit, ((0, 0), (0, 2**n - x.shape[1]))))
        for layer, angles in enumerate(others):
            phase = -signs @ theta[layer, :, 1] / 2
            c, s = jnp.cos(phase), jnp.sin(phase)
            if layer == 0:
                turned = jnp.stack((parts * c, parts * s))
            else:
                turned = jnp.stack((parts[0] * c - parts[1] * s, parts[0] * s + parts[1] * c))
            parts = rotate(angles, turned[..., source])
        return (parts[0] ** 2 + parts[1] ** 2) @ signs

    return jitted(task, features)


def jitted(task: Task, features: Callable[[Any, Any], Any], note: str = "") -> Rival:
    """A rival that is one differentiable JAX function of the angles and the rows."""
    rows = task.rows(2**17)
    theta, x, grad = jnp.asarray(task.theta), jnp.asarray(task.x[:rows]), jnp.asarray(task.grad[:rows])

    def value_and_gradients(theta: Any, x: Any, grad: Any) -> Any:
        value, pull_back = jax.vjp(features, theta, x)
        return value, *pull_back(grad)

    compiled, compiled_step = jax.jit(features), jax.jit(value_and_gradients)

    def forward() -> Any:
        return jax.block_until_ready(compiled(theta, x))

    def step() -> Any:
        return jax.block_until_ready(compiled_step(theta, x, grad))

    return Rival(forward, step, rows, task.note(rows, note))
