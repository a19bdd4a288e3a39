"""What noise after every gate does to the features of the paper's circuit: ``<Z>`` of ``ring`` on 10 wires, 4 layers.

``python -m benchmarks.noise`` compares noisy and exact features of normally distributed vectors, by a straight line
through all wires and vectors, and writes the table into ``docs/hardware.md``. Half a minute on one core.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import qaa
from benchmarks.hardware import put_between

WIRES, LAYERS, VECTORS, TRAJECTORIES, SEED = 10, 4, 32, 1000, 0
RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03)
BEGIN = "<!-- begin: python -m benchmarks.noise -->"
HEADER = (
    "| p | no error at all | slope, depolarizing | correlation | slope, damping | offset | correlation |",
    "|---:|---:|---:|---:|---:|---:|---:|",
)


def line_through(exact: NDArray[Any], noisy: qaa.noise.Estimate) -> tuple[float, float, float]:
    """Slope, offset and correlation of ``noisy`` over ``exact``, the scatter of trajectories taken out of the last."""
    covariance = np.cov(exact.ravel(), noisy.features.ravel())
    slope = covariance[0, 1] / covariance[0, 0]
    spread = covariance[1, 1] - np.mean(noisy.standard_error**2)
    correlation = covariance[0, 1] / np.sqrt(covariance[0, 0] * max(spread, 1e-300))
    return slope, noisy.features.mean() - slope * exact.mean(), correlation


def row(rate: float, wires: int, layers: int, vectors: int, trajectories: int) -> str:
    """The line of the table for one probability."""
    circuit = qaa.ansatz("ring", wires, layers)
    rng = np.random.default_rng(SEED)
    theta = rng.uniform(-np.pi, np.pi, circuit.parameter_shape)
    x = rng.standard_normal((vectors, 2**wires))
    exact = qaa.arrays.forward(circuit, theta, x)
    options: dict[str, Any] = {"trajectories": trajectories, "seed": SEED}
    flips, losses = (
        line_through(exact, qaa.noise.estimate(circuit, theta, x.astype(np.float32), noise=noise, **options))
        for noise in (qaa.noise.NoiseModel(depolarizing=rate), qaa.noise.NoiseModel(amplitude_damping=rate))
    )
    places = sum(len(gate.wires) for gate in circuit.gates)
    return (
        f"| {rate:g} | {(1 - rate) ** places:.0%} | {flips[0]:.2f} | {flips[2]:.2f} | {losses[0]:.2f} | "
        f"{losses[1]:+.4f} | {losses[2]:.2f} |"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noise", description=__doc__.splitlines()[0])
    for name, value in (("wires", WIRES), ("layers", LAYERS), ("vectors", VECTORS), ("trajectories", TRAJECTORIES)):
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("docs/hardware.md"), help="default: %(default)s")
    options = vars(parser.parse_args(arguments))
    output: Path = options.pop("output")
    lines = list(HEADER)
    for rate in RATES:
        lines.append(row(rate, **options))
        print(lines[-1], flush=True)
    output.write_text(put_between(output.read_text(encoding="utf-8"), lines, BEGIN), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
