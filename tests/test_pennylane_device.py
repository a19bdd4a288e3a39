"""The device qaa.qubit against default.qubit: values and gradients of the same quantum functions."""

from __future__ import annotations

import re
from collections.abc import Callable
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
