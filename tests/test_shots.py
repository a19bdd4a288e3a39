"""Estimates from shots: exact in expectation, with the variance of counting; their gradient by shifted circuits."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy.typing import NDArray
from scipy import stats

import oracle
from qaa import Circuit, Gate, Readout, ansatz, arrays, ops, shots
from qaa.circuit import GATES
from qaa.nn import QuantumLayer
from qaa.program import Program, program
from strategies import Problem, problems, random_angles, random_circuit

#: One gate of each kind that has angles, two of which share an entry of theta.
ALL_ANGLES = Circuit(
    3,
    (
        *(Gate("H", (wire,)) for wire in range(3)),
        Gate("RX", (0,), (0,)),
        Gate("RY", (1,), (1,)),
        Gate("RZ", (2,), (2,)),
        Gate("Rot", (0,), (3, 4, 0)),
        Gate("CRX", (0, 1), (5,)),
        Gate("CRY", (1, 2), (6,)),
        Gate("CRZ", (2, 0), (7,)),
        Gate("PhaseShift", (1,), (8,)),
        Gate("CNOT", (0, 1)),
        Gate("RY", (1,), (1,)),
    ),
    (9,),
)


class ExpectedCounts(np.random.Generator):
    """A generator whose counts are their own expectation."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def multinomial(self, n: Any, pvals: Any, size: Any = None) -> Any:
        np.testing.assert_allclose(np.sum(pvals, axis=-1), 1)
        return n * pvals


def estimable(problem: Problem) -> bool:
    return problem.readout.kind != "state"


@settings(max_examples=100)
@given(problems(max_wires=4, max_batch=4).filter(estimable))
def test_bases_signs_and_scales(problem: Problem) -> None:
    """With expected counts, an estimate is the exact feature: what is left of it is basis changes, signs and norms."""
    value = shots.forward(
        problem.circuit,
        problem.theta,
        problem.x,
        problem.readout,
        shots=7,
        seed=ExpectedCounts(),
        normalize=problem.normalize,
    )
    expected = oracle.features(problem.circuit, problem.theta, problem.x, problem.readout, normalize=problem.normalize)
    scale = 1 if problem.normalize else np.max(np.sum(problem.x**2, axis=1))
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12 * scale)


@settings(max_examples=60)
@given(problems(max_wires=4, max_gates=12, max_batch=3).filter(estimable))
def test_the_shift_rules(problem: Problem) -> None:
    """With expected counts, the shifted circuits give the exact derivative, of shared and of unused angles as well."""
    arguments = problem.circuit, problem.theta, problem.x, problem.grad, problem.readout
    options: dict[str, Any] = {"normalize": problem.normalize}
    value = shots.backward(*arguments, shots=1, seed=ExpectedCounts(), **options)
    expected, _ = oracle.vjp(*arguments, **options)
    scale = np.sum(np.abs(problem.grad)) * (1 if problem.normalize else np.max(np.sum(problem.x**2, axis=1)))
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12 * max(1, scale))
    assert value.shape == problem.circuit.parameter_shape


def test_every_gate_with_angles_has_a_rule() -> None:
    assert {name for name in GATES if GATES[name][1]} == set(shots.SHIFT_RULES)
    assert {gate.name for gate in ALL_ANGLES.gates} >= set(shots.SHIFT_RULES)


READOUTS: list[Any] = ["z", "probs", "probs[:3]", ["XXI", "ZZZ", "IYZ", "XIX", "III", "YXZ"]]


@pytest.mark.parametrize("readout", READOUTS, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_mean_and_variance(readout: Any, normalize: bool) -> None:
    """2000 independent estimates from 40 shots each: mean within 4 standard errors, variance within chi-square's."""
    rng = np.random.default_rng(5)
    theta, x = random_angles(rng, (9,)), rng.normal(size=(1, 7))
    n, n_shots = 2000, 40
    estimates = shots.forward(
        ALL_ANGLES, theta, np.repeat(x, n, axis=0), readout, shots=n_shots, seed=1, normalize=normalize
    )
    exact = oracle.features(ALL_ANGLES, theta, x, readout)[0]
    is_string = Readout.parse(readout, 3).kind == "expval"
    variance = (1 - exact**2 if is_string else exact * (1 - exact)) / n_shots
    scale = 1 if normalize else np.sum(x**2)
    certain = variance < 1e-15
    np.testing.assert_allclose(estimates[:, certain], np.tile(scale * exact[certain], (n, 1)), atol=1e-12)
    estimates, exact, variance = estimates[:, ~certain], scale * exact[~certain], scale**2 * variance[~certain]
    z = (estimates.mean(axis=0) - exact) / np.sqrt(variance / n)
    assert np.abs(z).max() < 4
    # The spread of a sample variance, whose fourth moment is close to a normal distribution's.
    ratio = estimates.var(axis=0, ddof=1) / variance
    assert np.abs(ratio - 1).max() < 4 * np.sqrt(2.5 / n)


def test_counts_have_the_circuits_distribution() -> None:
    rng = np.random.default_rng(2)
    circuit = random_circuit(rng, 4, 25)
    theta, x = random_angles(rng, circuit.parameter_shape), rng.normal(size=(3, 16))
    n_shots = 20_000
    counts = n_shots * shots.forward(circuit, theta, x, "probs", shots=n_shots, seed=3)
    expected = n_shots * oracle.features(circuit, theta, x, "probs")
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-9)
    np.testing.assert_allclose(counts.sum(axis=1), n_shots)
    assert expected.min() > 1, "too few counts for the test"
    for row, expected_row in zip(counts, expected, strict=True):
        assert stats.chisquare(row, expected_row).pvalue > 1e-3


def test_the_gradient_is_unbiased() -> None:
    """The mean of 150 gradients from 20 shots, by a t-test for each angle."""
    rng = np.random.default_rng(7)
    theta, x = rng.uniform(-np.pi, np.pi, 9), rng.normal(size=(2, 8))
    readout = ["ZII", "YYI"]
    grad = rng.normal(size=(2, 2))
    generator = np.random.default_rng(8)
    estimates = np.stack(
        [shots.backward(ALL_ANGLES, theta, x, grad, readout, shots=20, seed=generator) for _ in range(150)]
    )
    exact, _ = oracle.vjp(ALL_ANGLES, theta, x, grad, readout)
    z = (estimates.mean(axis=0) - exact) / (estimates.std(axis=0, ddof=1) / np.sqrt(150))
    assert np.abs(z).max() < 4
    assert np.all(estimates.std(axis=0) > 0)


def test_strings_that_commute_wire_by_wire_share_their_shots() -> None:
    theta, x = np.arange(9.0), np.ones((50, 8))
    what = program(ALL_ANGLES, ["ZII", "XIZ", "YYI", "IZI", "IIZ", "XII", "IIX"], True)
    assert [outputs for _, outputs in shots._groups(what)] == [[0, 3, 4], [1, 5], [2, 6]]
    z = shots.forward(ALL_ANGLES, theta, x, ["ZZI", "ZII", "IZI", "ZZI"], shots=1, seed=0)
    np.testing.assert_array_equal(z[:, 0], z[:, 1] * z[:, 2])  # outcomes of one and the same run
    np.testing.assert_array_equal(z[:, 0], z[:, 3])
    assert set(np.unique(z)) == {-1.0, 1.0}


def test_seeds_and_dtypes() -> None:
    theta, x = random_angles(np.random.default_rng(0), (9,)), np.ones((4, 8), np.float32)

    def run(seed: Any, x: NDArray[Any] = x) -> NDArray[Any]:
        return shots.forward(ALL_ANGLES, theta, x, shots=100, seed=seed)

    np.testing.assert_array_equal(run(1), run(1))
    np.testing.assert_array_equal(run(np.random.default_rng(1)), run(1))
    assert np.any(run(1) != run(2)) and np.any(run(None) != run(None))
    assert run(1).dtype == np.float32 and run(1, x.astype(np.float16)).dtype == np.float16
    np.testing.assert_array_equal(run(1), np.float32(run(1, x.astype(np.float64))))
    grad = np.ones((4, 3))
    first, second = (shots.backward(ALL_ANGLES, np.float32(theta), x, grad, shots=10, seed=1) for _ in range(2))
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, second)


def test_rows_that_are_no_states() -> None:
    theta = np.zeros(9)
    x = np.ones((4, 8))
    x[1], x[2, 3], x[3, 0] = 0, np.nan, np.inf
    for readout in READOUTS:
        value = shots.forward(ALL_ANGLES, theta, x, readout, shots=10, seed=0)
        assert np.isfinite(value[0]).all() and np.all(value[1] == 0) and np.isnan(value[2:]).all()
        assert np.isnan(shots.backward(ALL_ANGLES, theta, x, np.ones_like(value), readout, shots=1)).any()
    empty = shots.forward(ALL_ANGLES, theta, np.ones((0, 8)), shots=10)
    assert empty.shape == (0, 3)
    np.testing.assert_array_equal(shots.backward(ALL_ANGLES, theta, x[1:2], np.ones((1, 3)), shots=5), 0)


@pytest.mark.parametrize("readout", READOUTS, ids=str)
@pytest.mark.parametrize("angle", [np.nan, np.inf])
def test_angles_that_are_no_numbers_have_no_estimates(readout: Any, angle: float) -> None:
    """As qaa.arrays has NaN for them, and zero for a row that is no state."""
    theta, x = np.full(ALL_ANGLES.parameter_shape, angle), np.ones((3, 5))
    x[1] = 0
    value = shots.forward(ALL_ANGLES, theta, x, readout, shots=3)
    assert np.isnan(value[[0, 2]]).all() and not value[1].any()
    assert np.isnan(shots.backward(ALL_ANGLES, theta, x, np.ones_like(value), readout, shots=3)).all()


def test_refusals() -> None:
    theta, x = np.zeros(9), np.ones((2, 8))
    for number in (0, -1, 1.5, True, "10"):
        message = f"expected shots to be an integer of at least 1, received {number!r}"
        with pytest.raises(ValueError, match=re.escape(message)):
            shots.forward(ALL_ANGLES, theta, x, shots=number)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected Pauli strings or 'probs' with shots, received 'state\[:8\]'"):
        shots.forward(ALL_ANGLES, theta, x, "state", shots=1)
    with pytest.raises(ValueError, match=re.escape("expected grad of shape (2, 3), received (2, 2)")):
        shots.backward(ALL_ANGLES, theta, x, np.ones((2, 2)), shots=1)
    with pytest.raises(ValueError, match=re.escape("expected theta of shape (9,), received (8,)")):
        shots.backward(ALL_ANGLES, theta[:8], x, np.ones((2, 3)), shots=1)


# ------------------------------------------------------------------------------------------------ torch


def layer(**options: Any) -> QuantumLayer:
    torch.manual_seed(0)
    return QuantumLayer(ansatz("ring", 3, 2), **options)


def test_the_layer_estimates_what_it_computes() -> None:
    x = torch.randn(2, 400, 6, generator=torch.Generator().manual_seed(1))
    exact = layer()(x)
    estimate = layer(shots=50)(x)
    assert estimate.shape == exact.shape and estimate.dtype == torch.float32
    z = (estimate - exact) / ((1 - exact**2) / 50).sqrt()
    assert abs(z.mean()) < 4 / z.numel() ** 0.5 and abs(z.std() - 1) < 0.1
    assert "shots=50" in repr(layer(shots=50)) and "shots" not in repr(layer())


def test_the_layers_gradient_is_the_shift_rules() -> None:
    x = torch.randn(5, 6, dtype=torch.float64)
    noisy, exact = layer(shots=4000).double(), layer().double()
    weight = torch.randn(5, 3, dtype=torch.float64)
    (noisy(x) * weight).sum().backward()
    (exact(x) * weight).sum().backward()
    assert noisy.theta.grad is not None and exact.theta.grad is not None
    # Each of the two terms of an angle has a standard deviation of at most half of sum |w| / sqrt(N).
    bound = 4 * float(weight.abs().sum()) / 4000**0.5
    assert 0 < (noisy.theta.grad - exact.theta.grad).abs().max() < bound


def test_the_layers_random_numbers() -> None:
    x = torch.randn(3, 8)
    seeded = [layer(shots=10, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    values = [each(x) for each in seeded]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    for value in values[:2]:
        value.sum().backward()
    assert torch.equal(seeded[0].theta.grad, seeded[1].theta.grad)  # type: ignore[arg-type]
    assert not torch.equal(seeded[0](x), values[0])  # the generator has moved on
    default = layer(shots=10)
    torch.manual_seed(5)
    first = default(x)
    torch.manual_seed(5)
    assert torch.equal(default(x), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_layers_dtypes(dtype: torch.dtype) -> None:
    value = layer(shots=10)(torch.ones(2, 8, dtype=dtype))
    assert value.dtype == dtype
    value.sum().backward()


def test_a_layer_trains_on_shots() -> None:
    circuit = Circuit(2, (Gate("RY", (0,), (0,)), Gate("CNOT", (0, 1)), Gate("RX", (1,), (1,))), (2,))
    torch.manual_seed(1)
    model = QuantumLayer(circuit, ["ZZ"], shots=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    x = torch.tensor([[0.9, 0.1, 0.2, 0.1]])
    before = ops.quantum_features(circuit, model.theta, x, ["ZZ"]).item()
    for _ in range(40):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    after = ops.quantum_features(circuit, model.theta, x, ["ZZ"]).item()
    assert after < before - 0.5 and after < -0.7


def test_a_compiled_layer_breaks_its_graph() -> None:
    x = torch.ones(2, 8)
    eager = layer(shots=10, generator=torch.Generator().manual_seed(3))
    compiled = torch.compile(layer(shots=10, generator=torch.Generator().manual_seed(3)), backend="eager")
    assert torch.equal(eager(x), compiled(x))


def test_what_no_device_gives() -> None:
    x = torch.ones(2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="expected x without requires_grad with shots, received one with it"):
        layer(shots=10)(x)
    with torch.no_grad():
        assert layer(shots=10)(x).shape == (2, 3)
    model = layer(shots=10)
    value = model(x.detach())
    with pytest.raises(RuntimeError, match="expected create_graph=False with shots"):
        torch.autograd.grad(value.sum(), model.theta, create_graph=True)
    with pytest.raises(ValueError, match="expected a generator together with shots or noise, received one without"):
        layer(generator=torch.Generator())(x)
    with pytest.raises(TypeError, match=r"expected generator to be a torch\.Generator, received int"):
        layer(shots=1, generator=3)(x.detach())
    with pytest.raises(RuntimeError, match="expected plain tensors with shots, received traced or transformed ones"):
        torch.func.vmap(layer(shots=10))(torch.ones(2, 3, 8))


def test_programs_with_shots_are_the_programs() -> None:
    what = program(ALL_ANGLES, "z", True)
    separate, uses = shots._separate(what)
    assert isinstance(separate, Program) and separate.circuit.n_parameters == len(uses) == 11
    theta, x = np.arange(9.0), np.eye(2, 8)
    value = arrays.forward(separate.circuit, theta[[parameter for _, parameter in uses]], x)
    np.testing.assert_allclose(value, oracle.features(ALL_ANGLES, theta, x), atol=1e-12)
