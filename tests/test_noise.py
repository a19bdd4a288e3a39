"""Trajectories against density matrices: Qiskit Aer's, and one written out in NumPy."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import noise as table
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import oracle
from qaa import Circuit, Gate, Readout, ansatz, arrays, noise
from qaa.circuit import GATES
from qaa.nn import Adapter, QuantumLayer
from qaa.noise import NoiseModel
from strategies import Problem, problems, random_angles, random_circuit

Array = NDArray[Any]
SOME = NoiseModel(depolarizing=0.05, bit_flip=0.02, phase_flip=0.03, amplitude_damping=0.08, readout_error=0.04)

#: Every gate of the table, on states that no gate leaves alone.
ALL_GATES = Circuit(
    3,
    tuple(
        Gate(name, wires, tuple(range(3 * at, 3 * at + n_parameters)))
        for at, (name, (n_wires, n_parameters)) in enumerate(GATES.items())
        for wires in [tuple((at + shift) % 3 for shift in range(n_wires))]
    ),
    (3 * len(GATES),),
)
MIXED = ["ZII", "IXI", "IIY", "XYZ", "YYI", "III"]


def kraus(channels: NoiseModel) -> list[list[Array]]:
    """The operators of each channel, in the order in which the channels act."""
    x, y, z = (oracle.PAULI[letter] for letter in "XYZ")
    one = np.eye(2)
    p, g = channels.depolarizing, channels.amplitude_damping
    return [
        [math.sqrt(1 - p) * one, *(math.sqrt(p / 3) * pauli for pauli in (x, y, z))],
        [math.sqrt(1 - channels.bit_flip) * one, math.sqrt(channels.bit_flip) * x],
        [math.sqrt(1 - channels.phase_flip) * one, math.sqrt(channels.phase_flip) * z],
        [np.diag([1, math.sqrt(1 - g)]), math.sqrt(g) * np.array([[0, 1], [0, 0]])],
    ]


def density(circuit: Circuit, theta: Array, row: Array, channels: NoiseModel) -> Array:
    """The density matrix of one row, by full-size matrices."""
    n = circuit.n_wires
    psi = np.zeros(2**n, complex)
    psi[: len(row)] = row / np.linalg.norm(row)
    rho = np.outer(psi, psi.conj())
    angles = np.ravel(theta)
    for gate in circuit.gates:
        whole = oracle.embed(oracle.gate_matrix(gate.name, [angles[p] for p in gate.parameters]), gate.wires, n)
        rho = whole @ rho @ whole.conj().T
        for wire in gate.wires:
            for operators in kraus(channels):
                wholes = [oracle.embed(np.asarray(k, complex), [wire], n) for k in operators]
                rho = sum(k @ rho @ k.conj().T for k in wholes)
    return rho


def exact(
    circuit: Circuit, theta: Array, x: Array, readout: Any, channels: NoiseModel, normalize: bool = True
) -> Array:
    """Features by :func:`density`, with the confusion of bits at the end."""
    n, what = circuit.n_wires, Readout.parse(readout, circuit.n_wires)
    wrong = channels.readout_error
    rows = []
    for row in x:
        rho = density(circuit, theta, row, channels)
        if what.kind == "expval":
            values = []
            for string in what.paulis:
                whole = np.eye(1)
                for letter in string:
                    whole = np.kron(whole, oracle.PAULI[letter] * (1 if letter == "I" else 1 - 2 * wrong))
                values.append(np.trace(whole @ rho).real)
        else:
            confusion = np.eye(1)
            for _ in range(n):
                confusion = np.kron(confusion, np.array([[1 - wrong, wrong], [wrong, 1 - wrong]]))
            values = list((confusion @ np.diag(rho).real)[: what.n_outputs])
        rows.append(np.array(values) * (1 if normalize else np.sum(row**2)))
    return np.array(rows)


def aer_density(circuit: Circuit, theta: Array, row: Array, channels: NoiseModel) -> Array:
    """The density matrix by Qiskit Aer, in our order of wires."""
    from qiskit import QuantumCircuit
    from qiskit.quantum_info import Operator
    from qiskit_aer import AerSimulator
    from qiskit_aer.noise import amplitude_damping_error, depolarizing_error, pauli_error

    errors = [
        depolarizing_error(4 / 3 * channels.depolarizing, 1),
        pauli_error([("X", channels.bit_flip), ("I", 1 - channels.bit_flip)]),
        pauli_error([("Z", channels.phase_flip), ("I", 1 - channels.phase_flip)]),
        amplitude_damping_error(channels.amplitude_damping),
    ]
    n = circuit.n_wires
    noisy = QuantumCircuit(n)
    psi = np.zeros(2**n)
    psi[: len(row)] = row / np.linalg.norm(row)
    noisy.set_density_matrix(np.outer(psi, psi).reshape((2,) * 2 * n).transpose(_turned(n)).reshape(2**n, 2**n))
    for gate in circuit.gates:  # one by one: the noise stands behind each of ours, however Qiskit would write it
        one = Circuit(n, (gate,), circuit.parameter_shape)
        noisy.unitary(Operator(one.to_qiskit(theta)), range(n))
        for wire in gate.wires:
            for error in errors:
                noisy.append(error, [wire])
    noisy.save_density_matrix()
    rho = AerSimulator(method="density_matrix").run(noisy).result().data()["density_matrix"].data
    return np.asarray(rho).reshape((2,) * 2 * n).transpose(_turned(n)).reshape(2**n, 2**n)


def _turned(n: int) -> list[int]:
    return [*range(n)][::-1] + [*range(n, 2 * n)][::-1]


@pytest.mark.parametrize(
    "channels",
    [
        NoiseModel(depolarizing=0.05),
        NoiseModel(bit_flip=0.1),
        NoiseModel(phase_flip=0.1),
        NoiseModel(amplitude_damping=0.15),
        NoiseModel(depolarizing=0.02, bit_flip=0.03, phase_flip=0.04, amplitude_damping=0.1),
    ],
    ids=str,
)
@pytest.mark.parametrize("circuit", [ansatz("ring", 4, 2), ALL_GATES], ids=["ring", "all gates"])
def test_the_mean_is_aers_density_matrix(circuit: Circuit, channels: NoiseModel) -> None:
    """20,000 trajectories within 5 standard errors of Qiskit Aer's density matrix, and that one equal to ours."""
    rng = np.random.default_rng(3)
    theta, x = random_angles(rng, circuit.parameter_shape), rng.normal(size=(1, 2**circuit.n_wires - 1))
    rho = aer_density(circuit, theta, x[0], channels)
    np.testing.assert_allclose(rho, density(circuit, theta, x[0], channels), rtol=0, atol=1e-10)
    strings = [string + "I" * (circuit.n_wires - 3) for string in MIXED]
    for readout in (strings, "probs"):
        found = noise.estimate(circuit, theta, x, readout, noise=channels, trajectories=20_000, seed=1)
        expected = exact(circuit, theta, x, readout, channels)
        assert np.all(np.abs(found.features - expected) <= 5 * found.standard_error + 1e-12)
        assert np.median(found.standard_error) < 0.01
        assert np.all(found.standard_error[0, : len(MIXED) - 1] > 0)


def test_the_errors_have_the_size_that_is_claimed() -> None:
    """Deviations of 400 independent rows over their standard errors have variance 1; bits are wrong at the end."""
    rng = np.random.default_rng(4)
    theta, row = random_angles(rng, ALL_GATES.parameter_shape), rng.normal(size=8)
    for readout in ("z", "probs[:3]", MIXED):
        expected = exact(ALL_GATES, theta, row[None], readout, SOME)
        rows = np.repeat(row[None], 400, axis=0)
        found = noise.estimate(ALL_GATES, theta, rows, readout, noise=SOME, trajectories=100, seed=2)
        varies = found.standard_error[0] > 1e-6
        z = ((found.features - expected) / np.where(varies, found.standard_error, 1))[:, varies]
        np.testing.assert_allclose(found.features[:, ~varies], np.tile(expected[:, ~varies], (400, 1)), atol=1e-12)
        assert np.abs(z.mean(axis=0)).max() < 5 / math.sqrt(400)
        assert np.abs(z.var(axis=0) - 1).max() < 0.35


def test_wrong_bits_alone_need_no_statistics() -> None:
    rng = np.random.default_rng(4)
    channels = NoiseModel(readout_error=0.13)
    theta, x = random_angles(rng, ALL_GATES.parameter_shape), rng.normal(size=(3, 2**ALL_GATES.n_wires))
    for readout in ("probs", "probs[:3]", "z", MIXED):
        found = noise.estimate(ALL_GATES, theta, x, readout, noise=channels, trajectories=2, seed=0)
        np.testing.assert_allclose(found.features, exact(ALL_GATES, theta, x, readout, channels), rtol=0, atol=1e-13)
        assert found.standard_error.max() < 1e-7


@settings(max_examples=60)
@given(problems(max_wires=4, max_batch=3).filter(lambda problem: problem.readout.kind != "state"))
def test_without_noise_a_trajectory_is_exact(problem: Problem) -> None:
    arguments = problem.circuit, problem.theta, problem.x, problem.readout
    value = noise.forward(*arguments, noise=NoiseModel(), trajectories=1, normalize=problem.normalize)
    expected = oracle.features(*arguments, normalize=problem.normalize)
    scale = 1 if problem.normalize else max(1.0, float(np.max(np.sum(problem.x**2, axis=1))))
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12 * scale)


@settings(max_examples=40)
@given(
    problems(max_wires=3, max_batch=2).filter(lambda problem: problem.readout.kind != "state"),
    st.sampled_from(["bit_flip", "phase_flip", "amplitude_damping", "readout_error"]),
)
def test_what_happens_for_certain_is_exact(problem: Problem, channel: str) -> None:
    """Errors of probability 1 leave nothing to chance: one trajectory equals the density matrix."""
    channels = NoiseModel(**{channel: 1.0})
    touched = {wire for gate in problem.circuit.gates for wire in gate.wires}
    # wires without a gate would keep what they knew of those that decayed
    assume(channel != "amplitude_damping" or len(touched) == problem.circuit.n_wires)
    rows = problem.x[np.any(problem.x != 0, axis=1)]
    arguments = problem.circuit, problem.theta, rows, problem.readout
    found = noise.forward(*arguments, noise=channels, trajectories=1, normalize=problem.normalize)
    expected = exact(*arguments, channels, problem.normalize).reshape(found.shape)
    scale = 1 if problem.normalize else max([1.0, *np.sum(rows**2, axis=1)])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * scale)


def test_known_values() -> None:
    """A qubit after one gate: <Z> and <X> shrink by the textbook's factors; 3/4 of depolarizing leaves nothing."""
    theta, x = np.array([0.7]), np.array([[1.0, 0.0]])
    turn = Circuit(1, (Gate("RY", 0, 0),), (1,))
    z, y = math.cos(0.7), math.sin(0.7)
    cases = [
        (NoiseModel(depolarizing=0.3), (1 - 0.4) * z, (1 - 0.4) * y),
        (NoiseModel(depolarizing=0.75), 0, 0),
        (NoiseModel(bit_flip=0.2), 0.6 * z, y),
        (NoiseModel(phase_flip=0.2), z, 0.6 * y),
        (NoiseModel(amplitude_damping=0.36), 0.36 + 0.64 * z, 0.8 * y),
        (NoiseModel(readout_error=0.1), 0.8 * z, 0.8 * y),
    ]
    for channels, *expected in cases:
        found = noise.estimate(turn, theta, x, ["Z", "X"], noise=channels, trajectories=40_000, seed=5)
        assert np.all(np.abs(found.features[0] - expected) <= 5 * found.standard_error[0] + 1e-12), channels


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_results_do_not_depend_on_threads_or_on_other_rows(dtype: Any) -> None:
    rng = np.random.default_rng(6)
    circuit = random_circuit(rng, 5, 40)
    theta, x = random_angles(rng, circuit.parameter_shape), rng.normal(size=(70, 32)).astype(dtype)
    options: dict[str, Any] = {"noise": SOME, "trajectories": 50, "seed": 9}
    one = noise.estimate(circuit, theta, x, threads=1, **options)
    for threads in (2, 3):
        again = noise.estimate(circuit, theta, x, threads=threads, **options)
        for first, second in zip(one, again, strict=True):
            np.testing.assert_array_equal(first, second)
    tolerance = 1e-5 if dtype == np.float32 else 1e-13  # groups of other widths add in another order
    for count in (1, 2, 33):
        few = noise.forward(circuit, theta, x[:count], **options)
        np.testing.assert_allclose(few, one.features[:count], rtol=0, atol=tolerance)
    single = noise.forward(circuit, theta, x[:1], threads=4, noise=SOME, trajectories=3000, seed=9)
    np.testing.assert_array_equal(
        single, noise.forward(circuit, theta, x[:1], threads=1, noise=SOME, trajectories=3000, seed=9)
    )
    assert not np.allclose(one.features, noise.forward(circuit, theta, x, noise=SOME, trajectories=50, seed=10))


def test_zero_and_broken_rows_and_narrow_types() -> None:
    circuit = ansatz("ring", 3)
    theta = random_angles(np.random.default_rng(7), circuit.parameter_shape)
    x = np.array([[0.0] * 8, [1.0] * 8, [np.nan, *[1.0] * 7], [np.inf, *[1.0] * 7], [1e-200] * 8, [1e200] * 8])
    options: dict[str, Any] = {"noise": SOME, "trajectories": 20, "seed": 0}
    for readout in ("z", "probs"):
        found = noise.estimate(circuit, theta, x, readout, **options)
        np.testing.assert_array_equal(found.features[0], 0)
        assert np.isnan(found.features[2:4]).all() and np.isnan(found.standard_error[2:4]).all()
        assert np.isfinite(found.features[[1, 4, 5]]).all()
    for dtype, size in ((np.float32, 1e-40), (np.float32, 1e-45), (np.float64, 1e-310)):  # subnormal
        tiny = noise.forward(circuit, theta, np.full((1, 8), size, dtype), **options)
        np.testing.assert_allclose(tiny, noise.forward(circuit, theta, np.ones((1, 8), dtype), **options), atol=1e-5)
    half = noise.forward(circuit, theta, x[:2].astype(np.float16), **options)
    assert half.dtype == np.float16
    single = noise.forward(circuit, theta, x[:2].astype(np.float32), **options)
    np.testing.assert_allclose(half, single, atol=1e-3)
    assert noise.forward(circuit, theta, np.ones((0, 8)), **options).shape == (0, 3)
    assert np.isnan(noise.estimate(circuit, theta, x[1:2], noise=SOME, trajectories=1).standard_error).all()


def test_the_gradient_is_the_density_matrixs() -> None:
    """The shift rule on a noisy circuit, for every gate with angles, against differences of the exact values."""
    rng = np.random.default_rng(8)
    theta, x = random_angles(rng, ALL_GATES.parameter_shape), rng.normal(size=(1, 8))
    grad = np.array([[1.0, -0.5]])
    readout = ["ZIZ", "IXI"]
    step = 1e-5
    used = sorted({p for gate in ALL_GATES.gates for p in gate.parameters})
    expected = np.zeros(theta.size)
    for p in used:
        shift = step * np.eye(theta.size)[p]
        above, below = (exact(ALL_GATES, theta + s, x, readout, SOME) for s in (shift, -shift))
        expected[p] = np.sum(grad * (above - below)) / (2 * step)
    drawn = np.stack(
        [
            noise.backward(ALL_GATES, theta, x, grad, readout, noise=SOME, trajectories=100, seed=seed)
            for seed in range(100)
        ]
    )
    error = drawn.std(axis=0, ddof=1) / 10
    assert np.all(np.abs(drawn.mean(axis=0) - expected) <= 5 * error + 1e-8)
    assert np.median(error[used]) < 0.01


def test_a_layer_with_noise() -> None:
    circuit, channels = ansatz("ring", 3), NoiseModel(depolarizing=0.1)

    def layer(**options: Any) -> QuantumLayer:
        torch.manual_seed(0)
        return QuantumLayer(circuit, **options)

    x = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(1))
    given = {"noise": channels, "trajectories": 2000}
    noisy = layer(**given, generator=torch.Generator().manual_seed(2))
    value = noisy(x)
    theta = noisy.theta.detach().double().numpy()
    expected = exact(circuit, theta, x.reshape(-1, 7).double().numpy(), "z", channels)
    np.testing.assert_allclose(value.detach().reshape(-1, 3), expected, rtol=0, atol=0.1)
    assert value.dtype == x.dtype and value.shape == (4, 5, 3)
    assert torch.equal(value, layer(**given, generator=torch.Generator().manual_seed(2))(x))
    value.sum().backward()
    assert noisy.theta.grad is not None and noisy.theta.grad.abs().max() > 0.1
    assert "depolarizing=0.1" in repr(noisy) and "noise" not in repr(layer())
    exactly = layer(noise=NoiseModel(), trajectories=1)(x)
    torch.testing.assert_close(exactly, layer()(x), rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="expected x without requires_grad with noise"):
        noisy(x.requires_grad_())


def test_an_adapter_with_noise() -> None:
    quadratic, linear = (Adapter.create(in_features=8, readout=readout) for readout in ("z", "state[:3]"))
    theta, x = torch.ones(quadratic.circuit.parameter_shape), torch.randn(5, 8)
    full = NoiseModel(depolarizing=0.75)
    torch.manual_seed(0)
    noisy = quadratic.with_noise(full, 500).features(theta, x)
    assert noisy.abs().max() < 0.25 < quadratic.features(theta, x).abs().max()
    assert quadratic.with_noise(full, 500).with_noise(None, None) == quadratic
    with pytest.raises(ValueError, match="expected Pauli strings or 'probs' with noise, received 'state"):
        linear.with_noise(full, 500)


def test_requests_that_are_refused() -> None:
    circuit, x = ansatz("ring", 2), np.ones((1, 4))
    theta = np.zeros(circuit.parameter_shape)
    options: dict[str, Any] = {"noise": SOME, "trajectories": 5}
    with pytest.raises(
        ValueError, match=re.escape("expected phase_flip to be a probability from 0 to 1, received -0.1")
    ):
        NoiseModel(phase_flip=-0.1)
    for number in (0, True, 1.5, 2**33):
        with pytest.raises(ValueError, match="expected trajectories to be an integer from 1 to"):
            noise.forward(circuit, theta, x, noise=SOME, trajectories=number)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected noise to be a qaa\.noise\.NoiseModel, received float"):
        noise.forward(circuit, theta, x, noise=0.1, trajectories=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected Pauli strings or 'probs' with noise, received 'state\[:4\]'"):
        noise.forward(circuit, theta, x, "state", **options)
    with pytest.raises(ValueError, match="expected grad of shape"):
        noise.backward(circuit, theta, x, np.ones((2, 2)), **options)
    for wrong in ({"noise": SOME}, {"trajectories": 5}, {**options, "shots": 5}):
        with pytest.raises(ValueError, match="expected noise and trajectories together and without shots"):
            QuantumLayer(circuit, **wrong)(torch.ones(1, 4))
    np.testing.assert_array_equal(
        noise.forward(circuit, theta, x, noise=NoiseModel(), trajectories=1), arrays.forward(circuit, theta, x)
    )


def test_the_page_holds_the_commands_table(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "hardware.md").read_text(encoding="utf-8")
    assert text.partition(table.BEGIN)[2].count("\n| 0.") == len(table.RATES)
    copy = tmp_path / "page.md"
    copy.write_text(text, encoding="utf-8")
    small = ["--wires", "2", "--layers", "1", "--vectors", "3", "--trajectories", "20", "--output", str(copy)]
    assert table.main(small) == 0
    written = copy.read_text(encoding="utf-8")
    assert written.partition(table.BEGIN)[0] == text.partition(table.BEGIN)[0]
    # ring on two wires with one layer: 6 gates on one wire, 2 on two
    expected = [f"| {rate:g} | {(1 - rate) ** 10:.0%} |" for rate in table.RATES]
    assert [line for line in expected if f"\n{line}" in written] == expected


def test_a_line_through_known_points() -> None:
    """A slope, an offset and a scatter that are put in come out again; what trajectories scatter is taken out."""
    rng = np.random.default_rng(0)
    exactly, scatter = rng.normal(size=(2000, 3)), rng.normal(size=(2000, 3))
    of_trajectories = 0.3 * rng.normal(size=(2000, 3))
    features = 0.5 * exactly + 0.2 + 0.5 * scatter + of_trajectories
    found = table.line_through(exactly, noise.Estimate(features, np.full((2000, 3), 0.3)))
    np.testing.assert_allclose(found, (0.5, 0.2, math.sqrt(0.5)), atol=0.04)
