"""The same circuits in PennyLane: gate by gate, with its own embedding, measurements and differentiation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pennylane as qml
import torch
from numpy.typing import NDArray

from qaa.circuit import Circuit, Readout

#: The names that differ; all others are equal.
OPERATIONS: dict[str, Any] = {"X": qml.PauliX, "Y": qml.PauliY, "Z": qml.PauliZ, "H": qml.Hadamard}


def operations(circuit: Circuit, theta: Any) -> Iterator[Any]:
    """Queue (and yield) the gates of ``circuit`` with the angles ``theta.ravel()[...]``."""
    angles = theta.reshape(-1)
    for gate in circuit.gates:
        operation = OPERATIONS.get(gate.name) or getattr(qml, gate.name)
        yield operation(*(angles[p] for p in gate.parameters), wires=gate.wires)


def pauli_operator(string: str) -> Any:
    """The observable of a Pauli string."""
    return qml.pauli.string_to_pauli_word(string, wire_map={w: w for w in range(len(string))})


def measurements(readout: Readout, n_wires: int) -> Any:
    """What a quantum function returns for ``readout``; longer than K for a part of probs or state."""
    if readout.kind == "expval":
        return [qml.expval(pauli_operator(string)) for string in readout.paulis]
    return qml.probs(wires=range(n_wires)) if readout.kind == "probs" else qml.state()


def features(
    circuit: Circuit, theta: torch.Tensor, x: torch.Tensor, readout: Readout, *, normalize: bool = True
) -> torch.Tensor:
    """The features ``(batch, K)`` by default.qubit, differentiable by torch in ``theta`` and ``x``.

    PennyLane's states have length one, so without ``normalize`` its features are multiplied by ``||x||**2``, or by
    ``||x||`` for amplitudes.
    """
    n = circuit.n_wires

    def function(theta: torch.Tensor, x: torch.Tensor) -> Any:
        qml.AmplitudeEmbedding(x, wires=range(n), pad_with=0.0, normalize=True)
        list(operations(circuit, theta))
        return measurements(readout, n)

    node = qml.QNode(function, qml.device("default.qubit", wires=n), interface="torch", diff_method="backprop")
    result = node(theta, x)
    value: torch.Tensor = (
        torch.stack(list(result), dim=-1) if readout.kind == "expval" else result[..., : readout.n_outputs]
    )
    if normalize:
        return value
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    rescaled: torch.Tensor = value * (length if readout.kind == "state" else length**2)
    return rescaled


def features_and_gradients(
    circuit: Circuit,
    theta: NDArray[Any],
    x: NDArray[Any],
    grad: NDArray[Any],
    readout: Readout,
    *,
    normalize: bool = True,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """``(features, grad_theta, grad_x)`` in float64 for ``dL/dfeatures = grad``."""
    theta_t = torch.tensor(np.asarray(theta), requires_grad=True)
    x_t = torch.tensor(np.asarray(x), requires_grad=True)
    value = features(circuit, theta_t, x_t, readout, normalize=normalize)
    grads = torch.autograd.grad(value, (theta_t, x_t), torch.tensor(grad).to(value.dtype), allow_unused=True)
    gradients = [
        np.zeros(like.shape) if g is None else g.numpy() for g, like in zip(grads, (theta_t, x_t), strict=True)
    ]
    return value.detach().numpy(), gradients[0], gradients[1]
