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
