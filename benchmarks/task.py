"""What every rival computes, and what a rival is. NumPy only: this module is read in environments without torch or qaa.

The task is one QAA adapter's circuit: ``n`` wires, rows of width ``d`` padded to ``2**n`` and normalized, ``ring`` with
``layers`` layers, ``<Z>`` on every wire, float32, gradients with respect to the angles and the rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Task:
    """One batch, with the angles and with the gradient at the features; the same numbers in every process.

    ``in_parts`` lets a rival compute a part of the rows a call, if that is faster per row.
    """

    n_wires: int = 10
    width: int = 768
    batch: int = 1024
    layers: int = 1
    seed: int = 0
    in_parts: bool = True

    @cached_property
    def theta(self) -> Array:
        """Angles in radians, ``(layers, n_wires, 3)``: RY, RZ, and RY after the CNOTs."""
        angles = self._random(0).uniform(-math.pi, math.pi, (self.layers, self.n_wires, 3))
        return angles.astype(np.float32)

    @cached_property
    def x(self) -> Array:
        """Rows, ``(batch, width)``."""
        return self._random(1).standard_normal((self.batch, self.width), np.float32)

    @cached_property
    def grad(self) -> Array:
        """The incoming gradient, ``(batch, n_wires)``."""
        return self._random(2).standard_normal((self.batch, self.n_wires), np.float32)

    @property
    def gates(self) -> list[tuple[str, tuple[int, ...], int]]:
        """``ring`` as ``(name, wires, position of the angle in theta.ravel())``; -1 for a CNOT."""
        n = self.n_wires
        gates: list[tuple[str, tuple[int, ...], int]] = []
        for layer in range(self.layers):
            first = [3 * (layer * n + w) for w in range(n)]
            for w in range(n):
                gates += [("RY", (w,), first[w]), ("RZ", (w,), first[w] + 1)]
            gates += [("CNOT", (w, (w + 1) % n), -1) for w in range(n)]
            gates += [("RY", (w,), first[w] + 2) for w in range(n)]
        return gates

    def rows(self, amplitudes: int) -> int:
        """A part of the batch whose states have about so many amplitudes a thread: small enough for the caches."""
        if not self.in_parts:
            return self.batch
        threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
        return min(self.batch, max(1, threads * amplitudes >> self.n_wires))

    def note(self, rows: int, text: str = "") -> str:
        """What a reader of the table must know of a rival that computes so many rows at a time."""
        parts = [f"{rows} rows at a time"] if rows < self.batch else []
        return ", ".join([*parts, text] if text else parts)

    def __str__(self) -> str:
        return f"n = {self.n_wires}, d = {self.width}, L = {self.layers}, B = {self.batch}"

    def _random(self, stream: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, stream))


@dataclass(frozen=True)
class Rival:
    """A competitor, ready to run.

    Args:
        forward: computes the features ``(rows, n_wires)``; None where only a whole step makes sense.
        step: computes ``(features, grad_theta, grad_x)``; ``grad_x`` is None where the rival has no such gradient, and
            step is None where it has none at all.
        rows: how many of the batch's rows one call computes.
        note: what a reader of the table must know.
    """

    forward: Callable[[], Any] | None
    step: Callable[[], tuple[Any, Any, Any]] | None
    rows: int
    note: str = ""


def ring_of_cnots(n_wires: int) -> Array:
    """``source[i]``: the amplitude that the CNOTs 0→1, 1→2, …, n-1→0 bring to index i."""
    index = np.arange(2**n_wires)
    source = index.copy()
    for control in range(n_wires):
        target = (control + 1) % n_wires
        control_is_on = index >> (n_wires - 1 - control) & 1
        source = source[index ^ (control_is_on << (n_wires - 1 - target))]
    return source


def signs_of_z(n_wires: int) -> Array:
    """``(2**n, n)``: the eigenvalue of Z on every wire."""
    bits = np.arange(2**n_wires)[:, None] >> np.arange(n_wires)[::-1] & 1
    return (1.0 - 2.0 * bits).astype(np.float32)


def blocks_of_ry(theta: Any) -> list[Any]:
    """Angles ``(L, n, 3)`` as L + 1 layers of RY, one before, between and after L layers of RZ and CNOTs.

    The last RY of a layer and the first of the next one are one rotation, by the sum of their angles.
    """
    last = len(theta) - 1
    return [theta[0, :, 0], *(theta[i, :, 2] + theta[i + 1, :, 0] for i in range(last)), theta[last, :, 2]]


def embed(x: Array, n_wires: int) -> Array:
    """Rows of unit length, padded to ``2**n`` amplitudes."""
    psi = np.zeros((len(x), 2**n_wires), x.dtype)
    psi[:, : x.shape[1]] = x / np.linalg.norm(x, axis=1, keepdims=True)
    return psi
