"""``make gpu-check``: all that only a GPU can tell. Tests on it, compute-sanitizer, the kernels' times, training steps.

A layer's times are medians of CUDA events around one replay of a CUDA graph, so that nothing waits for Python, each
after a flush of the second-level cache; a training step's are of PEFT models as users run them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qaa
import qaa.ops
from benchmarks.rivals.differentiable import pad_and_normalize
from benchmarks.rivals.torch_by_hand import Circuit

LAYERS = [(10, 768, 1), (11, 2048, 1), (12, 4096, 1), (13, 8192, 1), (10, 768, 4), (12, 4096, 4)]  # wires, width, L
TOKENS = 8192
GOALS = {"forward": 60.0, "forward + adjoint": 250.0}  # microseconds at 11 wires on an H100
#: hidden size, intermediate size, layers, heads, key-value heads, vocabulary; and sequences of a batch and their length
MODELS = {
    "SmolLM2-135M": ((576, 1536, 30, 9, 3, 49152), (8, 1024)),
    "Llama-3.2-1B": ((2048, 8192, 16, 32, 8, 128256), (4, 1024)),
    "Llama-3.1-8B": ((4096, 14336, 32, 32, 8, 128256), (4, 1024)),
}
SECTIONS = ("tests", "sanitizer", "layers", "host", "training")
TARGETS = ["q_proj", "v_proj"]


def microseconds(call: Callable[[], Any], repeats: int = 30, warmup: int = 5) -> float:
    """The median time of a call on the GPU; a flush of the second-level cache comes before each."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    times: list[float] = []
    for repeat in range(repeats + warmup):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if repeat >= warmup:
            times.append(1000 * start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def graphed(call: Callable[[], Any]) -> Callable[[], None]:
    """The call's work on the GPU, without the time that Python takes to ask for it."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # the first one may compile kernels
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def directions(function: Callable[..., Tensor], *leaves: Tensor) -> dict[str, float]:
    """Times of a differentiable function without and with its gradients."""
    grad = torch.randn_like(function(*leaves))

    def forward() -> None:
        with torch.no_grad():
            function(*leaves)

    def step() -> None:
        torch.autograd.grad(function(*leaves), leaves, grad)

    return {"forward": microseconds(graphed(forward)), "forward + adjoint": microseconds(graphed(step))}


def layer(n_wires: int, width: int, n_layers: int) -> dict[str, dict[str, float]]:
    """Times of qaa, plain torch and LoRA for one layer's width."""
    circuit = qaa.ansatz("ring", n_wires, n_layers)
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

    def in_qaa(theta: Tensor, x: Tensor) -> Tensor:
        return qaa.ops.quantum_features(circuit, theta, x)

    times = {"qaa": directions(in_qaa, theta, x)}
    with kernels_of_the_build():
        times["qaa, kernels for any circuit"] = directions(in_qaa, theta, x)
    if n_wires <= 11 and n_layers == 1:
        times["torch, two matrix products a layer, compiled"] = directions(
            torch.compile(in_torch, dynamic=False), theta, x
        )
    times["LoRA r = 8"] = directions(lambda x, down, up: x @ down.T @ up.T, x, down, up)
    return times


@contextlib.contextmanager
def kernels_of_the_build() -> Iterator[None]:
    """Without kernels that are compiled for one circuit."""
    os.environ["QAA_CUDA_COMPILE"] = "0"
    qaa.ops._program_on_device.cache_clear()
    try:
        yield
    finally:
        del os.environ["QAA_CUDA_COMPILE"]
        qaa.ops._program_on_device.cache_clear()


def training(name: str, rounds: int = 15) -> dict[str, dict[str, float]]:
    """A training step of a model of random bfloat16 weights and each adapter; methods take turns, step by step.

    AdamW, autocast to bfloat16, adapters on q and v in float32, as the Trainer has it with ``bf16=True``. Medians of
    milliseconds until the GPU is done and until Python has asked for everything (``host``), of the ratio to the first
    method's step of the same round, and the sum of all kernels' times (``busy``); GiB at the peak.
    """
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes, (n_sequences, length) = MODELS[name]
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    shape: dict[str, Any] = dict(zip((*keys, "vocab_size"), sizes, strict=True))
    config = LlamaConfig(**shape, tie_word_embeddings=True)
    tokens = torch.randint(config.vocab_size, (n_sequences, length), device="cuda")
    with torch.device("cuda"):
        torch.manual_seed(0)
        auto: Any = AutoModelForCausalLM
        base = auto.from_config(config, dtype=torch.bfloat16)
    frozen = {id(p): p for p in base.parameters()}  # which all methods share

    def step_of(adapter: Any) -> tuple[Callable[[], None], int]:
        model = get_peft_model(copy.deepcopy(base, dict(frozen)), adapter).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()

        return step, sum(p.numel() for p in trained)

    steps = {method: step_of(adapter) for method, adapter in adapters(with_shared=True).items()}
    samples: dict[str, list[tuple[float, float]]] = {method: [] for method in steps}
    results: dict[str, dict[str, float]] = {}
    for method, (step, n_trained) in steps.items():
        for _ in range(3):  # the first one may compile kernels
            step()
        torch.cuda.reset_peak_memory_stats()
        results[method] = {**kernels_of(step), "trainable": n_trained}
        results[method]["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    for _ in range(rounds):
        for method, (step, _) in steps.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            asked = time.perf_counter()
            torch.cuda.synchronize()
            samples[method].append((1000 * (time.perf_counter() - start), 1000 * (asked - start)))
    reference = [wall for wall, _ in next(iter(samples.values()))]
    for method, of_method in samples.items():
        walls, hosts = zip(*of_method, strict=True)
        ratios = [wall / other for wall, other in zip(walls, reference, strict=True)]
        medians = zip(("milliseconds", "host", "ratio"), map(statistics.median, (walls, hosts, ratios)), strict=True)
        results[method].update(medians)
    return results


def kernels_of(step: Callable[[], None]) -> dict[str, float]:
    """How many kernels and copies a step launches, and the sum of their milliseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    on_gpu = [event for event in profile.events() if event.device_type.name == "CUDA"]
    return {"busy": sum(event.time_range.elapsed_us() for event in on_gpu) / 1000, "launches": len(on_gpu)}


def adapters(with_shared: bool = False) -> dict[str, Any]:
    """The methods that a training step compares, with one whose q and v share a circuit."""
    from peft import LoraConfig

    from qaa.peft import QaaConfig

    presets = {form: QaaConfig.preset(form, target_modules=TARGETS) for form in ("compact", "default", "paper")}
    if with_shared:
        presets["paper, one circuit"] = QaaConfig.preset("paper", target_modules=TARGETS, shared_circuit=TARGETS)
    return {"LoRA r = 8": LoraConfig(r=8, target_modules=TARGETS), **presets}


class Residual(torch.nn.Module):
    """Linear layers, each added to its input."""

    def __init__(self, width: int, n_modules: int) -> None:
        super().__init__()
        linear = (
            torch.nn.Linear(width, width, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(n_modules)
        )
        self.layers = torch.nn.Sequential(*(torch.nn.ModuleDict({TARGETS[0]: each}) for each in linear))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer[TARGETS[0]](x)  # type: ignore[index]
        return x


def host(width: int = 576, rows: int = 256, n_modules: int = 16, rounds: int = 40) -> dict[str, float]:
    """Microseconds for each adapted layer that Python takes to ask for a model's forward and backward pass."""
    from peft import get_peft_model

    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    model = Residual(width, n_modules)
    models: dict[str, Any] = {
        method: get_peft_model(copy.deepcopy(model), adapter).train() for method, adapter in adapters().items()
    }
    times: dict[str, list[float]] = {method: [] for method in models}
    for _ in range(rounds):
        for method, model in models.items():
            start = time.perf_counter()
            with torch.autocast("cuda", torch.bfloat16):
                y = model(x)
            torch.autograd.backward(y, torch.ones_like(y))
            times[method].append(1e6 * (time.perf_counter() - start) / n_modules)
            torch.cuda.synchronize()
    return {method: statistics.median(of_method) for method, of_method in times.items()}


def tests() -> str:
    """Whether the tests that need a GPU pass."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_cuda.py"], check=False)
    return "passed" if done.returncode == 0 else f"exit status {done.returncode}"


def sanitizer() -> dict[str, str] | str:
    """Verdicts of compute-sanitizer over a few tests."""
    if shutil.which("compute-sanitizer") is None:
        return "not installed"
    chosen = "(oracle and float32 and (6-z or 10-z)) or extreme or empty or (together and float32-compact)"
    running = {}
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        checked = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        if tool != "initcheck":  # which has to see who writes what qaa's kernels read
            checked += ["--kernel-name", "kns=qaa"]
        tests = [sys.executable, "-m", "pytest", "-q", "tests/test_cuda.py", "-k", chosen]
        running[tool] = subprocess.Popen([*checked, *tests])
    verdicts = {tool: process.wait() for tool, process in running.items()}
    return {tool: "clean" if status == 0 else f"exit status {status}" for tool, status in verdicts.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="Checks and times the CUDA kernels.")
    parser.add_argument("--output", type=Path, default=Path("reports/gpu/results.json"))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or not qaa.cuda.is_available():
        seen = "with" if torch.cuda.is_available() else "without"
        built = "with" if qaa.cuda.is_built() else "without"
        print(
            f"expected a GPU that torch and qaa can use, received torch {torch.__version__} {seen} a GPU "
            f"and qaa {built} CUDA kernels",
            file=sys.stderr,
        )
        return 1
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "tokens": TOKENS}

    def note(section: str, value: Any) -> None:
        """Written at once, so that nothing is lost if a later section fails."""
        results[section] = value
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")

    if "tests" in arguments.sections:
        note("tests", tests())
    if "sanitizer" in arguments.sections:
        note("sanitizer", sanitizer())
    if "layers" in arguments.sections:
        print(f"\n{results['device']}, {TOKENS} tokens in bfloat16, microseconds", flush=True)
        layers: dict[str, Any] = {}
        for n_wires, width, n_layers in LAYERS:
            times = layers[f"n = {n_wires}, d = {width}, L = {n_layers}"] = layer(n_wires, width, n_layers)
            note("microseconds", layers)
            for name, of_direction in times.items():
                cells = "".join(f"{direction:>20} {value:9.1f}" for direction, value in of_direction.items())
                print(f"n = {n_wires:2}, d = {width:5}, L = {n_layers}  {name:46}{cells}", flush=True)
        print("goals at n = 11 on an H100:", ", ".join(f"{name} at most {goal:.0f}" for name, goal in GOALS.items()))
    if "host" in arguments.sections:
        note("host", host())
        print("\nmicroseconds of the host for a layer and step:", results["host"], flush=True)
    if "training" in arguments.sections:
        steps: dict[str, Any] = {}
        for name in arguments.models:
            print(f"\n{name}'s shape, {' x '.join(map(str, MODELS[name][1]))} tokens, a training step", flush=True)
            steps[name] = training(name)
            note("training", steps)
            for method, of in steps[name].items():
                ratio, on_gpu = f"({of['ratio']:5.3f} x)", f"GPU {of['busy']:8.2f} in {of['launches']:.0f} launches"
                times_of_step = f"{of['milliseconds']:8.2f} ms {ratio}, host {of['host']:8.2f}, {on_gpu}"
                print(
                    f"{method:20}{times_of_step}, {of['GiB']:6.2f} GiB, {of['trainable']:10,.0f} trainable", flush=True
                )
            gc.collect()
            torch.cuda.empty_cache()
    verdicts = results.get("sanitizer", {})
    is_clean = verdicts == "not installed" or all(verdict == "clean" for verdict in verdicts.values())
    return 0 if results.get("tests", "passed") == "passed" and is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
