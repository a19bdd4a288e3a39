"""The CUDA kernels on a GPU, against the oracle; and what happens where there is no GPU, no driver or no such build."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
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
import qaa.nn  # noqa: E402
import qaa.ops  # noqa: E402
import qaa.peft  # noqa: E402

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
        qaa.ops._check_place("x", SimpleNamespace(is_cpu=False, layout=torch.strided, device=torch.device("cuda", 0)))


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected x on the CPU, or on a GPU.*, received mps:0"):
        qaa.ops._check_place("x", SimpleNamespace(is_cpu=False, layout=torch.strided, device=torch.device("mps", 0)))


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
    qaa.ops._program_on_device.cache_clear()
    yield
    qaa.ops._program_on_device.cache_clear()


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
    """Any gates, and the default circuit with angles at half turns."""
    rng, many = np.random.default_rng(n_wires), qaa.ops.MANY_ROWS
    circuit = strategies.random_circuit(rng, n_wires, 12)
    assert_right(strategies.random_problem(rng, circuit, readout, batch=many), dtype)
    problem = strategies.random_problem(rng, qaa.ansatz("ring", n_wires), readout, batch=700)
    assert_right(problem, dtype)
    problem.theta.flat[::4] = np.pi
    assert_right(problem, dtype)
    what = qaa.program.program(problem.circuit, problem.readout, problem.normalize)
    for backward in (False, True):
        for rows, is_known in ((many, _core.CudaProgram.can_be_known(what.plan)), (many - 1, False)):
            layout = (0, rows, 1, 1, qaa.ops._SCALARS[dtype])
            *_, kernel = qaa.ops._on_device(str(what), torch.device("cuda", 0), layout, backward, 1)
            assert bool(kernel) == is_known


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
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_vectors_with_angles_of_their_own(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the CPU, in one launch and in several."""
    circuit = qaa.ansatz("ring", 6, 2)
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(7, *circuit.parameter_shape, dtype=torch.float64, generator=generator)
    x = torch.randn(7, 3, 50, dtype=torch.float64, generator=generator).to(dtype)
    grad = torch.randn(7, 3, 6, dtype=torch.float64, generator=generator).to(dtype)
    results = []
    for device, at_once in (("cpu", 7), ("cuda", 7), ("cuda", 3)):
        monkeypatch.setattr(qaa.ops, "MOST_GROUPS", at_once)
        leaves = [t.to(device).requires_grad_() for t in (theta, x)]
        value = qaa.ops.quantum_features(circuit, *leaves)
        results.append((value, *torch.autograd.grad(value, leaves, grad.to(device))))
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    for here, there, in_parts in zip(*results, strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=tolerance, atol=tolerance)
        assert torch.equal(there, in_parts)


@gpu
def test_an_empty_batch() -> None:
    circuit = qaa.ansatz("ring", 4)
    theta = torch.rand(circuit.parameter_shape, device="cuda", requires_grad=True)
    features = qaa.ops.quantum_features(circuit, theta, torch.zeros(0, 16, device="cuda"))
    assert features.shape == (0, 4) and features.is_cuda
    features.sum().backward()
    assert not theta.grad.any()


def adapter_step(device: str, dtype: Any, readout: str, r: int | None, with_bias: bool) -> tuple[Any, ...]:
    """A whitened adapter of a frozen layer: a function of nothing for its output, and what gets a gradient."""
    adapter = qaa.nn.Adapter.create(72, n_layers=2, readout=readout, scaling=0.7 if with_bias else 1.0)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(torch.float32).to(device)

    k = adapter.n_features
    theta, mix = draw(*adapter.circuit.parameter_shape), None if r is None else draw(r, k) / k**0.5
    x, weight, up, c = draw(2, 9, 72).to(dtype), draw(40, 72).to(dtype) / 8, draw(40, r or k), draw(40)
    channels, gain = draw(72).abs() + 0.5, draw(k).abs() + 0.5
    whitening = qaa.nn.Whitening(channels=channels, gain=gain, mean=draw(k) if with_bias else None)
    leaves = [t.requires_grad_() for t in (x, theta, up, *([] if mix is None else [mix]), *([c] if with_bias else []))]

    def step() -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            base = torch.nn.functional.linear(x, weight)
            return adapter.add_to(base, x, theta, up, c if with_bias else None, whitening, mix, in_place=True)

    return step, leaves


@gpu
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("readout", "r"), [("state[:10]", None), ("state[:64]", 4), ("z", None), ("probs[:20]", 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_agree_with_the_cpu_and_never_wait_for_the_gpu(
    dtype: Any, readout: str, r: int | None, with_bias: bool
) -> None:
    results = []
    for device in ("cpu", "cuda"):
        step, leaves = adapter_step(device, dtype, readout, r, with_bias)
        grad = torch.linspace(-1, 1, 720, device=device).reshape(2, 9, 40)
        step().backward(grad.to(dtype))  # copies the program to the device
        for leaf in leaves:
            leaf.grad = None
        try:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            value = step()
            value.backward(grad.to(dtype))
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        results.append([t.detach().cpu().float() for t in (value, *(leaf.grad for leaf in leaves))])
    allowed = 0.04 if dtype == torch.bfloat16 else 2e-4
    for ours, expected in zip(results[1], results[0], strict=True):
        assert (ours - expected).abs().max() <= allowed * expected.abs().max()


@gpu
@pytest.mark.parametrize(("readout", "r"), [("state[:10]", None), ("state[:64]", 4)])
def test_a_captured_adapter_follows_its_angles(readout: str, r: int | None) -> None:
    """Rows are made anew in every forward, also where no gradient is asked for."""
    step, (_, theta, *_) = adapter_step("cuda", torch.bfloat16, readout, r, False)
    with torch.no_grad():
        for _ in range(2):
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        theta.data += 1
        graph.replay()
        torch.testing.assert_close(captured, step(), rtol=0, atol=0)


def adapted_net(preset: str, dtype: Any) -> tuple[Any, Any, list[Any]]:
    """Four adapted layers of two shapes on the GPU, a batch, and what is trained."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    shapes = [(72, 72), (72, 40), (40, 72), (72, 40)]
    net = torch.nn.Sequential(*(torch.nn.Linear(*shape, dtype=dtype) for shape in shapes)).cuda()
    config = qaa.peft.QaaConfig.preset(preset, target_modules=[str(i) for i in range(4)], init_weights=False)
    model = peft.get_peft_model(net, config).train()
    for layer in model.base_model.model:
        layer.qaa_pending.clear()
        for name in ("qaa_channels", "qaa_gain"):
            for tensor in getattr(layer, name).values():
                tensor.data.uniform_(0.5, 1.5)
    x = torch.randn(9, 72, device="cuda", dtype=dtype)
    return model, x, [p for p in model.parameters() if p.requires_grad]


@gpu
@pytest.mark.parametrize("preset", ["compact", "default", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_made_together_has_the_bits_of_what_layers_make(
    preset: str, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training, without gradients, and in a graph that follows the parameters; nobody waits for the GPU."""
    model, x, trained = adapted_net(preset, dtype)

    def step() -> list[Any]:
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = model(x)
        if torch.is_grad_enabled():
            value.backward(torch.ones_like(value))
        return [value.detach(), *(p.grad for p in trained if torch.is_grad_enabled())]

    groups: list[int] = []
    call = _core.cuda_forward
    monkeypatch.setattr(_core, "cuda_forward", lambda *args: groups.append(args[-1]) or call(*args))
    # all on one stream: gradients are added up on that of their first step, which a capture may not wait for
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for with_grad in (True, False):
            results = []
            for together, warm in ((True, True), (True, False), (False, True), (False, False)):
                groups.clear()
                model.zero_grad()
                with monkeypatch.context() as patch, torch.set_grad_enabled(with_grad):
                    if not together:
                        patch.setattr(type(model.base_model), "_around_forward", lambda self: nullcontext())
                    try:
                        torch.cuda.set_sync_debug_mode("default" if warm else "error")
                        results.append(step())
                    finally:
                        torch.cuda.set_sync_debug_mode("default")
                assert sorted(groups) == ([1, 3] if together and preset != "paper" else [1] * 4)
            assert all(torch.equal(a, b) for a, b in zip(results[1], results[3], strict=True))
        model.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        with torch.no_grad():
            for p in trained:
                p += 0.1
        graph.replay()
        model.zero_grad()
        for ours, theirs in zip(captured, step(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@gpu
def test_products_read_and_write_other_dtypes_in_one_pass() -> None:
    """What is asked of torch: a product whose result has another dtype than its factors, complex included."""
    t, columns = torch.randn(5, 8, device="cuda")[:, ::2], torch.randn(4, device="cuda")
    for source in (torch.float32, torch.bfloat16):
        for target in (torch.bfloat16, torch.float32, torch.complex64):
            with torch.no_grad():
                value = qaa.ops._scaled_once(t.to(source), columns, target)
            assert value.dtype == target and torch.equal(value, (t.to(source) * columns).to(target))
