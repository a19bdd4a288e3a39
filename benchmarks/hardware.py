"""What one vector would cost on a quantum device: two-qubit gates and depth, by Qiskit's transpiler.

``python -m benchmarks.hardware`` embeds a vector into the amplitudes (Qiskit's ``StatePreparation``), appends ``ring``
with one layer, transpiles for the gates rz, sx, x, cz and several maps of couplings, and writes the table into
``docs/hardware.md``. No device is asked, and no error is simulated.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import qaa

BASIS = ["rz", "sx", "x", "cz"]
WIRES = (4, 6, 8, 10)
MAPS = ("all to all", "line", "heavy-hex")
LEVELS = (1, 3)
SEED = 0
ERROR = 1e-3  # of one CZ, for the last column
BEGIN, END = "<!-- begin: python -m benchmarks.hardware -->", "<!-- end -->"
HEADER = (
    "| wires | couplings | level | CZ, embedding | CZ, `ring` | CZ, both | depth | depth in CZ | no CZ errs |",
    "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
)


def embedding(x: NDArray[Any], n_wires: int) -> Any:
    """The Qiskit circuit that takes |0...0> to ``pad(x) / ||x||``, wire 0 the most significant bit."""
    from qiskit import QuantumCircuit
    from qiskit.circuit.library import StatePreparation

    amplitudes = np.zeros(2**n_wires)
    amplitudes[: len(x)] = x / np.linalg.norm(x)
    circuit = QuantumCircuit(n_wires)
    circuit.append(StatePreparation(amplitudes), range(n_wires)[::-1])  # Qiskit's last qubit is the most significant
    return circuit


def couplings(name: str, n_wires: int) -> Any:
    """Which qubits have a CZ: all pairs (None), a line of ``n_wires``, or the heavy-hex lattice of 19 qubits."""
    from qiskit.transpiler import CouplingMap

    if name == "all to all":
        return None
    return CouplingMap.from_line(n_wires) if name == "line" else CouplingMap.from_heavy_hex(3)


def rows(x: NDArray[Any]) -> list[str]:
    """The lines of the table for a vector of up to 2**16 numbers."""
    from qiskit import transpile

    n_wires = max(1, (len(x) - 1).bit_length())
    circuit = qaa.ansatz("ring", n_wires)
    theta = np.random.default_rng(SEED).uniform(-np.pi, np.pi, circuit.parameter_shape)
    prepare, ring = embedding(x, n_wires), circuit.to_qiskit(theta)
    lines = []
    for name in MAPS:
        for level in LEVELS:
            options: dict[str, Any] = {
                "basis_gates": BASIS,
                "coupling_map": couplings(name, n_wires),
                "optimization_level": level,
                "seed_transpiler": SEED,
            }
            alone = [transpile(part, **options).count_ops().get("cz", 0) for part in (prepare, ring)]
            both = transpile(prepare.compose(ring), **options)
            n_cz = both.count_ops().get("cz", 0)
            depths = both.depth(), both.depth(lambda instruction: instruction.operation.name == "cz")
            figures = [n_wires, name, level, *alone, n_cz, *depths]
            cells = [f"{f:,}" if isinstance(f, int) else f for f in figures]
            lines.append(f"| {' | '.join(cells)} | {(1 - ERROR) ** n_cz:.0%} |")
    return lines


def put_between(text: str, lines: list[str], begin: str = BEGIN) -> str:
    """``text`` with ``lines`` in place of what stands between the two marks."""
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(END)
    if not found or not found_end:
        raise ValueError(f"expected a document with the marks {begin!r} and {END!r}, received one without")
    return "\n".join([before + begin, *lines, END + after])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hardware", description=__doc__.splitlines()[0])
    parser.add_argument("--wires", type=int, nargs="+", default=WIRES, help="random vectors of 2**n numbers")
    parser.add_argument("--input", type=Path, help="a vector in a .npy file; its rows are printed and not written")
    parser.add_argument("--output", type=Path, default=Path("docs/hardware.md"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.input:
        print("\n".join([*HEADER, *rows(np.load(options.input, allow_pickle=False))]))
        return 0
    lines = list(HEADER)
    for n_wires in options.wires:
        lines += rows(np.random.default_rng(SEED).standard_normal(2**n_wires))
        print("\n".join(lines[-len(MAPS) * len(LEVELS) :]), flush=True)
    text = options.output.read_text(encoding="utf-8")
    options.output.write_text(put_between(text, lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
