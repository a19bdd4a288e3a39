"""Quantum-amplitude embedded adaptation: batched circuit kernels with adjoint gradients, and a PEFT method on top.

``import qaa`` needs NumPy alone. The torch side is in :mod:`qaa.ops` (custom ops), :mod:`qaa.nn` (modules) and
:mod:`qaa.peft` (PEFT methods), JAX's in :mod:`qaa.jax`, each imported where it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from qaa import arrays, cuda, noise, shots
from qaa.circuit import Circuit, Gate, Readout, ansatz

__version__ = "0.1.0"
__all__ = ["Circuit", "Gate", "Readout", "__version__", "ansatz", "arrays", "cuda", "noise", "shots"]

_ON_FIRST_USE = ("jax", "nn", "ops", "peft", "pennylane")


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return importlib.import_module(f"qaa.{name}")
    raise AttributeError(f"module 'qaa' has no attribute {name!r}")
