"""Controls: adapters without a circuit that share nearly everything else with QAA, and could do what it does.

A control computes what a QAA adapter computes, ``y = W x + b + V (g * (f(u) - m)) + c`` with scaled channels
``u = s * x``, V = 0 and c = 0 at the start, and buffers s, g and m measured on the same batches of training data. Only
its features f come from elsewhere. Where a control does as well as QAA, the circuit has not earned its place.

One more difference: QAA caps each factor at 1000 times the layer's median and takes for constant what varies by less
than 1e-6 of its size; here there is no cap, and the limit is 1e-12. Published rows depend on it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaa.circuit import check_count


class Control(nn.Module):
    r"""A frozen linear layer plus features of its input: :math:`y = W x + b + V\,(g \odot (f(s \odot x) - m)) + c`.

    Shapes: x ``(..., d)``, y ``(..., d_out)``, V ``(d_out, K)``, c ``(d_out,)`` (only where ``bias`` is true), s
    ``(d,)``, g and m ``(K,)``. V and c are trained and start at zero, so that a fresh control is an exact no-op. s, g
    and m are buffers that start at one, one and zero, until :func:`calibrate` has measured them:

    * s is 1/rms of each input channel (``scale_channels``),
    * without a bias g is 1/rms of each feature and m is 0; with one m is its mean and g 1/std (``standardize``).

    With ``r``, V is ``B M`` with B ``(d_out, r)``, zero at the start, and M ``(r, K)``, both trained, as in QAA's own.

    Raises:
        ValueError: ``n_features`` is not between 1 and the layer's width, or ``r`` not between 1 and ``n_features``.
    """

    channels: Tensor
    mean: Tensor
    gain: Tensor
    scaling = 1.0  # a fixed factor of V f

    def __init__(
        self,
        base: nn.Linear,
        n_features: int = 10,
        bias: bool = False,
        scale_channels: bool = True,
        standardize: bool = True,
        r: int | None = None,
    ) -> None:
        super().__init__()
        check_count("n_features", n_features, base.in_features)
        if r is not None:
            check_count("r", r, n_features)
        self.base = base
        self.n_features, self.scale_channels, self.standardize = n_features, scale_channels, standardize
        weight = base.weight.detach()
        self.up = nn.Parameter(weight.new_zeros(base.out_features, n_features if r is None else r))
        self.mix = None if r is None else nn.Parameter(weight.new_empty(r, n_features).normal_(std=n_features**-0.5))
        self.bias = nn.Parameter(weight.new_zeros(base.out_features)) if bias else None
        self.register_buffer("channels", weight.new_ones(base.in_features))
        self.register_buffer("mean", weight.new_zeros(n_features))
        self.register_buffer("gain", weight.new_ones(n_features))

    def features(self, x: Tensor) -> Tensor:
        """f(s x): x of shape ``(..., d)`` to features of shape ``(..., K)``, before they are standardised."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        up = (self.up if self.mix is None else self.up @ self.mix) * (self.gain * self.scaling)
        bias = None if self.bias is None else self.bias - up @ self.mean
        result: Tensor = self.base(x) + F.linear(self.features(x), up, bias)
        return result

    @torch.no_grad()
    def set_channels(self, rms: Tensor) -> None:
        """Takes the measured rms of every input channel, shape ``(d,)``."""
        if self.scale_channels:
            self.channels.copy_(_inverse(rms))

    @torch.no_grad()
    def set_features(self, mean: Tensor, square: Tensor) -> None:
        """Takes the measured mean and mean square of every feature, shape ``(K,)`` each."""
        if self.standardize:
            if self.bias is not None:
                self.mean.copy_(mean)
                square = square - mean.square()
            self.gain.copy_(_inverse(square.clamp_min(0).sqrt()))


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 1 for what (up to rounding) is constant."""
    return torch.where(scale > 1e-12, 1 / scale, 1.0)


def orthonormal_rows(count: int, width: int) -> Tensor:
    """A random ``(count, width)`` matrix with orthonormal rows, uniformly distributed: Q of a Gaussian matrix's QR.

    Example:
        >>> rows = orthonormal_rows(3, 8)
        >>> torch.allclose(rows @ rows.T, torch.eye(3), atol=1e-6)
        True
    """
    q, r = torch.linalg.qr(torch.randn(width, count, dtype=torch.float64))
    rows: Tensor = (q * r.diagonal().sign()).T.float().contiguous()
    return rows


class RandomProjection(Control):
    """``f(u) = P u`` with frozen random orthonormal rows P, shape ``(K, d)``: the ``"state"`` readout, no circuit."""

    rows: Tensor

    def __init__(self, base: nn.Linear, n_features: int = 10, **options: Any) -> None:
        super().__init__(base, n_features, **options)
        self.register_buffer("rows", orthonormal_rows(n_features, base.in_features).to(base.weight))

    def features(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rows * self.channels)


class RandomSquares(RandomProjection):
    """``f(u) = (P u / ||u||)^2``, quadratic as ``<Z>`` is, with a bias as the paper's form has; zeros give zeros."""

    def __init__(self, base: nn.Linear, n_features: int = 10, bias: bool = True, **options: Any) -> None:
        super().__init__(base, n_features, bias=bias, **options)

    def features(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x * self.channels, dim=-1), self.rows).square()


class LargestChannels(Control):
    """``f(u)`` are the K channels whose rms was largest when measured (the first K before), each scaled."""

    index: Tensor

    def __init__(self, base: nn.Linear, n_features: int = 10, **options: Any) -> None:
        super().__init__(base, n_features, **options)
        self.register_buffer("index", torch.arange(n_features, device=base.weight.device))

    def features(self, x: Tensor) -> Tensor:
        return x[..., self.index] * self.channels[self.index]

    def set_channels(self, rms: Tensor) -> None:
        self.index.copy_(rms.topk(self.n_features).indices.sort().values)
        super().set_channels(rms)


class WhitenedLora(Control):
    """LoRA on scaled channels: ``f(u) = A u`` with A trained, shape ``(r, d)``, drawn as LoRA draws it.

    What LoRA would be with QAA's scaling: V is LoRA's B, and ``alpha / r`` multiplies V f. ``standardize`` is off
    unless asked for.
    """

    def __init__(
        self, base: nn.Linear, r: int = 8, alpha: float = 16.0, standardize: bool = False, **options: Any
    ) -> None:
        super().__init__(base, r, standardize=standardize, **options)
        self.scaling = alpha / r
        self.down = nn.Parameter(torch.empty(r, base.in_features).to(base.weight))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def features(self, x: Tensor) -> Tensor:
        return F.linear(x, self.down * self.channels)


#: name of the method -> its layer
CONTROLS: dict[str, type[Control]] = {
    "random-projection": RandomProjection,
    "random-squares": RandomSquares,
    "whitened-lora": WhitenedLora,
    "largest-channels": LargestChannels,
}


def check_control_options(kind: type[Control], options: Iterable[str]) -> None:
    """Raises ``TypeError`` for an option that no constructor of the control has."""
    classes = [each for each in kind.__mro__ if issubclass(each, Control)]
    known = {name for each in classes for name in inspect.signature(each.__init__).parameters}
    known -= {"self", "base", "options"}
    for name in options:
        if name not in known:
            raise TypeError(f"expected options among {', '.join(sorted(known))}, received {name!r}")


def wrap(model: nn.Module, names: Iterable[str], kind: type[Control], options: dict[str, Any]) -> None:
    """Replaces the named linear layers of ``model`` by controls; raises ``TypeError`` where one is no linear layer."""
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"expected {name} to be a torch.nn.Linear, received a {type(layer).__name__}")
        setattr(model.get_submodule(parent), child, kind(layer, **options))


def controls(model: nn.Module) -> dict[str, Control]:
    """The controls in ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Control)}


@torch.no_grad()
def calibrate(model: nn.Module, batches: list[Any], forward: Callable[[nn.Module, Any], Any]) -> int:
    """Measures the channels that reach every control, then its features; returns the number of controls.

    Two passes over ``batches`` with sums in float64, each by ``forward(model, batch)``; padding counts as data.

    Raises:
        ValueError: there is no batch.
    """
    layers = controls(model)
    if layers and not batches:
        raise ValueError("expected at least one batch, received none")
    for channels_first in (True, False):
        moments: dict[str, list[Tensor]] = {name: [] for name in layers}
        take = partial(_measure, moments, channels_first)
        hooks = [layer.register_forward_pre_hook(partial(take, name)) for name, layer in layers.items()]
        was_training = model.training
        model.eval()
        try:
            for batch in batches:
                forward(model, batch)
        finally:
            model.train(was_training)
            for hook in hooks:
                hook.remove()
        for name, layer in layers.items():
            count, total, square = (sum(parts) for parts in zip(*moments[name], strict=True))
            if channels_first:
                layer.set_channels((square / count).sqrt())
            else:
                layer.set_features(total / count, square / count)
    return len(layers)


def _measure(moments: dict[str, Any], channels_first: bool, name: str, layer: Any, args: tuple[Tensor, ...]) -> None:
    values = args[0] if channels_first else layer.features(args[0])
    rows = values.detach().flatten(0, -2).double()
    moments[name].append((len(rows), rows.sum(0), rows.square().sum(0)))
