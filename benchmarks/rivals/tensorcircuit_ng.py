"""TensorCircuit-NG on its JAX backend: one state's circuit, vectorized over the batch and jitted."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import tensorcircuit

from benchmarks.rivals.jax_by_hand import jitted
from benchmarks.task import Rival, Task, signs_of_z


def build(task: Task) -> Rival:
    """The state is read once and gives <Z> on every wire: one contraction instead of n."""
    tensorcircuit.set_backend("jax")
    tensorcircuit.set_dtype("complex64")
    n, gates, signs = task.n_wires, task.gates, jnp.asarray(signs_of_z(task.n_wires))

    def of_one_state(theta: Any, x: Any) -> Any:
        psi = jnp.pad(x / jnp.linalg.norm(x), (0, 2**n - x.shape[0])).astype(jnp.complex64)
        circuit, angles = tensorcircuit.Circuit(n, inputs=psi), theta.reshape(-1)
        for name, wires, position in gates:
            if name == "CNOT":
                circuit.cnot(*wires)
            elif name == "RY":
                circuit.ry(*wires, theta=angles[position])
            else:
                circuit.rz(*wires, theta=angles[position])
        state = circuit.state()
        return (state.real**2 + state.imag**2) @ signs

    return jitted(task, jax.vmap(of_one_state, in_axes=(None, 0)), "JAX backend, vmap, jit")
