"""Circuit, readout and normalization as one value, its text, and the compiled plan that belongs to it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from qaa import _core
from qaa.circuit import Circuit, Readout, check_circuit

#: Rewrites of the plan compiler; naming some in QAA_PLAN_WITHOUT (comma-separated) switches them off, for tests.
REWRITES = ("fuse", "rename", "absorb", "expand", "real", "tangent", "link")


@dataclass(frozen=True)
class Program:
    """What is computed for each row: ``readout(U(theta) x)``, with ``x`` normalized first or not.

    ``str`` and :meth:`parse` are inverse to each other; the text is how a program passes through ``torch.ops``.
    """

    circuit: Circuit
    readout: Readout
    normalize: bool

    def __reduce__(self) -> tuple[type[Program], tuple[Circuit, Readout, bool]]:
        return Program, (self.circuit, self.readout, self.normalize)  # the plan is made again

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        return f"{self.circuit} | {self.readout} | {'normalize' if self.normalize else 'as is'}"

    @staticmethod
    def parse(text: str) -> Program:
        """The program whose ``str`` is ``text``."""
        if not isinstance(text, str):
            raise TypeError(f"expected a program as a str, received {type(text).__name__}")
        return _parsed(text)

    @property
    def n_outputs(self) -> int:
        """Features per row."""
        return self.readout.n_outputs

    @property
    def is_complex(self) -> bool:
        """Whether the features are complex amplitudes."""
        return self.readout.kind == "state"

    @cached_property
    def plan(self) -> _core.Plan:
        """The compiled plan, made once."""
        return _plan(self)

    def check_width(self, width: int) -> None:
        """Raises ``ValueError`` unless rows of ``width`` numbers fit into the circuit's amplitudes."""
        n_wires = self.circuit.n_wires
        if not 1 <= width <= 2**n_wires:
            raise ValueError(
                f"expected x with a last dimension from 1 to {2**n_wires} for {n_wires} wires, received {width}"
            )

    def check_theta(self, shape: Sequence[int], vectors: Sequence[int] = ()) -> int:
        """How many axes of ``vectors``, the leading shape of x, theta has before the circuit's own; mostly none.

        Raises ``ValueError`` unless ``shape`` is ``(*vectors[:count], *circuit.parameter_shape)`` for such a count.
        """
        own = self.circuit.parameter_shape
        count, shape = len(shape) - len(own), tuple(shape)
        if count == 0 and shape == own:  # of unequal lengths, sizes that a graph leaves open would be compared
            return 0
        vectors = tuple(vectors)
        if count <= 0 or shape[count:] != own or not vectors:
            raise ValueError(f"expected theta of shape {own}, received {shape}")
        if shape[:count] != vectors[:count]:
            raise ValueError(
                f"expected theta of shape {own}, or with leading dimensions of x, {vectors}, before it, "
                f"received {shape}"
            )
        return count


def program(circuit: Circuit, readout: str | Sequence[str] | Readout, normalize: bool) -> Program:
    """The program of a circuit, a readout in any accepted form, and a normalization."""
    check_circuit(circuit)
    if not isinstance(normalize, bool):
        if not isinstance(normalize, np.bool_):
            raise TypeError(f"expected normalize to be a bool, received {type(normalize).__name__}")
        normalize = bool(normalize)
    if isinstance(readout, (str, Readout)):
        return _program(circuit, readout, normalize)
    return Program(circuit, Readout.parse(readout, circuit.n_wires), normalize)


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Program:
    parts = text.split(" | ")
    if len(parts) != 3 or parts[2] not in ("normalize", "as is"):
        raise ValueError(f"expected 'CIRCUIT | READOUT | normalize' or '... | as is', received {text[:80]!r}")
    circuit = Circuit.parse(parts[0])
    readout: str | list[str] = parts[1]
    if "[" not in parts[1]:
        readout = parts[1].split(",")
    elif "/" in parts[1]:  # of a circuit that is known, a part has been counted
        raise ValueError(f"expected a readout 'probs[:K]' or 'state[:K]', received {parts[1][:80]!r}")
    return Program(circuit, Readout.parse(readout, circuit.n_wires), parts[2] == "normalize")


@lru_cache(maxsize=1024)
def _program(circuit: Circuit, readout: str | Readout, normalize: bool) -> Program:
    return Program(circuit, Readout.parse(readout, circuit.n_wires), normalize)


@lru_cache(maxsize=1024)
def _plan(program: Program) -> _core.Plan:
    without = [name for name in os.environ.get("QAA_PLAN_WITHOUT", "").split(",") if name]
    for name in without:
        if name not in REWRITES:
            raise ValueError(f"expected QAA_PLAN_WITHOUT to name rewrites among {', '.join(REWRITES)}, received {name}")
    return _core.Plan(**plan_arguments(program) | {name: name not in without for name in REWRITES})


def plan_arguments(program: Program) -> dict[str, Any]:
    """What the core makes plans of, exact or noisy, by its names."""
    circuit, readout = program.circuit, program.readout
    return {
        "n_wires": circuit.n_wires,
        "n_parameters": circuit.n_parameters,
        "gates": [(gate.name, gate.wires, gate.parameters) for gate in circuit.gates],
        "kind": getattr(_core.ReadoutKind, readout.kind),
        "n_outputs": readout.n_outputs,
        "paulis": list(readout.paulis),
        "normalize": program.normalize,
    }
