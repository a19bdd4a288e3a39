"""The device qaa.qubit against default.qubit: values and gradients of the same quantum functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qaa import arrays
from strategies import random_angles, random_circuit

qml = pytest.importorskip("pennylane")
device = pytest.importorskip("qaa.pennylane", exc_type=ImportError)

ATOL = 1e-10


def both(function: Callable[..., Any], *arguments: Any, wires: Any = None) -> list[tuple[list[Any], list[Any]]]:
    """Values, and gradients of a fixed random function of them, by qaa.qubit and by default.qubit's backprop."""
    outcomes = []
    for dev, method in ((device.QaaQubit(wires), "best"), (qml.device("default.qubit", wires=wires), "backprop")):
        inputs = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in arguments]
        results = qml.QNode(function, dev, interface="torch", diff_method=method)(*inputs)
        results = list(results) if isinstance(results, (tuple, list)) else [results]
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(r.shape, generator=generator, dtype=torch.float64) for r in results]
        loss = sum((r**2 * w).sum() for r, w in zip(results, weights, strict=True))
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)  # type: ignore[arg-type]
        outcomes.append(([r.detach().numpy() for r in results], [None if g is None else g.numpy() for g in gradients]))
    return outcomes


def assert_same(outcomes: list[tuple[list[Any], list[Any]]]) -> None:
    ours, theirs = outcomes
    for mine, other in zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert mine.shape == other.shape and mine.dtype == other.dtype
            np.testing.assert_allclose(mine, other, rtol=0, atol=ATOL)


@pytest.mark.parametrize("seed", range(6))
def test_random_circuits_on_batches_of_vectors(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 1 + seed % 5
    circuit = random_circuit(rng, n, 20)

    def function(theta: Any, x: Any) -> Any:
        qml.AmplitudeEmbedding(x, wires=range(n), pad_with=0.0, normalize=True)
        circuit.to_pennylane(theta)
        return [
            *(qml.expval(qml.Z(w)) for w in range(n)),
            qml.probs(wires=range(n)),
            qml.expval(qml.Y(0) @ qml.X(n - 1) if n > 1 else qml.Y(0)),
        ]

    x = rng.normal(size=(4, 2**n - (n > 1)))
    assert_same(both(function, random_angles(rng, circuit.parameter_shape), x))
    assert_same(both(function, random_angles(rng, circuit.parameter_shape), x[0], wires=n))


def test_one_call_of_the_kernels_runs_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    forward = arrays.forward

    def counting(circuit: Any, theta: Any, x: Any, *arguments: Any, **options: Any) -> Any:
        batches.append(len(x))
        return forward(circuit, theta, x, *arguments, **options)

    monkeypatch.setattr(arrays, "forward", counting)

    @qml.qnode(device.QaaQubit(wires=3))
    def function(x: Any) -> Any:
        qml.AmplitudeEmbedding(x, wires=range(3), normalize=True)
        qml.StronglyEntanglingLayers(np.ones((2, 3, 3)), wires=range(3))
        return [qml.expval(qml.Z(wire)) for wire in range(3)]

    assert np.shape(function(np.ones((50, 8)))) == (3, 50)
    assert batches == [50]


def test_labels_orders_and_marginals() -> None:
    """A preparation on some of the wires, in no order; marginals of others; templates; names for wires."""
    rng = np.random.default_rng(0)

    def function(theta: Any, x: Any) -> Any:
        qml.StatePrep(x / torch.linalg.vector_norm(x, dim=-1, keepdim=True), wires=["c", "a"])
        qml.StronglyEntanglingLayers(theta, wires=["a", "b", "c", "d"])
        qml.adjoint(qml.S("b"))
        qml.Toffoli(["d", "a", "b"])
        return qml.probs(wires=["d", "a"]), qml.expval(qml.X("c") @ qml.Z("b")), qml.probs(wires="b")

    theta, x = rng.normal(size=(2, 4, 3)), rng.normal(size=(5, 4))
    assert_same(both(function, theta, x))
    assert_same(both(function, theta, x, wires=["d", "c", "b", "a"]))


def test_sums_of_pauli_strings_and_all_probabilities() -> None:
    def function(theta: Any) -> Any:
        qml.BasisState([1, 0, 1], wires=[0, 1, 2])
        qml.BasicEntanglerLayers(theta, wires=range(3))
        hamiltonian = 0.5 * qml.Z(0) @ qml.Z(1) - 1.25 * qml.X(2) + 0.75 * qml.I(0)
        return qml.expval(hamiltonian), qml.probs(), qml.expval(qml.X(1) + qml.Z(0))

    assert_same(both(function, np.random.default_rng(1).normal(size=(2, 3)), wires=3))


def test_probabilities_of_all_wires_come_in_the_devices_order() -> None:
    def function(theta: Any, x: Any) -> Any:
        qml.RY(theta[0], "b")
        qml.CRX(theta[1], ["b", "a"])
        return qml.probs()

    def prepared(theta: Any, x: Any) -> Any:
        qml.AmplitudeEmbedding(x, wires=["b", "a"], normalize=True)
        qml.CNOT(["c", "b"])
        return function(theta, x)

    theta, x = np.array([0.4, 1.3]), np.arange(1.0, 5.0)
    for wires in (None, ["a", "b", "c"], ["c", "a", "d", "b"]):
        assert_same(both(function, theta, x, wires=wires))
        assert_same(both(prepared, theta, x, wires=wires))


def test_nothing_prepared_and_a_batch_of_angles() -> None:
    def function(theta: Any, angle: Any) -> Any:
        qml.RX(angle, 0)
        qml.BasicEntanglerLayers(theta, wires=range(2))
        return qml.expval(qml.Z(1)), qml.probs(wires=[0, 1])

    rng = np.random.default_rng(2)
    assert_same(both(function, rng.normal(size=(1, 2)), rng.normal()))
    assert_same(both(function, rng.normal(size=(1, 2)), rng.normal(size=3)))


@pytest.mark.parametrize("seed", range(4))
def test_batches_of_angles_of_vectors_and_of_both_run_in_one_call(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    calls = []
    forward = arrays.forward
    monkeypatch.setattr(arrays, "forward", lambda *a, **k: calls.append(len(a[2])) or forward(*a, **k))

    def function(angles: Any, single: Any, x: Any) -> Any:
        qml.AmplitudeEmbedding(x, wires=range(3), pad_with=0.0, normalize=True)
        qml.AngleEmbedding(angles, wires=range(3), rotation="Y")
        qml.Rot(angles[..., 0], single, angles[..., 2], wires=1)
        qml.IsingXX(single, wires=[0, 1])
        qml.CNOT([2, 0])
        return qml.expval(qml.Z(0) @ qml.X(2)), qml.probs(wires=[2, 0]), qml.probs(wires=1), qml.expval(qml.Y(1))

    for angles, x in (((5, 3), (7,)), ((5, 3), (5, 7)), ((3,), (5, 7)), ((1, 3), (7,))):
        calls.clear()
        assert_same(both(function, rng.normal(size=angles), rng.normal(), rng.normal(size=x)))
        assert len(calls) == 2  # one for all strings, one for all probabilities


@pytest.fixture
def jax64() -> Iterator[Any]:
    """JAX with numbers of 64 bits."""
    jax = pytest.importorskip("jax")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield jax
    jax.config.update("jax_enable_x64", before)


def test_jax_maps_compiles_and_differentiates_in_any_order(jax64: Any) -> None:
    jax = jax64

    def gates(theta: Any) -> None:
        qml.RX(theta[0], 0)
        qml.CNOT([0, 1])
        qml.RY(theta[1], 1)

    def expval(theta: Any) -> Any:
        gates(theta)
        return qml.expval(qml.Z(1))

    def probs(theta: Any) -> Any:
        gates(theta)
        return qml.probs(wires=1)

    def both_measured(theta: Any) -> Any:
        gates(theta)
        return qml.expval(qml.Z(0)), qml.probs(wires=[1, 0])

    def embedded(x: Any) -> Any:
        qml.AmplitudeEmbedding(x, wires=[0, 1], normalize=True)
        qml.CNOT([0, 1])
        return qml.expval(qml.Z(1))

    def summed(node: Any) -> Any:
        return lambda theta: sum(part.sum() for part in jax.tree.leaves(node(theta)))

    theta, x = jax.numpy.array([0.3, 0.7]), jax.numpy.array([0.1, 0.2, 0.3, 0.4])
    cases = [
        (expval, jax.grad, theta),
        (probs, jax.jacobian, theta),
        (both_measured, jax.jacobian, theta),
        (both_measured, lambda node: jax.grad(summed(node)), theta),
        (both_measured, lambda node: jax.jacobian(lambda theta: node(theta)[0]), theta),
        (both_measured, lambda node: jax.jacobian(lambda theta: node(theta)[1]), theta),
        (expval, lambda node: jax.vmap(jax.grad(node)), jax.numpy.stack([theta, theta + 1])),
        (expval, jax.vmap, jax.numpy.stack([theta, theta + 1])),
        (embedded, jax.grad, x),
        (embedded, jax.vmap, jax.numpy.stack([x, x + 1])),
    ]
    for function, transform, argument in cases:
        expected = transform(qml.QNode(function, qml.device("default.qubit", wires=2)))(argument)
        node = qml.QNode(function, device.QaaQubit(wires=2))
        for made in (transform(node), jax.jit(transform(node))):
            found = made(argument)
            assert jax.tree.structure(found) == jax.tree.structure(expected)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                assert a.shape == b.shape
                np.testing.assert_allclose(a, b, rtol=0, atol=ATOL)


def test_jax_maps_the_cotangent_of_one_measurement_and_not_of_the_other(jax64: Any) -> None:
    jax = jax64

    def function(theta: Any) -> Any:
        qml.RX(theta[..., 0], 0)
        qml.CNOT([0, 1])
        qml.RY(theta[..., 1], 1)
        return qml.expval(qml.Z(0)), qml.expval(qml.X(1))

    theta, weights = jax.numpy.array([[0.3, 0.7], [1.3, 0.2], [-0.4, 2.0]]), jax.numpy.array([1.0, 2.0, 3.0])
    found = []
    for dev in (device.QaaQubit(wires=2), qml.device("default.qubit", wires=2)):
        _, pull = jax.vjp(qml.QNode(function, dev), theta)
        found.append(jax.vmap(lambda c, pull=pull: pull((c, weights))[0])(jax.numpy.eye(3)))  # type: ignore[misc]
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=ATOL)


def test_second_derivatives_by_shifts() -> None:
    def function(theta: Any) -> Any:
        qml.RX(theta[0], 0)
        qml.CNOT([0, 1])
        qml.RY(theta[1], 1)
        return qml.expval(qml.Z(1))

    theta = torch.tensor([0.3, 0.7], dtype=torch.float64)
    node, other = (
        qml.QNode(function, dev, max_diff=2, interface="torch")
        for dev in (device.QaaQubit(wires=2), qml.device("default.qubit", wires=2))
    )
    found, expected = (torch.autograd.functional.hessian(each, theta) for each in (node, other))
    torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)
    assert expected.abs().min() > 0.1


def test_the_tracker_counts() -> None:
    dev = device.QaaQubit(wires=1)
    node = qml.QNode(lambda a: (qml.RX(a, 0), qml.expval(qml.Z(0)))[1], dev)
    with qml.Tracker(dev) as tracker:
        qml.grad(node)(qml.numpy.array(0.3, requires_grad=True))
    assert tracker.totals["executions"] == 1 and tracker.totals["vjps"] == 1


def test_autograd_and_the_shift_rule() -> None:
    pnp = qml.numpy
    theta = pnp.array(np.random.default_rng(3).normal(size=(2, 3)), requires_grad=True)
    values = []
    for dev, method in (
        (device.QaaQubit(3), "adjoint"),
        (device.QaaQubit(3), "device"),
        (device.QaaQubit(3), "parameter-shift"),
        (qml.device("default.qubit", wires=3), "backprop"),
    ):

        @qml.qnode(dev, diff_method=method)
        def function(theta: Any) -> Any:
            qml.BasicEntanglerLayers(theta, wires=range(3))
            return qml.expval(qml.Z(0) @ qml.Y(2))

        values.append((float(function(theta)), qml.grad(function)(theta)))
    for value, gradient in values[:-1]:
        assert value == pytest.approx(values[-1][0], abs=ATOL)
        np.testing.assert_allclose(gradient, values[-1][1], rtol=0, atol=ATOL)


def test_a_torch_layer_of_pennylane() -> None:
    """Only the vectors, or only the angles, or nothing, need gradients."""
    dev = device.QaaQubit(wires=2)

    @qml.qnode(dev, interface="torch")
    def function(inputs: Any, weights: Any) -> Any:
        qml.AmplitudeEmbedding(inputs, wires=range(2), normalize=True)
        qml.BasicEntanglerLayers(weights, wires=range(2))
        return [qml.expval(qml.Z(0)), qml.expval(qml.Z(1))]

    layer = qml.qnn.TorchLayer(function, {"weights": (2, 2)})
    x = torch.randn(6, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.shape == (6, 4) and layer.weights.grad.shape == (2, 2)
    layer.requires_grad_(False)
    layer(x).sum().backward()
    with torch.no_grad():
        assert layer(x).shape == (6, 2)


def test_refusals() -> None:
    dev = device.QaaQubit(wires=2)
    node = qml.qnode(dev)

    def measured(measurement: Callable[[], Any], *operations: Callable[[], Any]) -> Any:
        def function() -> Any:
            for operation in operations:
                operation()
            return measurement()

        return node(function)

    error = qml.exceptions.DeviceError
    with pytest.raises(error, match=r"qaa\.qubit"):
        measured(qml.state)()
    with pytest.raises(error, match=r"qaa\.qubit"):
        measured(lambda: qml.var(qml.Z(0)))()
    with pytest.raises(error, match=r"not supported with qaa\.qubit"):
        measured(lambda: qml.expval(qml.Z(0)), lambda: qml.DepolarizingChannel(0.1, 0))()
    with pytest.raises(error, match=r"qaa\.qubit"):
        qml.set_shots(measured(lambda: qml.expval(qml.Z(0))), 10)()
    with pytest.raises(error, match=r"not supported|qaa\.qubit"):
        measured(lambda: qml.expval(qml.Hermitian(np.eye(2), 0)), lambda: qml.H(0))()
    with pytest.raises(error, match=r"Observable Projector\(.*\) not supported on qaa\.qubit"):
        measured(lambda: qml.expval(qml.Projector([1], wires=1)))()
    assert measured(lambda: qml.expval(np.exp(1j * np.pi) * qml.Z(0)))() == pytest.approx(-1)
    for product in (qml.prod(qml.X(0), qml.Y(0)), qml.Z(0) + 1j * qml.X(1)):  # the first is i Z
        with pytest.raises(error, match=r"Observable .* not supported on qaa\.qubit"):
            measured(lambda product=product: qml.expval(product))()  # type: ignore[misc]
    with pytest.raises(qml.exceptions.WireError, match="wires"):
        measured(lambda: qml.expval(qml.Z(5)))()
    with pytest.raises(ValueError, match="expected real amplitudes, received complex ones with imaginary parts"):
        measured(lambda: qml.expval(qml.Z(0)), lambda: qml.StatePrep(np.array([1, 1j]) / np.sqrt(2), 0))()
    with pytest.raises(qml.exceptions.QuantumFunctionError, match="backprop"):
        qml.QNode(lambda: qml.expval(qml.Z(0)), dev, diff_method="backprop")()


def test_the_entry_point() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'\[project\.entry-points\."pennylane\.plugins"\]\n"(.*)" = "(.*)"', text)
    assert match is not None and match[1] == device.QaaQubit.name
    assert EntryPoint(match[1], match[2], "pennylane.plugins").load() is device.QaaQubit
