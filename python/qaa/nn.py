"""Torch modules: a circuit as a layer, and a frozen linear layer with a quantum-amplitude embedded adapter.

The arithmetic of the adapter is in :class:`Adapter` and is written once: :class:`QAALinear` below and the PEFT layer
in :mod:`qaa.peft` both call it with parameters of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaa import ops
from qaa.circuit import MAX_WIRES, Circuit, Readout, ansatz

#: name -> half-width of the uniform distribution (radians) that the angles are drawn from
INIT_ANGLES: dict[str, float] = {"uniform": math.pi, "small": 0.1, "zero": 0.0}


@dataclass(frozen=True)
class Adapter:
    r"""What an adapter computes, without its parameters: ``s * (V f(x) + c)`` for inputs of ``in_features``.

    Quadratic readouts (``"z"``, Pauli strings, ``"probs"``) embed the normalised input into the amplitudes,

    ``f_k = <phi| M_k |phi>,  |phi> = U(theta) pad(x) / ||x||``,

    and the ``"state"`` readout takes the real parts of the first K amplitudes of the input that is *not* normalised,
    which makes it linear in x:

    ``f = A x,  A = Re U(theta)[:K, :in_features]``.

    Attributes:
        circuit: U(theta), with angles in radians and wire 0 as the most significant bit of the amplitude index.
        readout: the M_k, or the number K of amplitudes.
        scaling: s. ``create`` chooses ``sqrt(2**n_wires + 1)`` for quadratic readouts, because ``<Z>`` of a state that
            is spread over all amplitudes deviates from 0 by only ``1 / sqrt(2**n_wires + 1)``, and 1 for ``"state"``.
        in_features: width of x, at most ``2**n_wires``; the rest of the amplitudes is zero.

    Example:
        >>> adapter = Adapter.create(in_features=48, n_layers=2, readout="z")
        >>> adapter.circuit.n_wires, adapter.n_features, adapter.is_linear, adapter.scaling == 65**0.5
        (6, 6, False, True)
    """

    circuit: Circuit
    readout: Readout
    scaling: float
    in_features: int
    _known_rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @staticmethod
    def create(
        in_features: int,
        n_layers: int = 1,
        ansatz_name: str = "ring",
        readout: str | Sequence[str] | Readout = "z",
        scaling: float | None = None,
    ) -> Adapter:
        """The adapter with ``ceil(log2(in_features))`` wires (at least one); ``ValueError`` if that is above 16."""
        limit = 2**MAX_WIRES
        if isinstance(in_features, bool) or not isinstance(in_features, int) or not 1 <= in_features <= limit:
            raise ValueError(f"expected a layer with 1 to {limit} input features, received {in_features!r}")
        n_wires = max(1, (in_features - 1).bit_length())
        parsed = Readout.parse(readout, n_wires)
        if scaling is None:
            scaling = 1.0 if parsed.kind == "state" else math.sqrt(2**n_wires + 1)
        return Adapter(ansatz(ansatz_name, n_wires, n_layers), parsed, check_scaling(scaling), in_features)

    @property
    def n_features(self) -> int:
        """Number K of features, the width of V."""
        return self.readout.n_outputs

    @property
    def is_linear(self) -> bool:
        """Whether the adapter is linear in x, so that it merges into a weight and exports as a LoRA."""
        return self.readout.kind == "state"

    def down(self, theta: Tensor) -> Tensor:
        """``A = Re U(theta)[:K, :in_features]``, shape ``(K, in_features)``, for the ``"state"`` readout."""
        if not self.is_linear:
            raise ValueError(f"expected the readout 'state', which is linear in x, received {str(self.readout)!r}")
        is_trained = theta.requires_grad and torch.is_grad_enabled()
        if is_trained or not ops._is_plain(theta):
            return self._rows(theta)
        # Generation, and training with frozen angles, ask for the same rows over and over: comparing a hundred angles
        # takes microseconds, the rows some hundred times as long.
        known = self._known_rows.get("last")
        if known is None or known[0].dtype != theta.dtype or not torch.equal(known[0], theta):
            with torch.inference_mode(False), torch.no_grad():  # training may use these tensors later
                known = self._known_rows["last"] = theta.clone(), self._rows(theta)
        return known[1]

    def _rows(self, theta: Tensor) -> Tensor:
        return ops.amplitude_rows(self.circuit, theta, self.n_features, width=self.in_features, real=True)

    def features(self, theta: Tensor, x: Tensor, channels: Tensor | None = None) -> Tensor:
        """``f(x)``: x of shape ``(..., in_features)`` to features of shape ``(..., K)``, in x's dtype.

        ``channels`` of shape ``(in_features,)`` multiplies x first; where f is linear it goes into the matrix.
        """
        if self.is_linear:
            down = self.down(theta)
            return F.linear(x, (down if channels is None else down * channels).to(x.dtype))
        return ops.quantum_features(self.circuit, theta, x if channels is None else x * channels, self.readout)

    def delta(
        self, x: Tensor, theta: Tensor, up: Tensor, bias: Tensor | None, channels: Tensor | None = None
    ) -> Tensor:
        """``s * (V f(x) + c)``, shape ``(..., out_features)``: ``up`` is V, ``bias`` is c or None."""
        return F.linear(self.features(theta, x, channels), up, bias) * self.scaling

    def add_to(
        self,
        base: Tensor,
        x: Tensor,
        theta: Tensor,
        up: Tensor,
        bias: Tensor | None,
        channels: Tensor | None = None,
        *,
        in_place: bool = False,
    ) -> Tensor:
        """``base + delta(x, ...)`` in the dtype of ``base``; with ``in_place`` it may be written over ``base``."""
        return ops.project(base, self.features(theta, x, channels), up, bias, self.scaling, in_place=in_place)


_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_private_result(layer: nn.Module) -> bool:
    """Whether nobody but the caller sees what ``layer`` returns, so that it may be written over.

    A plain linear layer saves its input for the backward pass and not its output; a hook, or a ``forward`` that was
    put in place of its own, may keep that.
    """
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    everywhere = vars(nn.modules.module)
    return not any(getattr(layer, name) or everywhere["_global" + name] for name in _HOOKS)


class QuantumLayer(nn.Module):
    """The features of a circuit applied to amplitude-embedded inputs: ``f_k = <phi|M_k|phi>``.

    ``|phi> = U(theta) pad(x) / ||x||``; with ``normalize=False`` the division is left out.

    Args:
        circuit: U(theta); ``theta`` is in radians, starts uniform in ``[-pi, pi)`` and has the circuit's shape.
        readout: ``"z"``, ``"probs"``, ``"probs[:K]"``, ``"state"``, ``"state[:K]"`` or Pauli strings, wire 0 first.
        normalize: whether x is divided by its norm; rows of zeros give features 0 either way.
        shots: if given, features and the gradient of ``theta`` are unbiased estimates from so many runs for each
            vector, as on a device (:mod:`qaa.shots`); x then may not need a gradient.
        generator: where the random numbers for ``shots`` come from; by default torch's own generator.

    Shapes:
        x ``(..., d)`` with ``d <= 2**n_wires``, float64, float32, bfloat16 or float16, zero-padded to ``2**n_wires``;
        result ``(..., K)`` in x's dtype, complex for ``"state"``.

    Raises:
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
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(circuit, Circuit):
            raise TypeError(f"expected a qaa.Circuit, received {type(circuit).__name__}")
        self.circuit = circuit
        self.readout = Readout.parse(readout, circuit.n_wires)
        self.normalize = normalize
        self.shots, self.generator = shots, generator
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
            generator=self.generator,
        )

    def extra_repr(self) -> str:
        shots = "" if self.shots is None else f", shots={self.shots}"
        return f"n_wires={self.circuit.n_wires}, theta={tuple(self.theta.shape)}, readout={str(self.readout)!r}{shots}"


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

    Parameters ``theta`` (the circuit's shape), ``up`` (V, ``(out_features, K)``) and ``bias`` (c, ``(out_features,)``)
    are created on the device of ``base``, in float32 (float64 if ``base`` is).

    Raises:
        TypeError: ``base`` is no ``nn.Linear``.
        ValueError: an argument is out of range, or ``base`` has more than 65,536 input features.

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
    ) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"expected base to be a torch.nn.Linear, received {type(base).__name__}")
        self.base = base.requires_grad_(False)
        self.adapter = Adapter.create(base.in_features, n_layers, ansatz, readout, scaling)
        weight = base.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        theta = torch.empty(self.adapter.circuit.parameter_shape, dtype=dtype, device=weight.device)
        up = torch.zeros(base.out_features, self.adapter.n_features, dtype=dtype, device=weight.device)
        self.theta = nn.Parameter(draw_angles(theta, init_angles))
        self.up = nn.Parameter(up)
        has_bias = self.adapter.readout.kind == "expval" if adapter_bias is None else adapter_bias
        self.bias = nn.Parameter(up.new_zeros(base.out_features)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x)
        in_place = is_private_result(self.base)
        return self.adapter.add_to(result, x.to(self.up.dtype), self.theta, self.up, self.bias, in_place=in_place)


def draw_angles(theta: Tensor, name: str) -> Tensor:
    """Fills ``theta`` in place with angles (radians) drawn as ``name`` of :data:`INIT_ANGLES` says."""
    if name not in INIT_ANGLES:
        raise ValueError(f"expected init_angles among {', '.join(INIT_ANGLES)}, received {name!r}")
    return nn.init.uniform_(theta, -INIT_ANGLES[name], INIT_ANGLES[name])


def check_scaling(scaling: float) -> float:
    """``scaling`` as a float; ``ValueError`` unless it is a finite number."""
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or not math.isfinite(scaling):
        raise ValueError(f"expected scaling to be a finite number or None, received {scaling!r}")
    return float(scaling)
