"""Inputs at the ends of their types' ranges, and very deep circuits: the bounds of docs/reliability.md."""

from __future__ import annotations

import numpy as np
import pytest

import oracle
import qaa
from qaa.circuit import Readout

CIRCUIT = qaa.ansatz("ring", 4, 2)
THETA = np.random.default_rng(0).uniform(-3, 3, CIRCUIT.parameter_shape)
ROWS = np.random.default_rng(1).standard_normal((6, 13))
ROWS /= np.abs(ROWS).max()
KINDS = {
    "normal": ROWS,
    "one dominant channel": np.where(np.arange(13) == 3, 1.0, 1e-12 * ROWS),
    "all equal": np.ones((3, 13)),
    "alternating signs": (-1.0) ** np.arange(13)[None] * np.ones((3, 1)),
}
SIZES = {np.float32: (1e-43, 1e-41, 1e-38, 1e-30, 1e-19, 1e19, 1e30, 3e38), np.float64: (1e-320, 1e-300, 1e30, 1e300)}


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "size"), [(dtype, size) for dtype in SIZES for size in SIZES[dtype]])
def test_a_normalized_row_may_have_any_length(dtype: type, size: float, kind: str) -> None:
    """Features and gradients are those of the row divided by its largest number, within 16 roundings."""
    bound = 16 * np.finfo(dtype).eps
    x = (KINDS[kind] * dtype(size)).astype(dtype)
    largest = np.abs(x).max(axis=1, keepdims=True).astype(np.float64)
    reference, readout = x / largest, Readout.parse("z", 4)
    grad = np.ones((len(x), 4), dtype)
    features = qaa.arrays.forward(CIRCUIT, THETA, x)
    grad_theta, grad_x = qaa.arrays.backward(CIRCUIT, THETA, x, grad)
    np.testing.assert_allclose(
        features, oracle.features(CIRCUIT, THETA, reference, readout, normalize=True), rtol=0, atol=bound
    )
    for_theta, for_x = oracle.vjp(CIRCUIT, THETA, reference, grad, readout, normalize=True)
    np.testing.assert_allclose(grad_theta, for_theta, rtol=0, atol=bound * len(x))
    if np.isfinite(dtype(1 / largest.min())):  # a gradient is as large as the row is short
        np.testing.assert_allclose(grad_x * largest, for_x, rtol=0, atol=bound * 4)


@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [(np.float32, (9, 11, 13, 15)), (np.float64, (139, 141, 147, 149))],
    ids=["float32", "float64"],
)
def test_cosines_that_are_owed_do_not_overflow(dtype: type, exponents: tuple[int, ...]) -> None:
    """Rotations by nearly pi owe small cosines: stored amplitudes are then millions of times as large as the row's."""
    circuit = qaa.ansatz("ring", 10)
    theta = np.zeros(circuit.parameter_shape)
    theta[0, :, 0] = 2.74
    x = np.ones((1, 1024), dtype)
    grad = np.ones((1, 10), dtype)
    features, (grad_theta, grad_x) = (
        qaa.arrays.forward(circuit, theta, x),
        qaa.arrays.backward(circuit, theta, x, grad),
    )
    for exponent in exponents:
        row = x * dtype(10.0**exponent)
        tolerance = 64 * np.finfo(dtype).eps
        np.testing.assert_allclose(qaa.arrays.forward(circuit, theta, row), features, rtol=0, atol=tolerance)
        found_theta, found_x = qaa.arrays.backward(circuit, theta, row, grad)
        np.testing.assert_allclose(found_theta, grad_theta, rtol=0, atol=tolerance)
        np.testing.assert_allclose(found_x * 10.0**exponent, grad_x, rtol=0, atol=tolerance)


def test_float16_overflows_to_infinity_and_not_before() -> None:
    """What float16 can hold is right; what it cannot is infinite, in the row that it belongs to and nowhere else."""
    x = np.array([[65504.0] * 13, [1.0] * 13, [1e-7] * 13], np.float16)
    exact = qaa.arrays.forward(CIRCUIT, THETA, x.astype(np.float64))
    np.testing.assert_allclose(qaa.arrays.forward(CIRCUIT, THETA, x), exact, rtol=0, atol=2**-10)
    unnormalized = qaa.arrays.forward(CIRCUIT, THETA, x, normalize=False)
    assert np.isinf(unnormalized[0]).all() and np.isfinite(unnormalized[1:]).all()
    grad_theta, grad_x = qaa.arrays.backward(CIRCUIT, THETA, x, np.ones((3, 4), np.float16))
    assert np.isfinite(grad_theta).all() and np.isfinite(grad_x[:2]).all() and not np.isfinite(grad_x[2]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ten_thousand_layers_stay_unitary(dtype: type) -> None:
    """The norm drifts, and amplitudes err, by no more than a random walk of 60,000 roundings."""
    circuit = qaa.ansatz("basic_entangler", 3, 10_000)
    theta = np.random.default_rng(2).uniform(-np.pi, np.pi, circuit.parameter_shape)
    x = np.random.default_rng(3).standard_normal((4, 8)).astype(dtype)
    state = qaa.arrays.forward(circuit, theta, x, "state")
    bound = np.finfo(dtype).eps * np.sqrt(len(circuit.gates))
    np.testing.assert_allclose(np.linalg.norm(state.astype(np.complex128), axis=1), 1, rtol=0, atol=bound)
    exact = qaa.arrays.forward(circuit, theta, x.astype(np.float64), "state")
    np.testing.assert_allclose(state, exact, rtol=0, atol=bound)
    back, _ = qaa.arrays.backward(circuit, theta, x, np.ones((4, 8), state.dtype), "state")
    assert np.isfinite(back).all()
