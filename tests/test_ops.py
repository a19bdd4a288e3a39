"""The torch ops: registered as PyTorch wants, differentiable, traceable, and equal to the oracle in every dtype."""

from __future__ import annotations

import copy
import doctest
import inspect
import io
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import oracle
import qaa
from qaa import Circuit, Readout, ansatz

torch: Any = pytest.importorskip("torch")
ops: Any = pytest.importorskip("qaa.ops")
amplitude_rows, project, quantum_features = ops.amplitude_rows, ops.project, ops.quantum_features

CIRCUIT = ansatz("ring", 3, 2)
MIXED = Circuit.parse("wires 3; theta 2x2; Rot 0 t0 t1 t3; CRX 2 0 t3; H 1; CRZ 1 2 t0; PhaseShift 2 t1; SWAP 0 1; T 2")
READOUTS: list[Any] = ["z", "probs", "probs[:3]", "state", "state[:3]", ["XYZ", "III", "IZI", "XYZ"]]
SUFFIX = {True: "normalize", False: "as is"}


def angles(circuit: Circuit, dtype: Any = torch.float64, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(circuit.parameter_shape, generator=generator, dtype=torch.float64) * 6 - 3).to(dtype)


def vectors(*shape: int, dtype: Any = torch.float64, seed: int = 1) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def program_text(circuit: Circuit, readout: Any, normalize: bool = True) -> str:
    """What ``torch.ops.qaa.forward`` takes for a circuit, a readout and a normalization."""
    return f"{circuit} | {Readout.parse(readout, circuit.n_wires)} | {SUFFIX[normalize]}"


def gradients(value: Any, *leaves: Any, seed: int = 2) -> tuple[Any, ...]:
    """Gradients of a random linear function of ``value``."""
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(
        value.shape, generator=generator, dtype=torch.complex128 if value.is_complex() else torch.float64
    )
    return tuple(torch.autograd.grad(value, leaves, grad.to(value.dtype)))


# --------------------------------------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("readout", READOUTS, ids=str)
@pytest.mark.parametrize("circuit", [CIRCUIT, MIXED], ids=["ring", "mixed"])
def test_values_and_gradients_are_the_oracles(circuit: Circuit, readout: Any, normalize: bool) -> None:
    theta, x = angles(circuit).requires_grad_(), vectors(9, 6).requires_grad_()
    value = quantum_features(circuit, theta, x, readout, normalize=normalize)
    grad = torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(3))
    value.backward(grad)
    arguments = (circuit, theta.detach().numpy(), x.detach().numpy())
    exact = oracle.features(*arguments, readout, normalize=normalize)
    exact_theta, exact_x = oracle.vjp(*arguments, grad.numpy(), readout, normalize=normalize)
    for ours, expected in ((value, exact), (theta.grad, exact_theta), (x.grad, exact_x)):
        np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=0, atol=1e-11)


def test_the_front_ends_agree_to_the_bit() -> None:
    theta, x = angles(CIRCUIT), vectors(37, 7, dtype=torch.float32)
    for readout in READOUTS:
        value = quantum_features(CIRCUIT, theta, x, readout)
        np.testing.assert_array_equal(value.numpy(), qaa.arrays.forward(CIRCUIT, theta.numpy(), x.numpy(), readout))
        through_dispatcher = torch.ops.qaa.forward(theta, x, program_text(CIRCUIT, readout))
        assert torch.equal(value, through_dispatcher)


# ------------------------------------------------------------------------------------------------ angles of their own


@pytest.mark.parametrize(("leading", "rest"), [((4,), ()), ((4,), (3,)), ((2, 3), ()), ((2, 3), (2,)), ((1,), (5,))])
@pytest.mark.parametrize("readout", READOUTS, ids=str)
@pytest.mark.parametrize("circuit", [CIRCUIT, MIXED], ids=["ring", "mixed"])
def test_vectors_with_angles_of_their_own_are_the_oracles(
    circuit: Circuit, readout: Any, leading: tuple[int, ...], rest: tuple[int, ...]
) -> None:
    theta = vectors(*leading, *circuit.parameter_shape, seed=5).requires_grad_()
    x = vectors(*leading, *rest, 6).requires_grad_()
    value = quantum_features(circuit, theta, x, readout)
    grad = torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(3))
    value.backward(grad)
    assert value.shape == (*leading, *rest, Readout.parse(readout, 3).n_outputs)
    sets = theta.detach().reshape(-1, *circuit.parameter_shape).numpy()
    xs, grads = (t.detach().reshape(len(sets), -1, t.shape[-1]).numpy() for t in (x, grad))
    exact = np.stack([oracle.features(circuit, t, rows, readout) for t, rows in zip(sets, xs, strict=True)])
    found = [oracle.vjp(circuit, t, rows, g, readout) for t, rows, g in zip(sets, xs, grads, strict=True)]
    for ours, expected in (
        (value, exact),
        (theta.grad, np.stack([grad_theta for grad_theta, _ in found])),
        (x.grad, np.stack([grad_x for _, grad_x in found])),
    ):
        np.testing.assert_allclose(ours.detach().numpy(), expected.reshape(ours.shape), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_angles_of_their_own_give_the_bits_of_calls_of_their_own(dtype: Any, monkeypatch: Any) -> None:
    circuit = ansatz("ring", 5, 2)
    theta, x = vectors(7, *circuit.parameter_shape).requires_grad_(), vectors(7, 2, 29, dtype=dtype).requires_grad_()
    alone = [quantum_features(circuit, t, rows) for t, rows in zip(theta, x, strict=True)]
    expected = torch.stack(alone)
    expected = expected, *gradients(expected, theta, x)
    for at_once in (ops.MOST_GROUPS, 3, 1):  # a launch on a GPU has a limit
        monkeypatch.setattr(ops, "MOST_GROUPS", at_once)
        value = quantum_features(circuit, theta, x)
        for ours, theirs in zip((value, *gradients(value, theta, x)), expected, strict=True):
            assert torch.equal(ours, theirs)
    text = program_text(circuit, "z")
    assert torch.equal(torch.ops.qaa.forward(theta, x.reshape(14, 29), text).reshape(7, 2, 5), expected[0])
    rows = qaa.arrays.forward(circuit, theta.detach().numpy(), x[:, 0].detach().float().numpy())
    np.testing.assert_allclose(rows, quantum_features(circuit, theta, x[:, 0].float()).detach().numpy(), atol=1e-6)


def test_angles_of_their_own_pass_pytorchs_checks_and_compile() -> None:
    theta, x = vectors(3, *CIRCUIT.parameter_shape).requires_grad_(), vectors(3, 2, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda theta, x: quantum_features(CIRCUIT, theta, x), (theta, x))
    torch.library.opcheck(torch.ops.qaa.forward.default, (theta, x.detach().reshape(6, 6), program_text(CIRCUIT, "z")))
    empty = quantum_features(CIRCUIT, theta[:0], x[:0])
    assert empty.shape == (0, 2, 3) and [g.shape for g in gradients(empty, theta, x)] == [theta.shape, x.shape]
    torch._dynamo.reset()

    def model(theta: Any, x: Any) -> Any:
        return quantum_features(CIRCUIT, theta * 2, x).sin()

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (3, 2):
        ours, expected = compiled(theta[:count], x[:count]), model(theta[:count], x[:count])
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)
        for got, wanted in zip(gradients(ours, theta, x), gradients(expected, theta, x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)
    with pytest.raises(
        Exception, match=r"expected theta of shape .*, or with leading dimensions of x before it, receiv"
    ):
        compiled(theta[:2], x)


def test_graphs_take_as_many_sets_as_a_circuit_has_layers() -> None:
    """A batch of sets may not be mistaken for the first dimension of one."""
    circuit = ansatz("ring", 3, 4)

    class Own(torch.nn.Module):  # type: ignore[misc]
        def forward(self, theta: Any, x: Any) -> Any:
            return quantum_features(circuit, theta, x)

    def draw(count: int) -> tuple[Any, Any]:
        return vectors(count, *circuit.parameter_shape), vectors(count, 2, 6)

    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(Own(), draw(3), dynamic_shapes=({0: batch}, {0: batch})).module()
    for count in (3, 4, 5):
        torch.testing.assert_close(exported(*draw(count)), Own()(*draw(count)), rtol=0, atol=1e-13)


def test_rows_of_several_circuits_are_refused_in_graphs_too() -> None:
    several = vectors(4, *CIRCUIT.parameter_shape)
    for call in (
        lambda t: amplitude_rows(CIRCUIT, t, 4),
        lambda t: amplitude_rows(CIRCUIT, t, 4, real=True),
        lambda t: qaa.ops.mixed_rows(CIRCUIT, t, vectors(4, 5)),
    ):
        torch._dynamo.reset()
        for function in (call, torch.compile(call, backend="eager")):
            with pytest.raises(Exception, match=r"expected theta of shape \(2, 3, 3\), received \(4, 2, 3, 3\)"):
                function(several)


# ------------------------------------------------------------------------------------------------- PyTorch's own checks


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("readout", READOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype: Any, readout: Any, normalize: bool) -> None:
    theta, x = angles(CIRCUIT, torch.float32).requires_grad_(), vectors(5, 6, dtype=dtype).requires_grad_()
    text = program_text(CIRCUIT, readout, normalize)
    torch.library.opcheck(torch.ops.qaa.forward.default, (theta, x, text))
    grad = torch.ones_like(torch.ops.qaa.forward(theta, x, text)).detach()
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")  # the adjoint has no derivative
    torch.library.opcheck(
        torch.ops.qaa.backward.default, (theta.detach(), x.detach(), grad, text), test_utils=utilities
    )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("readout", READOUTS, ids=str)
@pytest.mark.parametrize("circuit", [CIRCUIT, MIXED], ids=["ring", "mixed"])
def test_gradcheck(circuit: Circuit, readout: Any, normalize: bool) -> None:
    theta, x = angles(circuit).requires_grad_(), vectors(2, 3, 5).requires_grad_()
    text = program_text(circuit, readout, normalize)
    assert torch.autograd.gradcheck(
        lambda theta, x: quantum_features(circuit, theta, x, readout, normalize=normalize), (theta, x)
    )
    assert torch.autograd.gradcheck(lambda theta, x: torch.ops.qaa.forward(theta, x.reshape(-1, 5), text), (theta, x))


def test_gradcheck_of_amplitude_rows() -> None:
    for circuit in (CIRCUIT, MIXED):
        for k in (1, 3, 8):
            assert torch.autograd.gradcheck(
                lambda theta, circuit=circuit, k=k: amplitude_rows(circuit, theta, k),
                (angles(circuit).requires_grad_(),),
            )


# ------------------------------------------------------------------------------------------------------ amplitude rows


@pytest.mark.parametrize("circuit", [CIRCUIT, MIXED, ansatz("strongly_entangling", 4, 2)], ids=["ring", "mixed", "4"])
def test_amplitude_rows_are_the_first_rows_of_the_unitary(circuit: Circuit) -> None:
    theta = angles(circuit)
    unitary = oracle.unitary(circuit, theta.numpy())
    for k in (1, 2, 2**circuit.n_wires):
        rows = amplitude_rows(circuit, theta, k)
        assert rows.shape == (k, 2**circuit.n_wires) and rows.dtype == torch.complex128
        np.testing.assert_allclose(rows.numpy(), unitary[:k], rtol=0, atol=1e-12)
        single = amplitude_rows(circuit, theta.float(), k)
        assert single.dtype == torch.complex64
        np.testing.assert_allclose(single.numpy(), unitary[:k], rtol=0, atol=5e-6)


def test_amplitude_rows_give_the_state_readout_and_its_gradients() -> None:
    theta, x = angles(MIXED).requires_grad_(), vectors(5, 6).requires_grad_()
    padded = torch.nn.functional.pad(x, (0, 2)).to(torch.complex128)
    by_rows = padded @ amplitude_rows(MIXED, theta, 3).T
    by_state = quantum_features(MIXED, theta, x, "state[:3]", normalize=False)
    torch.testing.assert_close(by_rows, by_state, rtol=0, atol=1e-12)
    for ours, expected in zip(gradients(by_rows, theta, x), gradients(by_state, theta, x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("circuit", [CIRCUIT, MIXED, ansatz("strongly_entangling", 4, 2)], ids=["ring", "mixed", "4"])
def test_mixed_rows_are_combinations_of_rows_with_their_gradients(circuit: Circuit) -> None:
    theta = angles(circuit).requires_grad_()
    real = oracle.unitary(circuit, theta.detach().numpy()).real
    for k, width in ((1, None), (5, 6), (2**circuit.n_wires, 3)):
        mix = vectors(2, k).requires_grad_()
        rows = ops.mixed_rows(circuit, theta, mix, width=width)
        np.testing.assert_allclose(rows.detach().numpy(), mix.detach().numpy() @ real[:k, :width], rtol=0, atol=1e-12)
        assert torch.autograd.gradcheck(partial(ops.mixed_rows, circuit, width=width), (theta, mix))
        single = ops.mixed_rows(circuit, theta.float(), mix.bfloat16(), width=width)
        assert single.dtype == torch.float32
    compiled = torch.compile(partial(ops.mixed_rows, circuit), backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(theta, mix), ops.mixed_rows(circuit, theta, mix))


def every_gate() -> Circuit:
    """Each gate of the table once, between gates that mix all amplitudes."""
    rng = np.random.default_rng(0)
    gates, n_parameters = [qaa.Gate("H", w) for w in range(3)], 0
    for name, (n_wires, parameters) in qaa.circuit.GATES.items():
        wires = tuple(map(int, rng.permutation(3)[:n_wires]))
        gates += [qaa.Gate(name, wires, tuple(range(n_parameters, n_parameters + parameters))), qaa.Gate("T", wires[0])]
        n_parameters += parameters
    return Circuit(3, tuple(gates), (n_parameters,))


@pytest.mark.parametrize("circuit", [every_gate(), CIRCUIT, MIXED], ids=["every gate", "ring", "mixed"])
def test_the_transposed_circuit_is_the_transposed_unitary_of_the_same_angles(circuit: Circuit) -> None:
    theta = angles(circuit)
    transposed = oracle.unitary(ops._transposed(circuit), theta.numpy())
    np.testing.assert_allclose(transposed, oracle.unitary(circuit, theta.numpy()).T, atol=1e-13)
    for k, width in ((3, 8), (8, 5), (1, 6)):
        expected = transposed.T[:k, :width]
        np.testing.assert_allclose(amplitude_rows(circuit, theta, k, width=width), expected, atol=1e-13)
        np.testing.assert_allclose(amplitude_rows(circuit, theta, k, width=width, real=True), expected.real, atol=1e-13)


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("theta_dtype", [torch.float32, torch.float64], ids=str)
def test_rows_with_factors_of_their_columns_are_rows_times_these_factors(theta_dtype: Any, dtype: Any) -> None:
    """In one pass, and to the bit what a product and a cast give."""
    theta = angles(MIXED, theta_dtype).requires_grad_()
    mix, columns = vectors(2, 5, dtype=theta_dtype).requires_grad_(), vectors(6, dtype=theta_dtype)
    for plain, fused, leaves in (
        (
            amplitude_rows(MIXED, theta, 5, width=6, real=True),
            ops._amplitude_rows(MIXED, theta, 5, 6, True, columns, dtype),
            (theta,),
        ),
        (
            ops.mixed_rows(MIXED, theta, mix, width=6),
            ops._mixed_rows(MIXED, theta, mix, 6, None, columns, dtype),
            (theta, mix),
        ),
    ):
        expected = (plain * columns).to(dtype or theta_dtype)
        assert fused.dtype == expected.dtype and torch.equal(fused, expected)
        assert fused.is_contiguous() and not fused._is_view()
        for ours, theirs in zip(gradients(fused, *leaves), gradients(expected, *leaves), strict=True):
            if dtype == torch.float64 != theta_dtype:  # where the product is the wider one
                torch.testing.assert_close(ours, theirs)
            else:
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_factors", [False, True])
def test_rows_made_together_have_the_bits_of_rows_made_alone(has_factors: bool, dtype: Any) -> None:
    n, (r, k, width) = 5, (2, 5, 6)
    for leaf_dtype in (torch.float32, torch.float64):
        thetas = [angles(MIXED, leaf_dtype, seed=i).requires_grad_() for i in range(n)]
        mixes = [vectors(r, k, dtype=leaf_dtype, seed=i).requires_grad_() for i in range(n)]
        gains, columns = ([vectors(size, dtype=leaf_dtype, seed=i) for i in range(n)] for size in (k, width))
        factors = (gains, columns) if has_factors else (None, None)
        together = ops._rows_together(MIXED, thetas, mixes, width, *factors, dtype)
        alone = [
            ops._mixed_rows(MIXED, *leaves, width, *(f and f[i] for f in factors), dtype)
            for i, leaves in enumerate(zip(thetas, mixes, strict=True))
        ]
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(together, alone, strict=True))
        leaves, used = (*thetas, *mixes), (0, 1, 3)  # what nobody used gets no gradient, not even zeros
        for chosen in (range(n), used):
            ours, theirs = (
                torch.autograd.grad(
                    sum(rows[i].double().pow(2).sum() for i in chosen), leaves, allow_unused=True, retain_graph=True
                )
                for rows in (together, alone)
            )
            for a, b in zip(ours, theirs, strict=True):
                assert a is b is None or (a.dtype == b.dtype and torch.equal(a, b))
        (first,) = torch.autograd.grad(together[1].double().pow(2).sum(), thetas[1], create_graph=True)
        torch.testing.assert_close(first, ours[1])
        with pytest.raises(RuntimeError, match="expected a first derivative"):
            first.sum().backward()


def test_rows_of_amplitudes_made_together_have_the_bits_of_rows_made_alone() -> None:
    thetas = [angles(MIXED, seed=i).requires_grad_() for i in range(5)]
    columns = [vectors(6, seed=i) for i in range(5)]
    together = ops._rows_together(MIXED, thetas, 3, 6, None, columns)
    alone = [ops._amplitude_rows(MIXED, theta, 3, 6, True, c) for theta, c in zip(thetas, columns, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    for used in (range(5), (1, 4), (2,)):
        ours, theirs = (
            torch.autograd.grad(sum(rows[i].square().sum() for i in used), thetas, allow_unused=True, retain_graph=True)
            for rows in (together, alone)
        )
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("with_bias", "with_gain", "scale"), [(False, False, 1.0), (True, False, 3.0), (True, True, 0.5)]
)
def test_factors_made_together_have_the_bits_of_factors_made_alone(
    monkeypatch: pytest.MonkeyPatch, with_bias: bool, with_gain: bool, scale: float, dtype: Any, is_padded: bool
) -> None:
    if is_padded:
        monkeypatch.setattr(ops, "_room", lambda count, dtype, device: -(-count // 8) * 8)
    n, d_out, k = 4, 5, 3
    ups = [vectors(d_out, k, dtype=torch.float32, seed=i).requires_grad_() for i in range(n)]
    biases = [vectors(d_out, dtype=torch.float32, seed=i).requires_grad_() for i in range(n)] if with_bias else []
    gains = [vectors(k, dtype=torch.float32, seed=i) for i in range(n)] if with_gain else None
    together = ops._factors(ups, biases, gains, scale, dtype)
    alone = [ops._factors([ups[i]], biases[i : i + 1], gains and [gains[i]], scale, dtype)[0] for i in range(n)]
    columns = k + with_bias
    for ours, theirs, i in zip(together, alone, range(n), strict=True):
        gained = ups[i] if gains is None else ups[i] * gains[i]
        expected = torch.cat([gained, *([biases[i][:, None]] if with_bias else [])], 1) * scale
        assert ours.dtype == dtype and torch.equal(ours, theirs) and not ours[:, columns:].any()
        torch.testing.assert_close(ours[:, :columns], expected.to(dtype))
    for used in (range(n), (0, 3), (2,)):  # what nobody used gets no gradient, not even zeros
        ours, theirs = (
            torch.autograd.grad(
                sum(factors[i].double().pow(2).sum() for i in used),
                (*ups, *biases),
                allow_unused=True,
                retain_graph=True,
            )
            for factors in (together, alone)
        )
        for a, b, i in zip(ours, theirs, [*range(n)] * (1 + with_bias), strict=True):
            assert (a is not None) == (i in used)
            assert a is b is None or (a.dtype == torch.float32 and torch.equal(a, b))


def test_rows_keep_what_they_were_made_of() -> None:
    """An optimizer may step before the backward pass; the gradients are those of what was multiplied."""
    theta, mix = angles(MIXED).requires_grad_(), vectors(2, 5).requires_grad_()
    expected = gradients(ops.mixed_rows(MIXED, theta, mix), theta, mix)
    rows = ops.mixed_rows(MIXED, theta, mix)
    with torch.no_grad():
        theta.add_(1), mix.mul_(2)
    assert all(torch.equal(a, b) for a, b in zip(gradients(rows, theta, mix), expected, strict=True))


def test_gradcheck_of_rows_with_factors_and_second_derivatives_of_them_are_an_error() -> None:
    theta, mix, columns = angles(MIXED).requires_grad_(), vectors(2, 5).requires_grad_(), vectors(6)
    for learned in (False, True):  # factors that want a gradient get one
        columns.requires_grad_(learned)
        leaves = (columns,) if learned else ()

        def rows(theta: Any, columns: Any = columns) -> Any:
            return ops._amplitude_rows(MIXED, theta, 3, 6, True, columns)

        def mixed(theta: Any, mix: Any, columns: Any = columns) -> Any:
            return ops._mixed_rows(MIXED, theta, mix, 6, columns[:5], columns)

        assert torch.autograd.gradcheck(rows, (theta, *leaves))
        assert torch.autograd.gradcheck(mixed, (theta, mix, *leaves))
    columns.requires_grad_(False)
    for value in (rows(theta, columns), mixed(theta, mix, columns)):
        (first,) = torch.autograd.grad(value.square().sum(), theta, create_graph=True)
        with pytest.raises(RuntimeError, match="expected a first derivative"):
            first.sum().backward()


def test_unit_matrices_are_kept_where_they_are_small_and_belong_to_no_mode() -> None:
    ops._known_units.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        small = ops._units(3, torch.float32, torch.device("cpu"))
    assert torch.equal(small, torch.eye(3))
    assert ops._units(3, torch.float32, torch.device("cpu")) is small
    ops._units(300, torch.float32, torch.device("cpu"))
    assert ops._known_units.cache_info().currsize == 1
    theta = angles(CIRCUIT, torch.float32).requires_grad_()
    amplitude_rows(CIRCUIT, theta, 3).abs().sum().backward()  # with units that were made in inference mode
    assert theta.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------------ project


def project_in_torch(base: Any, features: Any, up: Any, bias: Any = None, *, scale: float = 1.0) -> Any:
    """``y = base + s (V f + c)`` in float64, term by term."""
    base, features, up = base.double(), features.double(), up.double()
    total = (features[..., None, :] * up).sum(-1)
    return base + scale * (total if bias is None else total + bias.double())


def project_arguments(rows: tuple[int, ...], k: int, d_out: int, dtype: Any, with_bias: bool) -> list[Any]:
    shapes = [(*rows, d_out), (*rows, k), (d_out, k)] + [(d_out,)] * with_bias
    return [vectors(*shape, dtype=dtype, seed=s).requires_grad_() for s, shape in enumerate(shapes)]


#: (rows, K, d_out)
PROJECT_SIZES: list[tuple[tuple[int, ...], int, int]] = [((1,), 1, 1), ((7,), 3, 5), ((8,), 10, 16), ((9,), 10, 17)]
PROJECT_SIZES += [((3, 11), 12, 33), ((65,), 10, 768), ((300,), 33, 100), ((0,), 3, 5), ((2, 0), 3, 5), ((), 3, 5)]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_project_and_its_gradients(dtype: Any, with_bias: bool) -> None:
    """Around the widths of vector registers in every dimension, against the formula in float64."""
    tolerance = 64 * torch.finfo(dtype).eps
    for rows, k, d_out in PROJECT_SIZES:
        arguments = project_arguments(rows, k, d_out, dtype, with_bias)
        for scale in (1.0, -0.3, 0.0):
            value, exact = project(*arguments, scale=scale), project_in_torch(*arguments, scale=scale)
            assert value.shape == (*rows, d_out) and value.dtype == dtype
            torch.testing.assert_close(value.double(), exact, rtol=0, atol=tolerance * k)
            ours, expected = gradients(value, *arguments), gradients(exact, *arguments)
            for got, wanted, longest_sum in zip(ours, expected, (1, d_out, *[max(1, value.numel())] * 2), strict=False):
                assert got.dtype == dtype
                torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * longest_sum**0.5)


@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck_and_opcheck_of_project(with_bias: bool) -> None:
    arguments = project_arguments((4, 3), 5, 6, torch.float64, with_bias)
    assert torch.autograd.gradcheck(lambda *a: project(*a, scale=0.7), arguments)
    flat = [a.detach().reshape(-1, a.shape[-1]).requires_grad_() for a in arguments[:2]]
    flat += [a.detach().requires_grad_() for a in arguments[2:]] + [None] * (not with_bias)
    torch.library.opcheck(torch.ops.qaa.project.default, (*flat, 0.7))
    plain = [torch.ones_like(flat[0]), flat[1].detach(), flat[2].detach()]
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.qaa.project_backward.default, (*plain, with_bias, 0.7), test_utils=utilities)


@pytest.mark.parametrize("layout", ["transposed", "every second", "slice of a wider tensor", "one row repeated"])
def test_project_reads_any_layout(layout: str) -> None:
    for argument in range(3):
        arguments = [a.detach() for a in project_arguments((12,), 5, 6, torch.float32, True)]
        arguments[argument] = LAYOUTS[layout](arguments[argument])
        same = [a.clone().contiguous() for a in arguments]
        assert torch.equal(project(*arguments), project(*same))
        results = []
        for tensors in (arguments, same):
            leaves = [t.detach().requires_grad_() for t in tensors]
            results.append(torch.autograd.grad(project(*leaves).sum(), leaves))
        for ours, expected in zip(*results, strict=True):
            assert torch.equal(ours, expected)


def test_project_leaves_its_base_alone_and_does_not_depend_on_threads() -> None:
    arguments = project_arguments((500,), 10, 64, torch.float32, True)
    kept, before, results = arguments[0].detach().clone(), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            value = project(*arguments, scale=0.5)
            results.append((value, *gradients(value, *arguments)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(arguments[0], kept)
    for result in results[1:]:
        for ours, expected in zip(result, results[0], strict=True):
            assert torch.equal(ours, expected)


def test_project_in_place_is_the_same_function_written_over_its_base() -> None:
    arguments = project_arguments((3, 7), 10, 64, torch.float32, True)
    value = project(*arguments, scale=0.5)
    expected = gradients(value, *arguments)
    leaf = arguments[0]
    base = leaf * 1.0  # as a frozen layer's output: no leaf
    over = project(base, *arguments[1:], scale=0.5, in_place=True)
    assert over.data_ptr() == base.data_ptr() and torch.equal(over, value)
    for ours, theirs in zip(gradients(over, *arguments), expected, strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        base = leaf * 1.0
        assert project(base, *arguments[1:], scale=0.5, in_place=True).data_ptr() == base.data_ptr()
        assert torch.equal(base, value)


def test_project_in_place_spares_a_base_that_it_must_not_or_cannot_write_over() -> None:
    base, *others = project_arguments((12,), 5, 6, torch.float32, True)
    expected = project(base, *others)
    for spared in (base, base.detach().repeat(2, 1)[::2], base.detach().T.contiguous().T):
        kept = spared.detach().clone()
        value = project(spared, *others, in_place=True)
        assert torch.equal(spared, kept) and value.dtype == spared.dtype
        torch.testing.assert_close(value.float(), project(kept, *others).float())
    assert torch.equal(project(base, *others, in_place=True), expected)


def test_project_in_place_falls_back_where_autograd_would_object() -> None:
    base, *others = project_arguments((2, 6), 5, 6, torch.float32, True)
    expected = project(base, *others)
    with torch.inference_mode():
        inference = base.detach().clone()
        assert project(inference.clone(), *(t.detach() for t in others), in_place=True).shape == base.shape
    leaf = base.detach().clone().requires_grad_()
    kept = leaf.detach().clone()
    negative = torch._neg_view(-base.detach())
    for awkward in (
        inference,
        leaf.view(2, 6, 6),
        leaf.unsqueeze(0).unbind(0)[0],
        (leaf * 1.0).view(2, 6, 6),
        negative,
    ):
        features = others[0].reshape(*awkward.shape[:-1], 5)
        value = project(awkward, features, *others[1:], in_place=True)
        torch.testing.assert_close(value.reshape(expected.shape), expected)
        value.sum().backward()
    assert torch.equal(leaf.detach(), kept) and torch.equal(inference, base)


def test_what_project_returns_can_be_changed_in_place() -> None:
    for in_place in (False, True):
        base, *others = project_arguments((2, 6), 5, 6, torch.float32, True)
        value = project(base * 1.0, *others, in_place=in_place)
        value += 1
        value.relu_().sum().backward()
        assert base.grad is not None and torch.equal(base.grad, (value > 0).float())


def test_project_in_place_over_what_a_backward_pass_needs_is_an_error() -> None:
    base, *others = project_arguments((12,), 5, 6, torch.float32, True)
    saved = base.exp()  # saves its result
    value = project(saved, *others, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_project_of_mixed_dtypes_returns_that_of_the_base(weight_dtype: Any, base_dtype: Any) -> None:
    base, features, up, bias = project_arguments((9,), 5, 6, torch.float32, True)
    base, features = (t.detach().to(base_dtype).requires_grad_() for t in (base, features))
    up, bias = (t.detach().to(weight_dtype).requires_grad_() for t in (up, bias))
    value = project(base, features, up, bias, scale=0.5)
    assert value.dtype == base_dtype
    coarsest = max(torch.finfo(base_dtype).eps, torch.finfo(weight_dtype).eps)
    exact = project_in_torch(base, features, up, bias, scale=0.5)
    torch.testing.assert_close(value.double(), exact, rtol=0, atol=16 * coarsest)
    value.sum().backward()
    for tensor in (base, features, up, bias):
        assert tensor.grad.dtype == tensor.dtype and tensor.grad.shape == tensor.shape


def products(
    base: Any, features: Any, up: Any, bias: Any = None, *, gain: Any = None, scale: float = 1.0, in_place: bool = False
) -> Any:
    """What a GPU computes for ``project``."""
    biases, gains = [] if bias is None else [bias], None if gain is None else [gain]
    (factor,) = ops._factors([up], biases, gains, scale, features.dtype)
    return ops._add_product(base, features, factor, up.shape[1], bias is not None, in_place)


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("with_gain", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_project_and_differentiable_twice(
    monkeypatch: pytest.MonkeyPatch, with_bias: bool, with_gain: bool, is_padded: bool
) -> None:
    if is_padded:  # as in half precision on a GPU
        monkeypatch.setattr(ops, "_room", lambda count, dtype, device: -(-count // 8) * 8)
    for rows, k, d_out in PROJECT_SIZES:
        arguments = project_arguments(rows, k, d_out, torch.float64, with_bias)
        gain = vectors(k) if with_gain else None
        for scale in (1.0, -0.3, 0.0):
            gained = [*arguments[:2], arguments[2] if gain is None else arguments[2] * gain, *arguments[3:]]
            value, expected = products(*arguments, gain=gain, scale=scale), project(*gained, scale=scale)
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
            for ours, theirs in zip(gradients(value, *arguments), gradients(expected, *arguments), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
            leaf = arguments[0].detach().clone()
            with torch.no_grad():
                over = products(leaf, *arguments[1:], gain=gain, scale=scale, in_place=True)
            assert over.data_ptr() == leaf.data_ptr() and torch.equal(over, value)
    arguments = project_arguments((2, 3), 4, 5, torch.float64, with_bias)
    function = partial(products, gain=vectors(4) if with_gain else None, scale=0.7)
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_project_under_autocast_is_as_accurate_as_the_formula(dtype: Any, base_dtype: Any) -> None:
    """Beside V and c, ``base + scale * linear(...)`` rounds up to three times, a product added to its base once."""
    base, features, up, bias = (t.detach() for t in project_arguments((64, 3), 12, 32, torch.float32, True))
    base, features = base.to(base_dtype), features.to(dtype)
    for c in (None, bias):
        exact = project_in_torch(base, features, up, c, scale=0.7)
        with torch.autocast("cpu", dtype):
            plain = (base + 0.7 * torch.nn.functional.linear(features, up, c)).to(base_dtype)
            value = project(base, features, up, c, scale=0.7)
        assert value.dtype == base_dtype
        errors = (value - exact).abs(), (plain - exact).abs()
        assert errors[0].mean() <= 1.01 * errors[1].mean() and errors[0].max() <= 1.5 * errors[1].max()


def test_project_in_place_writes_over_a_base_of_another_dtype() -> None:
    base, *others = project_arguments((3, 4), 5, 6, torch.float32, True)
    for dtype in (torch.bfloat16, torch.float64):
        expected = project(base.detach().to(dtype), *others, scale=0.7)
        over = base.detach().to(dtype)
        with torch.no_grad():
            value = project(over, *others, scale=0.7, in_place=True)
        assert value.data_ptr() == over.data_ptr() and torch.equal(value, expected)


def test_project_gives_gradients_only_to_what_wants_them() -> None:
    for wanted, dtype in itertools.product(range(16), (torch.float32, torch.bfloat16)):
        arguments = [a.detach() for a in project_arguments((4,), 3, 5, torch.float32, True)]
        arguments[0] = arguments[0].to(dtype)
        for k, argument in enumerate(arguments):
            argument.requires_grad_(bool(wanted >> k & 1))
        value = project(*arguments)
        assert value.requires_grad == (wanted > 0)
        if wanted:
            value.sum().backward()
        assert [a.grad is not None for a in arguments] == [bool(wanted >> k & 1) for k in range(4)]


# ----------------------------------------------------------------------------------------------------- dtypes, autocast


@pytest.mark.parametrize("readout", ["z", "probs", "state"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype: Any, readout: str) -> None:
    theta, x = angles(CIRCUIT, torch.float32), vectors(19, 6, dtype=dtype)
    leaves = [theta.clone().requires_grad_(), x.clone().requires_grad_()]
    wide_leaves = [theta.clone().requires_grad_(), x.float().requires_grad_()]
    value = quantum_features(CIRCUIT, *leaves, readout)
    wide = quantum_features(CIRCUIT, *wide_leaves, readout)
    assert value.dtype == (torch.complex64 if readout == "state" else dtype)
    assert torch.equal(value, wide.to(value.dtype))
    grad = torch.ones_like(value)
    value.backward(grad)
    wide.backward(grad.to(wide.dtype))
    assert leaves[0].grad.dtype == torch.float32 and leaves[1].grad.dtype == dtype
    torch.testing.assert_close(leaves[0].grad, wide_leaves[0].grad, rtol=0, atol=0)
    torch.testing.assert_close(leaves[1].grad, wide_leaves[1].grad.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("theta_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_dtype_of_theta_is_its_own(dtype: Any, theta_dtype: Any) -> None:
    theta, x = angles(CIRCUIT, theta_dtype).requires_grad_(), vectors(4, 6, dtype=dtype).requires_grad_()
    value = quantum_features(CIRCUIT, theta, x)
    exact = oracle.features(CIRCUIT, theta.detach().double().numpy(), x.detach().double().numpy())
    np.testing.assert_allclose(value.detach().double().numpy(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps + 1e-14)
    value.sum().backward()
    assert theta.grad.dtype == theta_dtype and x.grad.dtype == dtype


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_the_states_in_float32(autocast_dtype: Any) -> None:
    """What reaches the op counts: float32 stays float32, and a bfloat16 activation gives bfloat16 features."""
    theta, x = angles(CIRCUIT, torch.float32).requires_grad_(), vectors(9, 6, dtype=torch.float32).requires_grad_()
    linear = torch.nn.Linear(6, 6)
    outside = quantum_features(CIRCUIT, theta, x)
    with torch.autocast("cpu", dtype=autocast_dtype):
        inside = quantum_features(CIRCUIT, theta, x)
        activation = linear(x)
        from_activation = quantum_features(CIRCUIT, theta, activation)
        up = torch.nn.functional.linear(from_activation, torch.ones(4, 3))
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)
    assert activation.dtype == from_activation.dtype == up.dtype == autocast_dtype
    up.sum().backward()
    assert theta.grad.dtype == x.grad.dtype == linear.weight.grad.dtype == torch.float32
    assert torch.isfinite(theta.grad).all() and theta.grad.any() and linear.weight.grad.any()


# --------------------------------------------------------------------------------------------------- shapes and layouts


@pytest.mark.parametrize("leading", [(), (1,), (4, 1), (2, 3, 2), (0,), (3, 0), (2, 0, 5)], ids=str)
def test_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    theta, x = angles(CIRCUIT).requires_grad_(), vectors(*leading, 6).requires_grad_()
    for readout in READOUTS:
        value = quantum_features(CIRCUIT, theta, x, readout)
        assert value.shape == (*leading, Readout.parse(readout, 3).n_outputs)
        flat = quantum_features(CIRCUIT, theta, x.reshape(-1, 6), readout)
        assert torch.equal(value.reshape(flat.shape), flat)
        grad_theta, grad_x = gradients(value, theta, x)
        assert grad_x.shape == x.shape and grad_theta.shape == theta.shape


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda t: torch.repeat_interleave(t, 2, -1)[..., ::2],
    "slice of a wider tensor": lambda t: torch.cat([t, torch.full_like(t, torch.nan)], -1)[..., : t.shape[-1]],
    "storage offset": lambda t: torch.cat([torch.full_like(t[:1], torch.nan), t])[1:],
    "one row repeated": lambda t: t[:1].expand_as(t),
    "one number repeated": lambda t: t.reshape(-1)[:1].reshape(*[1] * t.ndim).expand_as(t),
    "negative view": lambda t: torch.complex(t, -t).conj().imag,
    "permuted leading dimensions": lambda t: t.reshape(3, 4, -1).transpose(0, 1) if t.shape[0] == 12 else t,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_layout_gives_the_same_bits(dtype: Any, layout: str) -> None:
    change = LAYOUTS[layout]
    theta, x = change(angles(CIRCUIT, dtype)), change(vectors(12, 6, dtype=dtype))
    for readout in ("z", "state"):
        results = []
        for t, v in ((theta, x), (theta.clone().contiguous(), x.clone().contiguous())):
            t, v = t.detach().requires_grad_(), v.detach().requires_grad_()
            value = quantum_features(CIRCUIT, t, v, readout)
            results.append((value, *gradients(value, t, v)))
        for ours, expected in zip(*results, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("readout", ["z", "probs", "state"])
def test_gradients_arrive_in_any_layout(readout: str) -> None:
    """``sum`` sends back one number with zero strides, slices and transposes send views, ``conj`` a lazy conjugate."""
    theta, x = angles(CIRCUIT).requires_grad_(), vectors(12, 6).requires_grad_()
    value = quantum_features(CIRCUIT, theta, x, readout)
    uses: list[Callable[[Any], Any]] = [
        lambda v: v.sum(),
        lambda v: (v.T.contiguous() * torch.arange(12)).sum(),
        lambda v: v[:, ::2].sum() + v[3:5].sum(),
        lambda v: (v.conj() * (1 + 2j)).sum(),
    ]
    for use in uses:
        total = use(value)
        total = total.real + 0.5 * total.imag if total.is_complex() else total
        (grad,) = torch.autograd.grad(total, value, retain_graph=True)
        received = torch.autograd.grad(total, (theta, x), retain_graph=True)
        expected = oracle.vjp(CIRCUIT, theta.detach().numpy(), x.detach().numpy(), grad.resolve_conj().numpy(), readout)
        for ours, exact in zip(received, expected, strict=True):
            np.testing.assert_allclose(ours.numpy(), exact, rtol=0, atol=1e-12)


def test_only_what_requires_a_gradient_gets_one() -> None:
    for theta_wants in (False, True):
        for x_wants in (False, True):
            theta, x = angles(CIRCUIT).requires_grad_(theta_wants), vectors(4, 6).requires_grad_(x_wants)
            for value in (
                quantum_features(CIRCUIT, theta, x),
                torch.ops.qaa.forward(theta, x, program_text(CIRCUIT, "z")),
            ):
                assert value.requires_grad == (theta_wants or x_wants)
                if value.requires_grad:
                    value.sum().backward()
            assert (theta.grad is not None) == theta_wants and (x.grad is not None) == x_wants
    with torch.no_grad():
        assert not quantum_features(CIRCUIT, angles(CIRCUIT).requires_grad_(), vectors(4, 6)).requires_grad
    with torch.inference_mode():
        value = quantum_features(CIRCUIT, angles(CIRCUIT), vectors(4, 6))
    assert torch.equal(value, quantum_features(CIRCUIT, angles(CIRCUIT), vectors(4, 6)))


def test_gradients_accumulate_over_uses_of_one_theta() -> None:
    theta, x = angles(CIRCUIT).requires_grad_(), vectors(4, 6)
    (quantum_features(CIRCUIT, theta, x).sum() + quantum_features(CIRCUIT, theta, 2 * x + 1).sum()).backward()
    separate = [gradients_of_sum(theta, v) for v in (x, 2 * x + 1)]
    torch.testing.assert_close(theta.grad, separate[0] + separate[1], rtol=0, atol=1e-14)


def gradients_of_sum(theta: Any, x: Any) -> Any:
    theta = theta.detach().requires_grad_()
    return torch.autograd.grad(quantum_features(CIRCUIT, theta, x).sum(), theta)[0]


def test_zero_and_nan_rows() -> None:
    theta, x = angles(CIRCUIT, torch.float32), vectors(9, 6, dtype=torch.float32)
    clean = quantum_features(CIRCUIT, theta, x)
    x[2], x[5, 3] = 0, torch.nan
    theta, x = theta.requires_grad_(), x.requires_grad_()
    value = quantum_features(CIRCUIT, theta, x)
    others = [r for r in range(9) if r not in (2, 5)]
    assert not value[2].any() and value[5].isnan().all() and torch.equal(value[others], clean[others])
    value.sum().backward()
    assert not x.grad[2].any() and x.grad[5].isnan().all() and torch.isfinite(x.grad[others]).all()
    assert theta.grad.isnan().any()


# --------------------------------------------------------------------------------------------- no second derivative


def test_a_second_derivative_is_an_error_and_never_silently_zero() -> None:
    """Also as a gradient penalty, where the first loss is linear in the features and other terms have gradients."""
    makers: list[Callable[[Any, Any], Any]] = [
        lambda theta, x: quantum_features(CIRCUIT, theta, x),
        lambda theta, x: torch.ops.qaa.forward(theta, x, program_text(CIRCUIT, "z")),
        lambda theta, x: amplitude_rows(CIRCUIT, theta, 3).real,
        lambda theta, x: amplitude_rows(CIRCUIT, theta, 3, real=True),
        lambda theta, x: project(
            x, theta.reshape(-1, 6)[:1].expand(4, 6) ** 2, torch.ones(6, 6, dtype=x.dtype) * theta[0, 0, 0]
        ),
    ]
    losses: list[Callable[[Any], Any]] = [lambda v: v.sum(), lambda v: v.pow(2).sum()]
    for make in makers:
        for loss in losses:
            theta, x = angles(CIRCUIT).requires_grad_(), vectors(4, 6).requires_grad_()
            with pytest.raises(RuntimeError, match=r"second|twice"):
                (slope,) = torch.autograd.grad(loss(make(theta, x)), theta, create_graph=True)
                (make(theta, x).sum() + slope.pow(2).sum()).backward()


def test_gradgradcheck_says_that_there_is_no_second_derivative() -> None:
    theta, x = angles(CIRCUIT).requires_grad_(), vectors(2, 6).requires_grad_()
    with pytest.raises(RuntimeError, match=r"second|twice"):
        torch.autograd.gradgradcheck(lambda theta, x: quantum_features(CIRCUIT, theta, x), (theta, x))


# ------------------------------------------------------------------------------------------------------- transforms


def test_vmap_equals_a_loop() -> None:
    theta, x = angles(CIRCUIT), vectors(4, 5, 6)
    for readout in READOUTS:
        over_x = torch.func.vmap(lambda v, readout=readout: quantum_features(CIRCUIT, theta, v, readout))(x)
        torch.testing.assert_close(over_x, quantum_features(CIRCUIT, theta, x, readout), rtol=0, atol=1e-14)
    many = torch.stack([angles(CIRCUIT, seed=s) for s in range(4)])
    over_theta = torch.func.vmap(lambda t: quantum_features(CIRCUIT, t, x[0]))(many)
    expected = torch.stack([quantum_features(CIRCUIT, t, x[0]) for t in many])
    torch.testing.assert_close(over_theta, expected, rtol=0, atol=1e-14)
    rows = torch.func.vmap(lambda t: amplitude_rows(CIRCUIT, t, 3))(many)
    torch.testing.assert_close(rows, torch.stack([amplitude_rows(CIRCUIT, t, 3) for t in many]), rtol=0, atol=1e-14)


def energy_of(theta: Any, x: Any) -> Any:
    return quantum_features(CIRCUIT, theta, x).sin().sum()


def gradients_of_energy(theta: Any, x: Any) -> tuple[Any, ...]:
    theta, x = theta.clone().requires_grad_(), x.clone().requires_grad_()
    return tuple(torch.autograd.grad(energy_of(theta, x), (theta, x)))


@pytest.mark.parametrize("in_dims", [(0, 0), (None, 0), (0, None), (1, 2)], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["one set", "own angles"])
def test_maps_and_gradients_in_either_order_are_loops(in_dims: Any, own: bool) -> None:
    """The gradient of every member, as for per-sample gradients, and the gradient of the sum over members."""
    theta, x = vectors(4, *([5] if own else []), *CIRCUIT.parameter_shape), vectors(4, 5, 6)
    members = [
        tuple(t if dim is not None else first for t, dim, first in zip(pair, in_dims, (theta[0], x[0]), strict=True))
        for pair in zip(theta, x, strict=True)
    ]
    each = [gradients_of_energy(*member) for member in members]
    given = [t[0] if dim is None else t.movedim(0, dim) for t, dim in zip((theta, x), in_dims, strict=True)]
    found = torch.func.vmap(torch.func.grad(energy_of, (0, 1)), in_dims)(*given)
    for ours, expected in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(expected), rtol=0, atol=1e-13)
    found = torch.func.grad(lambda *a: torch.func.vmap(energy_of, in_dims)(*a).sum(), (0, 1))(*given)
    for ours, dim, expected in zip(found, in_dims, zip(*each, strict=True), strict=True):
        stacked = torch.stack(expected)
        expected = stacked.sum(0) if dim is None else stacked.movedim(0, dim)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)


def watch_calls(monkeypatch: Any, argument: str, default: Any = None) -> list[Any]:
    """An argument of every call of the core from now on."""
    seen: list[Any] = []

    def watched(call: Any, *arguments: Any) -> Any:
        seen.append(inspect.signature(call).bind(*arguments).arguments.get(argument, default))
        return call(*arguments)

    for name in ("_call_forward", "_call_backward"):
        monkeypatch.setattr(ops, name, partial(watched, getattr(ops, name)))
    return seen


def test_a_map_is_one_call_of_the_kernels(monkeypatch: Any) -> None:
    theta, x, groups = vectors(4, *CIRCUIT.parameter_shape), vectors(4, 5, 6), watch_calls(monkeypatch, "groups", 1)
    torch.func.vmap(torch.func.grad(energy_of))(theta, x)
    assert groups == [4, 4]
    groups.clear()
    torch.func.vmap(torch.func.vmap(energy_of, (None, 0)), (0, None))(theta, x)
    assert groups == [4]
    groups.clear()
    torch.func.vmap(energy_of, (None, 0))(theta[0], x)
    assert groups == [1]


def test_members_without_rows_and_no_members_at_all() -> None:
    theta = vectors(4, *CIRCUIT.parameter_shape)
    for count, rows in ((4, 0), (0, 5), (0, 0)):
        x = vectors(count, rows, 6)
        assert torch.func.vmap(lambda v: quantum_features(CIRCUIT, theta[0], v))(x).shape == (count, rows, 3)
        found = torch.func.vmap(torch.func.grad(energy_of, (0, 1)))(theta[:count], x)
        assert [tuple(t.shape) for t in found] == [(count, *CIRCUIT.parameter_shape), (count, rows, 6)]


def test_gradients_of_vectors_alone_are_one_batch(monkeypatch: Any) -> None:
    theta, x, groups = angles(CIRCUIT), vectors(4, 5, 6), watch_calls(monkeypatch, "groups", 1)
    found = torch.func.vmap(torch.func.grad(energy_of, 1), (None, 0))(theta, x)
    assert groups == [1, 1]
    torch.testing.assert_close(found, gradients_of_energy(theta, x)[1], rtol=0, atol=1e-13)
    many = vectors(4, *CIRCUIT.parameter_shape)
    found = torch.func.vmap(torch.func.grad(energy_of, 1))(many, x)
    expected = torch.stack([gradients_of_energy(*pair)[1] for pair in zip(many, x, strict=True)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_large_batches_keep_the_strings_for_the_adjoint(monkeypatch: Any, dtype: Any, own: bool) -> None:
    """The forward pass writes what the backward pass reads, with the gradients that small batches have, which measure
    again; without gradients nothing is written."""
    circuit, kept = ansatz("ring", 6, 1), watch_calls(monkeypatch, "strings")
    theta = torch.linspace(-1, 2, 2 * circuit.n_parameters, dtype=torch.float64).reshape(2, *circuit.parameter_shape)
    theta = (theta if own else theta[0]).detach().requires_grad_()
    x = vectors(2, 320, 50).to(dtype).requires_grad_()

    def gradients(of: Any) -> Any:
        return torch.autograd.grad((quantum_features(circuit, theta, of)[..., :3] ** 2).sum(), (theta, of))

    found = gradients(x)
    n_strings, wide = qaa.program.program(circuit, "z", True).plan.n_strings, dtype == torch.float64
    expected_shapes = [(640, n_strings), torch.float64 if wide else torch.float32]
    assert [[tuple(t.shape), t.dtype] for t in kept] == 2 * [expected_shapes]
    kept.clear()
    monkeypatch.setattr(ops, "_MANY_AMPLITUDES", 1 << 30)
    expected = gradients(x)
    assert kept == [None, None]
    rtol = 1e-12 if dtype == torch.float64 else 1e-2 if dtype == torch.bfloat16 else 1e-5
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=rtol, atol=rtol * float(reference.abs().max()))
    monkeypatch.undo()
    kept = watch_calls(monkeypatch, "strings")
    with torch.no_grad():
        quantum_features(circuit, theta, x)
    quantum_features(circuit, theta.detach(), x.detach())
    quantum_features(circuit, theta, x, "probs")
    assert kept == [None] * 3


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "features": lambda theta, x: quantum_features(CIRCUIT, theta, x),
    "amplitudes": lambda theta, x: quantum_features(CIRCUIT, theta, x, "state").abs(),
    "amplitude rows": lambda theta, x: amplitude_rows(CIRCUIT, theta, 3).abs() * x[0, 0],
    "real rows": lambda theta, x: amplitude_rows(CIRCUIT, theta, 3, real=True) * x[0, 0],
    "mixed rows": lambda theta, x: qaa.ops.mixed_rows(CIRCUIT, theta, x),
    "project": lambda theta, x: project(
        x, quantum_features(CIRCUIT, theta, x), theta.flatten().reshape(6, 3), theta[0, 0, :1].expand(6), 0.5
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_under_every_transform(name: str) -> None:
    function, theta, x = FUNCTIONS[name], vectors(4, *CIRCUIT.parameter_shape), vectors(4, 5, 6)

    def loss(theta: Any, x: Any) -> Any:
        return function(theta, x).sin().sum()

    def by_autograd(theta: Any, x: Any) -> tuple[Any, ...]:
        leaves = theta.clone().requires_grad_(), x.clone().requires_grad_()
        return tuple(torch.autograd.grad(loss(*leaves), leaves))

    expected = [torch.stack(each) for each in zip(*map(by_autograd, theta, x), strict=True)]
    for ours, exact in zip(torch.func.vmap(torch.func.grad(loss, (0, 1)))(theta, x), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
    summed = torch.func.grad(lambda *a: torch.func.vmap(loss)(*a).sum(), (0, 1))(theta, x)
    for ours, exact in zip(summed, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
    leaf = theta[0].clone().requires_grad_()
    by_rows = torch.autograd.functional.jacobian(lambda t: function(t, x[0]), leaf)
    for mapped in (
        torch.autograd.functional.jacobian(lambda t: function(t, x[0]), leaf, vectorize=True),
        torch.func.jacrev(lambda t: function(t, x[0]))(theta[0]),
    ):
        torch.testing.assert_close(mapped, by_rows, rtol=0, atol=1e-12)
    value = function(leaf, x[0])
    units = torch.eye(value.numel(), dtype=value.dtype).reshape(-1, *value.shape)
    mapped = torch.func.vmap(lambda v: torch.autograd.grad(value, leaf, v, retain_graph=True)[0])(units)
    torch.testing.assert_close(mapped.reshape(by_rows.shape), by_rows, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.func.functionalize(function)(theta[0], x[0]), function(theta[0], x[0]))


def test_a_graph_with_gradients_of_torch_func_in_it_is_refused() -> None:
    theta, x = angles(CIRCUIT), vectors(4, 6)
    torch._dynamo.reset()
    mapped = torch.compile(torch.func.vmap(lambda v: energy_of(theta, v)), backend="eager")
    torch.testing.assert_close(mapped(x), torch.stack([energy_of(theta, v) for v in x]), rtol=0, atol=1e-13)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.compile(torch.func.grad(lambda t: energy_of(t, x)), backend="eager")(theta)


def test_tangents_of_gradients_are_refused_and_never_silently_zero() -> None:
    """Forward mode over a reverse pass, and dual numbers in what comes behind the features."""
    x, forward_ad = vectors(5, 6), torch.autograd.forward_ad
    for function in (
        lambda t: quantum_features(CIRCUIT, t, x),
        lambda t: amplitude_rows(CIRCUIT, t, 2, real=True),
        lambda t: project(x, x[:, :1], t.flatten()[:6, None]),
    ):
        leaf = angles(CIRCUIT).requires_grad_()
        value = function(leaf)
        grad = torch.ones_like(value)

        def pulled(g: Any, value: Any = value, leaf: Any = leaf) -> Any:
            return torch.autograd.grad(value, leaf, g, retain_graph=True)[0]

        with pytest.raises(RuntimeError, match="expected reverse mode, received"):
            torch.func.jvp(pulled, (grad,), (grad,))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(grad, grad)
            with pytest.raises(RuntimeError, match="expected reverse mode, received"):
                torch.autograd.grad((function(leaf) * dual).sum(), leaf)


@pytest.mark.parametrize("readout", ["z", "state[:4]"])
def test_gradients_of_an_adapter_for_each_sample(readout: str) -> None:
    layer, x = qaa.nn.QAALinear(torch.nn.Linear(6, 5), 2, readout=readout).double(), vectors(4, 3, 6)
    torch.nn.init.normal_(layer.up)
    parameters = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}

    def loss(parameters: Any, x: Any) -> Any:
        return torch.func.functional_call(layer, parameters, (x,)).sin().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, rows in enumerate(x):
        layer.zero_grad()
        layer(rows).sin().sum().backward()
        for name in parameters:
            torch.testing.assert_close(found[name][i], layer.get_parameter(name).grad, rtol=0, atol=1e-12)


def test_jacobians_of_both_kinds() -> None:
    theta, x = angles(CIRCUIT).requires_grad_(), vectors(4, 6)
    by_rows = torch.autograd.functional.jacobian(lambda t: quantum_features(CIRCUIT, t, x), theta)
    at_once = torch.autograd.functional.jacobian(lambda t: quantum_features(CIRCUIT, t, x), theta, vectorize=True)
    ours = torch.func.jacrev(lambda t: quantum_features(CIRCUIT, t, x))(theta)
    assert ours.shape == (4, 3, *CIRCUIT.parameter_shape)
    torch.testing.assert_close(ours, by_rows, rtol=0, atol=1e-13)
    torch.testing.assert_close(at_once, by_rows, rtol=0, atol=1e-13)
    with pytest.raises(RuntimeError, match="expected a first derivative, received a request for a second one"):
        torch.func.grad(lambda t: torch.func.grad(energy_of)(t, x).sum())(theta)


def test_forward_mode_is_right_or_an_error_and_never_silently_zero() -> None:
    theta, x, step = angles(CIRCUIT), vectors(4, 6), 1e-6
    direction = torch.ones_like(theta)
    functions: list[Callable[[Any], Any]] = [
        lambda t: quantum_features(CIRCUIT, t, x),
        lambda t: amplitude_rows(CIRCUIT, t, 2),
        lambda t: amplitude_rows(CIRCUIT, t, 2, real=True),
        lambda t: project(x, x[:, :1], t.flatten()[:6, None]),
    ]

    def by_func(function: Callable[[Any], Any]) -> Any:
        return torch.func.jvp(function, (theta,), (direction,))[1]

    def by_dual_numbers(function: Callable[[Any], Any]) -> Any:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(theta, direction)
            return torch.autograd.forward_ad.unpack_dual(function(dual)).tangent

    def by_linearization(function: Callable[[Any], Any]) -> Any:
        return torch.func.linearize(function, theta)[1](direction)

    def under_a_mode(function: Callable[[Any], Any]) -> Any:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False):
            return by_dual_numbers(function)

    for function in functions:
        quotient = (function(theta + step * direction) - function(theta - step * direction)) / (2 * step)
        for derive in (by_func, by_dual_numbers, by_linearization, under_a_mode):
            try:
                tangent = derive(function)
            except (RuntimeError, NotImplementedError) as error:
                assert str(error)
            else:
                assert tangent is not None
                torch.testing.assert_close(tangent, quotient, rtol=0, atol=1e-7)


# ----------------------------------------------------------------------------------------- fakes, compile, export


@pytest.mark.parametrize("readout", READOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_meta_and_fake_tensors_have_the_real_shapes_and_dtypes(dtype: Any, readout: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    theta, x = angles(CIRCUIT, torch.float32), vectors(2, 5, 6, dtype=dtype)
    real = quantum_features(CIRCUIT, theta, x, readout)
    meta = quantum_features(CIRCUIT, theta.to("meta"), x.to("meta"), readout)
    assert meta.device.type == "meta" and (meta.shape, meta.dtype) == (real.shape, real.dtype)
    with FakeTensorMode() as mode:
        fake_theta = mode.from_tensor(theta).requires_grad_()
        fake = quantum_features(CIRCUIT, fake_theta, mode.from_tensor(x), readout)
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
        (grad,) = torch.autograd.grad(fake.abs().sum(), fake_theta)
        assert grad.shape == theta.shape
    rows = amplitude_rows(CIRCUIT, theta.to("meta"), 3)
    assert rows.shape == (3, 8) and rows.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_projection_is_of_meta_tensors_or_of_real_ones(dtype: Any) -> None:
    """Of both together torch makes memory that nobody has written to."""
    shapes = {"base": (2, 5), "features": (2, 4), "up": (5, 4), "bias": (5,)}
    real = {name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items()}
    on_meta = {name: tensor.to("meta") for name, tensor in real.items()}
    assert project(**on_meta).is_meta and project(**real).is_cpu
    for name in shapes:
        mixed = {**real, name: on_meta[name]}
        received = ", ".join(str(tensor.device) for tensor in mixed.values())
        refused = pytest.raises(ValueError, match=f"expected base, .* and bias on one device, received {received}")
        with refused:
            project(**mixed)
        with refused:
            ops._add_projection(**mixed, scale=1.0, in_place=False)
        if dtype == torch.float32:
            with refused:
                torch.ops.qaa.project(**mixed, scale=1.0)
    for name in ("features", "up"):
        mixed = {"grad": real["base"], "features": real["features"], "up": real["up"], name: on_meta[name]}
        with pytest.raises(ValueError, match=r"expected grad, features and up on one device, received cpu, .*meta"):
            torch.ops.qaa.project_backward(**mixed, with_bias=False, scale=1.0)
    theta, x, text = angles(CIRCUIT, torch.float32), vectors(5, 6, dtype=dtype), str(ops.program(CIRCUIT, "z", True))
    with pytest.raises(ValueError, match="expected theta, x and grad on one device, received meta, cpu, cpu"):
        torch.ops.qaa.backward(theta.to("meta"), x, x[:, :3], text)


def compiled_equals_eager(backend: str) -> None:
    torch._dynamo.reset()
    linear = torch.nn.Linear(6, 6, dtype=torch.float64)
    for readout in ("z", "probs[:3]", ["XYZ", "IIZ"], "state[:2]"):

        def model(theta: Any, x: Any, readout: Any = readout) -> Any:
            value = quantum_features(CIRCUIT, theta, torch.tanh(linear(x)), readout)
            rows = amplitude_rows(CIRCUIT, theta, 2)
            value = torch.view_as_real(value).flatten(-2) if value.is_complex() else value
            value = project(x[..., :2], value[..., :2], torch.ones(2, 2, dtype=x.dtype), scale=0.5)
            return 2 * value.sum(-1) + torch.view_as_real(rows).pow(2).sum()

        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
        for leading in ((5,), (9,), (2, 3), (2, 7)):
            theta, x = angles(CIRCUIT).requires_grad_(), vectors(*leading, 6).requires_grad_()
            expected = model(theta, x)
            ours = compiled(theta, x)
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
            for got, wanted in zip(gradients(ours, theta, x), gradients(expected, theta, x), strict=True):
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


class Features(torch.nn.Module):  # type: ignore[misc]
    """The smallest module with angles of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.circuit, self.readout = CIRCUIT, Readout.parse("z", CIRCUIT.n_wires)
        self.theta = torch.nn.Parameter(angles(CIRCUIT))

    def forward(self, x: Any) -> Any:
        return quantum_features(self.circuit, self.theta, x, self.readout)


def test_compiles_as_one_graph_with_dynamic_shapes() -> None:
    compiled_equals_eager("aot_eager")


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a compiler")
@pytest.mark.skipif(sys.platform == "win32", reason="inductor's C++ backend wants Linux or macOS")
def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()

    module = Features()  # its circuit is an attribute, not a global

    def model(x: Any) -> Any:
        return module(x * 2 + 1).sin().sum(-1)

    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for rows in (4, 9):
        x = vectors(rows, 6).requires_grad_()
        ours, expected = compiled(x), model(x)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
        for got, wanted in zip(gradients(ours, module.theta, x), gradients(expected, module.theta, x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_export_with_a_dynamic_batch_saves_and_loads() -> None:
    module, x = Features(), vectors(5, 6)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=4096)},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (2, 5, 33):
        x = vectors(rows, 6)
        torch.testing.assert_close(loaded(x), module(x), rtol=0, atol=1e-14)


def test_modules_copy_pickle_and_save() -> None:
    module, x = Features(), vectors(5, 6)
    expected = module(x)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), expected)
        twin(x).sum().backward()
        assert twin.theta.grad is not None and module.theta.grad is None
    state = io.BytesIO()
    torch.save(module.state_dict(), state)
    state.seek(0)
    fresh = Features()
    torch.nn.init.zeros_(fresh.theta)
    fresh.load_state_dict(torch.load(state, weights_only=True))
    assert torch.equal(fresh(x), expected)


def test_checkpointing_recomputes_the_same() -> None:
    from torch.utils.checkpoint import checkpoint

    theta, x = angles(CIRCUIT).requires_grad_(), vectors(9, 6).requires_grad_()
    plain = gradients(quantum_features(CIRCUIT, theta, x), theta, x)
    kept = gradients(checkpoint(lambda t, v: quantum_features(CIRCUIT, t, v), theta, x, use_reentrant=False), theta, x)
    for ours, expected in zip(kept, plain, strict=True):
        assert torch.equal(ours, expected)


def test_the_number_of_torch_threads_changes_no_bit() -> None:
    theta, x = angles(CIRCUIT, torch.float32).requires_grad_(), vectors(300, 8, dtype=torch.float32).requires_grad_()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            value = quantum_features(CIRCUIT, theta, x)
            results.append((value, *gradients(value, theta, x)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for ours, expected in zip(result, results[0], strict=True):
            assert torch.equal(ours, expected)


# --------------------------------------------------------------------------------------------------------- bad input

THETA, X = angles(CIRCUIT), vectors(4, 6)
TEXT = program_text(CIRCUIT, "z")
BAD_ARGUMENTS: list[tuple[str, Callable[[], Any], str]] = [
    ("x too wide", lambda: quantum_features(CIRCUIT, THETA, vectors(4, 9)), r"8.*received.*9"),
    ("x without columns", lambda: quantum_features(CIRCUIT, THETA, vectors(4, 0)), r"received.*0"),
    ("x a scalar", lambda: quantum_features(CIRCUIT, THETA, torch.tensor(1.0)), r"\(\)"),
    ("x integers", lambda: quantum_features(CIRCUIT, THETA, X.long()), r"int64"),
    ("x complex", lambda: quantum_features(CIRCUIT, THETA, X.to(torch.complex64)), r"complex64"),
    ("x booleans", lambda: quantum_features(CIRCUIT, THETA, X > 0), r"bool"),
    ("x float8", lambda: quantum_features(CIRCUIT, THETA, X.to(torch.float8_e4m3fn)), r"float8_e4m3fn"),
    ("x an array", lambda: quantum_features(CIRCUIT, THETA, X.numpy()), r"Tensor.*ndarray"),
    ("theta flat", lambda: quantum_features(CIRCUIT, THETA.flatten(), X), r"\(2, 3, 3\).*\(18,\)"),
    (
        "theta for other x",
        lambda: quantum_features(CIRCUIT, THETA.expand(3, 2, 3, 3), X),
        r"of x, \(4,\).*\(3, 2, 3, 3\)",
    ),
    ("theta deeper", lambda: quantum_features(CIRCUIT, THETA.expand(4, 4, 2, 3, 3), X), r"\(4,\).*\(4, 4, 2, 3, 3\)"),
    ("theta integers", lambda: quantum_features(CIRCUIT, THETA.long(), X), r"int64"),
    ("theta an array", lambda: quantum_features(CIRCUIT, THETA.numpy(), X), r"Tensor.*ndarray"),
    ("readout unknown", lambda: quantum_features(CIRCUIT, THETA, X, "y"), r"'y'"),
    ("readout of other wires", lambda: quantum_features(CIRCUIT, THETA, X, ["ZZ"]), r"'ZZ'"),
    ("circuit a string", lambda: quantum_features(str(CIRCUIT), THETA, X), r"Circuit.*str"),
    ("normalize a number", lambda: quantum_features(CIRCUIT, THETA, X, normalize=1), r"bool.*int"),
    ("no rows", lambda: amplitude_rows(CIRCUIT, THETA, 0), r"received 0"),
    ("negative rows", lambda: amplitude_rows(CIRCUIT, THETA, -3), r"received -3"),
    ("too many rows", lambda: amplitude_rows(CIRCUIT, THETA, 9), r"8.*received 9"),
    ("rows a fraction", lambda: amplitude_rows(CIRCUIT, THETA, 2.0), r"integer.*float"),
    ("rows, theta flat", lambda: amplitude_rows(CIRCUIT, THETA.flatten(), 2), r"\(2, 3, 3\).*\(18,\)"),
    ("op, x too wide", lambda: torch.ops.qaa.forward(THETA, vectors(4, 9), TEXT), r"8.*received.*9"),
    ("op, x a vector", lambda: torch.ops.qaa.forward(THETA, vectors(6), TEXT), r"\(batch, d\).*\(6,\)"),
    ("op, theta flat", lambda: torch.ops.qaa.forward(THETA.flatten(), X, TEXT), r"\(2, 3, 3\).*\(18,\)"),
    ("op, five sets", lambda: torch.ops.qaa.forward(THETA.expand(5, 2, 3, 3), X, TEXT), r"each of 5 sets.*received 4"),
    ("op, no set", lambda: torch.ops.qaa.forward(THETA.expand(0, 2, 3, 3), X, TEXT), r"each of 0 sets.*received 4"),
    ("op, no program", lambda: torch.ops.qaa.forward(THETA, X, "wires 3"), r"'wires 3'"),
    ("op, no circuit", lambda: torch.ops.qaa.forward(THETA, X, "wires 3; theta 1; FOO 0 | z | normalize"), r"FOO"),
    ("op, other gradient", lambda: torch.ops.qaa.backward(THETA, X, X, TEXT), r"\(4, 3\).*\(4, 6\)"),
    ("op, gradient in float32", lambda: torch.ops.qaa.backward(THETA, X, X[:, :3].float(), TEXT), r"float64.*float32"),
    ("project, other rows", lambda: project(X, vectors(5, 3), vectors(6, 3)), r"\(5, 6\).*\(4, 6\)"),
    ("project, other features", lambda: project(X, vectors(4, 2), vectors(6, 3)), r"\(4, 3\).*\(4, 2\)"),
    ("project, other outputs", lambda: project(X, vectors(4, 3), vectors(7, 3)), r"\(4, 7\).*\(4, 6\)"),
    ("project, up a vector", lambda: project(X, vectors(4, 3), vectors(6)), r"\(d_out, K\).*\(6,\)"),
    ("project, other bias", lambda: project(X, vectors(4, 3), vectors(6, 3), vectors(5)), r"\(6,\).*\(5,\)"),
    ("project, integers", lambda: project(X.long(), vectors(4, 3), vectors(6, 3)), r"int64"),
    ("project, an array", lambda: project(X.numpy(), vectors(4, 3), vectors(6, 3)), r"Tensor.*ndarray"),
]


@pytest.mark.parametrize(("call", "received"), [pytest.param(c, r, id=name) for name, c, r in BAD_ARGUMENTS])
def test_bad_arguments_say_what_was_expected_and_received(call: Callable[[], Any], received: str) -> None:
    with pytest.raises((ValueError, TypeError), match=received) as error:
        call()
    assert re.fullmatch(r"[^\n]*expected [^\n]*received [^\n]*", str(error.value)), str(error.value)


def test_torchs_flop_counter_counts_the_plans_operations() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def counted(call: Callable[[], Any], backward: bool) -> int:
        with FlopCounterMode(display=False) as counter:
            value = call()
            if backward:
                (value.real if value.is_complex() else value).sum().backward()
        return int(counter.get_total_flops())

    theta, x = angles(CIRCUIT).requires_grad_(), vectors(5, 7, 6).requires_grad_()
    for readout in ("z", "state[:3]"):
        forward, backward, reading = qaa.program.program(CIRCUIT, readout, True).plan.operations(6)
        call = partial(quantum_features, CIRCUIT, theta, x, readout)
        assert counted(call, backward=False) == 2 * 35 * forward
        assert counted(call, backward=True) == 2 * 35 * (forward + backward + reading)  # ops read them again
    forward, backward, _ = qaa.program.program(ops._transposed(CIRCUIT), "state[:6]", False).plan.operations(3)
    for real in (True, False):
        call = partial(amplitude_rows, CIRCUIT, theta, 3, width=6, real=real)
        assert counted(call, backward=False) == 2 * 3 * forward
        assert counted(call, backward=True) == 2 * 3 * (forward + backward)
    base, features, up = vectors(5, 7, 4), vectors(5, 7, 3).requires_grad_(), vectors(4, 3).requires_grad_()
    by_torch = counted(lambda: base + torch.nn.functional.linear(features, up), backward=True)
    assert counted(lambda: project(base, features, up), backward=True) == by_torch == 6 * 35 * 4 * 3


def test_examples_in_docstrings_run() -> None:
    result = doctest.testmod(ops)
    assert result.attempted >= 8 and result.failed == 0


def test_importing_the_ops_twice_in_two_ways_registers_them_once() -> None:
    code = "import qaa.ops, importlib, qaa.ops as again, torch; print(torch.ops.qaa.forward.default)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "qaa.forward.default"
