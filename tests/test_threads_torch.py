"""torch's threads around the kernels: autograd from many threads, another number in mid-run, a loader's workers."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import qaa
from qaa.nn import QAALinear
from qaa.ops import project, quantum_features
from test_threads import CIRCUIT, work


def gradients(seed: int) -> list[bytes]:
    """Bits of a loss and of all gradients of two adapted layers in a row, by autograd."""
    generator = torch.Generator().manual_seed(seed)
    layers = [QAALinear(torch.nn.Linear(64, 64), readout=readout) for readout in ("z", "state[:8]")]
    for parameter in (p for layer in layers for p in layer.parameters()):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    x = torch.randn(1024, 64, generator=generator, requires_grad=True)
    layers[1](layers[0](x).tanh()).square().sum().backward()
    trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    return [tensor.numpy().tobytes() for tensor in (x.grad, *(p.grad for p in trained))]


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_autograd_from_many_threads_gives_the_same_bits() -> None:
    expected = {seed: gradients(seed) for seed in range(2)}
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda seed=seed: found.append(gradients(seed) == expected[seed]))
        for seed in (0, 1, 0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == [True] * len(threads)


@pytest.mark.usefixtures("two_threads")
def test_the_number_of_threads_may_change_in_mid_run() -> None:
    """The kernels give the same bits for every number; torch's own products may differ by their order of summation."""
    generator = torch.Generator().manual_seed(0)
    theta, x = torch.randn(CIRCUIT.parameter_shape, generator=generator), torch.randn(2048, 200, generator=generator)
    expected, whole = quantum_features(CIRCUIT, theta, x), gradients(0)
    for number in (1, 3, 2, 5):
        torch.set_num_threads(number)
        assert torch.equal(quantum_features(CIRCUIT, theta, x), expected)
        for ours, theirs in zip(gradients(0), whole, strict=True):
            a, b = (np.frombuffer(bits, np.float32) for bits in (ours, theirs))
            np.testing.assert_allclose(a, b, rtol=0, atol=2**-20 * np.abs(b).max())


def tiny_numbers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(1e-39)


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="torch cannot take subnormal numbers for zero here")
@pytest.mark.usefixtures("two_threads")
def test_subnormal_numbers_count_on_threads_that_take_them_for_zero() -> None:
    theta, x, grad = np.ones(CIRCUIT.parameter_shape), tiny_numbers((600, 200), 0), tiny_numbers((600, 8), 1)
    ordinary, noise = np.ones((600, 200), np.float32), qaa.noise.NoiseModel(depolarizing=0.01)
    up = torch.full((40, 8), 0.5, requires_grad=True)

    def bits(threads: int) -> list[bytes]:
        torch.set_num_threads(threads)
        features = torch.from_numpy(grad).requires_grad_()
        added = project(torch.zeros(600, 40), features, up)
        results = [
            qaa.arrays.forward(CIRCUIT, theta, x, threads=threads),
            *qaa.arrays.backward(CIRCUIT, theta, ordinary, grad, threads=threads),
            qaa.noise.forward(CIRCUIT, theta, x[:9], noise=noise, trajectories=5, seed=0, threads=threads),
            added.detach().numpy(),
            *(t.numpy() for t in torch.autograd.grad(added.sum(), (features, up))),
        ]
        return [result.tobytes() for result in results]

    expected = bits(1)
    assert all(any(result) for result in expected)
    torch.set_flush_denormal(True)
    try:
        assert torch.tensor(1e-39) * 2 == 0
        assert bits(1) == expected and bits(2) == expected
        assert torch.tensor(1e-39) * 2 == 0  # the thread has back what it came with
    finally:
        torch.set_flush_denormal(False)


class Embedded(torch.utils.data.Dataset):  # type: ignore[misc]
    """Features that are computed where they are asked for: in the loader's workers."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, seed: int) -> Any:
        return torch.from_numpy(np.frombuffer(work(seed, 4)[0], np.float32).copy())


@pytest.mark.usefixtures("two_threads")
def test_workers_of_a_data_loader_after_first_use() -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    expected = torch.stack([Embedded()[seed] for seed in range(4)])
    loader = torch.utils.data.DataLoader(Embedded(), num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.cat(list(loader)), expected)


FORK = """
import os, signal, numpy as np, torch
{before}
torch.set_num_threads(2)
torch.ones(1 << 20).sin()
if os.fork() == 0:
    signal.alarm(60)
    import qaa
    circuit = qaa.ansatz("ring", 8, 2)
    theta, x = np.ones(circuit.parameter_shape), np.ones((4096, 200), np.float32)
    qaa.arrays.forward(circuit, theta, x, threads=2)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a child that loads qaa itself is known by its threads in /proc")
@pytest.mark.parametrize("before", ["import qaa", ""], ids=["loaded before the fork", "loaded by the child"])
def test_a_child_that_is_forked_before_first_use_does_not_wait_for_torchs_threads(before: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORK.format(before=before)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout.strip()) == (0, "0"), result.stderr


COUNT = """
import ctypes, os, numpy as np
{before}
import qaa
count = lambda: len(os.listdir("/proc/self/task"))
circuit = qaa.ansatz("ring", 8, 2)
theta, x = np.ones(circuit.parameter_shape), np.ones((4096, 200), np.float32)
start = count()
bits = {{qaa.arrays.forward(circuit, theta, x, threads=threads).tobytes() for threads in (1, 2)}}
print(hasattr(ctypes.CDLL(None), "GOMP_parallel"), count() - start, len(bits))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_loops_run_on_torchs_threads_where_there_are_any() -> None:
    """Torch's spin for a while after each operation and would take the cores from threads of ours."""

    def found(before: str) -> list[str]:
        command = [sys.executable, "-c", COUNT.format(before=before)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split()

    torchs = "import torch; torch.set_num_threads({}); torch.ones(1 << 20).sin()"
    if found(torchs.format(2))[0] != "True":
        pytest.skip("this torch does not show an OpenMP runtime")
    assert found(torchs.format(2)) == ["True", "0", "1"]
    assert found(torchs.format(1)) == ["True", "1", "1"]  # torch is to have one, this call may have two
    assert found("") == ["False", "1", "1"]
