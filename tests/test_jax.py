"""The JAX front end: the oracle's values and gradients under every transformation, and one clear sentence otherwise."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

import oracle
import qaa
from qaa import Circuit, Readout, ansatz
from strategies import Array, random_circuit, random_grad, random_problem

jax = pytest.importorskip("jax")
jnp = jax.numpy
import qaa.jax  # noqa: E402

forward: Any = qaa.jax.forward  # untyped here: some calls are wrong on purpose
CIRCUIT = ansatz("ring", 3, 2)
RNG = np.random.default_rng(0)
THETA, X = RNG.uniform(-3, 3, CIRCUIT.parameter_shape), RNG.normal(size=(5, 7))


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    """float64 here and nowhere else in the process."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def vjp(circuit: Circuit, theta: Any, x: Any, grad: Array, readout: Any, **options: Any) -> tuple[Array, Array]:
    """Gradients in the convention of qaa.arrays and the oracle: JAX's cotangent of a + ib is dE/da - i dE/db."""
    _, pull_back = jax.vjp(lambda t, v: forward(circuit, t, v, readout, **options), theta, x)
    return pull_back(jnp.asarray(np.conj(grad)))


def test_values_and_gradients_are_the_oracles() -> None:
    """Random circuits with every gate and every readout: so is the text read by which XLA names them."""
    rng = np.random.default_rng(3)
    kinds = set()
    for i in range(12):
        problem = random_problem(rng, random_circuit(rng, n_wires=1 + i % 6, n_gates=20), batch=int(rng.integers(1, 6)))
        call = (problem.circuit, problem.theta, problem.x)
        options = {"normalize": problem.normalize}
        kinds.add((problem.readout.kind, problem.normalize))
        value = forward(*call, problem.readout, **options)
        np.testing.assert_allclose(value, oracle.features(*call, problem.readout, **options), rtol=0, atol=1e-11)
        expected = oracle.vjp(*call, problem.grad, problem.readout, **options)
        for ours, wanted in zip(vjp(*call, problem.grad, problem.readout, **options), expected, strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-11 * max(1, np.abs(wanted).max(initial=0)))
    assert len(kinds) >= 5


@pytest.mark.parametrize("readout", ["z", "state[:3]"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_dtype_gives_the_bits_of_the_numpy_front_end(dtype: str, readout: str) -> None:
    x = np.asarray(jnp.asarray(X, dtype))
    value = qaa.arrays.forward(CIRCUIT, THETA, x, readout)
    grad = random_grad(RNG, Readout.parse(readout, 3), len(x)).astype(value.dtype)
    expected = qaa.arrays.backward(CIRCUIT, THETA, x, grad, readout)
    ours = forward(CIRCUIT, THETA, x, readout)
    assert ours.dtype == value.dtype
    np.testing.assert_array_equal(ours, value)
    for gradient, wanted in zip(vjp(CIRCUIT, THETA, x, grad, readout), expected, strict=True):
        assert gradient.dtype == wanted.dtype
        np.testing.assert_array_equal(gradient, wanted)
    for theta_dtype in ("float16", "bfloat16", "float32"):
        theta = jnp.asarray(THETA, theta_dtype)
        rounded = np.asarray(theta, np.float64)
        np.testing.assert_array_equal(
            forward(CIRCUIT, theta, x, readout), qaa.arrays.forward(CIRCUIT, rounded, x, readout)
        )
        assert vjp(CIRCUIT, theta, x, grad, readout)[0].dtype == theta.dtype


def energy(theta: Any, x: Any, readout: Any = "z") -> Any:
    """A number that depends on every feature of one vector or of many."""
    features = forward(CIRCUIT, theta, x, readout)
    weights = jnp.arange(1, 4) + (1j if jnp.iscomplexobj(features) else 0)
    return jnp.sum(jnp.real(weights * features) ** 2)


def test_subnormal_rows_count_on_xlas_threads_which_take_them_for_zero() -> None:
    x = X.astype(np.float32) * np.float32(1e-39)
    np.testing.assert_array_equal(jax.jit(partial(forward, CIRCUIT))(THETA, x), qaa.arrays.forward(CIRCUIT, THETA, x))


@pytest.mark.parametrize("readout", ["z", "state[:3]"])
def test_gradients_agree_with_finite_differences(readout: str) -> None:
    from jax.test_util import check_grads

    def of(theta: Any, x: Any) -> Any:
        return jnp.sin(energy(theta, x, readout))

    check_grads(of, (jnp.asarray(THETA), jnp.asarray(X)), order=1, modes=["rev"], rtol=1e-6, atol=1e-6)
    check_grads(jax.jit(of), (jnp.asarray(THETA), jnp.asarray(X)), order=1, modes=["rev"], rtol=1e-6, atol=1e-6)


def close(ours: Any, expected: Any) -> None:
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


def loop(function: Callable[..., Any], *lists: Any) -> Any:
    return jnp.stack([function(*items) for items in zip(*lists, strict=True)])


THETAS = RNG.uniform(-3, 3, (4, *CIRCUIT.parameter_shape))
XS = RNG.normal(size=(4, 5, 7))


TRANSFORMS = pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])


@TRANSFORMS
def test_vmap_is_a_loop(transform: Callable[[Any], Any]) -> None:
    """Over x, over rows one by one, over another axis, over theta, over both, and nested."""

    def plain(theta: Any, x: Any) -> Any:
        return forward(CIRCUIT, theta, x)

    by_theta = loop(lambda t: plain(t, X), THETAS)
    close(transform(jax.vmap(plain, (None, 0)))(THETA, XS), forward(CIRCUIT, THETA, XS))
    close(transform(jax.vmap(plain, (None, 0)))(THETA, X), forward(CIRCUIT, THETA, X))
    close(transform(jax.vmap(plain, (None, 2)))(THETA, np.moveaxis(XS, 0, 2)), forward(CIRCUIT, THETA, XS))
    close(transform(jax.vmap(plain, (0, None)))(THETAS, X), by_theta)
    close(transform(jax.vmap(plain))(THETAS, XS), loop(plain, THETAS, XS))
    close(transform(jax.vmap(jax.vmap(plain, (None, 0)), (0, None)))(THETAS, X), by_theta)


MAPS = [(0, None), (None, 0), (0, 0), (1, 2)]


@pytest.mark.parametrize("inner", MAPS)
@pytest.mark.parametrize("outer", MAPS)
@pytest.mark.parametrize("argument", [None, 0, 1, (0, 1)])
def test_nested_maps_are_loops_in_loops(inner: Any, outer: Any, argument: Any) -> None:
    """Features, and gradients within the maps, between them and outside, over any axes of theta and x."""

    def function(theta: Any, x: Any) -> Any:
        return energy(theta, x) if argument is None else jax.tree.leaves(jax.grad(energy, argument)(theta, x))

    def by_loops(f: Any, axes: Any) -> Any:
        def looped(theta: Any, x: Any) -> Any:
            moved = [a if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in zip((theta, x), axes, strict=True)]
            size = next(len(a) for a, axis in zip(moved, axes, strict=True) if axis is not None)
            outs = [f(*(a if axis is None else a[i] for a, axis in zip(moved, axes, strict=True))) for i in range(size)]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)

        return looped

    def operand(shape: tuple[int, ...], axis_inner: int | None, axis_outer: int | None) -> Any:
        for axis, size in ((axis_inner, 3), (axis_outer, 2)):
            shape = shape if axis is None else (*shape[:axis], size, *shape[axis:])
        return RNG.normal(size=shape)

    theta, x = (operand(s, *axes) for s, *axes in zip((THETA.shape, X.shape), inner, outer, strict=True))
    mapped, looped = jax.vmap(jax.vmap(function, inner), outer), by_loops(by_loops(function, inner), outer)
    jax.tree.map(close, mapped(theta, x), looped(theta, x))
    if argument is not None:
        within = jax.vmap(jax.grad(lambda t, v: jax.vmap(energy, inner)(t, v).sum(), argument), outer)(theta, x)
        outside = jax.grad(lambda t, v: jax.vmap(jax.vmap(energy, inner), outer)(t, v).sum(), argument)(theta, x)
        loops = by_loops(by_loops(energy, inner), outer)
        jax.tree.map(close, outside, jax.grad(lambda t, v: loops(t, v).sum(), argument)(theta, x))
        one = by_loops(jax.grad(lambda t, v: by_loops(energy, inner)(t, v).sum(), argument), outer)
        jax.tree.map(close, within, one(theta, x))


@TRANSFORMS
@pytest.mark.parametrize("argument", [0, 1])
def test_vmap_and_gradients_in_either_order(transform: Callable[[Any], Any], argument: int) -> None:
    gradient = jax.grad(energy, argument)
    by_x = loop(lambda v: gradient(THETA, v), XS)
    close(transform(jax.vmap(gradient, (None, 0)))(THETA, XS), by_x)
    close(transform(jax.vmap(gradient, (0, None)))(THETAS, X), loop(lambda t: gradient(t, X), THETAS))
    close(transform(jax.vmap(gradient))(THETAS, XS), loop(gradient, THETAS, XS))
    of_sum = jax.grad(lambda t, v: jax.vmap(energy, (None, 0))(t, v).sum(), argument)
    close(transform(of_sum)(THETA, XS), by_x if argument else by_x.sum(0))
    of_sums = jax.grad(lambda t, v: jax.vmap(energy)(t, v).sum(), argument)
    close(transform(of_sums)(THETAS, XS), loop(gradient, THETAS, XS))


def test_jacobians_by_rows() -> None:
    by_theta, by_x = jax.jacrev(lambda t, v: forward(CIRCUIT, t, v), (0, 1))(THETA, X[0])
    for k in range(3):
        grad_theta, grad_x = oracle.vjp(CIRCUIT, THETA, X[:1], np.eye(3)[k : k + 1])
        close(by_theta[k], grad_theta)
        close(by_x[k], grad_x[0])


def test_a_mapped_batch_is_one_call_of_the_kernels() -> None:
    """Forward and backward, and with the gradient of theta summed inside: no loop is left, and no row is alone."""
    of_sum = jax.grad(lambda t, v: jax.vmap(energy, (None, 0))(t, v).sum(), (0, 1))
    text = str(jax.make_jaxpr(of_sum)(THETA, XS))
    assert text.count("qaa_features[") == 1 and text.count("qaa_adjoint[") == 1 and "scan[" not in text
    text = str(jax.make_jaxpr(jax.vmap(jax.grad(energy, 1), (None, 0)))(THETA, XS))
    assert text.count("qaa_adjoint[") == 1 and "scan[" not in text
    for axes, of in (((0, None), 0), ((0, None), 1), ((0, 0), (0, 1)), ((None, 0), 0)):
        text = str(jax.make_jaxpr(jax.vmap(jax.grad(energy, of), axes))(THETAS if axes[0] == 0 else THETA, XS))
        assert text.count("qaa_adjoint[") == 1 and "scan[" not in text
    shared = jax.make_jaxpr(jax.vmap(jax.grad(energy), (0, None)))(THETAS, X)
    assert "broadcast_in_dim[shape=(4, 5, 7)" not in str(shared).replace(" ", "")  # x is not copied for each


def test_vectors_may_have_angles_of_their_own() -> None:
    x = np.random.default_rng(2).normal(size=(4, 2, 7))
    mapped = jax.vmap(partial(forward, CIRCUIT))
    close(forward(CIRCUIT, THETAS, x), mapped(THETAS, x))
    for argument in (0, 1):
        ours = jax.grad(lambda *a: jnp.sin(forward(CIRCUIT, *a)).sum(), argument)(THETAS, x)
        close(ours, jax.grad(lambda *a: jnp.sin(mapped(*a)).sum(), argument)(THETAS, x))
    twice = jnp.stack([THETAS, THETAS + 1])
    close(mapped(twice, jnp.stack([x, x])), jnp.stack([mapped(t, x) for t in twice]))
    assert forward(CIRCUIT, THETAS[:0], x[:0]).shape == (0, 2, 3)
    with pytest.raises(
        ValueError, match=r"or with leading dimensions of x, \(4, 2\), before it, received \(3, 2, 3, 3\)"
    ):
        forward(CIRCUIT, THETAS[:3], x)


def test_members_without_rows_and_no_members_at_all() -> None:
    for thetas, x in ((THETAS, X[:0]), (THETAS[:0], X)):
        features = jax.vmap(lambda t, v: forward(CIRCUIT, t, v), (0, None))(thetas, x)
        assert features.shape == (len(thetas), len(x), 3)
        grads = jax.vmap(jax.grad(energy, (0, 1)), (0, None))(thetas, x)
        assert [g.shape for g in grads] == [thetas.shape, (len(thetas), *x.shape)] and not grads[0].any()


def test_control_flow_checkpoint_and_one_argument_constant() -> None:
    def scanned(theta: Any) -> Any:
        return jax.lax.scan(lambda total, v: (total + energy(theta, v), None), 0.0, XS)[0]

    close(jax.grad(scanned)(THETA), loop(lambda v: jax.grad(energy)(THETA, v), XS).sum(0))
    close(jax.jit(jax.grad(jax.checkpoint(energy)))(THETA, X), jax.grad(energy)(THETA, X))
    twice = jax.grad(lambda t: energy(t, X) * energy(jax.lax.stop_gradient(t), X))(THETA)
    close(twice, energy(THETA, X) * jax.grad(energy)(THETA, X))
    angles_of_x = jax.grad(lambda v: energy(jnp.resize(v, THETA.shape), v))(X)  # both arguments move
    grad_theta, grad_x = jax.grad(energy, (0, 1))(jnp.resize(X, THETA.shape), X)
    _, pull_back = jax.vjp(lambda v: jnp.resize(v, THETA.shape), X)
    close(angles_of_x, pull_back(grad_theta)[0] + grad_x)


def test_empty_batches_zero_rows_and_circuits_without_angles() -> None:
    for shape in ((0, 7), (2, 0, 7)):
        x = jnp.zeros(shape)
        assert forward(CIRCUIT, THETA, x).shape == (*shape[:-1], 3)
        grad_theta, grad_x = jax.grad(energy, (0, 1))(THETA, x)
        assert not grad_theta.any() and grad_x.shape == shape
    x = X.copy()
    x[1] = 0
    grad_theta, grad_x = jax.grad(energy, (0, 1))(THETA, x)
    assert not grad_x[1].any() and not np.isnan(grad_theta).any()
    fixed, scalar = Circuit.parse("wires 2; theta 0; H 0; CNOT 0 1"), Circuit.parse("wires 2; theta ; RX 1 t0")
    assert jax.grad(lambda t: forward(fixed, t, jnp.ones(4)).sum())(jnp.zeros(0)).shape == (0,)
    ours = jax.grad(lambda t: forward(scalar, t, jnp.ones(4), ["XI", "ZY"]).sum())(0.4)
    close(ours, oracle.vjp(scalar, np.array(0.4), np.ones((1, 4)), np.ones((1, 2)), ["XI", "ZY"])[0])


def test_threads_change_no_bit() -> None:
    circuit = ansatz("ring", 8)
    theta, x = np.full(circuit.parameter_shape, 0.3), np.random.default_rng(0).normal(size=(700, 256))
    of = lambda threads: jax.value_and_grad(  # noqa: E731
        lambda t, v: forward(circuit, t, v, threads=threads).sum(), (0, 1)
    )(theta, x)
    for ours, expected in zip(jax.tree.leaves(of(3)), jax.tree.leaves(of(1)), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_an_exported_function_runs_in_another_process(tmp_path: Any) -> None:
    """What was compiled names its circuit by text, not by an address of this process."""
    names = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ("qaa_forward", "qaa_backward")]
    exported = jax.export.export(jax.jit(jax.grad(energy)), disabled_checks=names)(THETA, X)
    (tmp_path / "function").write_bytes(exported.serialize())
    np.savez(tmp_path / "arrays.npz", theta=THETA, x=X)
    code = f"""
import jax, numpy as np, qaa.jax
from jax import export
jax.config.update("jax_enable_x64", True)
arrays = np.load({str(tmp_path / "arrays.npz")!r})
function = export.deserialize(bytearray(open({str(tmp_path / "function")!r}, "rb").read()))
np.save({str(tmp_path / "out.npy")!r}, function.call(arrays["theta"], arrays["x"]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), jax.grad(energy)(THETA, X))


SHARDED = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
import jax.numpy as jnp, numpy as np, qaa, qaa.jax
from functools import partial
from jax.sharding import Mesh, PartitionSpec as P

circuit = qaa.ansatz("ring", 4)
theta, x = jnp.full(circuit.parameter_shape, 0.3), jax.random.normal(jax.random.key(0), (8, 12))
assert len(jax.devices()) == 2
shared = partial(jax.shard_map, mesh=Mesh(np.array(jax.devices()), ("d",)), in_specs=(P(), P("d")))

def refused(function, arguments):
    try:
        jax.jit(function)(*arguments)
    except ValueError as error:
        return "out_specs" in str(error)

for readout in ("z", "state[:3]"):
    def loss(theta, x):
        return (jnp.abs(qaa.jax.forward(circuit, theta, x, readout)) ** 3).sum()

    def by_rows(theta, x):
        return jax.vmap(lambda row: loss(theta, row))(x).sum()

    for function in (loss, by_rows):
        gradients = jax.grad(function, (0, 1))
        total = shared(lambda t, v: jax.lax.psum(function(t, v), "d"), out_specs=P())
        wanted = gradients(theta, x)
        inside = jax.jit(shared(gradients, out_specs=(P(), P("d"))))(theta, x)
        outside = jax.grad(total, (0, 1))(theta, x)
        for found in (inside, outside):
            for ours, plain in zip(found, wanted, strict=True):
                np.testing.assert_allclose(ours, plain, rtol=0, atol=2e-6)
    features = jax.jit(shared(lambda t, v: qaa.jax.forward(circuit, t, v, readout), out_specs=P("d")))(theta, x)
    np.testing.assert_allclose(features, qaa.jax.forward(circuit, theta, x, readout), rtol=0, atol=2e-6)
    assert refused(shared(loss, out_specs=P()), (theta, x))  # each device has a sum of its own
print("shared")
"""


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="this JAX has no jax.shard_map")
def test_devices_share_rows_and_add_up_the_gradients_of_shared_angles() -> None:
    result = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout.strip()) == (0, "shared"), result.stderr[-3000:]


# -------------------------------------------------------------------------------------------------------- bad input

BAD_ARGUMENTS: list[tuple[str, Callable[[], Any], str]] = [
    ("x too wide", lambda: forward(CIRCUIT, THETA, np.ones((4, 9))), r"8.*received.*9"),
    ("x without columns", lambda: forward(CIRCUIT, THETA, np.ones((4, 0))), r"received.*0"),
    ("x a scalar", lambda: forward(CIRCUIT, THETA, 1.0), r"\(\)"),
    ("x integers", lambda: forward(CIRCUIT, THETA, np.ones((4, 7), int)), r"int64"),
    ("x complex", lambda: forward(CIRCUIT, THETA, np.ones((4, 7), complex)), r"complex128"),
    ("theta flat", lambda: forward(CIRCUIT, THETA.ravel(), X), r"\(2, 3, 3\).*\(18,\)"),
    ("theta integers", lambda: forward(CIRCUIT, np.ones(THETA.shape, int), X), r"int64"),
    ("readout unknown", lambda: forward(CIRCUIT, THETA, X, "y"), r"'y'"),
    ("circuit a string", lambda: forward(str(CIRCUIT), THETA, X), r"Circuit.*str"),
    ("normalize a number", lambda: forward(CIRCUIT, THETA, X, normalize=1), r"bool.*int"),
    ("threads zero", lambda: forward(CIRCUIT, THETA, X, threads=0), r"0"),
    ("under jit", lambda: jax.jit(lambda t: forward(CIRCUIT, t, X))(THETA.ravel()), r"\(2, 3, 3\).*\(18,\)"),
    ("second derivative", lambda: jax.grad(lambda t: jax.grad(energy)(t, X).sum())(THETA), r"second"),
    ("Hessian", lambda: jax.hessian(energy)(THETA, X), r"forward mode"),
    ("forward mode", lambda: jax.jvp(energy, (THETA, X), (THETA, X)), r"forward mode"),
    ("forward mode, jit", lambda: jax.jit(jax.jacfwd(energy))(THETA, X), r"forward mode"),
]


@pytest.mark.parametrize(("call", "received"), [pytest.param(c, r, id=name) for name, c, r in BAD_ARGUMENTS])
def test_bad_calls_say_what_was_expected_and_received(call: Callable[[], Any], received: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=received) as error:
        call()
    assert re.fullmatch(r"[^\n]*expected [^\n]*received [^\n]*", str(error.value)), str(error.value)


def test_xla_hears_of_a_wrong_call_in_a_sentence() -> None:
    """Calls that only a stranger could make: the handlers check what qaa.jax has checked already."""

    def call(*operands: Any, **attributes: Any) -> None:
        out = jax.ShapeDtypeStruct((5, 3), np.float64)
        jax.ffi.ffi_call("qaa_forward", out)(*operands, **attributes).block_until_ready()

    text = str(qaa.program.program(CIRCUIT, "z", True))
    angles, good = THETA.ravel(), {"program": text, "threads": np.int64(1), "groups": np.int64(1)}
    for operands, change, message in (
        ((angles, X), {"program": None}, "expected the attribute 'program'"),
        ((angles, X), {"program": "wires"}, "expected 'CIRCUIT | READOUT"),
        ((angles, X), {"threads": np.int32(2)}, "expected threads of int64"),
        ((angles, X), {"groups": None}, "expected the attribute 'groups'"),
        ((angles, X), {"groups": np.int64(2)}, "expected theta with 36 angles"),
        ((angles[:0], X), {"groups": np.int64(-1)}, "expected 1 to 2147483647 groups of rows, equally many in each"),
        ((np.tile(angles, 2), X), {"groups": np.int64(2)}, "equally many in each, received 2 groups and 5 rows"),
        ((np.tile(angles, 5), X[:2]), {"groups": np.int64(5)}, "equally many in each, received 5 groups and 2 rows"),
        ((angles[:5], X), {}, "expected theta with 18 angles"),
        ((angles.astype(np.int64), X), {}, "expected theta of float32 or float64"),
        ((angles, X[0]), {}, "expected a matrix, received rank 1"),
        ((angles, X.astype(np.int32)), {}, "received XLA's type"),
        ((angles, X[:4]), {}, "expected features with 4 rows, received 5"),
        ((angles,), {}, "expected an array as argument 1, received none"),
    ):
        with pytest.raises(Exception, match=re.escape(message)):
            call(*operands, **{name: value for name, value in {**good, **change}.items() if value is not None})


def test_importing_qaa_imports_no_jax() -> None:
    code = "import sys, qaa, qaa.arrays; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
