"""Features estimated from a number of shots, and their gradient by the parameter-shift rule, as a device gives them.

The counterpart of :mod:`qaa.arrays`: ``forward`` draws outcomes from the exact distribution, ``backward`` runs shifted
circuits. Both are unbiased. There is no noise but that of counting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qaa import arrays
from qaa.circuit import GATES, Circuit, Gate, Readout
from qaa.program import Program, program

#: Gates that turn an operator's basis into that of Z, applied first to last; S^-1 is the product of Z and S.
BASIS_CHANGES: dict[str, tuple[str, ...]] = {"I": (), "Z": (), "X": ("H",), "Y": ("Z", "S", "H")}

#: Pairs (c, s) with f'(t) = sum of c (f(t + s) - f(t - s)).
_TWO_TERMS = ((0.5, math.pi / 2),)
_FOUR_TERMS = (
    ((math.sqrt(2) + 1) / (4 * math.sqrt(2)), math.pi / 2),
    (-(math.sqrt(2) - 1) / (4 * math.sqrt(2)), 3 * math.pi / 2),
)
#: The rule of each gate with angles: an expectation has frequency 1 in them, where there is a control also 1/2.
SHIFT_RULES: dict[str, tuple[tuple[float, float], ...]] = {
    name: _FOUR_TERMS if name in ("CRX", "CRY", "CRZ") else _TWO_TERMS for name in GATES if GATES[name][1]
}


def forward(
    circuit: Circuit,
    theta: ArrayLike,
    x: ArrayLike,
    readout: str | Sequence[str] | Readout = "z",
    *,
    shots: int,
    seed: int | np.random.Generator | None = None,
    normalize: bool = True,
    threads: int | None = None,
) -> NDArray[Any]:
    r"""Estimates of what :func:`qaa.arrays.forward` returns, from ``shots`` runs for each row.

    .. math::
        \hat f_k = \frac 1 N \sum_{s=1}^{N} m_{ks}, \qquad
        \mathrm{E} \hat f_k = f_k, \qquad \mathrm{Var} \hat f_k = (1 - f_k^2) / N

    for a Pauli string, whose outcomes m are -1 or 1, and :math:`f_k (1 - f_k) / N` for a probability.

    Strings that agree on every wire where neither is I are read from the same shots, after H (for X) or S^-1 and H (for
    Y) on their wires; strings are put into such groups in their order, each into the first that takes it. A row takes
    ``shots`` runs for each group: one group for ``"z"`` and ``"probs"``. Rows and groups are independent; estimates
    within one group are not.

    Args:
        circuit, theta, x, normalize, threads: as for :func:`qaa.arrays.forward`, with one set of angles for all
            rows. The distribution is computed in float64. Without ``normalize``, estimates are multiplied by
            ``||x||**2``.
        readout: Pauli strings or probabilities; no device counts amplitudes.
        shots: number N of runs, at least 1.
        seed: a seed or a NumPy generator; the same seed gives the same estimates.

    Returns:
        Shape ``(batch, n_outputs)`` in the dtype of ``x``. A zero row has features 0, and NaN or infinity in
        a row or in the angles makes NaN.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or range, or the readout is ``"state"``.

    Example:
        >>> import numpy as np, qaa
        >>> circuit = qaa.Circuit(1, (qaa.Gate("RY", 0, 0),), (1,))  # <Z> = cos(theta) for the state |0>
        >>> qaa.shots.forward(circuit, [np.pi / 3], [[1.0, 0.0]], shots=10_000, seed=0).round(1)
        array([[0.5]])
    """
    what = _checked(circuit, readout, normalize, shots)
    x = arrays._rows(what, x)
    return _estimate(what, arrays._angles(what, theta), x, shots, _generator(seed), threads).astype(x.dtype)


def backward(
    circuit: Circuit,
    theta: ArrayLike,
    x: ArrayLike,
    grad: ArrayLike,
    readout: str | Sequence[str] | Readout = "z",
    *,
    shots: int,
    seed: int | np.random.Generator | None = None,
    normalize: bool = True,
    threads: int | None = None,
) -> NDArray[Any]:
    r"""An unbiased estimate of the gradient of the angles, by the parameter-shift rule.

    For the k-th angle of a gate RX, RY, RZ, PhaseShift or Rot, and for CRX, CRY or CRZ,

    .. math::
        f' = \tfrac 1 2 \left[ f(\tfrac\pi 2) - f(-\tfrac\pi 2) \right], \qquad
        f' = \tfrac{\sqrt 2 + 1}{4 \sqrt 2} \left[ f(\tfrac\pi 2) - f(-\tfrac\pi 2) \right]
           - \tfrac{\sqrt 2 - 1}{4 \sqrt 2} \left[ f(\tfrac{3\pi}2) - f(-\tfrac{3\pi}2) \right]

    in the shift of this one angle; each f is an estimate as by :func:`forward`, from ``shots`` runs of its own. The
    uses of a shared entry of theta are shifted one by one. The gradient of ``x`` has no such rule and is not estimated.

    Args:
        circuit, theta, x, readout, shots, seed, normalize, threads: as for :func:`forward`.
        grad: the incoming gradient, shape ``(batch, n_outputs)``.

    Returns:
        ``grad_theta`` with the shape and dtype of ``theta``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or range, or the readout is ``"state"``.

    Sources: Schuld et al., Phys. Rev. A 99, 032331 (2019); four terms: Anselmetti et al., New J. Phys. 23, 113010
    (2021).

    Example:
        >>> import numpy as np, qaa
        >>> circuit = qaa.Circuit(1, (qaa.Gate("RY", 0, 0),), (1,))
        >>> qaa.shots.backward(circuit, [np.pi / 2], [[1.0, 0.0]], [[1.0]], shots=100)  # -sin(theta); no outcome varies
        array([-1.])
    """
    what = _checked(circuit, readout, normalize, shots)
    x, rng = arrays._rows(what, x), _generator(seed)

    def features(separate: Program, angles: NDArray[Any]) -> NDArray[Any]:
        return _estimate(separate, angles, x, shots, rng, threads)

    return _shift_gradient(what, theta, x, grad, features)


def _shift_gradient(
    what: Program,
    theta: ArrayLike,
    x: NDArray[Any],
    grad: ArrayLike,
    features: Callable[[Program, NDArray[Any]], NDArray[Any]],
) -> NDArray[Any]:
    """The gradient of the angles by shifted circuits: ``features(program, angles)`` computes those of one of them.

    Example:
        >>> import numpy as np, qaa
        >>> what = qaa.program.program(qaa.Circuit(1, (qaa.Gate("RY", 0, 0),), (1,)), "z", True)
        >>> x = np.array([[1.0, 0.0]])
        >>> _shift_gradient(what, [np.pi / 2], x, [[1.0]], lambda p, angles: arrays.forward(p.circuit, angles, x))
        array([-1.])
    """
    angles = arrays._angles(what, theta).ravel()
    grad = arrays.real_array("grad", grad).astype(np.float64)
    if grad.shape != (x.shape[0], what.n_outputs):
        raise ValueError(f"expected grad of shape {(x.shape[0], what.n_outputs)}, received {grad.shape}")
    separate, uses = _separate(what)
    grad_theta = np.zeros(what.circuit.n_parameters)
    for use, (gate, parameter) in enumerate(uses):
        for coefficient, shift in SHIFT_RULES[gate]:
            for sign in (1, -1):
                shifted = angles[[p for _, p in uses]]
                shifted[use] += sign * shift
                grad_theta[parameter] += sign * coefficient * np.sum(grad * features(separate, shifted))
    return grad_theta.reshape(what.circuit.parameter_shape).astype(np.asarray(theta).dtype)


def check_shots(shots: int) -> None:
    """Raises ``ValueError`` unless ``shots`` is a number of runs."""
    if isinstance(shots, bool) or not isinstance(shots, (int, np.integer)) or shots < 1:
        raise ValueError(f"expected shots to be an integer of at least 1, received {shots!r}")
    if shots >= 2**63:  # outcomes are counted in 64 bits
        raise ValueError(f"expected shots below {2**63}, received {shots}")


def _generator(seed: int | np.random.Generator | None) -> np.random.Generator:
    try:
        return np.random.default_rng(seed)
    except (TypeError, ValueError) as error:
        kind = type(error)
        raise kind(f"expected seed to be an integer of at least 0 or a NumPy generator, received {seed!r}") from None


def _checked(circuit: Circuit, readout: str | Sequence[str] | Readout, normalize: bool, shots: int) -> Program:
    check_shots(shots)
    what = program(circuit, readout, normalize)
    if what.is_complex:
        raise ValueError(f"expected Pauli strings or 'probs' with shots, received {str(what.readout)!r}")
    return what


@lru_cache(maxsize=256)
def _separate(what: Program) -> tuple[Program, list[tuple[str, int]]]:
    """The program with an entry of theta for each use of an angle, and for each use its gate and its original entry."""
    uses: list[tuple[str, int]] = []
    gates = []
    for gate in what.circuit.gates:
        gates.append(Gate(gate.name, gate.wires, tuple(range(len(uses), len(uses) + len(gate.parameters)))))
        uses += [(gate.name, parameter) for parameter in gate.parameters]
    circuit = Circuit(what.circuit.n_wires, tuple(gates), (len(uses),))
    return Program(circuit, what.readout, what.normalize), uses


@lru_cache(maxsize=256)
def _groups(what: Program) -> list[tuple[Circuit, list[int]]]:
    """Circuits that end in the basis of some outputs, and the indices of these outputs."""
    if what.readout.kind == "probs":
        return [(what.circuit, list(range(what.n_outputs)))]
    groups: list[tuple[str, list[int]]] = []
    for output, string in enumerate(what.readout.paulis):
        for position, (basis, outputs) in enumerate(groups):
            if all(a == b or "I" in (a, b) for a, b in zip(basis, string, strict=True)):
                joined = "".join(a if b == "I" else b for a, b in zip(basis, string, strict=True))
                groups[position] = joined, [*outputs, output]
                break
        else:
            groups.append((string, [output]))
    return [(_in_basis(what.circuit, basis), outputs) for basis, outputs in groups]


def _in_basis(circuit: Circuit, basis: str) -> Circuit:
    changes = [Gate(name, (wire,)) for wire, letter in enumerate(basis) for name in BASIS_CHANGES[letter]]
    return Circuit(circuit.n_wires, (*circuit.gates, *changes), circuit.parameter_shape)


def _signs(strings: Sequence[str]) -> NDArray[np.float64]:
    """The outcomes -1 and 1 of Z on the wires that are not I, shape ``(2**n, len(strings))``."""
    of_letter = {letter: np.array([1.0, 1.0 if letter == "I" else -1.0]) for letter in "IXYZ"}
    return np.stack([reduce(np.kron, [of_letter[letter] for letter in string]) for string in strings], axis=1)


def _estimate(
    what: Program, theta: NDArray[Any], x: NDArray[Any], shots: int, rng: np.random.Generator, threads: int | None
) -> NDArray[np.float64]:
    """Estimates in float64, shape ``(batch, n_outputs)``."""
    x = x.astype(np.float64)
    estimates = np.zeros((x.shape[0], what.n_outputs))
    broken = ~np.isfinite(x).all(axis=1)
    estimates[broken] = np.nan
    live = ~broken & (x != 0).any(axis=1)
    for circuit, outputs in _groups(what):
        probabilities = arrays.forward(circuit, theta, x[live], "probs", threads=threads)
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        frequencies = np.full_like(probabilities, np.nan)
        finite = np.isfinite(probabilities).all(axis=1)  # not so for angles that are not
        frequencies[finite] = rng.multinomial(shots, probabilities[finite]) / shots
        if what.readout.kind == "probs":
            estimates[live] = frequencies[:, outputs]
        else:
            signs = _signs([what.readout.paulis[output] for output in outputs])
            estimates[np.ix_(live, outputs)] = frequencies @ signs
    if not what.normalize:
        estimates[live] *= np.sum(x[live] ** 2, axis=1, keepdims=True)
    return estimates
