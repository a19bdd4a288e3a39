"""``make gpu-check``: all that only a GPU can tell. The tests on it, compute-sanitizer, then times by CUDA events.

Times are of the default circuit at the sizes of LLM layers, in bfloat16: the kernels, the same in plain torch (each
layer of RY two small matrix products, as ``benchmarks/rivals/torch_by_hand.py`` has it), and LoRA r = 8.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qaa
import qaa.ops
from benchmarks.rivals.differentiable import pad_and_normalize
from benchmarks.rivals.torch_by_hand import Circuit

SIZES = [(10, 768), (11, 2048), (12, 4096), (13, 8192)]  # wires, width
TOKENS = 8192
GOALS = {"forward": 60.0, "forward + adjoint": 250.0}  # microseconds at 11 wires on an H100


def microseconds(call: Callable[[], Any], repeats: int = 30) -> float:
    """The median time of a call on the GPU; a flush of the second-level cache comes before each."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    times: list[float] = []
    for repeat in range(repeats + 5):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 5:
            times.append(1000 * start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def directions(function: Callable[..., Tensor], *leaves: Tensor) -> dict[str, float]:
    """Times of a differentiable function without and with its gradients."""
    grad = torch.randn_like(function(*leaves))

    def forward() -> None:
        with torch.no_grad():
            function(*leaves)

    def step() -> None:
        torch.autograd.grad(function(*leaves), leaves, grad)

    return {"forward": microseconds(forward), "forward + adjoint": microseconds(step)}


def measure(n_wires: int, width: int) -> dict[str, dict[str, float]]:
    """Times of qaa, plain torch and LoRA for one layer's width."""
    circuit = qaa.ansatz("ring", n_wires)
    by_hand = Circuit(n_wires)
    by_hand.source, by_hand.signs = by_hand.source.cuda(), by_hand.signs.cuda()
    theta = torch.rand(circuit.parameter_shape, device="cuda", requires_grad=True)
    x = torch.randn(TOKENS, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    down = torch.randn(8, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    up = torch.randn(width, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def in_torch(theta: Tensor, x: Tensor) -> Tensor:
        re, im = by_hand(theta, pad_and_normalize(x.float(), n_wires))
        features: Tensor = (re**2 + im**2) @ by_hand.signs
        return features

    return {
        "qaa": directions(lambda theta, x: qaa.ops.quantum_features(circuit, theta, x), theta, x),
        "torch, two matrix products a layer": directions(in_torch, theta, x),
        "LoRA r = 8": directions(lambda x, down, up: x @ down.T @ up.T, x, down, up),
    }


def sanitize() -> dict[str, str]:
    """Verdicts of compute-sanitizer over a few tests; empty where it is not installed."""
    if shutil.which("compute-sanitizer") is None:
        return {}
    chosen = "(test_against_the_oracle and float32 and (6 or 9 or 10 or 11)) or extreme or empty"
    verdicts = {}
    for tool in ("memcheck", "racecheck", "initcheck"):
        checked = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        tests = [sys.executable, "-m", "pytest", "-q", "tests/test_cuda.py", "-k", chosen]
        done = subprocess.run([*checked, *tests], check=False)
        verdicts[tool] = "clean" if done.returncode == 0 else f"exit status {done.returncode}"
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="Checks and times the CUDA kernels.")
    parser.add_argument("--output", type=Path, default=Path("reports/gpu/results.json"))
    output: Path = parser.parse_args().output
    if not torch.cuda.is_available() or not qaa.cuda.is_available():
        seen = "with" if torch.cuda.is_available() else "without"
        built = "with" if qaa.cuda.is_built() else "without"
        print(
            f"expected a GPU that torch and qaa can use, received torch {torch.__version__} {seen} a GPU "
            f"and qaa {built} CUDA kernels",
            file=sys.stderr,
        )
        return 1
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_cuda.py"], check=False).returncode
    verdicts = sanitize()
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tokens": TOKENS,
        "tests": "passed" if tests == 0 else f"exit status {tests}",
        "sanitizer": verdicts or "not installed",
        "microseconds": {},
    }
    print(f"\n{results['device']}, {TOKENS} tokens in bfloat16, microseconds")
    for n_wires, width in SIZES:
        times = results["microseconds"][f"n = {n_wires}, d = {width}"] = measure(n_wires, width)
        for name, of_direction in times.items():
            cells = "".join(f"{direction:>20} {value:9.1f}" for direction, value in of_direction.items())
            print(f"n = {n_wires:2}, d = {width:5}  {name:36}{cells}")
    print("goals at n = 11 on an H100:", ", ".join(f"{name} at most {goal:.0f}" for name, goal in GOALS.items()))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")
    return 0 if tests == 0 and all(verdict == "clean" for verdict in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
