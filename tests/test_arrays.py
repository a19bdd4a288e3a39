"""The NumPy front end: every layout of memory gives the same numbers, and every bad argument one clear sentence."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Event, Thread
from time import perf_counter, sleep
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracle
import qaa
from qaa import Circuit, Readout, _core, ansatz
from qaa.program import Program, program
from strategies import Array, circuits, random_grad, readouts

arrays: Any = qaa.arrays  # untyped here: some calls are wrong on purpose
CIRCUIT = ansatz("ring", 4, 2)
RNG = np.random.default_rng(0)
THETA = RNG.uniform(-3, 3, CIRCUIT.parameter_shape)
X = RNG.normal(size=(21, 13))
READOUTS: list[Any] = ["z", "probs", "probs[:5]", "state", "state[:3]", ["XYZI", "IIII"]]


def grad_like(value: Array) -> Array:
    rng = np.random.default_rng(1)
    grad = rng.normal(size=value.shape)
    return (grad + 1j * rng.normal(size=value.shape) if np.iscomplexobj(value) else grad).astype(value.dtype)


# ----------------------------------------------------------------------------------------------- shapes and dtypes


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_shapes_and_dtypes(dtype: Any, readout: Any) -> None:
    x = X.astype(dtype)
    n_outputs = Readout.parse(readout, 4).n_outputs
    value = arrays.forward(CIRCUIT, THETA, x, readout)
    is_state = isinstance(readout, str) and readout.startswith("state")
    complex_dtype = np.complex128 if dtype == np.float64 else np.complex64
    assert value.shape == (21, n_outputs) and value.dtype == (complex_dtype if is_state else dtype)
    assert value.flags.c_contiguous and value.flags.writeable and value.flags.aligned
    for theta_dtype in (np.float16, np.float32, np.float64):
        theta = THETA.astype(theta_dtype)
        grad_theta, grad_x = arrays.backward(CIRCUIT, theta, x, grad_like(value), readout)
        assert grad_theta.shape == THETA.shape and grad_theta.dtype == theta_dtype
        assert grad_x.shape == x.shape and grad_x.dtype == dtype
        assert grad_x.flags.c_contiguous and grad_x.flags.writeable


@pytest.mark.parametrize("theta_dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_dtypes_of_angles_and_inputs_are_independent(dtype: Any, theta_dtype: Any) -> None:
    """The angles count with all their digits, whatever the dtype of x."""
    theta, x = THETA.astype(theta_dtype), X.astype(dtype)
    exact = oracle.features(CIRCUIT, theta.astype(float), x)
    tolerance = 1e-12 if dtype == np.float64 else 2e-6
    np.testing.assert_allclose(arrays.forward(CIRCUIT, theta, x), exact, rtol=0, atol=tolerance)
    grad = grad_like(exact).astype(dtype)
    grad_theta, _ = arrays.backward(CIRCUIT, theta, x, grad)
    expected, _ = oracle.vjp(CIRCUIT, theta.astype(float), x, grad)
    rounding = np.finfo(theta_dtype).eps * np.abs(expected).max()
    np.testing.assert_allclose(grad_theta, expected, rtol=0, atol=20 * tolerance + rounding)


@pytest.mark.parametrize("readout", READOUTS)
def test_an_empty_batch_is_a_result(readout: Any) -> None:
    x = np.zeros((0, 13), np.float32)
    value = arrays.forward(CIRCUIT, THETA, x, readout)
    assert value.shape == (0, Readout.parse(readout, 4).n_outputs)
    grad_theta, grad_x = arrays.backward(CIRCUIT, THETA, x, value, readout)
    assert grad_x.shape == (0, 13) and grad_theta.shape == THETA.shape and not grad_theta.any()


def test_rows_may_have_angles_of_their_own() -> None:
    rng = np.random.default_rng(1)
    theta, x = rng.uniform(-3, 3, (5, *CIRCUIT.parameter_shape)), rng.normal(size=(5, 13))
    value = qaa.arrays.forward(CIRCUIT, theta, x)
    grad = grad_like(value)
    grad_theta, grad_x = qaa.arrays.backward(CIRCUIT, theta, x, grad)
    assert grad_theta.shape == theta.shape
    for i in range(5):
        row = slice(i, i + 1)
        np.testing.assert_array_equal(value[row], qaa.arrays.forward(CIRCUIT, theta[i], x[row]))
        alone_theta, alone_x = qaa.arrays.backward(CIRCUIT, theta[i], x[row], grad[row])
        np.testing.assert_array_equal(grad_theta[i], alone_theta)
        np.testing.assert_array_equal(grad_x[row], alone_x)
    assert qaa.arrays.forward(CIRCUIT, theta[:0], x[:0]).shape == (0, 4)
    assert [a.shape for a in qaa.arrays.backward(CIRCUIT, theta[:0], x[:0], grad[:0])] == [(0, 2, 4, 3), (0, 13)]
    with pytest.raises(
        ValueError, match=r"expected theta of shape \(2, 4, 3\), or with leading dimensions of x, \(5,\), b"
    ):
        qaa.arrays.forward(CIRCUIT, theta[:4], x)


def test_theta_of_shape_zero_and_of_no_dimension() -> None:
    fixed, scalar = Circuit.parse("wires 2; theta 0; H 0; CNOT 0 1"), Circuit.parse("wires 2; theta ; RX 1 t0")
    x = np.ones((3, 4))
    assert arrays.backward(fixed, np.zeros(0), x, np.ones((3, 2)))[0].shape == (0,)
    grad_theta, _ = arrays.backward(scalar, np.array(0.4), x, np.ones((3, 2)), ["XI", "ZY"])
    assert grad_theta.shape == ()
    expected, _ = oracle.vjp(scalar, np.array(0.4), x, np.ones((3, 2)), ["XI", "ZY"])
    np.testing.assert_allclose(grad_theta, expected, atol=1e-12)


# -------------------------------------------------------------------------------------------------- memory layouts


def misaligned(a: Array) -> Array:
    raw = np.zeros(a.nbytes + 1, np.uint8)
    view = raw[1:].view(a.dtype).reshape(a.shape)
    view[:] = a
    return view


def read_only(a: Array) -> Array:
    a = a.copy()
    a.flags.writeable = False
    return a


#: name -> a copy of the same numbers in another layout
LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "fortran": np.asfortranarray,
    "every second row": lambda a: np.repeat(a, 2, axis=0)[::2],
    "every second column": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "rows backwards": lambda a: a[::-1].copy()[::-1],
    "columns backwards": lambda a: a[..., ::-1].copy()[..., ::-1],
    "columns of a wider array": lambda a: np.concatenate([a, np.full_like(a, np.nan)], axis=-1)[..., : a.shape[-1]],
    "read-only": read_only,
    "misaligned": misaligned,
}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_bits(layout: str, dtype: Any) -> None:
    x, theta = X.astype(dtype), THETA.astype(np.float32)
    for readout in ("z", "state"):
        value = arrays.forward(CIRCUIT, theta, x, readout)
        grad = grad_like(value)
        gradients = arrays.backward(CIRCUIT, theta, x, grad, readout)
        change = LAYOUTS[layout]
        np.testing.assert_array_equal(arrays.forward(CIRCUIT, change(theta), change(x), readout), value)
        changed = arrays.backward(CIRCUIT, change(theta), change(x), change(grad), readout)
        for ours, expected in zip(changed, gradients, strict=True):
            np.testing.assert_array_equal(ours, expected)


def test_zero_strides_are_read_like_any_other_strides() -> None:
    row = X[:1]
    repeated, constant = np.broadcast_to(row, (9, 13)), np.broadcast_to(np.float64(0.5), (9, 13))
    theta = np.broadcast_to(np.float64(0.3), THETA.shape)
    for x in (repeated, constant, np.broadcast_to(X[:, :1], X.shape)):
        value = arrays.forward(CIRCUIT, theta, x)
        np.testing.assert_array_equal(value, arrays.forward(CIRCUIT, theta.copy(), x.copy()))
        ones = np.broadcast_to(np.float64(1), value.shape)
        for ours, expected in zip(
            arrays.backward(CIRCUIT, theta, x, ones),
            arrays.backward(CIRCUIT, theta.copy(), x.copy(), ones.copy()),
            strict=True,
        ):
            np.testing.assert_array_equal(ours, expected)
            assert ours.flags.writeable


def test_arguments_are_left_alone() -> None:
    theta, x = THETA.copy(), X.copy()
    value = arrays.forward(CIRCUIT, theta, x)
    grad = grad_like(value)
    kept = grad.copy()
    arrays.backward(CIRCUIT, theta, x, grad)
    for ours, expected in ((theta, THETA), (x, X), (grad, kept)):
        np.testing.assert_array_equal(ours, expected)


def test_other_byte_orders_give_the_same_numbers_or_an_error() -> None:
    swapped = X.astype(X.dtype.newbyteorder())
    try:
        value = arrays.forward(CIRCUIT, THETA, swapped)
    except (TypeError, ValueError) as error:
        assert "expected" in str(error)
    else:
        np.testing.assert_array_equal(value, arrays.forward(CIRCUIT, THETA, X))


def test_a_readout_may_be_a_string_a_list_or_a_readout() -> None:
    for spelled in (["ZIII", "IZII", "IIZI", "IIIZ"], Readout.parse("z", 4), ("ZIII", "IZII", "IIZI", "IIIZ")):
        np.testing.assert_array_equal(arrays.forward(CIRCUIT, THETA, X, spelled), arrays.forward(CIRCUIT, THETA, X))
    np.testing.assert_array_equal(
        arrays.forward(CIRCUIT, THETA, X, "probs[:5]"), arrays.forward(CIRCUIT, THETA, X, "probs")[:, :5]
    )


def test_a_circuit_that_travelled_as_text_or_pickle_computes_the_same() -> None:
    expected = arrays.forward(CIRCUIT, THETA, X)
    for circuit in (Circuit.parse(str(CIRCUIT)), pickle.loads(pickle.dumps(CIRCUIT))):
        np.testing.assert_array_equal(arrays.forward(circuit, THETA, X), expected)


# -------------------------------------------------------------------------------------------------------- bad input

GRAD = np.ones((21, 4))
BAD_ARGUMENTS: list[tuple[str, Callable[[], Any], str]] = [
    ("x too wide", lambda: arrays.forward(CIRCUIT, THETA, np.ones((2, 17))), r"16.*17"),
    ("x without columns", lambda: arrays.forward(CIRCUIT, THETA, np.ones((2, 0))), r"0"),
    ("x a vector", lambda: arrays.forward(CIRCUIT, THETA, np.ones(13)), r"\(13,\)|1"),
    ("x three-dimensional", lambda: arrays.forward(CIRCUIT, THETA, np.ones((2, 3, 13))), r"\(2, 3, 13\)|3"),
    ("x integers", lambda: arrays.forward(CIRCUIT, THETA, np.ones((2, 13), np.int64)), r"int64"),
    ("x booleans", lambda: arrays.forward(CIRCUIT, THETA, np.ones((2, 13), bool)), r"bool"),
    ("x complex", lambda: arrays.forward(CIRCUIT, THETA, np.ones((2, 13), complex)), r"complex128"),
    ("x long double", lambda: arrays.forward(CIRCUIT, THETA, np.ones((2, 13), np.longdouble)), r"longdouble|float"),
    ("x objects", lambda: arrays.forward(CIRCUIT, THETA, np.ones((2, 13), object)), r"object|'O'"),
    ("x strings", lambda: arrays.forward(CIRCUIT, THETA, np.full((2, 13), "1")), r"U1|str"),
    ("theta flat", lambda: arrays.forward(CIRCUIT, THETA.ravel(), X), r"\(2, 4, 3\).*\(24,\)"),
    ("theta of another circuit", lambda: arrays.forward(CIRCUIT, THETA[:1], X), r"\(2, 4, 3\).*\(1, 4, 3\)"),
    ("theta complex", lambda: arrays.forward(CIRCUIT, THETA.astype(complex), X), r"complex128"),
    ("theta integers", lambda: arrays.forward(CIRCUIT, np.ones(THETA.shape, np.int32), X), r"int32"),
    ("grad too narrow", lambda: arrays.backward(CIRCUIT, THETA, X, GRAD[:, :3]), r"\(21, 4\).*\(21, 3\)"),
    ("grad of another batch", lambda: arrays.backward(CIRCUIT, THETA, X, GRAD[:20]), r"\(21, 4\).*\(20, 4\)"),
    ("grad complex", lambda: arrays.backward(CIRCUIT, THETA, X, GRAD.astype(complex)), r"complex128"),
    ("grad a scalar", lambda: arrays.backward(CIRCUIT, THETA, X, np.ones(())), r"\(21, 4\).*\(\)"),
    ("readout unknown", lambda: arrays.forward(CIRCUIT, THETA, X, "y"), r"'y'"),
    ("readout of other wires", lambda: arrays.forward(CIRCUIT, THETA, X, ["ZZ"]), r"'ZZ'"),
    ("readout a number", lambda: arrays.forward(CIRCUIT, THETA, X, 4), r"int"),
    ("readout too long", lambda: arrays.forward(CIRCUIT, THETA, X, "probs[:17]"), r"16.*17"),
    ("circuit a string", lambda: arrays.forward(str(CIRCUIT), THETA, X), r"Circuit.*str"),
    ("threads zero", lambda: arrays.forward(CIRCUIT, THETA, X, threads=0), r"0"),
    ("threads negative", lambda: arrays.forward(CIRCUIT, THETA, X, threads=-2), r"-2"),
    ("threads a fraction", lambda: arrays.forward(CIRCUIT, THETA, X, threads=1.5), r"1\.5"),
    ("backward, threads zero", lambda: arrays.backward(CIRCUIT, THETA, X, GRAD, threads=0), r"0"),
    ("backward, x too wide", lambda: arrays.backward(CIRCUIT, THETA, np.ones((21, 17)), GRAD), r"16.*17"),
    ("backward, theta flat", lambda: arrays.backward(CIRCUIT, THETA.ravel(), X, GRAD), r"\(2, 4, 3\).*\(24,\)"),
    ("backward, x integers", lambda: arrays.backward(CIRCUIT, THETA, np.ones((21, 13), int), GRAD), r"int"),
]


@pytest.mark.parametrize(("call", "received"), [pytest.param(c, r, id=name) for name, c, r in BAD_ARGUMENTS])
def test_bad_arguments_say_what_was_expected_and_received(call: Callable[[], Any], received: str) -> None:
    with pytest.raises((ValueError, TypeError), match=received) as error:
        call()
    assert re.fullmatch(r"[^\n]*expected [^\n]*received [^\n]*", str(error.value)), str(error.value)


def test_options_are_keywords() -> None:
    with pytest.raises(TypeError):
        arrays.forward(CIRCUIT, THETA, X, "z", True)
    with pytest.raises(TypeError):
        arrays.backward(CIRCUIT, THETA, X, GRAD, "z", True)


# ---------------------------------------------------------------------------------------------------- the package


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_qaa_and_its_numpy_front_end_imports_no_torch() -> None:
    code = "import sys, qaa, qaa.arrays; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert run_python(code).split() == ["False", "False"]


def test_the_package_works_where_torch_is_missing() -> None:
    code = """
import sys
sys.modules["torch"] = None
import numpy as np, qaa
circuit = qaa.ansatz("ring", 2)
print(qaa.arrays.forward(circuit, np.zeros(circuit.parameter_shape), np.eye(4)[:1]).tolist())
"""
    assert run_python(code).strip() == "[[1.0, 1.0]]"


def test_forward_survives_a_fork_after_threads_were_used() -> None:
    """A DataLoader's worker is a fork of a process whose threads have already run."""
    code = """
import os, numpy as np, qaa
circuit = qaa.ansatz("ring", 6)
theta, x = np.full(circuit.parameter_shape, 0.3), np.random.default_rng(0).normal(size=(500, 64))
expected = qaa.arrays.forward(circuit, theta, x, threads=2)
child = os.fork()
if child == 0:
    same = np.array_equal(qaa.arrays.forward(circuit, theta, x, threads=2), expected)
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "0"


def test_several_python_threads_may_call_at_once() -> None:
    problems = [(ansatz("ring", n), n) for n in (2, 4, 6, 8)] * 4

    def solve(item: tuple[Circuit, int]) -> Array:
        circuit, n = item
        x = np.random.default_rng(n).normal(size=(50, 2**n))
        theta = np.full(circuit.parameter_shape, 0.2)
        value = arrays.forward(circuit, theta, x, threads=2)
        return np.concatenate([value.ravel(), *map(np.ravel, arrays.backward(circuit, theta, x, value, threads=2))])

    expected = [solve(item) for item in problems]
    with ThreadPoolExecutor(8) as pool:
        for ours, alone in zip(pool.map(solve, problems), expected, strict=True):
            np.testing.assert_array_equal(ours, alone)


def test_other_python_threads_run_during_a_call() -> None:
    """The longest pause of a thread that only counts stays well below the duration of a call in another thread."""
    circuit = ansatz("ring", 12, 2)
    theta, x = np.full(circuit.parameter_shape, 0.2), np.random.default_rng(0).normal(size=(400, 4096))
    started, ended, finished = [], [], Event()

    def call() -> None:
        started.append(perf_counter())
        arrays.forward(circuit, theta, x, threads=1)
        arrays.backward(circuit, theta, x, np.ones((400, 12)), threads=1)
        ended.append(perf_counter())
        finished.set()

    worker = Thread(target=call)
    worker.start()
    ticks = []
    while not finished.is_set():
        ticks.append(perf_counter())
        sleep(0.001)
    worker.join()
    inside = [started[0], *(t for t in ticks if started[0] < t < ended[0]), ended[0]]
    longest_pause = max(b - a for a, b in pairwise(inside))
    assert longest_pause < 0.5 * (ended[0] - started[0])


def test_the_public_names() -> None:
    for name in ("Gate", "Circuit", "Readout", "ansatz", "arrays"):
        assert hasattr(qaa, name)


@given(st.data(), circuits(max_wires=4, max_gates=6), st.booleans())
def test_a_program_prints_as_text_that_parses_back(data: st.DataObject, circuit: Circuit, normalize: bool) -> None:
    """The text by which torch's ops name what they compute, whatever the circuit and the readout."""
    described = program(circuit, data.draw(readouts(circuit.n_wires)), normalize)
    assert Program.parse(str(described)) == described


def test_numpys_own_bools_and_integers_are_taken() -> None:
    described = program(CIRCUIT, Readout("probs", np.int64(3)), np.True_)  # type: ignore[arg-type]
    assert described == program(CIRCUIT, "probs[:3]", True)
    assert type(described.normalize) is bool and type(described.readout.n_outputs) is int
    theta = np.zeros(CIRCUIT.parameter_shape)
    value = arrays.forward(CIRCUIT, theta, np.ones((1, 4)), normalize=np.False_)
    np.testing.assert_array_equal(value, arrays.forward(CIRCUIT, theta, np.ones((1, 4)), normalize=False))


def test_a_program_can_be_copied_and_pickled_after_its_first_use() -> None:
    described = program(CIRCUIT, "z", True)
    assert described.plan is described.plan
    for twin in (copy.deepcopy(described), copy.copy(described), pickle.loads(pickle.dumps(described))):
        assert twin == described and str(twin) == str(described)
        assert str(twin.plan) == str(described.plan)


def test_a_rewrite_that_does_not_exist_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAA_PLAN_WITHOUT", "fuse,magic")
    with pytest.raises(ValueError, match=r"expected QAA_PLAN_WITHOUT to name rewrites among .*received magic"):
        arrays.forward(Circuit.parse("wires 1; theta 0; H 0; T 0; H 0; S 0"), np.zeros(0), np.ones((1, 2)))


@pytest.mark.parametrize("setting", ["", "1", "3", "4,2", "0", "many"])
def test_any_omp_num_threads_gives_the_same_numbers(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = arrays.forward(CIRCUIT, THETA, X, threads=1)
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    np.testing.assert_array_equal(arrays.forward(CIRCUIT, THETA, X), expected)


def test_bfloat16_arrays() -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    x = X.astype(bfloat16)
    value = arrays.forward(CIRCUIT, THETA, x)
    assert value.dtype == bfloat16
    single = arrays.forward(CIRCUIT, THETA, x.astype(np.float32))
    np.testing.assert_array_equal(value, single.astype(bfloat16))
    _, grad_x = arrays.backward(CIRCUIT, THETA, x, value)
    assert grad_x.dtype == bfloat16


def test_random_grad_matches_the_features() -> None:
    for readout in READOUTS:
        parsed = Readout.parse(readout, 4)
        value = arrays.forward(CIRCUIT, THETA, X, readout)
        grad = random_grad(np.random.default_rng(0), parsed, len(X))
        assert grad.shape == value.shape and grad.dtype == value.dtype


def test_the_core_needs_rows_unless_the_readout_is_linear_in_them() -> None:
    circuit = qaa.ansatz("ring", 3, 1)
    theta = np.linspace(-1, 1, circuit.n_parameters).reshape(circuit.parameter_shape)
    grad_theta = np.empty_like(theta)
    out, grad = np.empty((2, 8)), np.ones((2, 8))
    scalar = _core.Scalar.float64
    nothing = _core.ConstMatrix(0, 2, 8, 8, scalar)
    for readout, normalize, message in (("state[:4]", True, "not linear in x"), ("probs", False, "not linear in x")):
        plan = program(circuit, readout, normalize).plan
        incoming = _core.ConstMatrix(grad.ctypes.data, 2, plan.n_columns, 8, scalar)
        features = _core.Matrix(out.ctypes.data, 2, plan.n_columns, 8, scalar)
        grad_x = _core.Matrix(out.ctypes.data, 2, 8, 8, scalar)
        with pytest.raises(ValueError, match="expected x with data, received a null pointer"):
            _core.forward(plan, theta.ctypes.data, scalar, nothing, features, 1)
        with pytest.raises(ValueError, match=message):
            _core.backward(plan, theta.ctypes.data, scalar, nothing, incoming, grad_theta.ctypes.data, grad_x, 1)
    plan = program(circuit, "state[:4]", False).plan
    with pytest.raises(ValueError, match="expected grad_x with data"):
        no_grad_x = _core.Matrix(0, 0, 0, 0, scalar)
        _core.backward(plan, theta.ctypes.data, scalar, nothing, incoming, grad_theta.ctypes.data, no_grad_x, 1)
    _core.backward(plan, theta.ctypes.data, scalar, nothing, incoming, grad_theta.ctypes.data, grad_x, 1)
    _, expected = qaa.arrays.backward(circuit, theta, np.zeros((2, 8)), np.full((2, 4), 1 + 1j), "state[:4]",
                                      normalize=False)  # fmt: skip
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-15)
    assert np.all(grad_theta == 0)
    with pytest.raises(ValueError, match="angles of float32 or float64"):
        _core.forward(plan, theta.ctypes.data, _core.Scalar.bfloat16, nothing, features, 1)


@pytest.mark.parametrize("narrow", ["up", "base", "out"])
def test_the_core_projects_into_the_type_of_the_features_alone(narrow: str) -> None:
    """float16 results beside float32 features would be written past."""
    shapes = {"features": (4, 2), "up": (4, 2), "base": (4, 4), "out": (4, 4)}
    held = {name: np.ones(shape, np.float16 if name == narrow else np.float32) for name, shape in shapes.items()}
    scalars = {np.dtype(np.float16): _core.Scalar.float16, np.dtype(np.float32): _core.Scalar.float32}

    def matrix(name: str) -> tuple[object, ...]:
        a = held[name]
        return a.ctypes.data, *a.shape, a.shape[1], scalars[a.dtype]

    bias = _core.ConstMatrix(0, 0, 0, 0, _core.Scalar.float32)
    read = [_core.ConstMatrix(*matrix(name)) for name in ("features", "up")]
    with pytest.raises(ValueError, match=f"expected {narrow} with float32 numbers, as features has, received float16"):
        _core.project(*read, bias, _core.ConstMatrix(*matrix("base")), 1.0, _core.Matrix(*matrix("out")), 1)
    assert all(np.all(a == 1) for a in held.values())


def test_the_core_refuses_probabilities_that_are_none() -> None:
    for pauli in ([0.1, np.nan, 0.1], [-0.1, 0.1, 0.1], [0.6, 0.6, 0.6]):
        with pytest.raises(ValueError, match=r"expected .*probabilit.*received"):
            _core.NoisyPlan(1, 0, [("X", (0,), ())], _core.ReadoutKind.expval, 1, ["Z"], True, pauli, 0.0, 0.0)
