"""Every rival is held to the float64 oracle of the tests before it is timed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from benchmarks.task import Array, Task
from qaa import ansatz

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracle

#: Finds wrong formulas and leaves room for what long sums in float32 lose; the tables show the errors.
TOLERANCE = 1e-3
_BLOCK = 64


@dataclass(frozen=True)
class Errors:
    """What a rival's answer is off by.

    Args:
        largest: of features and gradients, each difference relative to the largest exact number.
        theta: of the gradient of the angles, ``||g - exact|| / ||exact||``; None where there is none.
    """

    largest: float
    theta: float | None


@lru_cache(maxsize=512)
def _block(task: Task, start: int, stop: int) -> tuple[Array, Array, Array]:
    circuit = ansatz("ring", task.n_wires, task.layers)
    theta, x, grad = (a.astype(float) for a in (task.theta, task.x[start:stop], task.grad[start:stop]))
    return oracle.features(circuit, theta, x), *oracle.vjp(circuit, theta, x, grad)


def exact(task: Task, rows: int) -> dict[str, Array]:
    """Features and gradients of the first ``rows`` rows, some rows at a time."""
    blocks = [_block(task, i, min(i + _BLOCK, rows)) for i in range(0, rows, _BLOCK)]
    features, theta, x = zip(*blocks, strict=True)
    value = np.concatenate(features)
    return {"forward": value, "features": value, "theta": np.sum(theta, axis=0), "x": np.concatenate(x)}


def hold_to_oracle(task: Task, rows: int, answer: Mapping[str, Array]) -> Errors:
    """Compares what a rival computed of the first ``rows`` rows: any of ``forward, features, theta, x``.

    Raises:
        AssertionError: an error exceeds the tolerance, or a shape is wrong.
    """
    expected = exact(task, rows)
    largest = 0.0
    for name, ours in answer.items():
        assert ours.shape == expected[name].shape, f"{name} has shape {ours.shape}, not {expected[name].shape}"
        error = float(np.abs(ours - expected[name]).max() / np.abs(expected[name]).max())
        assert error < TOLERANCE, f"{name} is off by {error:.2g}, more than {TOLERANCE:.2g}"
        largest = max(largest, error)
    theta = None
    if "theta" in answer:
        difference = np.linalg.norm(answer["theta"] - expected["theta"])
        theta = float(difference / np.linalg.norm(expected["theta"]))
    return Errors(largest, theta)
