"""torch custom ops: ``torch.ops.qaa.forward`` and ``project`` with their adjoints, and what users call.

The ops carry fakes and autograd, so that ``torch.compile``, ``torch.export`` and ``opcheck`` see them. In eager mode
the same code is called through an ``autograd.Function``, which costs a fraction of a dispatcher round trip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from qaa import _core, cuda
from qaa import noise as noisy
from qaa import shots as estimates
from qaa.circuit import Circuit, Gate, Readout, check_circuit, check_count
from qaa.program import Program, program

_SCALARS = {
    torch.float16: _core.Scalar.float16,
    torch.bfloat16: _core.Scalar.bfloat16,
    torch.float32: _core.Scalar.float32,
    torch.float64: _core.Scalar.float64,
}

_PLAIN = (Tensor, torch.nn.Parameter)

_PAIRS = {torch.complex64: _core.Scalar.float32, torch.complex128: _core.Scalar.float64}  # real and imaginary part


def quantum_features(
    circuit: Circuit,
    theta: Tensor,
    x: Tensor,
    readout: str | Sequence[str] | Readout = "z",
    *,
    normalize: bool = True,
    shots: int | None = None,
    noise: noisy.NoiseModel | None = None,
    trajectories: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Features of every vector of ``x`` after amplitude embedding, the circuit and the readout; differentiable.

    .. math::
        |\psi\rangle = \mathrm{pad}(x) / \lVert x \rVert, \qquad |\phi\rangle = U(\theta) |\psi\rangle, \qquad
        f_k = \langle\phi| M_k |\phi\rangle \ \text{or}\ |\phi_k|^2 \ \text{or}\ \phi_k

    Args:
        circuit: U, on ``n`` wires; wire 0 is the most significant bit of an amplitude's index.
        theta: angles in radians, shape ``circuit.parameter_shape``, any real floating dtype; or with leading
            dimensions of x before it, ``(batch, *circuit.parameter_shape)`` for x of shape ``(batch, ..., d)``, where
            vectors have angles of their own, such as data that is encoded in angles. Measured on one machine, such a
            vector took three to five times as long as one that shares its angles at ten wires, fifteen to twenty times
            at four (docs/performance.md).
        x: shape ``(..., d)`` with ``1 <= d <= 2**n``, padded with zeros to ``2**n``; float16, bfloat16, float32 or
            float64, on the CPU or, in builds with CUDA kernels, on a GPU. States are float64 for float64, else
            float32; autocast does not change that.
        readout: see :class:`qaa.Readout`.
        normalize: if False, the vector itself goes through the circuit: expectations and probabilities become
            quadratic forms of it, amplitudes a linear map.
        shots: if given, features are unbiased estimates from so many runs per vector, and so is the gradient of theta,
            by the parameter-shift rule: see :mod:`qaa.shots`. Computed on the CPU, outside of compiled graphs, with one
            set of angles for all vectors.
        noise, trajectories: if given, features are those of a noisy circuit, unbiased estimates from so many
            trajectories per vector, and so is the gradient of theta: see :mod:`qaa.noise`. On the CPU as ``shots``,
            and not together with them.
        generator: where the random numbers for ``shots`` or ``noise`` come from; by default torch's own generator.

    Returns:
        Shape ``(..., n_outputs)`` in the dtype of ``x``; for the readout ``"state"`` complex128 for float64 ``x`` and
        else complex64. A zero vector is no state: its features and gradients are zero. For gradients theta and x are
        kept and, of large batches on the CPU, at most as many further numbers as a vector has (expectation values).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device.
        RuntimeError: a second derivative is asked for; the adjoint itself is not differentiable. With ``shots`` or
            ``noise``, the gradient of ``x`` is asked for, which no device gives.

    Example:
        >>> import torch, qaa
        >>> circuit = qaa.ansatz("ring", n_wires=3, n_layers=2)
        >>> theta = torch.zeros(circuit.parameter_shape, requires_grad=True)
        >>> features = quantum_features(circuit, theta, torch.ones(4, 7, 6))
        >>> features.shape
        torch.Size([4, 7, 3])
        >>> features.sum().backward()
        >>> theta.grad.shape
        torch.Size([2, 3, 3])
        >>> angles = torch.randn(4, 7, 2, 3, 3)  # of each vector its own
        >>> quantum_features(circuit, angles, torch.ones(4, 7, 6)).shape
        torch.Size([4, 7, 3])
    """
    _check_estimates(shots, noise, trajectories, generator)
    if noise is not None:
        how: dict[str, Any] = {"noise": noise, "trajectories": trajectories}
        return _estimated_features(noisy, circuit, theta, x, readout, normalize, how, generator)
    if shots is not None:
        return _estimated_features(estimates, circuit, theta, x, readout, normalize, {"shots": shots}, generator)
    if torch.compiler.is_compiling():
        leading = theta.ndim - len(circuit.parameter_shape)
        if leading > 0 and theta.shape[:leading] != x.shape[:-1][:leading]:
            raise ValueError(
                f"expected theta of shape {circuit.parameter_shape}, or with leading dimensions of x before it, "
                f"received {tuple(theta.shape)} and x of shape {tuple(x.shape)}"
            )
        theta = _in_groups(theta, leading)
        features = torch.ops.qaa.forward(theta, x.reshape(-1, x.shape[-1]), _text(circuit, readout, normalize))
        return features.reshape(*x.shape[:-1], features.shape[-1])
    what = program(circuit, readout, normalize)
    _check_x(what, x)
    theta = _in_groups(theta, _check_theta(what, theta, x.shape[:-1]))
    _check_together(theta, "x", x)
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if _is_plain(theta, x):
        keep = torch.is_grad_enabled() and (theta.requires_grad or x.requires_grad)
        features = _Features.apply(theta, rows, what, keep)
    else:
        features = _watched(theta, rows, str(what))
    return features if x.ndim == 2 else features.reshape(*x.shape[:-1], what.n_outputs)


def _in_groups(theta: Tensor, leading: int) -> Tensor:
    """Angles with so many leading axes as ``(groups, *parameter_shape)``; those of all vectors as they are."""
    return theta if leading <= 1 else theta.flatten(0, leading - 1)


@torch.compiler.disable
def _estimated_features(
    source: Any,
    circuit: Circuit,
    theta: Tensor,
    x: Tensor,
    readout: str | Sequence[str] | Readout,
    normalize: bool,
    how: dict[str, Any],
    generator: torch.Generator | None,
) -> Tensor:
    """Features by ``forward`` of :mod:`qaa.shots` or :mod:`qaa.noise`, with the options ``how``."""
    what = source._checked(circuit, readout, normalize, **how)
    _check_theta(what, theta)
    _check_x(what, x)
    _check_together(theta, "x", x)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"expected generator to be a torch.Generator, received {type(generator).__name__}")
    if not _is_plain(theta, x):
        raise RuntimeError(f"expected plain tensors with {next(iter(how))}, received traced or transformed ones")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"expected x without requires_grad with {next(iter(how))}, received one with it: an embedded vector has no "
            "shift rule"
        )
    device = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    features = _Estimates.apply(theta, x.reshape(-1, x.shape[-1]), what, source, how, seed)
    return features.reshape(*x.shape[:-1], what.n_outputs)


def _check_estimates(shots: Any, noise: Any, trajectories: Any, generator: Any) -> None:
    """Raises ``ValueError`` unless these are shots, or noise with trajectories, or neither and then no generator."""
    if noise is not None or trajectories is not None:
        if noise is None or trajectories is None or shots is not None:
            raise ValueError("expected noise and trajectories together and without shots, received another choice")
    elif generator is not None and shots is None:
        raise ValueError("expected a generator together with shots or noise, received one without")


def amplitude_rows(circuit: Circuit, theta: Tensor, k: int, *, width: int | None = None, real: bool = False) -> Tensor:
    r"""The first ``k`` rows of the circuit's unitary, differentiable in the angles.

    .. math:: A_{bi} = \langle b| U(\theta) |i\rangle, \qquad b < k

    so that the first ``k`` amplitudes of ``U(theta) x`` are ``pad(x) @ A.T``: the readout ``"state[:k]"`` without
    normalization as a matrix, at the cost of ``k`` simulated states: row by row ``U(theta)^T |b>``.

    Args:
        circuit: U, on ``n`` wires.
        theta: angles in radians, shape ``circuit.parameter_shape``.
        k: number of rows, 1 to ``2**n``.
        width: number of columns, for vectors of that width; by default ``2**n``.
        real: whether to return the real parts alone.

    Returns:
        Shape ``(k, width)``; complex128 for float64 ``theta``, else complex64, or the real dtype of that precision.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device, or ``k`` is out of range.

    Example:
        >>> import torch, qaa
        >>> hadamard = qaa.Circuit(1, (qaa.Gate("H", 0),), (0,))
        >>> amplitude_rows(hadamard, torch.zeros(0), 2).real
        tensor([[ 0.7071,  0.7071],
                [ 0.7071, -0.7071]])
    """
    check_circuit(circuit)
    for name, number in (("k", k), ("width", 1 if width is None else width)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"expected {name} to be an integer, received {type(number).__name__}")
    if k < 1:
        raise ValueError(f"expected k of at least 1, received {k}")
    return _amplitude_rows(circuit, theta, k, width, real)


def _amplitude_rows(
    circuit: Circuit,
    theta: Tensor,
    k: int,
    width: int | None,
    real: bool,
    columns: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`amplitude_rows`, each column times its factor, in ``dtype``; zeros may follow the rows (:func:`_room`)."""
    width = 2**circuit.n_wires if width is None else width
    if torch.compiler.is_compiling():
        _check_one_set(circuit, theta)
        units = torch.eye(k, dtype=_real_dtype(theta), device=theta.device)
    else:
        what = program(circuit, f"state[:{k}]", False)
        _check_theta(what, theta)
        what.check_width(width)
        units = _units(k, _real_dtype(theta), theta.device)
    if real:
        return _mixed_rows(circuit, theta, units, width, None, columns, dtype)
    rows = quantum_features(_transposed(circuit), theta, units, f"state[:{width}]", normalize=False)
    return _scaled(rows, columns, dtype)


def mixed_rows(circuit: Circuit, theta: Tensor, mix: Tensor, *, width: int | None = None) -> Tensor:
    r"""Combinations of the real parts of rows of the circuit's unitary, differentiable in the angles and in ``mix``.

    .. math::
        C = M \, \mathrm{Re}\, U(\theta)_{:k}, \qquad C_j = \mathrm{Re}\, U(\theta)^T \, \mathrm{pad}(m_j)

    so that the cost is one simulated state for each row m of ``mix``, whatever k is.

    Args:
        circuit: U, on ``n`` wires.
        theta: angles in radians, shape ``circuit.parameter_shape``.
        mix: M, real, shape ``(r, k)`` with ``k <= 2**n``.
        width: number of columns; by default ``2**n``.

    Returns:
        C, shape ``(r, width)``, in the dtype of ``mix``, but float32 for half precision.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device, or ``width`` is out of range.

    Example:
        >>> import torch, qaa
        >>> circuit = qaa.ansatz("ring", n_wires=3, n_layers=1)
        >>> theta, mix = torch.ones(circuit.parameter_shape), torch.randn(2, 5)
        >>> torch.allclose(mixed_rows(circuit, theta, mix), mix @ amplitude_rows(circuit, theta, 5).real, atol=1e-6)
        True
    """
    check_circuit(circuit)
    if not isinstance(mix, Tensor):
        raise TypeError(f"expected mix to be a torch.Tensor, received {type(mix).__name__}")
    if not mix.is_floating_point():
        raise TypeError(f"expected mix of a real floating dtype, received {mix.dtype}")
    size = 2**circuit.n_wires
    if mix.ndim != 2 or not 1 <= mix.shape[1] <= size:
        raise ValueError(f"expected mix of shape (r, k) with k from 1 to {size}, received {tuple(mix.shape)}")
    if width is not None:
        check_count("width", width, size)
    return _mixed_rows(circuit, theta, mix, size if width is None else width)


def _mixed_rows(
    circuit: Circuit,
    theta: Tensor,
    mix: Tensor,
    width: int,
    gain: Tensor | None = None,
    columns: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`mixed_rows` of ``M diag(gain)``, each column times a factor, in ``dtype``; zeros may follow the rows
    (:func:`_room`)."""
    readout = f"state[:{width}]"
    if torch.compiler.is_compiling():
        _check_one_set(circuit, theta)
        states = torch.ops.qaa.forward(theta, _scaled(mix, gain, None), _text(circuit, readout, False, transposed=True))
        return _scaled(states.real, columns, dtype)
    what = program(_transposed(circuit), readout, False)
    _check_theta(what, theta)
    _check_x(what, mix)
    _check_together(theta, "mix", mix)
    if _is_plain(theta, mix) and _is_constant(columns) and _is_constant(gain):
        factors = (None if each is None else each[None, None] for each in (gain, columns))
        rows: Tensor = _MixedRows.apply(what, 1, *factors, dtype, theta, mix)[0]
        return rows
    return _scaled(_watched(theta, _scaled(mix, gain, None), str(what)).real, columns, dtype)


def _rows_together(
    circuit: Circuit,
    thetas: Sequence[Tensor],
    mixes: Sequence[Tensor] | int,
    width: int,
    gains: Sequence[Tensor] | None = None,
    columns: Sequence[Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """:func:`_mixed_rows` of several angles and M, or :func:`_amplitude_rows` of the first k amplitudes for a number k;
    plain tensors of one shape, dtype and device. The same bits by one call of the core and one node of autograd."""
    what = program(_transposed(circuit), f"state[:{width}]", False)
    factors = (None if each is None else _stacked(each)[:, None] for each in (gains, columns))
    if isinstance(mixes, int):
        mixes = [_units(mixes, _real_dtype(thetas[0]), thetas[0].device)]
    rows: tuple[Tensor, ...] = _MixedRows.apply(what, len(thetas), *factors, dtype, *thetas, *mixes)
    return rows


@lru_cache(maxsize=256)
def _transposed(circuit: Circuit) -> Circuit:
    """The circuit of ``U(theta)^T``: the gates backwards, those about Y between two Z, which turn Y into -Y = Y^T."""
    gates = []
    for gate in reversed(circuit.gates):
        turned = Gate(gate.name, gate.wires, gate.parameters[::-1])
        sign = Gate("Z", gate.wires[-1:])
        gates += [sign, turned, sign] if gate.name in ("Y", "RY", "CRY", "Rot") else [turned]
    return Circuit(circuit.n_wires, tuple(gates), circuit.parameter_shape)


def _scaled(t: Tensor, columns: Tensor | float | None, dtype: torch.dtype | None) -> Tensor:
    """Each column times its factor, or all times one, in ``dtype``; None leaves a step out."""
    t = t if columns is None else t * columns
    return t if dtype is None else t.to(dtype)


def _scaled_once(t: Tensor, columns: Tensor | float | None, dtype: torch.dtype | None) -> Tensor:
    """:func:`_scaled` in one pass over the numbers."""
    if columns is None or dtype is None or _need_ops(t):
        return _scaled(t, columns, dtype)
    return torch.mul(t, columns, out=torch.empty(t.shape, dtype=dtype, device=t.device))


def _room(count: int, dtype: torch.dtype | None, device: torch.device) -> int:
    """Features that a matrix has room for: in half precision on a GPU whole 16 bytes, without which cuBLAS leaves its
    fast kernels for others."""
    return -(-count // 8) * 8 if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) else count


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.stack``, of one tensor without a copy."""
    return torch.stack(tuple(tensors)) if len(tensors) > 1 else tensors[0][None]


def _chosen(t: Tensor, indices: Sequence[int]) -> Tensor:
    """``t[indices]``, without indices that a GPU would wait for."""
    return _stacked([t[i] for i in indices])


def _padded(t: Tensor, columns: Tensor | float | None, dtype: torch.dtype | None, shape: tuple[int, ...]) -> Tensor:
    """:func:`_scaled_once`, with zeros around it up to ``shape``."""
    if tuple(t.shape) == shape:
        return _scaled_once(t, columns, dtype).contiguous()
    out = torch.zeros(shape, dtype=dtype or t.dtype, device=t.device)
    inner = out[..., : t.shape[-2], : t.shape[-1]]
    if columns is None:
        inner.copy_(t)
    else:
        torch.mul(t, columns, out=inner)
    return out


def _narrowed(t: Tensor, width: int) -> Tensor:
    """Rows without what is behind ``width``."""
    return t if t.shape[-1] == width else t[..., :width]


def _autocast_dtype(t: Tensor) -> torch.dtype | None:
    """What autocast casts ``t`` to for a matrix product, None where it leaves it as it is."""
    kind = t.device.type
    if kind == "meta" or t.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _is_cast_back(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether autocast would undo a cast of ``x`` to ``dtype``."""
    return dtype != torch.float64 and x.dtype == _autocast_dtype(x)


def project(
    base: Tensor,
    features: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    *,
    in_place: bool = False,
) -> Tensor:
    r"""Features back to the width of a layer, added to the layer's own output; differentiable in every tensor.

    .. math:: y = \mathrm{base} + s\, (V f + c)

    The adjoint goes once over the incoming gradient, some rows at a time, for all of the gradients of f, V and c, and
    allocates nothing of its size. Tensors that are not all float32 or all float64 on the CPU are multiplied by plain
    torch, in the features' dtype or autocast's, and the result is in that of ``base``.

    Args:
        base: shape ``(..., d_out)``, for example the output of a frozen linear layer.
        features: f, shape ``(..., K)`` with the same leading dimensions.
        up: V, shape ``(d_out, K)``.
        bias: c, shape ``(d_out,)``, or None.
        scale: s.
        in_place: whether the result may be written over ``base``, which must not be read afterwards. It is, unless
            autograd, tracing or the layout of ``base`` is against it; then the result is a new tensor.

    Returns:
        The shape and dtype of ``base``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device.
        RuntimeError: a second derivative is asked for, of tensors that are all float32 or all float64 on the CPU.

    Example:
        >>> import torch
        >>> project(torch.ones(2, 3), torch.ones(2, 1), torch.tensor([[0.0], [1.0], [2.0]]), scale=0.5)
        tensor([[1.0000, 1.5000, 2.0000],
                [1.0000, 1.5000, 2.0000]])
    """
    _check_projection(base, features, up, bias, scale)
    return _add_projection(base, features, up, bias, float(scale), in_place)


def _check_projection(base: Tensor, features: Tensor, up: Tensor, bias: Tensor | None, scale: float) -> None:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"expected scale to be a number, received {type(scale).__name__}")
    tensors = [("base", base), ("features", features), ("up", up)] + ([] if bias is None else [("bias", bias)])
    for name, tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"expected {name} to be a torch.Tensor, received {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"expected {name} of a real floating dtype, received {tensor.dtype}")
    if up.ndim != 2 or 0 in up.shape:
        raise ValueError(f"expected up of shape (d_out, K), received {tuple(up.shape)}")
    expected = {"base": (*features.shape[:-1], up.shape[0]), "features": (*base.shape[:-1], up.shape[1])}
    for name, tensor in tensors[:2]:
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"expected {name} of shape {expected[name]}, received {tuple(tensor.shape)}")
    if bias is not None and tuple(bias.shape) != (up.shape[0],):
        raise ValueError(f"expected bias of shape {(up.shape[0],)}, received {tuple(bias.shape)}")
    _check_one_device(base=base, features=features, up=up, bias=bias)


def _add_projection(
    base: Tensor,
    features: Tensor,
    up: Tensor,
    bias: Tensor | None,
    scale: float,
    in_place: bool,
    gain: Tensor | None = None,
) -> Tensor:
    """:func:`project` of tensors that fit together, each column of ``up`` times its gain; zeros may follow features."""
    tensors = (base, features, up) if bias is None else (base, features, up, bias)
    dtype = base.dtype
    of_kernel = not base.is_cuda and dtype in (torch.float32, torch.float64) and all(t.dtype == dtype for t in tensors)
    of_kernel = of_kernel and (all(t.is_cpu for t in tensors) or all(t.is_meta for t in tensors))
    is_plain = _is_plain(*tensors)
    if not (of_kernel or is_plain) and any(t.is_meta for t in tensors):  # torch's products would not notice
        _check_one_device(base=base, features=features, up=up, bias=bias)
    of_kernel = of_kernel and (is_plain or not (_is_transformed() or _have_tangents(*tensors)))
    if is_plain and not of_kernel and _is_constant(gain):
        dtype, biases = _autocast_dtype(features) or features.dtype, [] if bias is None else [bias]
        (factor,) = _factors([up], biases, None if gain is None else [gain], scale, dtype)
        return _add_product(base, features, factor, up.shape[1], bias is not None, in_place)
    up, features = _scaled(up, gain, None), _narrowed(features, up.shape[1])
    if of_kernel:
        flat = features.reshape(-1, features.shape[-1])
        if is_plain:
            return _Project.apply(base, flat, up, bias, scale, in_place and _may_write_over(base))
        return torch.ops.qaa.project(base.reshape(-1, base.shape[-1]), flat, up, bias, scale).reshape(base.shape)
    bias = None if bias is None else bias.to(features.dtype)
    delta = torch.nn.functional.linear(features, up.to(features.dtype), bias)
    return (base + (delta if scale == 1 else scale * delta)).to(dtype)


def _factors(
    ups: Sequence[Tensor], biases: Sequence[Tensor], gains: Sequence[Tensor] | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """What :func:`_add_product` multiplies features by, of V with c, or without any, of one shape, dtype and device."""
    stacked = None if gains is None else _stacked(gains)[:, None]
    factors: tuple[Tensor, ...] = _Factors.apply(len(ups), stacked, scale, dtype, *ups, *biases)
    return factors


def _text(
    circuit: Circuit, readout: str | Sequence[str] | Readout, normalize: bool, *, transposed: bool = False
) -> str:
    """The program's text while a graph is traced: to torch before 2.12 strings are constants, dataclasses are not."""
    if isinstance(readout, Readout):
        readout = readout.paulis if readout.kind == "expval" else str(readout)
    return _constant_text(str(circuit), readout, normalize, transposed)


@torch.compiler.assume_constant_result
def _constant_text(circuit: str, readout: str | Sequence[str], normalize: bool, transposed: bool) -> str:
    parsed = Circuit.parse(circuit)
    return str(program(_transposed(parsed) if transposed else parsed, readout, normalize))


# ------------------------------------------------------------------------------------------------ checks


def _check_theta(what: Program, theta: Tensor, vectors: Sequence[int] = ()) -> int:
    """How many axes of ``vectors``, the leading shape of x, theta has before the circuit's own."""
    if not isinstance(theta, Tensor):
        raise TypeError(f"expected theta to be a torch.Tensor, received {type(theta).__name__}")
    if theta.dtype not in _SCALARS:
        raise TypeError(f"expected theta of a real floating dtype, received {theta.dtype}")
    leading = what.check_theta(theta.shape, vectors)
    _check_place("theta", theta)
    return leading


def _check_one_set(circuit: Circuit, theta: Tensor) -> None:
    """For graphs that are traced, where nobody else looks: the op takes several sets of angles."""
    if theta.ndim != len(circuit.parameter_shape):
        raise ValueError(f"expected theta of shape {circuit.parameter_shape}, received {tuple(theta.shape)}")


def _check_x(what: Program, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"expected x to be a torch.Tensor, received {type(x).__name__}")
    if x.dtype not in _SCALARS:
        raise TypeError(f"expected x of dtype float16, bfloat16, float32 or float64, received {x.dtype}")
    if x.ndim < 1:
        raise ValueError(f"expected x of shape (..., d), received {tuple(x.shape)}")
    what.check_width(x.shape[-1])
    _check_place("x", x)


def _check_place(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"expected {name} to be a dense tensor, received one of layout {tensor.layout}")
    if tensor.is_cpu or tensor.device.type == "meta" or (tensor.device.type == "cuda" and cuda.is_built()):
        return
    where = "a GPU" if cuda.is_built() else f"a GPU with {cuda.HOW_TO_BUILD}"
    raise ValueError(f"expected {name} on the CPU, or on {where}, received {tensor.device}")


def _check_together(theta: Tensor, name: str, tensor: Tensor) -> None:
    if not (theta.is_cpu and tensor.is_cpu) and theta.device != tensor.device:
        raise ValueError(f"expected theta and {name} on one device, received {theta.device} and {tensor.device}")


def _check_one_device(**tensors: Tensor | None) -> None:
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    devices = [tensor.device for tensor in given.values()]
    if any(device != devices[0] for device in devices):
        *names, last = given
        received = ", ".join(map(str, devices))
        raise ValueError(f"expected {', '.join(names)} and {last} on one device, received {received}")


def _is_plain(*tensors: Tensor) -> bool:
    """Whether nobody watches: no tracing, no subclass, no dispatch mode, no transform."""
    if torch.compiler.is_compiling() or _transform() is not None or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if torch._C._get_tracing_state() is not None:
        return False
    for t in tensors:  # noqa: SIM110 (a generator takes half a microsecond)
        if type(t) not in _PLAIN or not (t.is_cpu or t.is_cuda):
            return False
    return True


def _transform() -> Any:
    """What torch.func does here; ``RuntimeError`` in forward mode, where torch takes an op's tangent to be zero."""
    transform = torch._C._functorch.peek_interpreter_stack()
    if transform is None:
        return None
    kind = transform.key()
    if kind == torch._C._functorch.TransformType.Jvp:
        raise RuntimeError("expected reverse mode, received torch.func.jvp: the kernels have no forward mode")
    return kind


def _is_transformed() -> bool:
    """Whether torch.func maps or differentiates here."""
    known = torch._C._functorch.TransformType
    return not torch.compiler.is_compiling() and _transform() in (known.Grad, known.Vmap)


def _have_tangents(*tensors: Tensor) -> bool:
    """Whether one of them is a dual number, whose tangent an op would drop."""
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _refuse_tangents(*tensors: Tensor) -> None:
    if _have_tangents(*tensors):
        raise RuntimeError("expected reverse mode, received tensors with tangents: the kernels have no forward mode")


def _watched(theta: Tensor, x: Tensor, program: str) -> Tensor:
    """The op, which tracers and modes see; under torch.func an autograd function around it."""
    if _is_transformed():
        return cast(Tensor, _TransformedFeatures.apply(theta, x, program))
    _refuse_tangents(theta, x)
    return cast(Tensor, torch.ops.qaa.forward(theta, x, program))


def _is_constant(factors: Tensor | None) -> bool:
    """Whether factors are plain numbers that want no gradient, or None."""
    return factors is None or (not factors.requires_grad and type(factors) in (Tensor, torch.nn.Parameter))


# ------------------------------------------------------------------------------------------------ calls of the core


def _feature_dtype(what: Program, dtype: torch.dtype) -> torch.dtype:
    if not what.is_complex:
        return dtype
    return torch.complex128 if dtype == torch.float64 else torch.complex64


def _readable(t: Tensor) -> Tensor:
    """A matrix with adjacent numbers in each row; copies only where that is needed."""
    if t.is_contiguous() and not t.is_neg() and not t.is_conj():
        return t
    t = t.resolve_conj().resolve_neg()
    return t if t.stride(1) == 1 or t.size(1) <= 1 else t.contiguous()


_Layout = tuple[int, int, int, int, _core.Scalar]  # address, rows, columns, row stride, type


def _layout(t: Tensor) -> _Layout:
    (rows, columns), stride = t.shape, t.stride(0)
    scalar = _SCALARS.get(t.dtype)
    if scalar is None:
        return t.data_ptr(), rows, 2 * columns, 2 * stride, _PAIRS[t.dtype]
    return t.data_ptr(), rows, columns, stride, scalar


def _angles(theta: Tensor) -> Tensor:
    """Adjacent numbers in float32 or float64; copies only where that is needed."""
    if theta.dtype not in (torch.float32, torch.float64):
        theta = theta.to(torch.float32)
    return theta if theta.is_contiguous() and not theta.is_neg() else theta.resolve_neg().contiguous()


#: So many amplitudes are worth it that the forward pass keeps the values of the strings for the adjoint.
_MANY_AMPLITUDES = 1 << 15


def _room_for_strings(what: Program, x: Tensor) -> Tensor | None:
    """Where the forward pass may write what the adjoint would measure again, no more numbers than x has; or None."""
    rows, width = x.shape
    if x.is_cuda or rows << what.circuit.n_wires < _MANY_AMPLITUDES or not 0 < what.plan.n_strings <= width:
        return None
    return torch.empty(rows, what.plan.n_strings, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _forward(what: Program, theta: Tensor, x: Tensor, strings: Tensor | None = None) -> Tensor:
    if what.is_complex:
        features = x.new_empty(x.shape[0], what.n_outputs, dtype=_feature_dtype(what, x.dtype))
    else:
        features = x.new_empty(x.shape[0], what.n_outputs)
    if theta.ndim == len(what.circuit.parameter_shape):
        _call_forward(what, theta, x, features, 1, strings)
    else:
        for groups, angles, rows, results, values in _groups(theta, x, features, strings):
            _call_forward(what, angles, rows, results, groups, values)
    return features


def _adjoint(
    what: Program, theta: Tensor, x: Tensor, grad: Tensor, strings: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of theta, one set of angles or several, and of x."""
    if theta.ndim == len(what.circuit.parameter_shape):
        return _backward(what, theta, x, grad, 1, strings)
    parts = [
        _backward(what, angles, rows, grads, groups, values)
        for groups, angles, rows, grads, values in _groups(theta, x, grad, strings)
    ]
    if not parts:
        return torch.empty_like(theta), torch.empty_like(x)
    grad_theta, grad_x = zip(*parts, strict=True)
    return (grad_theta[0], grad_x[0]) if len(parts) == 1 else (torch.cat(grad_theta), torch.cat(grad_x))


def _groups(
    theta: Tensor, x: Tensor, results: Tensor, strings: Tensor | None
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor | None]]:
    """How many sets of angles, these, and the vectors, results and values of strings that are theirs, for as many as
    one call takes."""
    groups = len(theta)
    for first in range(0, groups, MOST_GROUPS):
        angles = theta[first : first + MOST_GROUPS]
        rows = slice(first * len(x) // groups, (first + len(angles)) * len(x) // groups)
        yield len(angles), angles, x[rows], results[rows], None if strings is None else strings[rows]


def _real_parts(what: Program, theta: Tensor, x: Tensor, n_rows: int, groups: int) -> Tensor:
    """Real parts of the amplitudes that a program reads, a view of both parts."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    pairs = torch.empty(n_rows, 2 * what.n_outputs, dtype=dtype, device=x.device)
    _call_forward(what, theta, x, pairs, groups)
    return pairs[:, ::2]


# With several groups rows fall into so many of one size, each with a row of theta as its angles; x may have the rows of
# one group, for all.


def _call_forward(
    what: Program, theta: Tensor, x: Tensor, features: Tensor, groups: int = 1, strings: Tensor | None = None
) -> None:
    angles, x = _angles(theta), _readable(x)
    layout = _layout(x)
    matrices = _core.ConstMatrix(*layout), _core.Matrix(*_layout(features))
    if x.is_cuda:
        with _current(x.device):
            program, description, kernel = _on_device(str(what), x.device, layout, False, groups)
            workspace = _workspace(program, features.shape[0], layout, x.device, False, groups)
            _core.cuda_forward(
                program,
                description.data_ptr(),
                angles.data_ptr(),
                _SCALARS[angles.dtype],
                *matrices,
                workspace.data_ptr(),
                _stream(x.device),
                kernel,
                groups,
            )
    else:
        where = angles.data_ptr(), _SCALARS[angles.dtype]
        values = None if strings is None else _core.Matrix(*_layout(strings))
        _core.forward(what.plan, *where, *matrices, torch.get_num_threads(), groups, values)


def _backward(
    what: Program, theta: Tensor, x: Tensor, grad: Tensor, groups: int = 1, strings: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    angles, x, grad = _angles(theta), _readable(x), _readable(grad)
    grad_x = torch.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)
    return _call_backward(what, theta, angles, _layout(x), grad, _layout(grad_x), groups, strings), grad_x


def _call_backward(
    what: Program,
    theta: Tensor,
    angles: Tensor,
    x: _Layout,
    grad: Tensor,
    grad_x: _Layout,
    groups: int = 1,
    strings: Tensor | None = None,
) -> Tensor:
    grad_angles = torch.empty_like(angles)
    matrices = _core.ConstMatrix(*x), _core.ConstMatrix(*_layout(grad))
    if angles.is_cuda:
        with _current(angles.device):
            program, description, kernel = _on_device(str(what), angles.device, x, True, groups)
            workspace = _workspace(program, grad.shape[0], x, angles.device, True, groups)
            _core.cuda_backward(
                program,
                description.data_ptr(),
                angles.data_ptr(),
                _SCALARS[angles.dtype],
                *matrices,
                grad_angles.data_ptr(),
                _core.Matrix(*grad_x),
                workspace.data_ptr(),
                _stream(angles.device),
                kernel,
                groups,
            )
    else:
        _core.backward(
            what.plan,
            angles.data_ptr(),
            _SCALARS[angles.dtype],
            *matrices,
            grad_angles.data_ptr(),
            _core.Matrix(*grad_x),
            torch.get_num_threads(),
            groups,
            None if strings is None else _core.ConstMatrix(*_layout(_readable(strings))),
        )
    return grad_angles if grad_angles.dtype == theta.dtype else grad_angles.to(theta.dtype)


#: Sets of angles that one call takes: the second dimension of a grid on a GPU.
MOST_GROUPS = 65_535

#: So many rows are worth a kernel of the circuit's own; the few that an adapter of the readout "state" asks for wait
#: for memory rather than for instructions.
MANY_ROWS = 256


def _on_device(
    text: str, device: torch.device, x: _Layout, backward: bool, groups: int
) -> tuple[_core.CudaProgram, Tensor, int]:
    """A program as the CUDA kernels read it, its description in the device's memory, and its own kernel or 0."""
    return _program_on_device(text, device, x[4], backward, groups == 1 and x[1] >= MANY_ROWS)


@lru_cache(maxsize=1024)
def _program_on_device(
    text: str, device: torch.device, scalar: _core.Scalar, backward: bool, of_its_own: bool
) -> tuple[_core.CudaProgram, Tensor, int]:
    plan, known = Program.parse(text).plan, None
    if of_its_own:
        known = cuda.known_kernel(plan, scalar, backward, torch.cuda.get_device_capability(device))
    program, kernel = (_core.CudaProgram(plan), 0) if known is None else known
    return program, torch.frombuffer(bytearray(program.description), dtype=torch.uint8).to(device), kernel


@lru_cache(maxsize=1024)
def _workspace_bytes(program: _core.CudaProgram, rows: int, scalar: _core.Scalar, backward: bool, groups: int) -> int:
    return program.workspace_bytes(rows, scalar, backward, groups)


def _workspace(
    program: _core.CudaProgram, rows: int, x: _Layout, device: torch.device, backward: bool, groups: int
) -> Tensor:
    return torch.empty(_workspace_bytes(program, rows, x[4], backward, groups), dtype=torch.uint8, device=device)


def _stream(device: torch.device) -> int:
    """The current stream's address, without an object around it."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """In which ``device`` is the current one; costs nothing where it is already."""
    return nullcontext() if torch.cuda.current_device() == device.index else torch.cuda.device(device)


def _real_dtype(theta: Tensor) -> torch.dtype:
    return torch.float64 if theta.dtype == torch.float64 else torch.float32


def _units(k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The unit matrix of k rows; of few rows it is kept."""
    return (_known_units if k <= 256 else _new_units)(k, dtype, device)


def _new_units(k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # they will be saved for backward passes
        # a copy from the CPU has arrived before any stream may read it
        return torch.eye(k, dtype=dtype, device="cpu").to(device)


_known_units = lru_cache(maxsize=32)(_new_units)


_NO_MATRIX = (0, 0, 0, 0, _core.Scalar.float32)


def _may_write_over(base: Tensor) -> bool:
    """Whether autograd lets a custom function write over ``base``, and does so without copies of its gradient."""
    if not base.is_contiguous() or base.is_neg():
        return False
    if torch._C._len_torch_function_stack() > 0 or (base.is_inference() and not torch.is_inference_mode_enabled()):
        return False
    return not ((base.is_leaf and base.requires_grad) or (base._is_view() and torch.is_grad_enabled()))


def _project(
    base: Tensor, features: Tensor, up: Tensor, bias: Tensor | None, scale: float, out: Tensor | None = None
) -> Tensor:
    base, features, up = _readable(base), _readable(features), _readable(up)
    bias = None if bias is None else _readable(bias[None])
    out = torch.empty(base.shape, dtype=base.dtype) if out is None else out
    _core.project(
        _core.ConstMatrix(*_layout(features)),
        _core.ConstMatrix(*_layout(up)),
        _core.ConstMatrix(*(_NO_MATRIX if bias is None else _layout(bias))),
        _core.ConstMatrix(*_layout(base)),
        scale,
        _core.Matrix(*_layout(out)),
        torch.get_num_threads(),
    )
    return out


def _project_backward(
    grad: Tensor, features: Tensor, up: Tensor, with_bias: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad, features, up = _readable(grad), _readable(features), _readable(up)
    grad_features, grad_up = torch.empty(features.shape, dtype=up.dtype), torch.empty(up.shape, dtype=up.dtype)
    grad_bias = torch.empty(1, up.shape[0] if with_bias else 0, dtype=up.dtype)
    _core.project_backward(
        _core.ConstMatrix(*_layout(grad)),
        _core.ConstMatrix(*_layout(features)),
        _core.ConstMatrix(*_layout(up)),
        scale,
        _core.Matrix(*_layout(grad_features)),
        _core.Matrix(*_layout(grad_up)),
        _core.Matrix(*(_layout(grad_bias) if with_bias else _NO_MATRIX)),
        torch.get_num_threads(),
    )
    return grad_features, grad_up, grad_bias[0]


# ------------------------------------------------------------------------------------------------ eager autograd

# Where a graph of the derivative is wanted (create_graph), the adjoint goes through its op: differentiating that one
# raises an error, while once_differentiable would let a constant incoming gradient through with a silent zero.


def _need_ops(grad: Tensor) -> bool:
    """Whether the backward pass is to be differentiated, which ops refuse, or vmap, ``is_grads_batched`` or
    ``torch.autograd.functional`` map over gradients, which ops have rules for; ``RuntimeError`` for a gradient with a
    tangent, of which an op's would be zero."""
    _refuse_tangents(grad)
    functorch = torch._C._functorch
    if functorch.is_functorch_wrapped_tensor(grad):
        _transform()
        return True
    return torch.is_grad_enabled() or functorch.is_legacy_batchedtensor(grad)


class _Function(torch.autograd.function._SingleLevelFunction):
    """``torch.autograd.Function`` without its search for torch.func's transforms, which :func:`_is_plain` has made."""

    apply: ClassVar[Any]


class _Features(_Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, x: Tensor, what: Program, keep: bool) -> Tensor:
        strings = _room_for_strings(what, x) if keep else None
        ctx.save_for_backward(theta, x, strings)
        ctx.what = what
        return _forward(what, theta, x, strings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        theta, x, strings = ctx.saved_tensors
        if _need_ops(grad):
            return *torch.ops.qaa.backward(theta, x, grad, str(ctx.what)), None, None
        return *_adjoint(ctx.what, theta, x, grad, strings), None, None


class _Estimates(torch.autograd.Function):
    """Features from shots or trajectories; the backward pass draws from a stream of its own, so that its order does not
    matter."""

    @staticmethod
    def forward(
        ctx: Any, theta: Tensor, x: Tensor, what: Program, source: Any, how: dict[str, Any], seed: int
    ) -> Tensor:
        ctx.save_for_backward(theta, x)
        ctx.what, ctx.source, ctx.seed = what, source, seed
        ctx.how = {**how, "normalize": what.normalize, "threads": torch.get_num_threads()}
        rng = np.random.default_rng([seed, 0])
        return torch.from_numpy(source.forward(*_arguments(what, theta, x), what.readout, seed=rng, **ctx.how)).to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "expected create_graph=False with shots or noise, received a request for second derivatives"
            )
        theta, x = ctx.saved_tensors
        arguments = *_arguments(ctx.what, theta, x), _doubles(grad), ctx.what.readout
        grad_theta = ctx.source.backward(*arguments, seed=np.random.default_rng([ctx.seed, 1]), **ctx.how)
        return torch.from_numpy(grad_theta).to(theta), None, None, None, None, None


def _arguments(what: Program, theta: Tensor, x: Tensor) -> tuple[Circuit, Any, Any]:
    rows = x.detach().cpu().resolve_neg()
    return what.circuit, _doubles(theta), (rows if x.dtype == torch.float64 else rows.float()).numpy()


def _doubles(t: Tensor) -> Any:
    return t.detach().to("cpu", torch.float64).resolve_neg().numpy()


class _MixedRows(_Function):
    """Real parts of the amplitudes of a transposed circuit, for one or several angles, each with rows of its own.

    Nothing is saved by autograd's means: the rows of a checkpointed part of a model may be made before it, and within
    it when it is run again. What is kept is small, and being copies it stays what it was.
    """

    @staticmethod
    def forward(
        ctx: Any,
        what: Program,
        n: int,
        gains: Tensor | None,  # (n, 1, k)
        columns: Tensor | None,  # (n, 1, width)
        dtype: torch.dtype | None,
        *inputs: Tensor,  # n thetas, then as many M, or one for all that wants no gradient
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.what, ctx.inputs, ctx.gains, ctx.columns = what, inputs, gains, columns
        ctx.theta = torch.stack([_angles(theta).flatten() for theta in inputs[:n]])
        ctx.mix = _scaled(torch.stack(inputs[n:]), gains, None)
        rows = _real_parts(what, ctx.theta, ctx.mix.flatten(0, 1), n * ctx.mix.shape[1], groups=n)
        shape = _room(ctx.mix.shape[1], dtype, rows.device), rows.shape[1]
        if n == 1:  # not a view, which nobody could write to
            return (_padded(rows, None if columns is None else columns[0], dtype, shape),)
        made: tuple[Tensor, ...] = _padded(rows.view(n, -1, rows.shape[1]), columns, dtype, (n, *shape)).unbind()
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n, count, what = len(grads), ctx.mix.shape[1], ctx.what
        thetas, mixes = ctx.inputs[:n], ctx.inputs[n:]
        of_thetas: list[Tensor | None] = [None] * n
        of_mixes: list[Tensor | None] = [None] * len(mixes)
        used = [i for i, grad in enumerate(grads) if grad is not None]
        if used:
            one_for_all = len(mixes) < n
            theta, mix, gains, columns = ctx.theta, ctx.mix, ctx.gains, ctx.columns
            if len(used) < n:
                theta, gains, columns = (None if t is None else _chosen(t, used) for t in (theta, gains, columns))
                mix = mix if one_for_all else _chosen(mix, used)
            grad = _stacked([grad[:count] for grad in grads if grad is not None])
            grad = _scaled_once(grad, columns, _feature_dtype(what, mix.dtype))
            found_theta, found_mix = _MixedRows._adjoint(
                ctx, used, theta, mix, grad, any(ctx.needs_input_grad[5 + n :])
            )
            if found_mix is not None:
                found_mix = _scaled(found_mix, gains, None)
            for j, i in enumerate(used):
                of_thetas[i] = found_theta[j].view(thetas[i].shape).to(thetas[i].dtype)
                if found_mix is not None:
                    of_mixes[i] = found_mix[j].to(mixes[i].dtype)
        return None, None, None, None, None, *of_thetas, *of_mixes

    @staticmethod
    def _adjoint(
        ctx: Any, used: list[int], theta: Tensor, mix: Tensor, grad: Tensor, with_mix: bool
    ) -> tuple[Any, Any]:
        """Gradients of the angles and of M times its gains, where they are wanted."""
        what, n = ctx.what, len(ctx.theta)
        if _need_ops(grad):
            pairs = []
            for j, i in enumerate(used):
                of_one = ctx.inputs[n + min(i, len(ctx.inputs) - n - 1)]
                of_one = _scaled(of_one, None if ctx.gains is None else ctx.gains[i], None)
                pairs.append(torch.ops.qaa.backward(ctx.inputs[i], of_one, grad[j], str(what)))
            return [pair[0] for pair in pairs], torch.stack([pair[1] for pair in pairs]) if with_mix else None
        rows, grad = _readable(mix.flatten(0, 1)), _readable(grad.flatten(0, 1))
        if with_mix:
            found_theta, found_mix = _backward(what, theta, rows, grad, len(used))
            return found_theta, found_mix.view(mix.shape)
        return _call_backward(what, theta, _angles(theta), _layout(rows), grad, _NO_MATRIX, len(used)), None


class _Project(_Function):
    @staticmethod
    def forward(
        ctx: Any, base: Tensor, features: Tensor, up: Tensor, bias: Tensor | None, scale: float, in_place: bool
    ) -> Tensor:
        ctx.save_for_backward(features, up)
        ctx.with_bias, ctx.scale = bias is not None, scale
        if in_place:
            ctx.mark_dirty(base)
        out = base if in_place else torch.empty(base.shape, dtype=base.dtype)
        width = base.shape[-1]
        _project(base.reshape(-1, width), features, up, bias, scale, out.view(-1, width))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, up = ctx.saved_tensors
        adjoint = torch.ops.qaa.project_backward if _need_ops(grad) else _project_backward
        rows = grad.reshape(-1, grad.shape[-1])
        grad_features, grad_up, grad_bias = adjoint(rows, features, up, ctx.with_bias, ctx.scale)
        return grad, grad_features, grad_up, grad_bias if ctx.with_bias else None, None, None


class _Factors(_Function):
    """``s [V diag(gain), c]`` of one or several adapters in the dtype of products, with zeros behind (:func:`_room`).

    As in :class:`_MixedRows` nothing is saved by autograd's means, and what no layer has used gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        n: int,
        gains: Tensor | None,  # (n, 1, K)
        scale: float,
        dtype: torch.dtype,
        *inputs: Tensor,  # n V, then as many c, or none
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        (d_out, k), up = inputs[0].shape, _stacked(inputs[:n])
        ctx.n, ctx.k, ctx.gains, ctx.scale = n, k, gains, scale
        ctx.dtypes = [each.dtype for each in inputs]
        factor = _product_of(gains, scale)
        shape = n, d_out, _room(k + (len(inputs) > n), dtype, up.device)
        made = _padded(up, factor, dtype, shape)
        if len(inputs) > n:
            torch.mul(_stacked(inputs[n:]), scale, out=made[..., k])
        return made.unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n, gains, scale = ctx.n, ctx.gains, ctx.scale
        found: list[Tensor | None] = [None] * len(ctx.dtypes)
        used = [i for i, grad in enumerate(grads) if grad is not None]
        if used:
            grad = _stacked([grad for grad in grads if grad is not None])
            if gains is not None and len(used) < n:
                gains = _chosen(gains, used)
            of_up = _scaled_once(grad[..., : ctx.k], _product_of(gains, scale), ctx.dtypes[0])
            of_bias = _scaled_once(grad[..., ctx.k], scale, ctx.dtypes[n]) if len(found) > n else None
            for j, i in enumerate(used):
                found[i] = of_up[j]
                if of_bias is not None:
                    found[n + i] = of_bias[j]
        return None, None, None, None, *found


def _product_of(gains: Tensor | None, scale: float) -> Tensor | float | None:
    """Gains times a scale; None for one."""
    return gains if scale == 1 else scale if gains is None else gains * scale


def _add_product(base: Tensor, features: Tensor, factor: Tensor, k: int, with_bias: bool, in_place: bool) -> Tensor:
    """``base + [f, 1] factor^T`` in the dtype of ``base``; f are the first k features of each row. In place where no
    gradient is wanted: autograd would copy that of a view that was written to."""
    in_place = in_place and not torch.is_grad_enabled() and _may_write_over(base)
    f, room = _matrix(features), factor.shape[1]
    if with_bias or f.shape[1] != room:
        f = _narrowed(f, k)
        f = torch.cat((f, _tail(room - k, with_bias, f.dtype, f.device).expand(len(f), -1)), 1)
    if base.dtype != factor.dtype:
        added = torch.nn.functional.linear(f.to(factor.dtype), factor).view(base.shape)
        return torch.add(base, added, out=base) if in_place else (base + added).to(base.dtype)
    rows = _matrix(base)
    if in_place:
        rows.addmm_(f.to(factor.dtype), factor.T)
        return base
    return torch.addmm(rows, f.to(factor.dtype), factor.T).view(base.shape)


@lru_cache(maxsize=64)
def _tail(size: int, with_one: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What follows the features of a row: a one that c is multiplied by, if there is a c, and zeros."""
    with torch.inference_mode(False):
        tail = torch.zeros(1, size, dtype=dtype, device="cpu")
        if with_one:
            tail[0, 0] = 1
        return tail.to(device)


def _matrix(t: Tensor) -> Tensor:
    return t if t.ndim == 2 else t.reshape(-1, t.shape[-1])


# ------------------------------------------------------------------------------------------------ dispatcher

_library = torch.library.Library("qaa", "DEF")
_library.define("forward(Tensor theta, Tensor x, str program) -> Tensor")
_library.define("backward(Tensor theta, Tensor x, Tensor grad, str program) -> (Tensor, Tensor)")
_library.define("project(Tensor base, Tensor features, Tensor up, Tensor? bias, float scale) -> Tensor")
_library.define(
    "project_backward(Tensor grad, Tensor features, Tensor up, bool with_bias, float scale) -> (Tensor, Tensor, Tensor)"
)


def _checked(text: str, theta: Tensor, x: Tensor, grad: Tensor | None = None) -> Program:
    what = Program.parse(text)
    _check_x(what, x)
    if x.ndim != 2:
        raise ValueError(f"expected x of shape (batch, d), received {tuple(x.shape)}")
    groups = theta.shape[0] if theta.ndim == len(what.circuit.parameter_shape) + 1 else 1
    if x.shape[0] % groups if groups else x.shape[0]:
        raise ValueError(f"expected as many vectors for each of {groups} sets of angles, received {x.shape[0]} in all")
    _check_theta(what, theta, (groups,))
    _check_together(theta, "x", x)
    if grad is not None:
        shape, dtype = (x.shape[0], what.n_outputs), _feature_dtype(what, x.dtype)
        if tuple(grad.shape) != shape or grad.dtype != dtype:
            raise ValueError(
                f"expected grad of shape {shape} and dtype {dtype}, received {tuple(grad.shape)} and {grad.dtype}"
            )
        _check_together(theta, "grad", grad)
    return what


def _op_forward(theta: Tensor, x: Tensor, program: str) -> Tensor:
    return _forward(_checked(program, theta, x), theta, x)


def _op_backward(theta: Tensor, x: Tensor, grad: Tensor, program: str) -> tuple[Tensor, Tensor]:
    return _adjoint(_checked(program, theta, x, grad), theta, x, grad)


def _check_matrices(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            raise ValueError(f"expected {name} of two dimensions, received {tuple(tensor.shape)}")
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"expected {name} of dtype float32 or float64, received {tensor.dtype}")


def _op_project(base: Tensor, features: Tensor, up: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    _check_matrices(base=base, features=features, up=up)
    if bias is not None and (bias.ndim != 1 or bias.dtype != up.dtype):
        raise ValueError(f"expected bias of one dimension and {up.dtype}, received {tuple(bias.shape)} {bias.dtype}")
    _check_one_device(base=base, features=features, up=up, bias=bias)
    return _project(base, features, up, bias, scale)


def _op_project_backward(
    grad: Tensor, features: Tensor, up: Tensor, with_bias: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check_matrices(grad=grad, features=features, up=up)
    _check_one_device(grad=grad, features=features, up=up)
    return _project_backward(grad, features, up, with_bias, scale)


for _device in ("CPU", "CUDA"):
    _library.impl("forward", _op_forward, _device)
    _library.impl("backward", _op_backward, _device)
_library.impl("project", _op_project, "CPU")
_library.impl("project_backward", _op_project_backward, "CPU")


@torch.library.register_fake("qaa::forward", lib=_library)
def _fake_forward(theta: Tensor, x: Tensor, program: str) -> Tensor:
    what = _checked(program, theta, x)
    return x.new_empty((x.shape[0], what.n_outputs), dtype=_feature_dtype(what, x.dtype))


@torch.library.register_fake("qaa::backward", lib=_library)
def _fake_backward(theta: Tensor, x: Tensor, grad: Tensor, program: str) -> tuple[Tensor, Tensor]:
    _check_one_device(theta=theta, x=x, grad=grad)
    return theta.new_empty(theta.shape), x.new_empty(x.shape)


@torch.library.register_fake("qaa::project", lib=_library)
def _fake_project(base: Tensor, features: Tensor, up: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    _check_one_device(base=base, features=features, up=up, bias=bias)
    return base.new_empty(base.shape)


@torch.library.register_fake("qaa::project_backward", lib=_library)
def _fake_project_backward(
    grad: Tensor, features: Tensor, up: Tensor, with_bias: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check_one_device(grad=grad, features=features, up=up)
    return features.new_empty(features.shape), up.new_empty(up.shape), up.new_empty(up.shape[0] if with_bias else 0)


def _setup_features(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    theta, x, ctx.program = inputs
    ctx.save_for_backward(theta, x)


def _autograd_features(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    theta, x = ctx.saved_tensors
    grad_theta, grad_x = torch.ops.qaa.backward(theta, x, grad, ctx.program)
    return grad_theta, grad_x, None


def _setup_project(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, features, up, bias, ctx.scale = inputs
    ctx.with_bias = bias is not None
    ctx.save_for_backward(features, up)


def _autograd_project(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    features, up = ctx.saved_tensors
    grad_features, grad_up, grad_bias = torch.ops.qaa.project_backward(grad, features, up, ctx.with_bias, ctx.scale)
    return grad, grad_features, grad_up, grad_bias if ctx.with_bias else None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("expected a first derivative, received a request for a second one: the adjoint has none")


torch.library.register_autograd("qaa::forward", _autograd_features, setup_context=_setup_features, lib=_library)
torch.library.register_autograd("qaa::project", _autograd_project, setup_context=_setup_project, lib=_library)
torch.library.register_autograd("qaa::project_backward", _no_second_derivative, lib=_library)
torch.library.register_autograd("qaa::backward", _no_second_derivative, lib=_library)


# ------------------------------------------------------------------------------------------------ torch.func

# Members that vmap maps over become groups of vectors, with angles of their own where the angles are mapped. Ops have
# no gradients under torch.func, so that it is given autograd functions around them.


def _members(size: int, dim: int | None, t: Tensor) -> Tensor:
    """``t`` with the mapped axis in front; where it is not mapped, once for every member."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _angles_of_members(size: int, dim: int | None, theta: Tensor, program: str, *, each: bool = False) -> Tensor:
    """One set of angles after the other, those of the first member first; where all share one set, that alone unless
    ``each`` is to have its own."""
    n_axes = len(Program.parse(program).circuit.parameter_shape)
    if dim is None and theta.ndim == n_axes and not each:
        return theta
    theta = _members(size, dim, theta)
    return theta if theta.ndim == 1 + n_axes else theta.flatten(0, 1)


def _map_forward(call: Any, info: Any, in_dims: Any, theta: Tensor, x: Tensor, program: str) -> tuple[Tensor, int]:
    size, (theta_dim, x_dim, _) = info.batch_size, in_dims
    rows, angles = _members(size, x_dim, x), _angles_of_members(size, theta_dim, theta, program)
    features = call(angles, rows.flatten(0, 1), program)
    return features.reshape(*rows.shape[:2], features.shape[-1]), 0


def _map_backward(
    call: Any, info: Any, in_dims: Any, theta: Tensor, x: Tensor, grad: Tensor, program: str
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Every member has a gradient of the angles, whether these are its own or not."""
    size, (theta_dim, x_dim, grad_dim, _) = info.batch_size, in_dims
    rows, grads = _members(size, x_dim, x), _members(size, grad_dim, grad)
    own = theta.shape if theta_dim is None else theta.movedim(theta_dim, 0).shape[1:]
    angles = _angles_of_members(size, theta_dim, theta, program, each=True)
    grad_theta, grad_x = call(angles, rows.flatten(0, 1), grads.flatten(0, 1), program)
    return (grad_theta.reshape(size, *own), grad_x.reshape(rows.shape)), (0, 0)


torch.library.register_vmap("qaa::forward", partial(_map_forward, torch.ops.qaa.forward), lib=_library)
torch.library.register_vmap("qaa::backward", partial(_map_backward, torch.ops.qaa.backward), lib=_library)


class _TransformedFeatures(torch.autograd.Function):
    @staticmethod
    def forward(theta: Tensor, x: Tensor, program: str) -> Tensor:
        result: Tensor = torch.ops.qaa.forward(theta, x, program)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        theta, x, ctx.program = inputs
        ctx.save_for_backward(theta, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        theta, x = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, _TransformedAdjointOfX.apply(theta, x, grad, ctx.program), None
        return *_TransformedAdjoint.apply(theta, x, grad, ctx.program), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
        return _map_forward(_TransformedFeatures.apply, info, in_dims, *inputs)


class _WithoutDerivative(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        _no_second_derivative(ctx, *grads)


class _TransformedAdjoint(_WithoutDerivative):
    @staticmethod
    def forward(theta: Tensor, x: Tensor, grad: Tensor, program: str) -> tuple[Tensor, Tensor]:
        grad_theta, grad_x = torch.ops.qaa.backward(theta, x, grad, program)
        return grad_theta, grad_x

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return _map_backward(_TransformedAdjoint.apply, info, in_dims, *inputs)


class _TransformedAdjointOfX(_WithoutDerivative):
    """The gradient of x alone: members that share their angles are one larger batch."""

    @staticmethod
    def forward(theta: Tensor, x: Tensor, grad: Tensor, program: str) -> Tensor:
        grad_x: Tensor = torch.ops.qaa.backward(theta, x, grad, program)[1]
        return grad_x

    @staticmethod
    def vmap(info: Any, in_dims: Any, theta: Tensor, x: Tensor, grad: Tensor, program: str) -> tuple[Tensor, int]:
        size, (theta_dim, x_dim, grad_dim, _) = info.batch_size, in_dims
        rows, grads = _members(size, x_dim, x), _members(size, grad_dim, grad)
        angles = _angles_of_members(size, theta_dim, theta, program)
        grad_x = _TransformedAdjointOfX.apply(angles, rows.flatten(0, 1), grads.flatten(0, 1), program)
        return grad_x.reshape(rows.shape), 0


# ------------------------------------------------------------------------------------------------ operation counts

# What torch.utils.flop_counter.FlopCounterMode adds up: a multiply-add is two, as in its own formulas, and a circuit's
# operations are those that its compiled plan executes for one state. Tensors arrive as shapes.

_Shape = tuple[int, ...]


@register_flop_formula(torch.ops.qaa.forward)
def _flop_forward(theta: _Shape, x: _Shape, program: str, **_: Any) -> int:
    return 2 * x[0] * round(Program.parse(program).plan.operations(x[1])[0])


@register_flop_formula(torch.ops.qaa.backward)
def _flop_backward(theta: _Shape, x: _Shape, grad: _Shape, program: str, **_: Any) -> int:
    return 2 * x[0] * round(sum(Program.parse(program).plan.operations(x[1])[1:]))


@register_flop_formula(torch.ops.qaa.project)
def _flop_project(base: _Shape, features: _Shape, up: _Shape, *_: Any, **__: Any) -> int:
    return 2 * features[0] * up[0] * up[1]


@register_flop_formula(torch.ops.qaa.project_backward)
def _flop_project_backward(grad: _Shape, features: _Shape, up: _Shape, *_: Any, **__: Any) -> int:
    return 4 * features[0] * up[0] * up[1]
