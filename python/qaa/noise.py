"""Features of a noisy circuit, by Monte-Carlo trajectories, and their gradient by the parameter-shift rule.

The counterpart of :mod:`qaa.arrays` for a device that errs: channels act after every gate, on each of its wires. What
is computed has the density matrix's expectation value as its mean; it differs from it by the statistics of a finite
number of trajectories, whose standard error :func:`estimate` returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qaa import _core, arrays, shots
from qaa.circuit import Circuit, Readout, check_count
from qaa.program import Program, plan_arguments, program


@dataclass(frozen=True)
class NoiseModel:
    r"""Probabilities of the channels after every gate, on each of the gate's wires, in the order in which they act.

    =====================  ===========================================================================================
    ``depolarizing`` p     :math:`\rho \to (1 - p) \rho + \tfrac p 3 (X \rho X + Y \rho Y + Z \rho Z)`
    ``bit_flip`` p         :math:`\rho \to (1 - p) \rho + p X \rho X`
    ``phase_flip`` p       :math:`\rho \to (1 - p) \rho + p Z \rho Z`
    ``amplitude_damping``  :math:`\rho \to K_0 \rho K_0^\dagger + K_1 \rho K_1^\dagger`,
                           :math:`K_0 = \mathrm{diag}(1, \sqrt{1 - \gamma})`,
                           :math:`K_1 = \sqrt\gamma |0\rangle\langle 1|`
    ``readout_error`` p    every measured bit is wrong with probability p, whatever the bit
    =====================  ===========================================================================================

    p of ``depolarizing`` is the probability of an error, as in PennyLane's ``DepolarizingChannel``; Qiskit's parameter
    is ``4 p / 3``, and p = 3/4 leaves nothing of the qubit. A gate on two wires has two channels, one on each. The
    embedding has no noise, and neither have changes of basis for a readout of X or Y.

    Raises:
        ValueError: a value is no number from 0 to 1.

    Example:
        >>> NoiseModel(depolarizing=0.01, amplitude_damping=0.02).pauli
        (0.0033333333333333335, 0.0033333333333333335, 0.0033333333333333335)
        >>> NoiseModel(bit_flip=1.5)
        Traceback (most recent call last):
        ValueError: expected bit_flip to be a probability from 0 to 1, received 1.5
    """

    depolarizing: float = 0.0
    bit_flip: float = 0.0
    phase_flip: float = 0.0
    amplitude_damping: float = 0.0
    readout_error: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
            if not is_number or not 0 <= value <= 1:
                raise ValueError(f"expected {field.name} to be a probability from 0 to 1, received {value!r}")
            object.__setattr__(self, field.name, float(value))

    @property
    def pauli(self) -> tuple[float, float, float]:
        """Probabilities of X, Y and Z by the first three channels together."""
        p = self.depolarizing
        x, y, z = p / 3, p / 3, p / 3
        identity = 1 - p
        flip = self.bit_flip  # X after a Pauli: I <-> X, Y <-> Z
        identity, x, y, z = (a + flip * (b - a) for a, b in ((identity, x), (x, identity), (y, z), (z, y)))
        flip = self.phase_flip  # I <-> Z, X <-> Y
        x, y, z = (a + flip * (b - a) for a, b in ((x, y), (y, x), (z, identity)))
        return x, y, z


class Estimate(NamedTuple):
    """Means over trajectories and their standard errors, each of shape ``(batch, n_outputs)``."""

    features: NDArray[Any]
    standard_error: NDArray[Any]


def forward(
    circuit: Circuit,
    theta: ArrayLike,
    x: ArrayLike,
    readout: str | Sequence[str] | Readout = "z",
    *,
    noise: NoiseModel,
    trajectories: int,
    seed: int | np.random.Generator | None = None,
    normalize: bool = True,
    threads: int | None = None,
) -> NDArray[Any]:
    r"""Estimates of the features of a noisy circuit, from ``trajectories`` runs for each row.

    .. math::
        \hat f_k = \frac 1 T \sum_{t=1}^T \langle\phi_t| M_k |\phi_t\rangle, \qquad
        \mathrm{E} \hat f_k = \mathrm{Tr}\, M_k \rho

    where rho is the density matrix that the channels of ``noise`` leave of the embedded row, and each trajectory draws
    a Pauli operator after every gate, and a decay or none with the probability that it has in the trajectory's state.
    Outcomes are not sampled: without noise a single trajectory is exact. So is ``readout_error``: an expectation value
    of a Pauli string of w letters loses the factor :math:`(1 - 2 p)^w`, and probabilities are those of bits of which
    each is wrong with probability p.

    Args:
        circuit, theta, x, normalize, threads: as for :func:`qaa.arrays.forward`, with one set of angles for all rows.
            Narrow types of ``x`` are computed in float32. Without ``normalize``, estimates are multiplied by
            ``||x||**2``.
        readout: Pauli strings or probabilities; amplitudes are no observable of a mixed state.
        noise: the channels.
        trajectories: number T of runs, at least 1.
        seed: a seed or a NumPy generator. What is drawn for a trajectory depends on the seed, its number and the
            number of its row, so that results do not depend on threads, and a row's depend on the rows after it by
            rounding alone. Chances are resolved to ``2**-32``.

    Returns:
        Shape ``(batch, n_outputs)`` in the dtype of ``x``. A zero row has features 0, a row with NaN or infinity NaN.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or range, or the readout is ``"state"``.

    Source: Dalibard, Castin, Mølmer, Phys. Rev. Lett. 68, 580 (1992).

    Example:
        >>> import numpy as np, qaa
        >>> circuit = qaa.Circuit(1, (qaa.Gate("X", 0),), (0,))
        >>> x, noise = [[1.0, 0.0]], qaa.noise.NoiseModel(amplitude_damping=0.25)
        >>> qaa.noise.forward(circuit, np.zeros(0), x, noise=noise, trajectories=10_000, seed=0).round(1)  # -1 + 2/4
        array([[-0.5]])
    """
    options: dict[str, Any] = {"noise": noise, "trajectories": trajectories, "seed": seed, "threads": threads}
    return estimate(circuit, theta, x, readout, normalize=normalize, **options).features


def estimate(
    circuit: Circuit,
    theta: ArrayLike,
    x: ArrayLike,
    readout: str | Sequence[str] | Readout = "z",
    *,
    noise: NoiseModel,
    trajectories: int,
    seed: int | np.random.Generator | None = None,
    normalize: bool = True,
    threads: int | None = None,
) -> Estimate:
    r"""What :func:`forward` returns, and its standard error.

    .. math:: \sigma_k = \sqrt{\frac{1}{T (T - 1)} \sum_t (f_{kt} - \hat f_k)^2}

    Args:
        circuit, theta, x, readout, noise, trajectories, seed, normalize, threads: as for :func:`forward`.

    Returns:
        ``(features, standard_error)``; NaN for the error of a single trajectory.

    Raises:
        TypeError, ValueError: as :func:`forward`.

    Example:
        >>> import numpy as np, qaa
        >>> circuit = qaa.Circuit(1, (qaa.Gate("X", 0),), (0,))
        >>> x, noise = [[1.0, 0.0]], qaa.noise.NoiseModel(bit_flip=0.5)
        >>> qaa.noise.estimate(circuit, np.zeros(0), x, noise=noise, trajectories=400).standard_error.round(2)
        array([[0.05]])
    """
    what = _checked(circuit, readout, normalize, noise, trajectories)
    rows = arrays._rows(what, x)
    computed = rows if rows.dtype == np.float64 else rows.astype(np.float32)
    found = _estimate(what, arrays._angles(what, theta), computed, noise, trajectories, _seed(seed), threads)
    return Estimate(*(part.astype(rows.dtype, copy=False) for part in found))


def backward(
    circuit: Circuit,
    theta: ArrayLike,
    x: ArrayLike,
    grad: ArrayLike,
    readout: str | Sequence[str] | Readout = "z",
    *,
    noise: NoiseModel,
    trajectories: int,
    seed: int | np.random.Generator | None = None,
    normalize: bool = True,
    threads: int | None = None,
) -> NDArray[Any]:
    r"""An unbiased estimate of the gradient of the angles, by the parameter-shift rule of :func:`qaa.shots.backward`.

    The rule holds for a noisy circuit because no channel depends on an angle: as a function of one angle, Tr M rho is
    made of the same frequencies. All shifted circuits draw the same Pauli operators, which takes out of their
    differences most of what is left to chance.

    Args:
        circuit, theta, x, readout, noise, trajectories, seed, normalize, threads: as for :func:`forward`.
        grad: the incoming gradient, shape ``(batch, n_outputs)``.

    Returns:
        ``grad_theta`` with the shape and dtype of ``theta``. The gradient of ``x`` is not estimated.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or range, or the readout is ``"state"``.

    Example:
        >>> import numpy as np, qaa
        >>> circuit = qaa.Circuit(1, (qaa.Gate("RY", 0, 0),), (1,))  # <Z> = (1 - 2 p) cos(theta) for the state |0>
        >>> options = {"noise": qaa.noise.NoiseModel(bit_flip=0.1), "trajectories": 10_000, "seed": 0}
        >>> qaa.noise.backward(circuit, [np.pi / 2], [[1.0, 0.0]], [[1.0]], **options).round(1)
        array([-0.8])
    """
    what = _checked(circuit, readout, normalize, noise, trajectories)
    x = arrays._rows(what, x)
    x = x if x.dtype == np.float64 else x.astype(np.float32)
    key = _seed(seed)

    def features(separate: Program, angles: NDArray[Any]) -> NDArray[Any]:
        return _estimate(separate, angles, x, noise, trajectories, key, threads).features

    return shots._shift_gradient(what, theta, x, grad, features)


def check_noise(noise: object, trajectories: object) -> None:
    """Raises ``TypeError`` unless ``noise`` is a :class:`NoiseModel`, ``ValueError`` for no count of trajectories."""
    if not isinstance(noise, NoiseModel):
        raise TypeError(f"expected noise to be a qaa.noise.NoiseModel, received {type(noise).__name__}")
    check_count("trajectories", trajectories, 2**32)


def _checked(
    circuit: Circuit, readout: str | Sequence[str] | Readout, normalize: bool, noise: NoiseModel, trajectories: int
) -> Program:
    check_noise(noise, trajectories)
    what = program(circuit, readout, normalize)
    if what.is_complex:
        raise ValueError(f"expected Pauli strings or 'probs' with noise, received {str(what.readout)!r}")
    return what


def _seed(seed: int | np.random.Generator | None) -> int:
    return int(shots._generator(seed).integers(2**64, dtype=np.uint64))


@lru_cache(maxsize=256)
def _plan(what: Program, noise: NoiseModel) -> _core.NoisyPlan:
    return _core.NoisyPlan(
        **plan_arguments(what),
        pauli=list(noise.pauli),
        damping=noise.amplitude_damping,
        readout=noise.readout_error,
    )


def _estimate(
    what: Program,
    angles: NDArray[np.float64],
    x: NDArray[Any],
    noise: NoiseModel,
    trajectories: int,
    seed: int,
    threads: int | None,
) -> Estimate:
    """Estimates in the dtype of ``x``, float32 or float64."""
    features = np.empty((x.shape[0], what.n_outputs), x.dtype)
    errors = np.empty_like(features)
    angles = np.ascontiguousarray(angles)
    _core.noisy_forward(
        _plan(what, noise),
        angles.ctypes.data,
        _core.Scalar.float64,
        arrays._const_matrix(x),
        int(trajectories),
        seed,
        arrays._matrix(features),
        arrays._matrix(errors),
        arrays._threads(threads),
    )
    return Estimate(features, errors)
