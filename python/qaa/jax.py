"""JAX: features of vectors as a JAX function, under ``jit``, ``grad`` and ``vmap``, on the CPU.

The kernels are called through XLA's foreign function interface, so that a compiled computation never returns to Python.
Three JAX primitives carry them: the features; their tangent, which exists to be transposed; and the adjoint, which is
its transpose. A function with ``jax.custom_vjp`` would be shorter, but ``vmap`` over rows would then ask for the
angles' gradient row by row: here a batch under ``vmap`` is a batch of the kernels, forward and backward, and what is
mapped over angles too, one call with groups of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

try:
    import jax
    import jax.ffi
    import jax.numpy as jnp
    from jax.core import ShapedArray
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir
except ImportError as error:
    raise ImportError(f"expected jax 0.5 or newer (pip install 'qaa[jax]'), received {error}") from error

from qaa import _core
from qaa.arrays import _SCALARS, _feature_dtype, _threads
from qaa.circuit import Circuit, Readout
from qaa.program import Program, program


def forward(
    circuit: Circuit,
    theta: Any,
    x: Any,
    readout: str | Sequence[str] | Readout = "z",
    *,
    normalize: bool = True,
    threads: int | None = None,
) -> jax.Array:
    r"""Features of every vector of ``x`` after amplitude embedding, the circuit and the readout; differentiable.

    .. math::
        |\psi\rangle = \mathrm{pad}(x) / \lVert x \rVert, \qquad |\phi\rangle = U(\theta) |\psi\rangle, \qquad
        f_k = \langle\phi| M_k |\phi\rangle \ \text{or}\ |\phi_k|^2 \ \text{or}\ \phi_k

    ``jax.vmap`` over ``x`` is one call with a larger batch, and so are its gradients. Mapped over ``theta``, or over
    gradients with respect to it, it is one call as well, in which every member has angles of its own; threads share
    the members.

    Args:
        circuit: U, on ``n`` wires; wire 0 is the most significant bit of an amplitude's index.
        theta: angles in radians, shape ``circuit.parameter_shape``, any real floating dtype; or with leading
            dimensions of x before it, where vectors have angles of their own.
        x: shape ``(..., d)`` with ``1 <= d <= 2**n``, padded with zeros to ``2**n``; float16, bfloat16, float32 or,
            where ``jax_enable_x64`` is set, float64. The arithmetic is float64 for float64, else float32.
        readout: see :class:`qaa.Readout`.
        normalize: if False, the vector itself goes through the circuit: expectations and probabilities become
            quadratic forms of it, amplitudes a linear map.
        threads: number of threads; by default ``OMP_NUM_THREADS`` or all processors, at the time of tracing. Results
            do not depend on it.

    Returns:
        Shape ``(..., n_outputs)`` in the dtype of ``x``; for the readout ``"state"`` complex128 for float64 ``x`` and
        else complex64. A zero vector is no state: its features and gradients are zero.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or dtype.
        RuntimeError: a second derivative, or a forward-mode one (``jax.jvp``, ``jax.jacfwd``, ``jax.hessian``), is
            asked for; the kernels have neither.
        NotImplementedError: JAX compiles for another device than the CPU.

    Example:
        >>> import jax, jax.numpy as jnp, qaa, qaa.jax
        >>> circuit = qaa.Circuit(1, (qaa.Gate("RY", 0, 0),), (1,))  # <Z> = cos(theta) for the state |0>
        >>> def expectation(theta, x):
        ...     return qaa.jax.forward(circuit, theta, x)[..., 0]
        >>> theta, x = jnp.array([jnp.pi / 2]), jnp.array([1.0, 0.0])
        >>> jax.jit(jax.grad(expectation))(theta, x).round(4)
        Array([-1.], dtype=float32)
        >>> jax.vmap(expectation, (None, 0))(theta, jnp.eye(2)).shape
        (2,)
    """
    what = program(circuit, readout, normalize)
    theta, x = jnp.asarray(theta), jnp.asarray(x)
    if theta.dtype.name not in _SCALARS:
        raise TypeError(f"expected theta of a real floating dtype, received {theta.dtype}")
    if x.dtype.name not in _SCALARS:
        raise TypeError(f"expected x of dtype {', '.join(_SCALARS)}, received {x.dtype}")
    if x.ndim < 1:
        raise ValueError(f"expected x of shape (..., d), received {x.shape}")
    what.check_width(x.shape[-1])
    mapped = what.check_theta(theta.shape, x.shape[:-1])
    if theta.dtype.name not in ("float32", "float64"):
        theta = theta.astype(np.float32)
    theta, x = _varying(theta, x)
    features: jax.Array = _features.bind(theta, x, what=what, threads=_threads(threads), mapped=mapped, shared=False)
    return features


# ------------------------------------------------------------------------------------------------ primitives

# Operands of all three: theta (*lead, *circuit.parameter_shape) and x (*lead, ..., d). The tangent has the tangents of
# theta, x or both after them; the adjoint has the features' cotangent, and yields cotangents for `of`: "theta", "x" or
# both. `lead` are the `mapped` first axes of theta, one member of the circuit's angles each; where x is `shared` by all
# members it has none of these axes, but the adjoint yields a cotangent of it for each.
_features = Primitive("qaa_features")
_tangent = Primitive("qaa_tangent")
_adjoint = Primitive("qaa_adjoint")
_adjoint.multiple_results = True


def _shape_of_features(theta: Any, x: Any, *_: Any, what: Program, mapped: int, shared: bool, **__: Any) -> Any:
    shape = (*theta.shape[: mapped * shared], *x.shape[:-1], what.n_outputs)
    return jax.ShapeDtypeStruct(shape, _feature_dtype(what, x.dtype))


def _shapes_of_adjoint(
    theta: Any, x: Any, grad: Any, *, of: tuple[str, ...], mapped: int, shared: bool, **_: Any
) -> list[Any]:
    shapes = {"theta": theta.shape, "x": (*theta.shape[: mapped * shared], *x.shape)}
    return [jax.ShapeDtypeStruct(shapes[name], a.dtype) for name, a in (("theta", theta), ("x", x)) if name in of]


# Inside jax.shard_map an array's type names the axes of devices over which it varies. Operands get their common axes,
# and results theirs: the transpose of that adds up the gradient of angles that all devices share.
_AXES = "manual_axis_type" if hasattr(ShapedArray, "manual_axis_type") else "vma"  # before JAX 0.7 neither


def _axes(kind: Any) -> frozenset[Any]:
    axes = getattr(kind, _AXES, None)
    return frozenset(getattr(axes, "varying", axes) or ())


def _typed(result: Any, operand: Any) -> ShapedArray:
    if not _axes(operand):
        return ShapedArray(result.shape, result.dtype)
    sharding = operand.sharding.update(spec=jax.sharding.PartitionSpec(*[None] * len(result.shape)))
    return ShapedArray(result.shape, result.dtype, sharding=sharding, **{_AXES: getattr(operand, _AXES)})


def _type_of_features(theta: Any, x: Any, *rest: Any, **params: Any) -> ShapedArray:
    return _typed(_shape_of_features(theta, x, *rest, **params), x)


def _types_of_adjoint(theta: Any, x: Any, grad: Any, **params: Any) -> list[ShapedArray]:
    return [_typed(result, x) for result in _shapes_of_adjoint(theta, x, grad, **params)]


def _varying(*operands: Any) -> list[Any]:
    if not hasattr(jax, "typeof"):
        return list(operands)
    vary = partial(jax.lax.pcast, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary
    own = [_axes(jax.typeof(a)) for a in operands]
    missing = [tuple(frozenset().union(*own) - axes) for axes in own]
    return [vary(a, axes) if axes else a for a, axes in zip(operands, missing, strict=True)]


def _call_forward(theta: Any, x: Any, *, what: Program, threads: int, mapped: int, shared: bool) -> Any:
    out = _shape_of_features(theta, x, what=what, mapped=mapped, shared=shared)
    if 0 in out.shape:
        return jnp.zeros(out.shape, out.dtype)
    shape = jax.ShapeDtypeStruct((math.prod(out.shape[:-1]), what.n_outputs), out.dtype)
    groups = np.int64(math.prod(theta.shape[:mapped]))
    call = jax.ffi.ffi_call("qaa_forward", shape)
    rows = x.reshape(-1, x.shape[-1])
    found = call(theta.reshape(-1), rows, program=str(what), threads=np.int64(threads), groups=groups)
    return found.reshape(out.shape)


def _call_backward(
    theta: Any, x: Any, grad: Any, *, what: Program, threads: int, of: tuple[str, ...], mapped: int, shared: bool
) -> list[Any]:
    shapes = _shapes_of_adjoint(theta, x, grad, of=("theta", "x"), mapped=mapped, shared=shared)
    if 0 in grad.shape:
        return [jnp.zeros(s.shape, s.dtype) for s, name in zip(shapes, ("theta", "x"), strict=True) if name in of]
    angles, width, n_rows = theta.reshape(-1), x.shape[-1], math.prod(grad.shape[:-1])
    results = [jax.ShapeDtypeStruct(angles.shape, angles.dtype)]
    if "x" in of:
        results.append(jax.ShapeDtypeStruct((n_rows, width), x.dtype))
    call = jax.ffi.ffi_call("qaa_backward", results)
    # JAX's cotangent of a + ib is dE/da - i dE/db, the core's is dE/da + i dE/db.
    grad = grad.reshape(n_rows, what.n_outputs).conj()
    numbers = {"threads": np.int64(threads), "groups": np.int64(math.prod(theta.shape[:mapped]))}
    found = call(angles, x.reshape(-1, width), grad, program=str(what), **numbers)
    grads = dict(zip(("theta", "x"), found, strict=False))
    return [grads[name].reshape(s.shape) for s, name in zip(shapes, ("theta", "x"), strict=True) if name in of]


def _no_forward_mode(*_: Any, **__: Any) -> Any:
    raise RuntimeError("expected reverse mode, received a request for forward mode: the kernels have none")


def _no_second_derivative(*_: Any, **__: Any) -> Any:
    raise RuntimeError("expected a first derivative, received a request for a second one: the adjoint has none")


# ------------------------------------------------------------------------------------------------ derivatives


def _differentiate(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    theta, x = primals
    moving = {name: t for name, t in zip(("theta", "x"), tangents, strict=True) if type(t) is not ad.Zero}
    return (
        _features.bind(theta, x, **params),
        _tangent.bind(theta, x, *moving.values(), of=tuple(moving), **params),
    )


def _transpose(grad: Any, theta: Any, x: Any, *tangents: Any, of: tuple[str, ...], **params: Any) -> list[Any]:
    if type(grad) is ad.Zero:
        return [None, None, *(ad.Zero(t.aval) if ad.is_undefined_primal(t) else None for t in tangents)]
    wanted = tuple(name for name, t in zip(of, tangents, strict=True) if ad.is_undefined_primal(t))
    grads = dict(zip(wanted, _adjoint.bind(theta, x, grad, of=wanted, **params), strict=True))
    if params["shared"] and "x" in grads:
        grads["x"] = grads["x"].sum(tuple(range(params["mapped"])))
    return [None, None, *(grads.get(name) for name in of)]


# ------------------------------------------------------------------------------------------------ batches


def _batch_tangent(operands: Sequence[Any], axes: Sequence[int | None], **params: Any) -> tuple[Any, Any]:
    """A loop: tangents are there to be transposed, and whoever maps over one before asks for few."""
    items = [jnp.moveaxis(a, axis, 0) for a, axis in zip(operands, axes, strict=True) if axis is not None]

    def one(slices: list[Any]) -> Any:
        rest = iter(slices)
        return _tangent.bind(
            *(a if axis is None else next(rest) for a, axis in zip(operands, axes, strict=True)), **params
        )

    return jax.lax.map(one, items), 0


def _size(operands: Sequence[Any], axes: Sequence[int | None]) -> int:
    return next(int(a.shape[axis]) for a, axis in zip(operands, axes, strict=True) if axis is not None)


def _in_front(a: Any, axis: int | None, size: int) -> Any:
    """``a`` with the mapped axis in front, or as often as it has members where it is not mapped."""
    return jnp.broadcast_to(a, (size, *a.shape)) if axis is None else jnp.moveaxis(a, axis, 0)


def _with_members(
    theta: Any, x: Any, axes: Sequence[int | None], size: int, mapped: int, shared: bool
) -> tuple[Any, Any, dict[str, Any]]:
    """theta and x with a new first axis of members, which x goes without as long as all members share it."""
    theta_axis, x_axis = axes
    theta = _in_front(theta, theta_axis, size)
    if x_axis is None and (shared or not mapped):
        return theta, x, {"mapped": mapped + 1, "shared": True}
    lead = theta.shape[1 : mapped + 1]
    x = _in_front(x, x_axis, size)
    if shared:
        x = jnp.broadcast_to(x.reshape(size, *[1] * mapped, *x.shape[1:]), (size, *lead, *x.shape[1:]))
    return theta, x, {"mapped": mapped + 1, "shared": False}


def _batch_features(
    operands: Sequence[Any], axes: Sequence[int | None], *, mapped: int, shared: bool, **params: Any
) -> tuple[Any, Any]:
    theta, x = operands
    if axes[0] is None:  # a larger batch for every member
        x = jnp.moveaxis(x, axes[1], 0 if shared else mapped)
        return _features.bind(theta, x, mapped=mapped, shared=shared, **params), mapped
    theta, x, members = _with_members(theta, x, axes, _size(operands, axes), mapped, shared)
    return _features.bind(theta, x, **members, **params), 0


def _batch_adjoint(
    operands: Sequence[Any],
    axes: Sequence[int | None],
    *,
    of: tuple[str, ...],
    mapped: int,
    shared: bool,
    **params: Any,
) -> tuple[Any, Any]:
    """Gradients of x alone are one larger batch for every member; each gradient of theta is that of a new member."""
    theta, x, grad = operands
    size = _size(operands, axes)
    grad = _in_front(grad, axes[2], size)
    if "theta" in of or axes[0] is not None:
        theta, x, members = _with_members(theta, x, axes[:2], size, mapped, shared)
        return _adjoint.bind(theta, x, grad, of=of, **members, **params), [0] * len(of)
    x = _in_front(x, axes[1], size)
    if not shared:
        x = jnp.moveaxis(x, 0, mapped)
    grad = jnp.moveaxis(grad, 0, mapped)
    return _adjoint.bind(theta, x, grad, of=of, mapped=mapped, shared=shared, **params), [mapped]


# ------------------------------------------------------------------------------------------------ registration

for _name, _handler in _core.xla_handlers().items():
    jax.ffi.register_ffi_target(_name, _handler, platform="cpu")

_features.def_abstract_eval(_type_of_features)
_tangent.def_abstract_eval(_type_of_features)
_adjoint.def_abstract_eval(_types_of_adjoint)
_features.def_impl(jax.jit(_features.bind, static_argnames=("what", "threads", "mapped", "shared")))
_tangent.def_impl(_no_forward_mode)
_adjoint.def_impl(jax.jit(_adjoint.bind, static_argnames=("what", "threads", "of", "mapped", "shared")))
mlir.register_lowering(_features, mlir.lower_fun(_call_forward, multiple_results=False), platform="cpu")
mlir.register_lowering(_tangent, _no_forward_mode)
mlir.register_lowering(_adjoint, mlir.lower_fun(_call_backward, multiple_results=True), platform="cpu")
ad.primitive_jvps[_features] = _differentiate
ad.primitive_jvps[_tangent] = _no_second_derivative
ad.primitive_jvps[_adjoint] = _no_second_derivative
ad.primitive_transposes[_tangent] = _transpose
batching.primitive_batchers[_features] = _batch_features
batching.primitive_batchers[_tangent] = _batch_tangent
batching.primitive_batchers[_adjoint] = _batch_adjoint
