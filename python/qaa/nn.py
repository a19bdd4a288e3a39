"""Torch modules: a circuit as a layer, SQUARE's classifier, and a frozen linear layer with a QAA adapter.

The arithmetic of the adapter is in :class:`Adapter` and is written once: :class:`QAALinear` below and the PEFT layer
in :mod:`qaa.peft` both call it with parameters of their own.
"""

from __future__ import annotations

import copy
import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaa import ops
from qaa.circuit import MAX_WIRES, Circuit, Readout, ansatz, check_circuit, check_count, is_number, shown
from qaa.noise import NoiseModel, check_noise
from qaa.program import program
from qaa.shots import check_shots

#: name -> half-width of the uniform distribution (radians) that the angles are drawn from
INIT_ANGLES: dict[str, float] = {"uniform": math.pi, "small": 0.1, "zero": 0.0}


class Whitening(NamedTuple):
    r"""Frozen statistics that bring an adapter's input and features to unit size; None leaves a step out.

    .. math:: u = (x - \mu) \odot \sigma, \qquad g = (f(u) - m) \odot \rho

    Attributes:
        channels: sigma, shape ``(in_features,)``, 1/std of each input channel where there is a centre, else 1/rms.
        center: mu, shape ``(in_features,)``, the mean of each input channel.
        mean: m, shape ``(K,)``, the mean of each feature.
        gain: rho, shape ``(K,)``, 1/std of each feature where there is a mean, else 1/rms.

    m is for adapters that have a c: without one, subtracting it would add the constant ``-V diag(rho) m``.

    Where f is linear nothing of this costs a pass over x: sigma goes into the matrix, mu into a constant. Where f
    is quadratic, u is one fused operation before the kernel. In both, rho and m go into the up-projection and its bias.

    Example:
        >>> adapter, x = Adapter.create(in_features=8, readout="state[:3]"), torch.randn(5, 8)
        >>> theta = torch.zeros(adapter.circuit.parameter_shape)
        >>> whitening = Whitening(channels=torch.full((8,), 0.5), center=torch.ones(8))
        >>> features = adapter.features(theta, x, whitening)
        >>> torch.allclose(features, adapter.features(theta, (x - 1) * 0.5), atol=1e-6)
        True
    """

    channels: Tensor | None = None
    center: Tensor | None = None
    mean: Tensor | None = None
    gain: Tensor | None = None


NO_WHITENING = Whitening()

_Parts = tuple[Tensor | None, ...]
_Rows = tuple[_Parts, torch.dtype | None, Tensor]  # rows, and before them what they were made from


@dataclass(frozen=True)
class Adapter:
    r"""What an adapter computes, without its parameters: ``s * (V g + c)`` for inputs of ``in_features``.

    ``g`` are the features ``f`` of x, or, with a :class:`Whitening`, standardised features of whitened x. Quadratic
    readouts (``"z"``, Pauli strings, ``"probs"``) embed the normalised input into the amplitudes,

    ``f_k = <phi| M_k |phi>,  |phi> = U(theta) pad(x) / ||x||``,

    and the ``"state"`` readout takes the real parts of the first K amplitudes of the input that is *not* normalised,
    which makes it linear in x:

    ``f = A x,  A = Re U(theta)[:K, :in_features]``.

    V may be of low rank, ``V = B M`` with M of shape ``(r, K)``: methods that are given M as ``mix`` take B as ``up``.

    With several ``blocks``, x is cut into as many neighbouring pieces of equal width (the last one padded with zeros),
    each goes through the same circuit, normalised by itself, and f are their features one after the other.

    With ``reupload`` a vector sets its angles too (data re-uploading; Pérez-Salinas et al., Quantum 4, 226, 2020, with
    a fixed projection in the place of trained weights for every input): each angle has a trained rate omega, and

    ``theta_lw(x) = theta_lw + omega_lw z_w(x),  z_w = sqrt(n) sum_(i = w mod n) x_i / ||x||``

    radians, for every angle of wire w in layer l (with a :class:`Whitening`, of u in the place of x). The n numbers z
    are orthogonal projections; of a direction that is drawn at random they have variance 1 where n divides the width
    of x, and about 1 elsewhere. Methods take theta and omega as one tensor, ``parameter_shape``.

    Attributes:
        circuit: U(theta), with angles in radians and wire 0 as the most significant bit of the amplitude index.
        readout: the M_k, or the number K of amplitudes.
        scaling: s. ``create`` chooses ``sqrt(2**n_wires + 1)`` for quadratic readouts, because ``<Z>`` of a state that
            is spread over all amplitudes deviates from 0 by only ``1 / sqrt(2**n_wires + 1)``, and 1 for ``"state"``.
        in_features: width of x, at most ``blocks * 2**n_wires``; the rest of the amplitudes is zero.
        noise, trajectories: if given, quadratic features are estimates for a noisy circuit (:mod:`qaa.noise`), for
            evaluation: there is no gradient for x.
        blocks: number of pieces that x is cut into.
        reupload: whether vectors set angles.

    Example:
        >>> adapter = Adapter.create(in_features=48, n_layers=2, readout="z")
        >>> adapter.circuit.n_wires, adapter.n_features, adapter.is_linear, adapter.scaling == 65**0.5
        (6, 6, False, True)
        >>> adapter = Adapter.create(in_features=48, max_wires=4)
        >>> adapter.circuit.n_wires, adapter.blocks, adapter.n_features
        (4, 3, 12)
    """

    circuit: Circuit
    readout: Readout
    scaling: float
    in_features: int
    noise: NoiseModel | None = None
    trajectories: int | None = None
    blocks: int = 1
    reupload: bool = False
    _known_rows: dict[str, _Rows] = field(default_factory=dict, init=False, repr=False, compare=False)

    @staticmethod
    def create(
        in_features: int,
        n_layers: int = 1,
        ansatz_name: str = "ring",
        readout: str | Sequence[str] | Readout = "z",
        scaling: float | None = None,
        max_wires: int | None = None,
        reupload: bool = False,
    ) -> Adapter:
        """The adapter with ``ceil(log2(in_features))`` wires (at least one), or ``max_wires`` and as few blocks as do.

        Raises:
            ValueError: an argument is out of range, there would be more than 16 wires, or vectors are to set the angles
                of the readout ``"state"``, which is linear in x.
        """
        limit = 2**MAX_WIRES
        if max_wires is not None:
            max_wires = check_count("max_wires", max_wires, MAX_WIRES)
            limit = 2**31 - 1
        in_features = check_count("in_features", in_features, limit)
        n_wires = max(1, (in_features - 1).bit_length())
        if max_wires is not None:
            n_wires = min(n_wires, max_wires)
        blocks = -(-in_features // 2**n_wires)
        parsed = Readout.parse(readout, n_wires)
        most, count = max(256, blocks * 2**n_wires), blocks * parsed.n_outputs  # 256 Pauli strings of four wires
        if count > most:
            where = f"{n_wires} wires" if blocks == 1 else f"{blocks} blocks of {n_wires} wires"
            raise ValueError(f"expected at most {most} features for {where}, received {count}")
        if scaling is None:
            scaling = 1.0 if parsed.kind == "state" else math.sqrt(2**n_wires + 1)
        check_flag("reupload", reupload)
        if reupload and parsed.kind == "state":
            raise ValueError(f"expected Pauli strings or 'probs' with reupload, received {str(parsed)!r}")
        circuit = ansatz(ansatz_name, n_wires, n_layers)
        return Adapter(circuit, parsed, check_scaling(scaling), in_features, blocks=blocks, reupload=reupload)

    def with_noise(self, noise: NoiseModel | None, trajectories: int | None) -> Adapter:
        """The same adapter on a noisy circuit, or without noise; ``ValueError`` for ``"state"``, no observable, and for
        vectors that set angles."""
        if noise is not None and self.is_linear:
            raise ValueError(f"expected Pauli strings or 'probs' with noise, received {str(self.readout)!r}")
        if noise is not None and self.reupload:
            raise ValueError("expected one circuit for all vectors with noise, received an adapter with reupload")
        return replace(self, noise=noise, trajectories=trajectories)

    @property
    def n_features(self) -> int:
        """Number K of features, the width of V."""
        return self.blocks * self.readout.n_outputs

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of what methods take as ``theta``: the circuit's, after a 2 for theta and omega with ``reupload``."""
        own = self.circuit.parameter_shape
        return (2, *own) if self.reupload else own

    def _angles(self, theta: Tensor, x: Tensor) -> Tensor:
        """``theta + omega z(x)``: from x of shape ``(..., width)`` to ``(..., *circuit.parameter_shape)``."""
        n, dtype = self.circuit.n_wires, torch.promote_types(torch.promote_types(theta.dtype, x.dtype), torch.float32)
        theta, x = theta.to(dtype), x.to(dtype)
        # z does not depend on the size of x, so that no gradient has to pass the factor that keeps squares in range
        largest = x.detach().abs().amax(-1, keepdim=True)
        x = x / torch.where(largest > 0, largest, 1.0)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        each = -(-x.shape[-1] // n)
        sums = F.pad(x, (0, each * n - x.shape[-1])).reshape(*x.shape[:-1], each, n).sum(-2)
        z = sums * (math.sqrt(n) / torch.where(norm > 0, norm, 1.0))
        z = z.reshape(*z.shape[:-1], 1, n, *[1] * (theta.ndim - 3))
        return torch.addcmul(theta[0], theta[1], z)

    def _cut(self, x: Tensor) -> Tensor:
        """The blocks of x: from shape ``(..., in_features)`` to ``(..., blocks, width)``."""
        missing = self.blocks * self._width - self.in_features
        return F.pad(x, (0, missing)).reshape(*x.shape[:-1], self.blocks, self._width)

    @property
    def _width(self) -> int:
        """How many inputs a block takes; the last one may have fewer."""
        return -(-self.in_features // self.blocks)

    @property
    def is_linear(self) -> bool:
        """Whether the adapter is linear in x, so that it merges into a weight and exports as a LoRA."""
        return self.readout.kind == "state"

    def down(self, theta: Tensor, mix: Tensor | None = None) -> Tensor:
        """``A = Re U(theta)[:K, :in_features]``, or ``M A``, for the ``"state"`` readout.

        With several blocks A has ``Re U(theta)[:K / blocks]`` for each of them on its diagonal, and zeros elsewhere.

        ``M A`` costs as many simulated states as M has rows: row by row it is ``Re U^T m``, since m is real.

        Shapes: ``theta`` the circuit's, ``mix`` ``(r, K)``, result ``(K, in_features)`` or ``(r, in_features)``.

        Raises:
            ValueError: the readout is another one.
        """
        if not self.is_linear:
            raise ValueError(f"expected the readout 'state', which is linear in x, received {str(self.readout)!r}")
        return self._own(self._down(theta, mix))

    def _own(self, rows: Tensor) -> Tensor:
        """Rows that a caller may write to: not those that are kept for the next call."""
        known = self._known_rows.get("last")
        return rows.clone() if known is not None and known[2] is rows else rows

    def _down(
        self,
        theta: Tensor,
        mix: Tensor | None,
        gain: Tensor | None = None,
        channels: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """``A diag(sigma)``, or ``M diag(gain)`` times it, in ``dtype``; zeros may follow (:func:`qaa.ops._room`)."""
        asked = theta, mix, gain, channels
        given = tuple(tensor for tensor in asked if tensor is not None)
        is_trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
        # A GPU has made the rows anew before it can tell the host whether the angles are the same.
        if is_trained or theta.is_cuda or not ops._is_plain(*given):
            return self._rows(theta, mix, gain, channels, dtype)
        # Generation, and training with frozen angles, ask for the same rows over and over: comparing some hundred
        # numbers takes microseconds, the rows some hundred times as long.
        known = self._known_rows.get("last")
        if known is None or known[1] != dtype or not _are_equal(known[0], asked):
            with torch.inference_mode(False), torch.no_grad():  # training may use these tensors later
                rows = self._rows(theta, mix, gain, channels, dtype)
                known = tuple(None if tensor is None else tensor.clone() for tensor in asked), dtype, rows
            self._known_rows["last"] = known
        return known[2]

    def _rows(
        self,
        theta: Tensor,
        mix: Tensor | None,
        gain: Tensor | None,
        channels: Tensor | None,
        dtype: torch.dtype | None,
    ) -> Tensor:
        circuit, count, width = self.circuit, self.readout.n_outputs, self._width
        if self.blocks == 1:
            if mix is None:
                return ops._amplitude_rows(circuit, theta, count, width, True, channels, dtype)
            return ops._mixed_rows(circuit, theta, mix, width, gain, channels, dtype)
        if mix is None:
            rows = torch.block_diag(  # type: ignore[no-untyped-call]
                *[ops._amplitude_rows(circuit, theta, count, width, True)] * self.blocks
            )
        else:
            mix = ops._scaled(mix, gain, None).reshape(-1, count)
            rows = ops._mixed_rows(circuit, theta, mix, width).reshape(-1, self.blocks * width)
        return ops._scaled(rows[:, : self.in_features], channels, dtype)

    def _affine(
        self,
        theta: Tensor,
        whitening: Whitening,
        mix: Tensor | None,
        gain: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``(A', -A' mu)`` with ``A' = A diag(sigma)``, so that ``A u = A' x - A' mu``; a mix M makes A
        ``M diag(gain) A``."""
        channels, center = whitening.channels, whitening.center
        if center is None:
            return self._down(theta, mix, gain, channels, dtype), None
        down = self._down(theta, mix, gain, channels)
        offset = -(down * center).sum(-1)  # as a sum, which autocast leaves in full precision
        return ops._scaled(down, None, dtype), ops._scaled(offset, None, dtype)

    @staticmethod
    def _folded(
        up: Tensor, bias: Tensor | None, whitening: Whitening, mix: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """V', c' and M' with ``V g + c = V' M' f(u) + c'``; costs as many operations as V, or V and M, have numbers.

        ``V' = V diag(rho)`` and ``c' = c - V' m`` without one, else ``M' = M diag(rho)`` and ``c' = c - V M' m``.
        """
        mean, gain = whitening.mean, whitening.gain
        if gain is not None:
            up, mix = (up * gain, None) if mix is None else (up, mix * gain)
        if mean is not None:
            mean = mean if mix is None else (mix * mean).sum(-1)
            constant = (up * mean).sum(-1)
            bias = -constant if bias is None else bias - constant
        return up, bias, mix

    def features(
        self, theta: Tensor, x: Tensor, whitening: Whitening = NO_WHITENING, mix: Tensor | None = None
    ) -> Tensor:
        """``f(u)``, or ``M f(u)``: from shape ``(..., in_features)`` to ``(..., K)`` or ``(..., r)``, in x's dtype.

        ``u = (x - mu) sigma`` with the whitening's ``center`` and ``channels``; standardisation is not applied here.

        Raises:
            ValueError: x is not ``in_features`` wide.
        """
        _check_width(x, self.in_features)
        return ops._narrowed(self._features(theta, x, whitening, mix), self.n_features if mix is None else len(mix))

    def _features(
        self, theta: Tensor, x: Tensor, whitening: Whitening, mix: Tensor | None, gain: Tensor | None = None
    ) -> Tensor:
        """:meth:`features`, behind which there may be zeros, for the products that follow; M is ``mix diag(gain)``."""
        if self.is_linear:
            ops._check_together(theta, "x", x)  # torch multiplies the CPU's tensors by those on meta
            return F.linear(x, *self._affine(theta, whitening, mix, gain, ops._autocast_dtype(x) or x.dtype))
        return self._mixed(self._quadratic(theta, x, whitening), mix, gain)

    def _quadratic(self, theta: Tensor, x: Tensor, whitening: Whitening) -> Tensor:
        """``f(u)`` of a readout that is not linear in x."""
        if theta.shape != self.parameter_shape:
            raise ValueError(f"expected theta of shape {self.parameter_shape}, received {tuple(theta.shape)}")
        channels, center = whitening.channels, whitening.center
        if channels is not None:
            x = x * channels if center is None else torch.addcmul(-center * channels, x, channels)
        elif center is not None:
            x = x - center
        noise, trajectories = self.noise, self.trajectories
        if self.blocks > 1:
            x = self._cut(x)
        if self.reupload:
            theta = self._angles(theta, x)
        features = ops.quantum_features(self.circuit, theta, x, self.readout, noise=noise, trajectories=trajectories)
        return features.flatten(-2) if self.blocks > 1 else features

    @staticmethod
    def _mixed(features: Tensor, mix: Tensor | None, gain: Tensor | None) -> Tensor:
        if mix is None:
            return features
        ops._check_one_device(mix=mix, features=features)  # see _features
        return F.linear(features, ops._scaled(mix, gain, features.dtype))

    def delta(
        self,
        x: Tensor,
        theta: Tensor,
        up: Tensor,
        bias: Tensor | None,
        whitening: Whitening = NO_WHITENING,
        mix: Tensor | None = None,
    ) -> Tensor:
        """``s * (V g + c)``, shape ``(..., out_features)``: ``up`` is V, or B with a mix; ``bias`` is c or None."""
        up, bias, mix = self._folded(up, bias, whitening, mix)
        delta = F.linear(self.features(theta, x, whitening, mix), up, bias)
        return delta if self.scaling == 1 else delta * self.scaling

    def add_to(
        self,
        base: Tensor,
        x: Tensor,
        theta: Tensor,
        up: Tensor,
        bias: Tensor | None,
        whitening: Whitening = NO_WHITENING,
        mix: Tensor | None = None,
        *,
        in_place: bool = False,
        made: _Made | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """``base + delta(x, ...)`` in the dtype of ``base``; with ``in_place`` it may be written over ``base``.

        ``made`` is what :func:`_made_together` has made of the parameters, if it has; ``features`` is f(u), if that is
        known, of a readout that is not linear in x.
        """
        # without a mean a gain is left to the function that changes V or M anyway
        gain = whitening.gain if whitening.mean is None else None
        if gain is None:
            up, bias, mix = self._folded(up, bias, whitening, mix)
        if features is not None:
            features = self._mixed(features, mix, gain)
        elif made is not None and made.down is not None:
            features = F.linear(x, made.down)
        else:
            features = self._features(theta, x, whitening, mix, None if mix is None else gain)
        if made is not None and made.factor is not None:
            return made.add_product(base, features, in_place)
        gain = gain if mix is None else None
        return ops._add_projection(base, features, up, bias, self.scaling, in_place, gain)

    def low_rank(
        self,
        theta: Tensor,
        up: Tensor,
        bias: Tensor | None,
        whitening: Whitening = NO_WHITENING,
        mix: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(A', s V', constant)`` with ``delta(x) = s V' A' x + constant``, for the ``"state"`` readout.

        Shapes ``(K, in_features)``, ``(out_features, K)`` and ``(out_features,)``, with r for K where there is a mix,
        in the dtype of A. The constant is ``s (c - V' (m + A' mu))``, None where there is neither c nor m nor mu.
        """
        up, bias, mix = self._folded(up, bias, whitening, mix)
        down, offset = self._affine(theta, whitening, mix)
        up, bias = up.to(down.dtype), None if bias is None else bias.to(down.dtype)
        if offset is not None:
            bias = up @ offset if bias is None else bias + up @ offset
        return self._own(down), up * self.scaling, None if bias is None else bias * self.scaling


class _Member(NamedTuple):
    """An adapter with its parameters, for :func:`_made_together`; up and bias are None where V is no parameter."""

    adapter: Adapter
    theta: Tensor
    whitening: Whitening
    mix: Tensor | None
    up: Tensor | None
    bias: Tensor | None


class _Made(NamedTuple):
    """What an adapter multiplies by and what does not depend on x, each if it has been made: for linear ones A, and
    ``s [V, c]`` in the dtype of products (:func:`qaa.ops._factors`)."""

    down: Tensor | None
    factor: Tensor | None
    n_columns: int  # of V
    with_bias: bool

    def fits(self, x: Tensor) -> bool:
        """Whether it was made for the dtype in which x is multiplied."""
        dtype = ops._autocast_dtype(x) or x.dtype
        return all(made is None or made.dtype == dtype for made in (self.down, self.factor))

    def add_product(self, base: Tensor, features: Tensor, in_place: bool) -> Tensor:
        """``base + s (V f + c)``."""
        assert self.factor is not None
        return ops._add_product(base, features, self.factor, self.n_columns, self.with_bias, in_place)


def _made_together(members: Sequence[_Member]) -> list[_Made]:
    """What :meth:`Adapter.add_to` takes as ``made``, for several adapters at once; those of one shape share launches.

    There is one call of the core for matrices of linear adapters, and one node of autograd for them and one for
    up-projections that are multiplied in another dtype, or on a GPU. The bits are those that each would make alone.
    """
    downs: list[Tensor | None] = [None] * len(members)
    for (circuit, n_features, width, dtype, *_), found in _alike(map(_kind_of_rows, members), _amplitudes):
        several = [members[i] for i in found]
        thetas, mixes = [m.theta for m in several], [m.mix for m in several if m.mix is not None]
        channels = [m.whitening.channels for m in several if m.whitening.channels is not None]
        gains = [m.whitening.gain for m in several if m.whitening.gain is not None] if mixes else []
        dtype = ops._autocast_dtype(thetas[0]) or dtype
        made = ops._rows_together(circuit, thetas, mixes or n_features, width, gains or None, channels or None, dtype)
        for i, down in zip(found, made, strict=True):
            downs[i] = down
    factors: list[Tensor | None] = [None] * len(members)
    for (scale, *_), found in _alike(map(_kind_of_factor, members)):
        several = [members[i] for i in found]
        ups = [m.up for m in several if m.up is not None]
        dtype = ops._autocast_dtype(ups[0]) or ups[0].dtype
        if not ups[0].is_cuda and not (ups[0].is_cpu and dtype in (torch.float16, torch.bfloat16)):
            continue
        biases = [m.bias for m in several if m.bias is not None]
        gains = [m.whitening.gain for m in several if m.whitening.gain is not None and m.mix is None]
        for i, factor in zip(found, ops._factors(ups, biases, gains or None, scale, dtype), strict=True):
            factors[i] = factor
    n_columns = (m.adapter.n_features if m.mix is None else len(m.mix) for m in members)
    with_bias = (m.bias is not None for m in members)
    return [_Made(*parts) for parts in zip(downs, factors, n_columns, with_bias, strict=True)]


def _alike(kinds: Iterable[Any], size: Callable[[Any], int] = lambda kind: 1) -> Iterator[tuple[Any, list[int]]]:
    """Each kind of which there are several, with where they are, so many at a time; None is no kind."""
    found: dict[Any, list[int]] = {}
    for i, kind in enumerate(kinds):
        if kind is not None:
            found.setdefault(kind, []).append(i)
    for kind, where in found.items():
        at_once = max(1, MANY_AMPLITUDES // size(kind))
        if len(where) > 1:
            yield from ((kind, where[i : i + at_once]) for i in range(0, len(where), at_once))


def _kind_of_rows(member: _Member) -> Any:
    """What matrices have in common that can be made by one call; None where the layer has to make its own.

    On a CPU rows that nobody trains are kept (:meth:`Adapter._down`); a GPU has no way to tell whether they still hold.
    """
    adapter, theta, (channels, center, mean, gain), mix, *_ = member
    if not adapter.is_linear or adapter.blocks > 1 or center is not None or (mix is not None and mean is not None):
        return None
    gain = None if mix is None else gain
    if not _are_parameters(theta, mix) or not _are_parameters(theta, gain, channels, frozen=True):
        return None
    shape = None if mix is None else mix.shape
    if theta.shape != adapter.circuit.parameter_shape or (shape is not None and shape[-1:] != (adapter.n_features,)):
        return None  # shards of them
    is_trained = theta.requires_grad or (mix is not None and mix.requires_grad)
    if not theta.is_cuda and not (is_trained and theta.is_cpu and torch.is_grad_enabled()):
        return None
    return (
        *(adapter.circuit, adapter.n_features, adapter._width, theta.dtype, theta.device),
        *(gain is not None, channels is not None, shape),
    )


#: Amplitudes that are simulated by one call at most; on a GPU some lie in memory, 16 bytes each in float32.
MANY_AMPLITUDES = 2**24


def _amplitudes(kind: Any) -> int:
    """How many amplitudes one of the matrices of this kind is made from."""
    circuit, n_features, *_, shape = kind
    rows = n_features if shape is None else shape[0]
    return int(rows << circuit.n_wires)


def _kind_of_factor(member: _Member) -> Any:
    """What up-projections have in common that are made by one call, likewise."""
    adapter, _, (_, _, mean, gain), mix, up, bias = member
    gain = gain if mix is None else None
    if up is None or mean is not None or not _are_parameters(up, bias) or not _are_parameters(up, gain, frozen=True):
        return None
    if up.shape[1:] != (adapter.n_features if mix is None else len(mix),):
        return None
    return adapter.scaling, up.shape, up.dtype, up.device, bias is not None, gain is not None


def _are_parameters(first: Tensor, *others: Tensor | None, frozen: bool = False) -> bool:
    """Whether these are plain parameters of one dtype on one device, the others frozen ones; None is none of them."""
    if type(first) is not nn.Parameter:
        return False
    device, dtype = first.device, first.dtype
    for other in others:
        if other is None:
            continue
        if type(other) is not nn.Parameter or other.dtype != dtype or other.device != device:
            return False
        if frozen and other.requires_grad:
            return False
    return True


def _are_equal(these: _Parts, those: _Parts) -> bool:
    return all(
        a is b is None or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b))
        for a, b in zip(these, those, strict=True)
    )


_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_private_result(layer: nn.Module) -> bool:
    """Whether nobody but the caller sees what ``layer`` returns, so that it may be written over.

    A plain linear layer saves its input for the backward pass and not its output; a hook, or a ``forward`` that was
    put in place of its own, may keep that.
    """
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    return not any(getattr(layer, name) or getattr(nn.modules.module, "_global" + name) for name in _HOOKS)


class QuantumLayer(nn.Module):
    """The features of a circuit applied to amplitude-embedded inputs: ``f_k = <phi|M_k|phi>``.

    ``|phi> = U(theta) pad(x) / ||x||``; with ``normalize=False`` the division is left out.

    Args:
        circuit: U(theta); ``theta`` is in radians, starts uniform in ``[-pi, pi)`` and has the circuit's shape.
        readout: ``"z"``, ``"probs"``, ``"state"``, a part of either such as ``"state[:K]"``, see
            :class:`qaa.Readout`, or Pauli strings, wire 0 first.
        normalize: whether x is divided by its norm; rows of zeros give features 0 either way.
        shots: if given, features and the gradient of ``theta`` are unbiased estimates from so many runs for each
            vector, as on a device (:mod:`qaa.shots`); x then may not need a gradient.
        noise, trajectories: if given, the circuit is a noisy one, and features and the gradient of ``theta`` are
            unbiased estimates from so many trajectories for each vector (:mod:`qaa.noise`); likewise.
        generator: where the random numbers for either come from; by default torch's own generator.

    Shapes:
        x ``(..., d)`` with ``d <= 2**n_wires``, float64, float32, bfloat16 or float16, zero-padded to ``2**n_wires``;
        result ``(..., K)`` in x's dtype, complex for ``"state"``.

    Raises:
        TypeError: normalize is no bool, or circuit or readout of another type.
        ValueError: the readout does not fit the circuit, or x is wider than ``2**n_wires``.

    Example:
        >>> import qaa, torch
        >>> layer = QuantumLayer(qaa.ansatz("ring", n_wires=3, n_layers=1))
        >>> layer(torch.ones(2, 5, 7)).shape
        torch.Size([2, 5, 3])
    """

    def __init__(
        self,
        circuit: Circuit,
        readout: str | Sequence[str] | Readout = "z",
        normalize: bool = True,
        *,
        shots: int | None = None,
        noise: NoiseModel | None = None,
        trajectories: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        what = program(circuit, readout, normalize)
        self.circuit, self.readout, self.normalize = circuit, what.readout, what.normalize
        ops._check_estimates(shots, noise, trajectories, generator)
        if shots is not None:
            check_shots(shots)
        if noise is not None:
            check_noise(noise, trajectories)
        if self.readout.kind == "state" and (shots is not None or noise is not None):
            raise ValueError(f"expected Pauli strings or 'probs' with shots or noise, received {str(self.readout)!r}")
        self.shots, self.noise, self.trajectories, self.generator = shots, noise, trajectories, generator
        self.theta = nn.Parameter(torch.empty(circuit.parameter_shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the angles anew, uniform in ``[-pi, pi)``."""
        draw_angles(self.theta, "uniform")

    def forward(self, x: Tensor) -> Tensor:
        return ops.quantum_features(
            self.circuit,
            self.theta,
            x,
            self.readout,
            normalize=self.normalize,
            shots=self.shots,
            noise=self.noise,
            trajectories=self.trajectories,
            generator=self.generator,
        )

    def extra_repr(self) -> str:
        how = {name: getattr(self, name) for name in ("shots", "noise", "trajectories")}
        given = "".join(f", {name}={value}" for name, value in how.items() if value is not None)
        return f"n_wires={self.circuit.n_wires}, theta={tuple(self.theta.shape)}, readout={str(self.readout)!r}{given}"


class Square(nn.Module):
    r"""SQUARE's classifier (Roh et al.): bottleneck, amplitude embedding, circuit, ``[probs, <Z>]``, light head.

    .. math::
        \hat x = \frac{W_b x + b_b}{\lVert W_b x + b_b \rVert}, \quad
        p_b = \bigl|\langle b| U(\theta) |\hat x\rangle\bigr|^2, \quad
        z_w = \sum_b (-1)^{b_w} p_b, \quad
        y = W_2 \tanh\bigl(W_1 [p, z] + b_1\bigr) + b_2

    U is ``qaa.ansatz("ring", n_wires, n_layers)``: RY and RZ on every wire, a ring of CNOTs, RY on every wire; b_w is
    wire w's bit of the index b, wire 0 the most significant one. The circuit is simulated once a row: every <Z> is a
    fixed sum of the probabilities. :meth:`to_classical` is the same function without a circuit.

    Args:
        in_features: width of x; there is a bottleneck unless it is ``2**n_wires`` (16 numbers on four wires in SQUARE).
        out_features: width of the result, logits or a regression.
        n_wires: number of wires n, 1 to 16.
        n_layers: depth of the circuit, whose angles ``circuit.theta`` (n_layers, n_wires, 3) are in radians and start
            uniform in ``[-pi, pi)``.
        hidden_features: width of the head's only hidden layer.

    Shapes:
        x ``(..., in_features)`` in the dtype of the parameters; result ``(..., out_features)``. A row that embeds as
        zero is no state: its features are zero.

    Raises:
        ValueError: a size is out of range, or x is not ``in_features`` wide.

    Example:
        >>> import torch
        >>> model = Square(in_features=768, out_features=2, n_wires=4)
        >>> model(torch.randn(5, 768)).shape, model.features(torch.randn(5, 768)).shape
        (torch.Size([5, 2]), torch.Size([5, 20]))
        >>> sum(p.numel() for p in Square(16, 1).parameters())  # 12 angles, 20 * 8 + 8 and 8 + 1 for the head
        189
    """

    signs: Tensor

    def __init__(
        self, in_features: int, out_features: int, n_wires: int = 4, n_layers: int = 1, hidden_features: int = 8
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "out_features": out_features, "hidden_features": hidden_features}
        for what, size in sizes.items():
            check_count(what, size, 2**31 - 1)
        circuit = ansatz("ring", n_wires, n_layers)
        width = 2**n_wires
        self.in_features = in_features
        self.bottleneck = None if in_features == width else nn.Linear(in_features, width)
        self.circuit = QuantumLayer(circuit, readout="probs")
        self.register_buffer("signs", _signs_of_z(n_wires), persistent=False)
        self.head = nn.Sequential(
            nn.Linear(width + n_wires, hidden_features), nn.Tanh(), nn.Linear(hidden_features, out_features)
        )

    def features(self, x: Tensor) -> Tensor:
        """``[p, z]``, the probabilities and then <Z> of every wire: ``(..., 2**n_wires + n_wires)``."""
        _check_width(x, self.in_features)
        return _with_z(self.circuit(x if self.bottleneck is None else self.bottleneck(x)), self.signs)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.features(x))
        return result

    def to_matrix(self) -> Tensor:
        r"""The circuit as a matrix: U of shape ``(2**n, 2**n)`` with :math:`p = |U \hat x|^2`; differentiable in theta.

        complex128 for float64 angles, else complex64; ``4**n`` numbers from ``2 * 2**n`` simulated states.

        Example:
            >>> import torch
            >>> model = Square(16, 1).double()
            >>> x = torch.nn.functional.normalize(torch.randn(3, 16, dtype=torch.float64), dim=-1)
            >>> p = (x.to(torch.complex128) @ model.to_matrix().T).abs() ** 2
            >>> torch.allclose(p, model.features(x)[:, :16], rtol=0, atol=1e-12)
            True
        """
        circuit = self.circuit.circuit
        return ops.amplitude_rows(circuit, self.circuit.theta, 2**circuit.n_wires)

    def to_classical(self) -> DenseSquare:
        """The same function as a network without a circuit, with parameters of its own.

        Example:
            >>> import torch
            >>> model, x = Square(48, 3, n_wires=5, n_layers=2), torch.randn(7, 48)
            >>> torch.allclose(model.to_classical()(x), model(x), atol=1e-5)
            True
        """
        return DenseSquare(self)


class DenseSquare(nn.Module):
    r"""What a :class:`Square` computes, as two linear layers around squares:

    .. math:: p = (A \hat x)^2 + (B \hat x)^2, \qquad A = \mathrm{Re}\, U, \ B = \mathrm{Im}\, U

    (squares of every entry), then the same ``[p, z]`` and head. A and B are the upper and the lower half of
    ``mix.weight``, shape ``(2 * 2**n, 2**n)``. A fresh module agrees with its source to rounding. Training treats the
    ``2 * 4**n`` numbers of A and B as free, where the circuit has ``3 n L`` angles and A + iB stays unitary.

    Args:
        source: the module whose values are copied; later changes of one do not reach the other.

    Example:
        >>> import torch
        >>> dense = DenseSquare(Square(16, 1))
        >>> dense(torch.zeros(2, 16)).shape, dense.mix.weight.shape
        (torch.Size([2, 1]), torch.Size([32, 16]))
    """

    signs: Tensor

    def __init__(self, source: Square) -> None:
        super().__init__()
        unitary = source.to_matrix().detach()
        self.bottleneck = copy.deepcopy(source.bottleneck)
        width, theta = len(unitary), source.circuit.theta
        self.mix = nn.Linear(width, 2 * width, bias=False, dtype=theta.dtype, device=theta.device)
        self.mix.weight.data.copy_(torch.cat([unitary.real, unitary.imag]))
        self.register_buffer("signs", source.signs.clone(), persistent=False)
        self.head = copy.deepcopy(source.head)

    def forward(self, x: Tensor) -> Tensor:
        if self.bottleneck is not None:
            x = self.bottleneck(x)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        real, imag = self.mix(x / torch.where(norm > 0, norm, 1.0)).chunk(2, dim=-1)
        result: Tensor = self.head(_with_z(real.square() + imag.square(), self.signs))
        return result


class DenseCircuit(nn.Module):
    r"""The features of a circuit as matrix products, squares and sums, for programs that know torch's own ops alone.

    .. math::
        \phi = U_{:k}\, x / \lVert x \rVert, \qquad
        \langle P \rangle = \sum_b \pm\, (\mathrm{Re}\ \text{or}\ \mathrm{Im})\; \bar\phi_{b \oplus m}\, \phi_b

    where m marks the wires on which the Pauli string P flips; for a string of I and Z the summands are ``|phi_b|**2``.
    The matrix has ``2 k`` rows of ``width`` numbers, ``k = 2**n`` for Pauli strings, K for ``"probs[:K]"``, which costs
    ``2 k width`` multiply-adds a vector: export with it, and train with :class:`QuantumLayer`. Its values are a copy;
    there is nothing to train.

    Args:
        circuit: U(theta).
        theta: angles in radians, of the circuit's shape.
        readout: ``"z"``, Pauli strings, ``"probs"`` or ``"probs[:K]"``; amplitudes are complex, and no feature here.
        width: width of x, by default ``2**n_wires``.

    Shapes:
        x ``(..., width)`` in the dtype of ``theta``, float32 or float64; result ``(..., K)``. Features of zero are 0.

    Raises:
        ValueError: the readout is ``"state"``, or something does not fit the circuit.

    Example:
        >>> import qaa, torch
        >>> circuit = qaa.ansatz("ring", n_wires=3, n_layers=2)
        >>> layer, x = QuantumLayer(circuit, ["ZII", "XYI", "IXX"]), torch.randn(4, 7)
        >>> dense = DenseCircuit(circuit, layer.theta, layer.readout, width=7)
        >>> torch.allclose(dense(x), layer(x), atol=1e-5)
        True
    """

    mix: Tensor
    flipped: Tensor
    signs: Tensor

    def __init__(
        self,
        circuit: Circuit,
        theta: Tensor,
        readout: str | Sequence[str] | Readout = "z",
        width: int | None = None,
    ) -> None:
        super().__init__()
        check_circuit(circuit)
        parsed = Readout.parse(readout, circuit.n_wires)
        if parsed.kind == "state":
            raise ValueError(f"expected a readout of probabilities or Pauli strings, received {str(parsed)!r}")
        is_probs = parsed.kind == "probs"
        size = parsed.n_outputs if is_probs else 2**circuit.n_wires
        with torch.no_grad():
            rows = ops.amplitude_rows(circuit, theta, size, width=width)
            self.register_buffer("mix", torch.cat([rows.real, rows.imag]))
        # P|b> = i**(number of Y) (-1)**(b & z) |b ^ x>: for each string a row of signs, for each x and each parity of
        # the number of Y one product of amplitudes
        masks = [tuple(int("".join(str(int(c in on)) for c in p), 2) for on in ("XY", "YZ")) for p in parsed.paulis]
        odd = [p.count("Y") % 2 for p in parsed.paulis]
        self.products = sorted({(x, y) for (x, _), y in zip(masks, odd, strict=True)}) if not is_probs else []
        index = torch.arange(size, device=theta.device)
        signs = self.mix.new_zeros(len(masks), len(self.products), size)
        for k, ((x, z), y) in enumerate(zip(masks, odd, strict=True)):
            parity = sum(index >> w & z >> w & 1 for w in range(circuit.n_wires)) % 2
            signs[k, self.products.index((x, y))] = (1 - 2 * parity) * (-1) ** (parsed.paulis[k].count("Y") // 2)
        self.register_buffer("signs", signs.flatten(1))
        flips = [index ^ x for x, _ in self.products]
        self.register_buffer("flipped", torch.stack(flips) if flips else index[:0])

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        real, imag = F.linear(x / torch.where(norm > 0, norm, 1.0), self.mix).chunk(2, dim=-1)
        products = []
        for i, (mask, is_odd) in enumerate(self.products):
            # conj(phi[b ^ x]) phi[b]
            left = (real, imag) if mask == 0 else (real[..., self.flipped[i]], imag[..., self.flipped[i]])
            products.append(left[1] * real - left[0] * imag if is_odd else left[0] * real + left[1] * imag)
        if not products:
            return real.square() + imag.square()
        return F.linear(torch.cat(products, dim=-1), self.signs)


def _signs_of_z(n_wires: int) -> Tensor:
    """``(-1)**(bit of wire w in b)``, shape ``(n_wires, 2**n_wires)``: row w gives <Z_w> from the probabilities."""
    bits = torch.arange(2**n_wires) >> torch.arange(n_wires - 1, -1, -1)[:, None] & 1
    return 1.0 - 2.0 * bits


def _with_z(probs: Tensor, signs: Tensor) -> Tensor:
    return torch.cat([probs, F.linear(probs, signs)], dim=-1)


class QAALinear(nn.Module):
    """A frozen linear layer with a quantum-amplitude embedded adapter: ``y = W x + b + s (V f(x) + c)``.

    V and c start at zero, so that a fresh layer returns exactly what ``base`` returns.

    Args:
        base: the linear layer; its parameters are frozen in place (``requires_grad=False``).
        n_layers: number L of layers of the circuit.
        ansatz: name of the circuit, see :func:`qaa.ansatz`.
        readout: what f is; see :class:`Adapter`.
        scaling: s; None chooses ``sqrt(2**n_wires + 1)`` for quadratic readouts and 1 for ``"state"``.
        adapter_bias: whether there is a c; None means yes for Pauli readouts, no otherwise.
        init_angles: ``"uniform"`` in ``[-pi, pi)``, ``"small"`` in ``[-0.1, 0.1)`` radians, or ``"zero"``.
        max_wires: most wires of the circuit; wider inputs go through it in blocks.

    Parameters ``theta`` (the circuit's shape), ``up`` (V, ``(out_features, K)``) and ``bias`` (c, ``(out_features,)``)
    are created on the device of ``base``, in float32 (float64 if ``base`` is).

    Raises:
        TypeError: ``base`` is no ``nn.Linear``.
        ValueError: an argument is out of range, or without ``max_wires`` ``base`` has more than 65,536
            input features.

    Example:
        >>> import torch
        >>> base = torch.nn.Linear(12, 5)
        >>> layer, x = QAALinear(base, n_layers=2), torch.randn(3, 12)
        >>> torch.equal(layer(x), base(x)), layer.theta.shape, layer.up.shape
        (True, torch.Size([2, 4, 3]), torch.Size([5, 4]))
    """

    def __init__(
        self,
        base: nn.Linear,
        n_layers: int = 1,
        ansatz: str = "ring",
        readout: str | Sequence[str] | Readout = "z",
        *,
        scaling: float | None = None,
        adapter_bias: bool | None = None,
        init_angles: str = "uniform",
        max_wires: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"expected base to be a torch.nn.Linear, received {type(base).__name__}")
        if adapter_bias is not None:
            check_flag("adapter_bias", adapter_bias)
        self.base = base.requires_grad_(False)
        self.adapter = Adapter.create(base.in_features, n_layers, ansatz, readout, scaling, max_wires)
        weight = base.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        theta = torch.empty(self.adapter.circuit.parameter_shape, dtype=dtype, device=weight.device)
        up = torch.zeros(base.out_features, self.adapter.n_features, dtype=dtype, device=weight.device)
        self.theta = nn.Parameter(draw_angles(theta, init_angles))
        self.up = nn.Parameter(up)
        has_bias = self.adapter.readout.kind == "expval" if adapter_bias is None else adapter_bias
        self.bias = nn.Parameter(up.new_zeros(base.out_features)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        _check_width(x, self.base.in_features)
        result: Tensor = self.base(x)
        in_place = is_private_result(self.base)
        x = x if ops._is_cast_back(x, self.up.dtype) else x.to(self.up.dtype)
        return self.adapter.add_to(result, x, self.theta, self.up, self.bias, in_place=in_place)


def draw_angles(theta: Tensor, name: str) -> Tensor:
    """Fills ``theta`` in place with angles (radians) drawn as ``name`` of :data:`INIT_ANGLES` says."""
    if not isinstance(name, str) or name not in INIT_ANGLES:
        raise ValueError(f"expected init_angles among {', '.join(INIT_ANGLES)}, received {name!r}")
    return nn.init.uniform_(theta, -INIT_ANGLES[name], INIT_ANGLES[name])


def random_signs(out_features: int, n_features: int, key: int) -> Tensor:
    r"""Signs for a frozen up-projection ``R / sqrt(K)``, drawn from the key and the shape and nothing else.

    The bits are those of SHAKE-256 (FIPS 202), so that every machine and version draws the same and R need not be
    saved. Entries of ``R / sqrt(K)`` have mean 0 and variance 1/K, as those of a normal draw; its K columns have the
    length ``sqrt(out_features / K)`` and are orthogonal up to cosines of about ``1 / sqrt(out_features)``.

    Returns:
        R, shape ``(out_features, K)``, int8, +1 and -1.

    Example:
        >>> random_signs(2, 3, key=0)
        tensor([[ 1, -1,  1],
                [-1,  1,  1]], dtype=torch.int8)
    """
    for what, size in (("out_features", out_features), ("n_features", n_features)):
        check_count(what, size, 2**31 - 1)
    check_key(key)
    count = out_features * n_features
    digest = hashlib.shake_256(f"qaa up-projection {key} {out_features} {n_features}".encode()).digest(-(-count // 8))
    bits = np.unpackbits(np.frombuffer(digest, np.uint8), count=count).reshape(out_features, n_features)
    return torch.from_numpy(2 * bits.astype(np.int8) - 1)


def check_key(key: int) -> None:
    """``ValueError`` unless ``key`` is an integer of 64 bits, which :func:`random_signs` draws from."""
    if isinstance(key, bool) or not isinstance(key, int) or not -(2**63) <= key < 2**63:
        raise ValueError(f"expected projection_key to be an integer of 64 bits, received {shown(key)}")


def check_flag(name: str, value: bool) -> None:
    """``ValueError`` unless ``value`` is True or False."""
    if value is not True and value is not False:
        raise ValueError(f"expected {name} to be True or False, received {value!r}")


def _check_width(x: Tensor, width: int) -> None:
    if x.ndim < 1 or x.shape[-1] != width:
        raise ValueError(f"expected x with a last dimension of {width}, received {x.shape[-1] if x.ndim else ()}")


def check_scaling(scaling: float) -> float:
    """``scaling`` as a float; ``ValueError`` unless it is a finite number."""
    if not is_number(scaling) or not abs(scaling) <= sys.float_info.max:
        raise ValueError(f"expected scaling to be a finite number or None, received {shown(scaling)}")
    return float(scaling)
