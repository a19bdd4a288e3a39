"""NumPy entry points: features of a batch of vectors, and their vector-Jacobian product. No torch is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qaa import _core
from qaa.circuit import Circuit, Readout
from qaa.program import Program, program

_SCALARS = {
    "float16": _core.Scalar.float16,
    "bfloat16": _core.Scalar.bfloat16,
    "float32": _core.Scalar.float32,
    "float64": _core.Scalar.float64,
}


def forward(
    circuit: Circuit,
    theta: ArrayLike,
    x: ArrayLike,
    readout: str | Sequence[str] | Readout = "z",
    *,
    normalize: bool = True,
    threads: int | None = None,
) -> NDArray[Any]:
    r"""Features of every row of ``x`` after amplitude embedding, the circuit and the readout.

    .. math::
        |\psi\rangle = \mathrm{pad}(x) / \lVert x \rVert, \qquad |\phi\rangle = U(\theta) |\psi\rangle, \qquad
        f_k = \langle\phi| M_k |\phi\rangle \ \text{or}\ |\phi_k|^2 \ \text{or}\ \phi_k

    Args:
        circuit: U, on ``n`` wires; wire 0 is the most significant bit of an amplitude's index.
        theta: angles in radians, shape ``circuit.parameter_shape``, any real floating dtype; or, where every row has
            angles of its own, ``(batch, *circuit.parameter_shape)``.
        x: shape ``(batch, d)`` with ``1 <= d <= 2**n``, padded with zeros to ``2**n``; float16, bfloat16 (ml_dtypes),
            float32 or float64. The arithmetic is float64 for float64, else float32.
        readout: see :class:`qaa.Readout`.
        normalize: if False, the row itself goes through the circuit: expectations and probabilities become quadratic
            forms of the row, amplitudes a linear map of it.
        threads: number of threads; by default ``OMP_NUM_THREADS`` or all processors. Results do not depend on it.

    Returns:
        Shape ``(batch, n_outputs)`` in the dtype of ``x``; for the readout ``"state"`` complex128 for float64 ``x``
        and else complex64. A zero row is no state: its features are zero. NaN and infinity stay in their row.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or dtype.
        MemoryError: there is not enough memory for the features.

    Example:
        >>> import numpy as np, qaa
        >>> circuit = qaa.ansatz("ring", n_wires=2)
        >>> theta = np.zeros(circuit.parameter_shape)
        >>> qaa.arrays.forward(circuit, theta, np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]]))
        array([[ 1.,  1.],
               [-1., -1.]])
    """
    what = program(circuit, readout, normalize)
    x = _rows(what, x)
    angles = _angles(what, theta, x.shape[:1])
    groups = _groups(what, angles)
    dtype = _feature_dtype(what, x.dtype)
    features = _empty("features", (x.shape[0], what.n_outputs), dtype)
    matrices, threads = (_const_matrix(x), _matrix(features)), _threads(threads)
    if groups:
        _core.forward(what.plan, angles.ctypes.data, _core.Scalar.float64, *matrices, threads, groups)
    return features


def backward(
    circuit: Circuit,
    theta: ArrayLike,
    x: ArrayLike,
    grad: ArrayLike,
    readout: str | Sequence[str] | Readout = "z",
    *,
    normalize: bool = True,
    threads: int | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    r"""Vector-Jacobian product of :func:`forward` by adjoint differentiation, for the angles and for the input.

    With :math:`E = \sum_{rk} \mathrm{Re}(\bar g_{rk} f_{rk})` for the incoming gradient ``grad`` = g, returns
    :math:`\partial E / \partial\theta` and :math:`\partial E / \partial x`. The memory beyond the results does not
    grow with the batch; it grows with the circuit, by a few tables of ``2**n`` numbers for each run of diagonal gates.

    Args:
        circuit, theta, x, readout, normalize, threads: as for :func:`forward`.
        grad: shape and dtype of what :func:`forward` returns. A complex gradient is dE/dRe + i dE/dIm, torch's
            convention.

    Returns:
        ``(grad_theta, grad_x)`` with the shapes and dtypes of ``theta`` and ``x``. A zero row has zero gradients
        (where rows are normalized). A row with NaN or infinity makes ``grad_theta`` NaN, in angles that the readout
        depends on, and no other row of ``grad_x``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or dtype.

    Example:
        >>> import numpy as np, qaa
        >>> circuit = qaa.Circuit(1, (qaa.Gate("RY", 0, 0),), (1,))  # <Z> = cos(theta) for the state |0>
        >>> grad_theta, grad_x = qaa.arrays.backward(circuit, [np.pi / 2], [[1.0, 0.0]], [[1.0]])
        >>> grad_theta.round(12), grad_x.round(12)
        (array([-1.]), array([[ 0., -2.]]))
    """
    what = program(circuit, readout, normalize)
    x = _rows(what, x)
    angles = _angles(what, theta, x.shape[:1])
    groups = _groups(what, angles)
    dtype, shape = _feature_dtype(what, x.dtype), (x.shape[0], what.n_outputs)
    grad = _array("grad", grad)
    if grad.shape != shape or grad.dtype != dtype:
        raise ValueError(f"expected grad of shape {shape} and dtype {dtype}, received {grad.shape} and {grad.dtype}")
    grad = _adjacent(grad)
    grad_angles, grad_x = np.empty_like(angles), _empty("grad_x", x.shape, x.dtype)
    threads = _threads(threads)
    if groups:
        _core.backward(
            what.plan,
            angles.ctypes.data,
            _core.Scalar.float64,
            _const_matrix(x),
            _const_matrix(grad),
            grad_angles.ctypes.data,
            _matrix(grad_x),
            threads,
            groups,
        )
    return grad_angles.astype(np.asarray(theta).dtype, copy=False), grad_x


def real_array(what: str, value: ArrayLike) -> NDArray[Any]:
    """``value`` as an array of real numbers; ``TypeError`` if it holds others, ``ValueError`` if it is none."""
    array = _array(what, value)
    if array.dtype.kind not in "fiu" and array.dtype.name not in _SCALARS:
        raise TypeError(f"expected {what} of real numbers, received {array.dtype}")
    return array


def _array(what: str, value: ArrayLike) -> NDArray[Any]:
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"expected {what} as an array without a mask, received a masked array")
    try:
        return np.asarray(value)
    except ValueError:
        raise ValueError(f"expected {what} as an array, received sequences of unequal lengths") from None


def _empty(what: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    try:
        return np.empty(shape, dtype)
    except ValueError:  # more bytes than there are addresses
        raise MemoryError(f"expected {what} that fit into memory, received shape {shape} of {dtype}") from None


def _angles(what: Program, theta: ArrayLike, rows: tuple[int, ...] = ()) -> NDArray[np.float64]:
    """Angles for all rows, or, where the shape of the rows is given, a set for each."""
    theta = _array("theta", theta)
    if theta.dtype.name not in _SCALARS:
        raise TypeError(f"expected theta of a real floating dtype, received {theta.dtype}")
    what.check_theta(theta.shape, rows)
    return np.asarray(theta, np.float64, order="C")


def _groups(what: Program, angles: NDArray[np.float64]) -> int:
    """How many sets of angles there are."""
    return 1 if angles.ndim == len(what.circuit.parameter_shape) else len(angles)


def _rows(what: Program, x: ArrayLike) -> NDArray[Any]:
    x = _array("x", x)
    if x.dtype.name not in _SCALARS or not x.dtype.isnative:
        raise TypeError(f"expected x of dtype {', '.join(_SCALARS)} in native byte order, received {x.dtype}")
    if x.ndim != 2:
        raise ValueError(f"expected x of shape (batch, d), received {x.shape}")
    what.check_width(x.shape[1])
    return _adjacent(x)


def _adjacent(a: NDArray[Any]) -> NDArray[Any]:
    """``a``, copied unless the numbers of each row are adjacent and rows lie whole numbers apart."""
    itemsize = a.itemsize
    if a.shape[1] > 1 and a.strides[1] != itemsize:
        return np.ascontiguousarray(a)
    if a.shape[0] > 1 and a.strides[0] % itemsize:
        return np.ascontiguousarray(a)
    return a if a.flags.aligned else a.copy()


def _feature_dtype(what: Program, dtype: np.dtype[Any]) -> np.dtype[Any]:
    if not what.is_complex:
        return dtype
    return np.dtype(np.complex128 if dtype == np.float64 else np.complex64)


def _layout(a: NDArray[Any]) -> tuple[int, int, int, int, _core.Scalar]:
    """Address, rows, columns, row stride and scalar, a complex number being two real ones."""
    parts = 2 if a.dtype.kind == "c" else 1
    scalar = {"complex64": "float32", "complex128": "float64"}.get(a.dtype.name, a.dtype.name)
    return a.ctypes.data, a.shape[0], a.shape[1] * parts, a.strides[0] // a.itemsize * parts, _SCALARS[scalar]


def _const_matrix(a: NDArray[Any]) -> _core.ConstMatrix:
    return _core.ConstMatrix(*_layout(a))


def _matrix(a: NDArray[Any]) -> _core.Matrix:
    return _core.Matrix(*_layout(a))


def _threads(threads: int | None) -> int:
    if threads is None:
        threads = _default_threads()
    if isinstance(threads, bool) or not isinstance(threads, (int, np.integer)) or threads < 1:
        raise ValueError(f"expected threads to be an integer of at least 1, received {threads!r}")
    return min(int(threads), 1024)


def _default_threads() -> int:
    from_environment = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if from_environment.isdigit() and int(from_environment) > 0:
        return int(from_environment)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
