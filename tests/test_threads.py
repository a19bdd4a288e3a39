"""Many threads, forked and spawned processes: the same bits everywhere, and nobody waits for ever."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

import qaa

CIRCUIT = qaa.ansatz("ring", 8, 2)


def work(seed: int, threads: int) -> list[bytes]:
    """Bits of the features and of both gradients, of a batch large enough for every thread."""
    rng = np.random.default_rng(seed)
    theta = rng.uniform(-3, 3, CIRCUIT.parameter_shape)
    x, grad = rng.standard_normal((600, 200), np.float32), rng.standard_normal((600, 8), np.float32)
    features = qaa.arrays.forward(CIRCUIT, theta, x, threads=threads)
    gradients = qaa.arrays.backward(CIRCUIT, theta, x, grad, threads=threads)
    return [a.tobytes() for a in (features, *gradients)]


def send(pipe: Any, seed: int, threads: int) -> None:
    pipe.send(work(seed, threads))


def test_results_are_the_same_for_any_number_of_threads() -> None:
    assert all(work(0, threads) == work(0, 1) for threads in (2, 3, 5, 64))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_after_first_use(method: str) -> None:
    """A forked child has none of the pool's threads: it must make its own instead of waiting for them."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    expected = work(1, 4)
    context: Any = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=send, args=(sender, 1, 4))
    child.start()
    assert receiver.poll(60), "the child did not answer"
    assert receiver.recv() == expected
    child.join(60)
    assert child.exitcode == 0


def test_many_python_threads_at_once() -> None:
    expected = {seed: work(seed, 1) for seed in range(8)}
    wrong: list[int] = []

    def repeat(seed: int) -> None:
        for _ in range(5):
            if work(seed, 3) != expected[seed]:
                wrong.append(seed)

    threads = [threading.Thread(target=repeat, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not wrong


def test_an_interpreter_that_ends_while_calls_are_running() -> None:
    """Daemon threads are inside the kernels, with helpers, when the interpreter goes: it ends at once and cleanly."""
    program = (
        "import threading, time, numpy as np, qaa\n"
        "c = qaa.ansatz('ring', 10, 8); t = np.zeros(c.parameter_shape); x = np.ones((4096, 1024), np.float32)\n"
        "def work():\n"
        "    while True: qaa.arrays.forward(c, t, x, threads=2)\n"
        "for _ in range(3): threading.Thread(target=work, daemon=True).start()\n"
        "time.sleep(0.3); print('end')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "end\n", "")


torch: Any = pytest.importorskip("torch")


def gradients(seed: int) -> list[bytes]:
    """Bits of a loss and of all gradients of two adapted layers in a row, by autograd."""
    from qaa.nn import QAALinear

    generator = torch.Generator().manual_seed(seed)
    layers = [QAALinear(torch.nn.Linear(64, 64), readout=readout) for readout in ("z", "state[:8]")]
    for parameter in (p for layer in layers for p in layer.parameters()):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    x = torch.randn(2048, 64, generator=generator, requires_grad=True)
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
    expected = {seed: gradients(seed) for seed in range(3)}
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda seed=seed: found.append(gradients(seed) == expected[seed]))
        for seed in (0, 1, 2, 0, 1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == [True] * len(threads)


@pytest.mark.usefixtures("two_threads")
def test_the_number_of_threads_may_change_in_mid_run() -> None:
    """The kernels give the same bits for every number; torch's own products may differ by their order of summation."""
    from qaa.ops import quantum_features

    generator = torch.Generator().manual_seed(0)
    theta, x = torch.randn(CIRCUIT.parameter_shape, generator=generator), torch.randn(2048, 200, generator=generator)
    expected, whole = quantum_features(CIRCUIT, theta, x), gradients(0)
    for number in (1, 3, 2, 5):
        torch.set_num_threads(number)
        assert torch.equal(quantum_features(CIRCUIT, theta, x), expected)
        for ours, theirs in zip(gradients(0), whole, strict=True):
            a, b = (np.frombuffer(bits, np.float32) for bits in (ours, theirs))
            np.testing.assert_allclose(a, b, rtol=0, atol=2**-20 * np.abs(b).max())


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
