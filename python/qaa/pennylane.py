"""The PennyLane device ``qaa.qubit``: QNodes on our kernels, with adjoint gradients of angles and embedded vectors.

``qml.device("qaa.qubit", wires=n)`` finds it once qaa is installed. A QNode may start from ``AmplitudeEmbedding``,
``StatePrep`` or ``BasisState``, goes on with any gates that decompose into those of :data:`qaa.circuit.GATES`, and ends
in expectation values of observables with a Pauli form, and probabilities. A batch of vectors, of angles or of both runs
in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qaa import arrays, exchange
from qaa.circuit import Circuit, Readout

qml = exchange.import_pennylane()

from pennylane.devices import Device, ExecutionConfig, modifiers  # noqa: E402
from pennylane.devices import preprocess as checks  # noqa: E402

Results = Any  # a number or an array for one measurement, a tuple of them for more


@modifiers.simulator_tracking
class QaaQubit(Device):
    r"""An exact simulator of up to 16 wires for batches of embedded vectors.

    For the amplitudes psi of the first operation (:math:`|0\ldots0\rangle` without one), angles theta (radians) and
    measurements M, the device computes :math:`\langle\psi| U(\theta)^\dagger M U(\theta) |\psi\rangle` in float64, and
    the gradients in theta and psi by an adjoint pass. As in ``default.qubit``, the gradient in psi is that of the
    quadratic form; what ``AmplitudeEmbedding(..., normalize=True)`` does before is differentiated by the interface.

    Args:
        wires: number of wires or their labels, as for any device; None takes them from the circuit.

    Raises:
        pennylane.exceptions.DeviceError: a QNode has shots, gates or measurements that the device does not know.
        ValueError: there are more than 16 wires, or amplitudes with imaginary parts.

    ``diff_method`` may be ``"best"``, ``"device"`` or ``"adjoint"``, which mean the same here, or a gradient transform
    such as ``"parameter-shift"``. Second derivatives need ``max_diff=2`` and ``"best"``; without, PennyLane's
    interfaces take the gradient of an adjoint pass for a constant, and give zeros.

    Example:
        >>> import pennylane as qml, torch
        >>> @qml.qnode(QaaQubit(wires=2))
        ... def features(theta, x):
        ...     qml.AmplitudeEmbedding(x, wires=range(2), pad_with=0.0, normalize=True)
        ...     qml.BasicEntanglerLayers(theta, wires=range(2))
        ...     return [qml.expval(qml.Z(wire)) for wire in range(2)]
        >>> theta = torch.zeros(1, 2, requires_grad=True)
        >>> z = torch.stack(features(theta, torch.eye(3)), dim=-1)  # of the three rows, CNOT turns the last one
        >>> z.detach()
        tensor([[ 1.,  1.],
                [ 1., -1.],
                [-1., -1.]], dtype=torch.float64)
        >>> z.sum().backward()
        >>> theta.grad.shape
        torch.Size([1, 2])
    """

    name = "qaa.qubit"

    def __init__(self, wires: Any = None) -> None:
        super().__init__(wires=wires)

    def setup_execution_config(self, config: Any = None, circuit: Any = None) -> Any:
        """Vector-Jacobian products by the device wherever its gradient is asked for; it has no others."""
        config = config or ExecutionConfig()
        if not _is_ours(config):
            return config
        chosen = {"gradient_method": "adjoint", "use_device_gradient": True, "use_device_jacobian_product": True}
        if hasattr(config, "convert_to_numpy"):  # else, under jax.jit, PennyLane asks for whole Jacobians
            chosen["convert_to_numpy"] = False
        return replace(config, grad_on_execution=False, **chosen)

    def preprocess_transforms(self, execution_config: Any = None) -> Any:
        """What turns a circuit into one that the kernels can run, or refuses it."""
        program = qml.CompilePipeline() if hasattr(qml, "CompilePipeline") else qml.transforms.core.TransformProgram()
        program.add_transform(checks.no_sampling, name=self.name)
        program.add_transform(checks.validate_device_wires, self.wires, name=self.name)
        program.add_transform(
            checks.decompose, stopping_condition=_is_gate, skip_initial_state_prep=True, name=self.name
        )
        program.add_transform(checks.validate_measurements, analytic_measurements=_is_measurement, name=self.name)
        program.add_transform(checks.validate_observables, _has_pauli_form, name=self.name)
        return program

    def supports_derivatives(self, execution_config: Any = None, circuit: Any = None) -> bool:
        """First derivatives without shots."""
        if execution_config is not None and (not _is_ours(execution_config) or execution_config.derivative_order != 1):
            return False
        return circuit is None or not circuit.shots

    def supports_vjp(self, execution_config: Any = None, circuit: Any = None) -> bool:
        """The same as :meth:`supports_derivatives`."""
        return self.supports_derivatives(execution_config, circuit)

    def execute(self, circuits: Any, execution_config: Any = None) -> Any:
        """The measurements of one tape, or of each tape of a batch."""
        return _each(circuits, lambda tape: _Task.of(tape).results())

    def compute_vjp(self, circuits: Any, cotangents: Any, execution_config: Any = None) -> Any:
        """For each tape, the vector-Jacobian product of each of its trainable parameters."""
        return _each(circuits, lambda tape, cotangent: _Task.of(tape).vjp(cotangent), cotangents)

    def execute_and_compute_vjp(self, circuits: Any, cotangents: Any, execution_config: Any = None) -> Any:
        """Both of :meth:`execute` and :meth:`compute_vjp`."""
        return self.execute(circuits), self.compute_vjp(circuits, cotangents)


class _Products(tuple[Any, ...]):
    """A tuple that PennyLane's torch interface can ask for its length by ``np.squeeze``, entries of any shape."""

    def squeeze(self, axis: Any = None) -> NDArray[np.float64]:
        return np.zeros(len(self))


def _each(circuits: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    if isinstance(circuits, qml.tape.QuantumScript):
        return function(circuits, *arguments)
    return tuple(function(*each) for each in zip(circuits, *arguments, strict=True))


def _is_ours(config: Any) -> bool:
    return config.gradient_method in ("best", "device", "adjoint")


# ---------------------------------------------------------------------------------------------------- preprocessing


def _is_gate(operation: Any) -> bool:
    return exchange.is_pennylane_gate(operation)


def _has_pauli_form(observable: Any) -> bool:
    return observable.pauli_rep is not None and all(map(_is_real, observable.pauli_rep.values()))


def _is_real(coefficient: Any) -> bool:
    """Up to rounding, as of exp(i pi)."""
    if qml.math.is_abstract(coefficient):
        return True
    value = complex(_values(coefficient))
    return abs(value.imag) <= 1e-12 * max(1.0, abs(value))


def _values(tensor: Any) -> NDArray[Any]:
    """The numbers of any interface's tensor."""
    return np.asarray(qml.math.unwrap([tensor])[0])


def _is_measurement(measurement: Any) -> bool:
    if isinstance(measurement, qml.measurements.ProbabilityMP):
        return measurement.obs is None and measurement.eigvals() is None
    return isinstance(measurement, qml.measurements.ExpectationMP) and measurement.obs is not None


def _is_preparation(operation: Any) -> bool:
    return isinstance(operation, qml.operation.StatePrepBase)


# ---------------------------------------------------------------------------------------------------- one tape


@dataclass(frozen=True)
class _Task:
    """A tape as our circuit, its angles, its vectors and what is read out.

    The wires that a preparation does not name come first: amplitudes of vectors then are the first ones of the state,
    which the kernels pad with zeros.
    """

    circuit: Circuit
    theta: NDArray[np.float64]  # (angles,), or (batch, angles)
    x: NDArray[np.float64]  # (batch, width); one row in a tape without a batch
    shapes: tuple[tuple[int, ...], ...]  # of the trainable ones in the tape: with a batch or without
    is_batch: bool
    measurements: tuple[Any, ...]
    order: tuple[Any, ...]  # labels of our wire 0, 1, ...
    labels: tuple[Any, ...]  # the same in the order of the tape
    trainable: tuple[int, ...]  # entries of theta; -1 for the vectors

    @staticmethod
    def of(tape: Any) -> _Task:
        operations = list(tape.operations)
        prepared: list[Any] = []
        state = np.ones(1)
        n_before = 0  # parameters before the angles
        if operations and _is_preparation(operations[0]):
            preparation = operations.pop(0)
            prepared = list(preparation.wires)
            state = _amplitudes(preparation)
            n_before = len(preparation.data)
        order = [*(wire for wire in tape.wires if wire not in prepared), *prepared]
        angles = [_values(angle) for operation in operations for angle in operation.data]
        single = qml.tape.QuantumScript(list(map(_first_of_batch, operations)))
        circuit, theta = exchange.from_pennylane(single, wire_order=order)
        trainable = [max(index - n_before, -1) for index in tape.trainable_params]
        if trainable and trainable[-1] >= len(angles):
            raise ValueError("expected observables with fixed coefficients, received trainable ones")
        shapes = [state.shape if index < 0 else angles[index].shape for index in trainable]
        x = state.reshape(-1, state.shape[-1])
        if any(angle.ndim for angle in angles):
            theta = np.stack([np.broadcast_to(angle, tape.batch_size) for angle in angles], -1).astype(np.float64)
            x = np.broadcast_to(x, (tape.batch_size, x.shape[-1]))
        return _Task(
            circuit,
            theta,
            x,
            tuple(shapes),
            tape.batch_size is not None,
            tuple(tape.measurements),
            tuple(order),
            tuple(tape.wires),
            tuple(trainable),
        )

    def strings(self) -> tuple[list[str], list[dict[int, float]]]:
        """All Pauli strings, and for each measurement the coefficient of those that it adds up."""
        index: dict[str, int] = {}
        sums = []
        for measurement in self.measurements:
            terms = {} if _is_probs(measurement) else measurement.obs.pauli_rep
            names = {"".join(word.get(wire, "I") for wire in self.order): c for word, c in terms.items()}
            sums.append({index.setdefault(name, len(index)): float(np.real(c)) for name, c in names.items()})
        return list(index), sums

    def results(self) -> Results:
        strings, sums = self.strings()
        values = self._forward(strings) if strings else None
        probabilities = self._forward("probs") if any(map(_is_probs, self.measurements)) else None
        results = []
        for measurement, terms in zip(self.measurements, sums, strict=True):
            if _is_probs(measurement):
                result = self._marginal(probabilities, measurement)  # type: ignore[arg-type]
            else:
                result = np.zeros(len(self.x))
                for string, coefficient in terms.items():
                    result += coefficient * values[:, string]  # type: ignore[index]
            results.append(result if self.is_batch else result[0])
        return results[0] if len(results) == 1 else tuple(results)

    def vjp(self, cotangent: Any) -> tuple[NDArray[np.float64], ...]:
        cotangents = (cotangent,) if len(self.measurements) == 1 else cotangent
        # JAX maps over cotangents, in a first dimension of those that it maps
        pairs = list(zip(cotangents, self.measurements, strict=True))
        mapped = [np.ndim(incoming) > self.is_batch + _is_probs(measurement) for incoming, measurement in pairs]
        if any(mapped):
            size = len(cotangents[mapped.index(True)])
            cotangents = [
                incoming if is_mapped else np.broadcast_to(incoming, (size, *np.shape(incoming)))
                for incoming, is_mapped in zip(cotangents, mapped, strict=True)
            ]
            each = [self.vjp(some[0] if len(some) == 1 else some) for some in zip(*cotangents, strict=True)]
            return _Products(map(np.stack, zip(*each, strict=True)))
        strings, sums = self.strings()
        grad_strings = np.zeros((len(self.x), len(strings)))
        grad_probs = np.zeros((len(self.x), 2**self.circuit.n_wires))
        for measurement, terms, incoming in zip(self.measurements, sums, cotangents, strict=True):
            if _is_probs(measurement):
                grad_probs += self._unmarginal(np.reshape(np.real(incoming), (len(self.x), -1)), measurement)
            for string, coefficient in terms.items():
                grad_strings[:, string] += coefficient * np.reshape(np.real(incoming), -1)
        grad_theta, grad_x = np.zeros_like(self.theta), np.zeros_like(self.x)
        readouts: list[tuple[Any, NDArray[np.float64]]] = [(strings, grad_strings)] if strings else []
        if any(map(_is_probs, self.measurements)):
            readouts.append(("probs", grad_probs))
        for readout, grad in readouts:
            of_theta, of_x = arrays.backward(self.circuit, self.theta, self.x, grad, readout, normalize=False)
            grad_theta += of_theta
            grad_x += of_x
        of_all = [grad_x if index < 0 else grad_theta[..., index] for index in self.trainable]
        return _Products(_summed_to(grad, shape) for grad, shape in zip(of_all, self.shapes, strict=True))

    def _forward(self, readout: str | Sequence[str] | Readout) -> NDArray[np.float64]:
        return arrays.forward(self.circuit, self.theta, self.x, readout, normalize=False)

    def _axes(self, measurement: Any) -> list[int]:
        return [1 + self.order.index(wire) for wire in measurement.wires or self.labels]

    def _marginal(self, probabilities: NDArray[np.float64], measurement: Any) -> NDArray[np.float64]:
        """Probabilities ``(batch, 2**n)`` of all wires to ``(batch, 2**m)`` of the measured ones, in their order."""
        axes = self._axes(measurement)
        tensor = probabilities.reshape(-1, *(2,) * self.circuit.n_wires)
        first = np.moveaxis(tensor, axes, range(1, len(axes) + 1))
        return np.sum(first.reshape(len(tensor), 2 ** len(axes), -1), axis=-1)

    def _unmarginal(self, grad: NDArray[np.float64], measurement: Any) -> NDArray[np.float64]:
        """The transpose of :meth:`_marginal`."""
        axes, n = self._axes(measurement), self.circuit.n_wires
        spread = np.repeat(grad[:, :, None], 2 ** (n - len(axes)), axis=2).reshape(-1, *(2,) * n)
        return np.moveaxis(spread, range(1, len(axes) + 1), axes).reshape(len(grad), -1)


def _is_probs(measurement: Any) -> bool:
    return isinstance(measurement, qml.measurements.ProbabilityMP)


def _first_of_batch(operation: Any) -> Any:
    if not operation.batch_size:
        return operation
    first = [_values(angle).flat[0] for angle in operation.data]
    return qml.ops.functions.bind_new_parameters(operation, first)


def _summed_to(grad: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The gradient of what was given in this shape, and repeated along the batch where it has none."""
    return np.asarray(grad if np.shape(grad) == shape else np.sum(grad, 0)).reshape(shape)


def _amplitudes(preparation: Any) -> NDArray[np.float64]:
    state = _values(preparation.data[0] if isinstance(preparation, qml.StatePrep) else preparation.state_vector())
    state = state.reshape(*np.shape(state)[:1], -1) if preparation.batch_size else np.ravel(state)
    if np.any(np.imag(state) != 0):
        raise ValueError("expected real amplitudes, received complex ones with imaginary parts")
    return np.ascontiguousarray(np.real(state), np.float64)
