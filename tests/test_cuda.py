"""The CUDA kernels on a GPU, against the oracle; and what happens where there is no GPU, no driver or no such build."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import qaa
import strategies
from emulated import rounded
from qaa import _core
from test_kernels import assert_accurate

torch = pytest.importorskip("torch")
import qaa.ops  # noqa: E402

gpu = pytest.mark.skipif(not qaa.cuda.is_available() or not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float16: np.float16,
}


# ------------------------------------------------------------------------------------------------ without a GPU


def test_states_of_a_build() -> None:
    assert isinstance(qaa.cuda.is_built(), bool)
    assert qaa.cuda.is_built() or not qaa.cuda.is_available()


def test_a_cuda_tensor_meets_a_build_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qaa.cuda, "is_built", lambda: False)
    with pytest.raises(ValueError, match=r"expected x on the CPU, or on a GPU with a build .*QAA_CUDA=ON.*cuda:0"):
        qaa.ops._check_place("x", SimpleNamespace(layout=torch.strided, device=torch.device("cuda", 0)))


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected x on the CPU, or on a GPU.*, received mps:0"):
        qaa.ops._check_place("x", SimpleNamespace(layout=torch.strided, device=torch.device("mps", 0)))


def test_a_build_meets_no_driver() -> None:
    plan = qaa.program.program(qaa.ansatz("ring", 3), "z", True).plan
    if not qaa.cuda.is_built():
        with pytest.raises(RuntimeError, match="expected a build of qaa with CUDA kernels"):
            _core.CudaProgram(plan)
    elif not qaa.cuda.is_available():
        with pytest.raises(RuntimeError, match="expected CUDA to name the current device, received: "):
            _core.CudaProgram(plan).workspace_bytes(8, _core.Scalar.float32, True)


# ------------------------------------------------------------------------------------------------ with one


def run(problem: strategies.Problem, dtype: Any, x: Any = None) -> tuple[Any, Any, Any]:
    """Features and gradients on the GPU."""
    theta = torch.tensor(problem.theta, device="cuda", requires_grad=True)
    rows = torch.tensor(problem.x, device="cuda").to(dtype) if x is None else x
    rows = rows.detach().requires_grad_()
    features = qaa.ops.quantum_features(problem.circuit, theta, rows, problem.readout, normalize=problem.normalize)
    features.backward(torch.tensor(problem.grad, device="cuda").to(features.dtype))
    return features.detach(), theta.grad, rows.grad


def assert_right(problem: strategies.Problem, dtype: Any) -> None:
    """As close to the oracle as the CPU core has to be."""
    number = DTYPES[dtype]
    problem = rounded(problem, number)
    results = [t.cpu() if t.is_complex() else t.cpu().double() for t in run(problem, dtype)]
    storage = number if np.dtype(number).itemsize == 2 else None
    assert_accurate(problem, tuple(t.numpy() for t in results), problem.theta.dtype, storage)


@pytest.fixture
def build_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels of the build, and none that are compiled for one circuit."""
    monkeypatch.setenv("QAA_CUDA_COMPILE", "0")
    qaa.ops._on_device.cache_clear()
    yield
    qaa.ops._on_device.cache_clear()


@gpu
@pytest.mark.usefixtures("build_alone")
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("readout", ["z", "probs", "state", None])
@pytest.mark.parametrize("n_wires", range(1, 15))
def test_against_the_oracle(n_wires: int, readout: str | None, dtype: Any) -> None:
    rng = np.random.default_rng(n_wires)
    circuit = strategies.random_circuit(rng, n_wires, 24)
    assert_right(strategies.random_problem(rng, circuit, readout, batch=37 if n_wires < 12 else 3), dtype)


@gpu
@pytest.mark.skipif(qaa.cuda.compiler() is None, reason="needs NVRTC")
@pytest.mark.parametrize(
    ("n_wires", "readout", "dtype"),
    [
        (9, None, torch.float16),
        (10, "z", torch.bfloat16),
        (10, "state", torch.float32),
        (11, "probs", torch.float32),
        (11, None, torch.bfloat16),
        (12, "z", torch.float32),
        (13, "z", torch.bfloat16),
    ],
)
def test_kernels_of_one_circuit(n_wires: int, readout: str | None, dtype: Any) -> None:
    """Any gates, and the default circuit with angles at half turns; more rows than are worked on at once, and few."""
    rng = np.random.default_rng(n_wires)
    assert_right(strategies.random_problem(rng, strategies.random_circuit(rng, n_wires, 12), readout, batch=3), dtype)
    problem = strategies.random_problem(rng, qaa.ansatz("ring", n_wires), readout, batch=700)
    assert_right(problem, dtype)
    problem.theta.flat[::4] = np.pi
    assert_right(problem, dtype)
    kernels = [known[2] for known in map(_known, (problem,), (dtype,))]
    assert all(kernels), "expected a kernel for this circuit alone"


def _known(problem: strategies.Problem, dtype: Any) -> Any:
    what = qaa.program.program(problem.circuit, problem.readout, problem.normalize)
    return qaa.ops._on_device(str(what), torch.device("cuda", 0), qaa.ops._SCALARS[dtype], True)


@gpu
@pytest.mark.parametrize("n_wires", [15, 16])
def test_states_in_global_memory(n_wires: int) -> None:
    rng = np.random.default_rng(n_wires)
    circuit = strategies.random_circuit(rng, n_wires, 12)
    assert_right(strategies.random_problem(rng, circuit, "z", batch=2), torch.float32)


@gpu
def test_rows_of_zeros_nan_and_extreme_size() -> None:
    rng = np.random.default_rng(0)
    problem = strategies.random_problem(rng, qaa.ansatz("ring", 10), "z", batch=6, d=700, normalize=True)
    x = torch.tensor(problem.x, dtype=torch.float32, device="cuda")
    expected, _, _ = run(problem, torch.float32, x)
    for row, factor in enumerate((0, np.nan, 1e30, 1e-30)):
        x[row] *= factor
    features, _, grad_x = run(problem, torch.float32, x)
    assert not features[0].any() and not grad_x[0].any()
    assert features[1].isnan().all() and grad_x[1].isnan().all()
    torch.testing.assert_close(features[2:], expected[2:], rtol=1e-5, atol=1e-6)


@gpu
def test_gradients_are_the_same_bits_every_time() -> None:
    rng = np.random.default_rng(1)
    problem = strategies.random_problem(rng, qaa.ansatz("ring", 11, 2), "z", batch=9000, normalize=True)
    first, second = (run(problem, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@gpu
def test_layouts_streams_and_graphs() -> None:
    rng = np.random.default_rng(2)
    circuit = qaa.ansatz("ring", 10)
    theta = torch.tensor(strategies.random_angles(rng, circuit.parameter_shape), device="cuda")
    wide = torch.randn(64, 1001, device="cuda", dtype=torch.bfloat16)
    x = wide[:, 1:769]  # rows that no 16-byte load may touch
    expected = qaa.ops.quantum_features(circuit, theta, x.contiguous())
    torch.testing.assert_close(qaa.ops.quantum_features(circuit, theta, x), expected, rtol=0, atol=0)
    with torch.cuda.stream(torch.cuda.Stream()):
        other = qaa.ops.quantum_features(circuit, theta, x)
    torch.cuda.synchronize()
    torch.testing.assert_close(other, expected, rtol=0, atol=0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = qaa.ops.quantum_features(circuit, theta, x)
    theta += 1
    graph.replay()
    torch.testing.assert_close(captured, qaa.ops.quantum_features(circuit, theta, x), rtol=0, atol=0)


@gpu
def test_ops_are_well_formed() -> None:
    circuit = qaa.ansatz("ring", 4)
    theta = torch.rand(circuit.parameter_shape, device="cuda", dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 16, device="cuda", dtype=torch.float64, requires_grad=True)
    program = str(qaa.program.program(circuit, "z", True))
    torch.library.opcheck(torch.ops.qaa.forward, (theta, x, program))
    rows = qaa.ops.amplitude_rows(circuit, theta, 3)
    torch.testing.assert_close(rows.cpu(), qaa.ops.amplitude_rows(circuit, theta.cpu(), 3))


@gpu
def test_an_empty_batch() -> None:
    circuit = qaa.ansatz("ring", 4)
    theta = torch.rand(circuit.parameter_shape, device="cuda", requires_grad=True)
    features = qaa.ops.quantum_features(circuit, theta, torch.zeros(0, 16, device="cuda"))
    assert features.shape == (0, 4) and features.is_cuda
    features.sum().backward()
    assert not theta.grad.any()
