"""SoRA, sparse low-rank adaptation, as a PEFT method: a LoRA with a gate per rank that training drives to zero.

``y = W x + b + (alpha / r) B (g * (A x))``, and after each optimizer step the proximal step of ``xi * |g|_1``, the soft
threshold ``g <- sign(g) max(|g| - xi, 0)``. Ranks whose gate is zero contribute nothing and are pruned by
:func:`qaa.peft.to_lora`.

Source: Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models", EMNLP 2023, arXiv 2311.11696. The
authors' program (github.com/TsinghuaC3I/SoRA, src/sparse_optimizer.py and src/trainer.py) differs in two ways that are
options here: its threshold works in place and so sets every gate below ``2 xi`` to zero (``operator="repository"``),
and its loss has a further term ``l1 * mean |g|``, so that the L1 norm acts twice (``l1``).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftType
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qaa.circuit import MAX_WIRES, check_count, is_number, shown

from .tuner import AdapterParameters, AdditiveLayer, AdditiveModel, check_flags, settle_modules

OPERATORS = ("soft", "repository")
SCHEDULES = ("constant", "linear", "log_linear", "exp_linear")


@dataclass
class SoraConfig(PeftConfig):
    """Configuration of sparse low-rank adaptation, ``y = W x + b + (alpha / r) B (g * (A x))``.

    The configuration describes the layer; the threshold belongs to training: add :class:`SoraCallback` to a
    ``transformers.Trainer``, or call :func:`sora_proximal_step` after each optimizer step. Without either this is a
    LoRA with a gate that never becomes sparse.

    Args:
        target_modules: names of the linear layers to adapt (a list of names or endings, a regular expression, or
            ``"all-linear"``); None chooses what PEFT's LoRA adapts in this architecture.
        exclude_modules: names that are not adapted although they match.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: name of the module list that ``layers_to_transform`` counts in.
        modules_to_save: other modules that are trained in full and saved.
        r: largest rank, the number of gates of a layer.
        sora_alpha: alpha; the adapter is scaled by ``alpha / r``.
        sora_dropout: probability with which elements of the adapter's input are dropped in training.
        init_weights: True for B = 0, an exact no-op; False for a random B (tests).

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> SoraConfig(r=8, target_modules=["q_proj"]).peft_type.value
        'SORA'
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the linear layers to adapt: a list of names or endings, a regular expression, or "
            "'all-linear'. None adapts what PEFT's LoRA adapts in this architecture. The authors adapt all six linear "
            "layers of a block, which pays since pruning then decides where ranks are needed."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names that are not adapted although they match; pays together with 'all-linear'."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Indices of the layers to adapt, one or a list; the upper ones alone train faster."},
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the module list that layers_to_transform counts in, if it is an unusual one."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Other modules that are trained in full and saved, such as a new classification head."},
    )
    r: int = field(
        default=8,
        metadata={
            "help": "Largest rank, the number of gates of a layer. Choose it larger than for a LoRA: what is not "
            "needed is pruned, at the price of training time."
        },
    )
    sora_alpha: float = field(default=16.0, metadata={"help": "alpha: the adapter is scaled by alpha / r, as in LoRA."})
    sora_dropout: float = field(
        default=0.0,
        metadata={"help": "Dropout of the adapter's input in training; pays on small data sets."},
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True: B = 0, so that a fresh adapter is an exact no-op. False: random, for tests."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType.SORA  # type: ignore[attr-defined]
        settle_modules(self)
        check_flags(self, "init_weights")
        self.r = check_count("r", self.r, 2**MAX_WIRES)
        if not is_number(self.sora_alpha) or not 0 < self.sora_alpha <= sys.float_info.max:
            raise ValueError(f"expected sora_alpha to be a positive number, received {shown(self.sora_alpha)}")
        if not is_number(self.sora_dropout) or not 0 <= self.sora_dropout < 1:
            raise ValueError(f"expected sora_dropout from 0 to below 1, received {shown(self.sora_dropout)}")


class SoraLayer(AdditiveLayer):
    """A linear layer with SoRA adapters."""

    method = "SoRA"
    adapter_layer_names = ("sora_A", "sora_B", "sora_gate")
    other_param_names = ("sora_dropout", "sora_scaling")

    def _create_containers(self) -> None:
        self.sora_A = AdapterParameters()  # (r, in_features)
        self.sora_B = AdapterParameters()  # (out_features, r)
        self.sora_gate = AdapterParameters()  # g, (r,)
        self.sora_dropout = nn.ModuleDict()
        self.sora_scaling: dict[str, float] = {}

    def _create_adapter(self, adapter_name: str, config: Any) -> None:
        most = max(64, self.in_features, self.out_features)
        if config.r > most:  # a stranger's number must not take more memory than the layer has
            raise ValueError(
                f"expected r of at most {most} for a layer of {self.in_features} inputs and {self.out_features} "
                f"outputs, received {config.r}"
            )
        # the published initialisation: A as in LoRA, B zero, gates standard normal
        self.sora_A[adapter_name] = nn.init.kaiming_uniform_(torch.empty(config.r, self.in_features), a=math.sqrt(5))
        self.sora_B[adapter_name] = torch.zeros(self.out_features, config.r)
        self.sora_gate[adapter_name] = torch.randn(config.r)
        if not config.init_weights:
            nn.init.normal_(self.sora_B[adapter_name], std=config.r**-0.5)
        self.sora_dropout[adapter_name] = nn.Dropout(config.sora_dropout) if config.sora_dropout else nn.Identity()
        self.sora_scaling[adapter_name] = config.sora_alpha / config.r

    def add_to(self, base: Tensor, adapter_name: str, x: Tensor) -> Tensor:
        down, up = self.sora_A[adapter_name], self.sora_B[adapter_name]
        self._check_loaded(adapter_name, down, x)
        x = self.sora_dropout[adapter_name](self._cast_input_dtype(x, down.dtype))
        gated = nn.functional.linear(x, down) * self.sora_gate[adapter_name]
        return base + nn.functional.linear(gated, up) * self.sora_scaling[adapter_name]

    def lora_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, None]:
        gate = self.sora_gate[adapter_name].float()
        up = self.sora_B[adapter_name].float() * (gate * self.sora_scaling[adapter_name])
        return self.sora_A[adapter_name].float()[gate != 0], up[:, gate != 0], None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class SoraModel(AdditiveModel):
    """Creates a SoRA model from a pretrained one; use it through ``peft.get_peft_model(model, SoraConfig(...))``."""

    prefix = "sora_"
    tuner_layer_cls = SoraLayer


def soft_threshold(gate: Tensor, xi: float, operator: str = "soft") -> Tensor:
    """The gates after one proximal step with threshold ``xi``.

    ``"soft"`` is the proximal operator of ``xi * |g|_1``, ``sign(g) max(|g| - xi, 0)`` (arXiv 2311.11696).
    ``"repository"`` does what the authors' program does in place: gates beyond ``xi`` shrink by ``xi``, and what is
    then below ``xi`` is set to zero, so that everything below ``2 xi`` vanishes at once.

    Args:
        gate: gates of any shape.
        xi: the threshold, at least 0.
        operator: ``"soft"`` or ``"repository"``.

    Raises:
        ValueError: ``xi`` or the operator is none of these.

    Example:
        >>> soft_threshold(torch.tensor([0.5, 1.5, -3.0]), 1.0).tolist()
        [0.0, 0.5, -2.0]
        >>> soft_threshold(torch.tensor([0.5, 1.5, -3.0]), 1.0, "repository").tolist()
        [0.0, 0.0, -2.0]
    """
    if operator not in OPERATORS:
        raise ValueError(f"expected an operator among {', '.join(OPERATORS)}, received {operator!r}")
    if not is_number(xi) or not 0 <= xi <= sys.float_info.max:
        raise ValueError(f"expected a threshold xi of at least 0, received {shown(xi)}")
    if operator == "soft":
        return gate.sign() * (gate.abs() - xi).clamp_min(0)
    shrunk = torch.where(gate.abs() > xi, gate - gate.sign() * xi, gate)
    return torch.where(shrunk.abs() < xi, torch.zeros_like(shrunk), shrunk)


def _gates(model: nn.Module, adapter_name: str | None) -> Iterator[Tensor]:
    """The gates of ``adapter_name`` in every SoRA layer, for None those of the active adapters."""
    layers = [module for module in model.modules() if isinstance(module, SoraLayer)]
    gates = [
        layer.sora_gate[name]
        for layer in layers
        for name in ([adapter_name] if adapter_name is not None else layer.active_adapters)
        if name in layer.sora_gate
    ]
    if not gates:
        which = "an active SoRA adapter" if adapter_name is None else f"a SoRA adapter named {adapter_name!r}"
        raise ValueError(f"expected a model with {which}, received a {type(model).__name__} without it")
    return iter(gates)


@torch.no_grad()
def sora_proximal_step(model: nn.Module, xi: float, *, operator: str = "soft", adapter_name: str | None = None) -> None:
    """Applies :func:`soft_threshold` to the gates in place; call it after each ``optimizer.step()``.

    The paper's threshold is ``eta * lambda``, learning rate times the weight of the L1 term; the authors' program
    uses a fixed one, by default 1e-3. Both are a choice of ``xi``.

    Args:
        model: a model with SoRA adapters.
        xi: the threshold, at least 0.
        operator: ``"soft"`` or ``"repository"``.
        adapter_name: which adapter; None means the active ones.

    Raises:
        ValueError: the model has no such adapter, an argument is out of range, or a gate of 16 bits is so large that
            the threshold would vanish in its rounding.

    Example:
        >>> import peft
        >>> config = SoraConfig(r=4, target_modules=["0"])
        >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 3)), config)
        >>> sora_proximal_step(model, xi=100.0)
        >>> sora_sparsity(model), sora_l1(model).item()
        (1.0, 0.0)
    """
    gates = list(_gates(model, adapter_name))
    after = [soft_threshold(gate, xi, operator) for gate in gates]
    for gate in gates:
        if gate.itemsize < 4 and xi > 0 and bool((gate.abs() * torch.finfo(gate.dtype).eps > xi).any()):
            raise ValueError(
                f"expected gates of float32, received {str(gate.dtype).removeprefix('torch.')} in which a step of {xi} "
                "is lost in rounding; cast them: parameter.data = parameter.data.float()"
            )
    for gate, value in zip(gates, after, strict=True):
        gate.copy_(value)


def sora_l1(model: nn.Module, adapter_name: str | None = None) -> Tensor:
    """``sum |g| / (number of gates)`` over all layers, a scalar to be weighted and added to the loss.

    Args:
        model: a model with SoRA adapters.
        adapter_name: which adapter; None means the active ones.

    Raises:
        ValueError: the model has no such adapter.
    """
    return torch.cat([gate.flatten().float() for gate in _gates(model, adapter_name)]).abs().mean()


def sora_sparsity(model: nn.Module, adapter_name: str | None = None) -> float:
    """Share of the gates that are exactly zero, from 0 to 1.

    Args:
        model: a model with SoRA adapters.
        adapter_name: which adapter; None means the active ones.

    Raises:
        ValueError: the model has no such adapter.
    """
    return torch.cat([gate.detach().flatten() == 0 for gate in _gates(model, adapter_name)]).float().mean().item()


def threshold_at(progress: float, xi: float, max_xi: float | None, schedule: str = "constant") -> float:
    """The threshold at ``progress`` from 0 to 1: from ``xi`` up to ``max_xi``.

    ``"linear"``: ``xi + p (max_xi - xi)``; ``"log_linear"``: ``log((1 - p) e^xi + p e^max_xi)``; ``"exp_linear"``:
    ``xi (max_xi / xi)^p``, a geometric progression. Names and formulas are the authors' (src/sparse_optimizer.py).

    Raises:
        ValueError: there is no such schedule.

    Example:
        >>> round(threshold_at(0.5, 1e-4, 1e-2, "exp_linear"), 6)
        0.001
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"expected a schedule among {', '.join(SCHEDULES)}, received {shown(schedule)}")
    if schedule == "constant" or max_xi is None:
        return xi
    if schedule == "linear":
        return xi + progress * (max_xi - xi)
    if schedule == "log_linear":
        return math.log((1 - progress) * math.exp(xi) + progress * math.exp(max_xi))
    return xi * math.exp(progress * math.log(max_xi / xi))


class SoraCallback(TrainerCallback):
    """Sparsifies a SoRA adapter while a ``transformers.Trainer`` trains it: a proximal step after each optimizer step.

    Args:
        xi: threshold, or its first value if it rises.
        max_xi: last value of the threshold; needed by every schedule but ``"constant"``.
        schedule: ``"constant"``, ``"linear"``, ``"log_linear"`` or ``"exp_linear"``, see :func:`threshold_at`.
        dense_share: share of the training, from 0 to 1, that passes before the threshold starts to act.
        rounds: number of values that the threshold takes; None changes it at every step. The authors train 15 epochs
            at each of 10 values.
        operator: ``"soft"`` or ``"repository"``, see :func:`soft_threshold`.
        l1: weight of the authors' further loss term ``mean |g|``. Its (sub)gradient is added to that of the gates just
            before the optimizer step, hence after gradient clipping and without changing the reported loss.

    Raises:
        ValueError: an argument is out of range, or the trained model has no active SoRA adapter.

    Example:
        >>> callback = SoraCallback(xi=1e-4, max_xi=1e-2, schedule="exp_linear")
        >>> [round(callback.threshold(step, 101), 6) for step in (0, 50, 100)]
        [0.0001, 0.001, 0.01]
    """

    def __init__(
        self,
        xi: float = 1e-3,
        *,
        max_xi: float | None = None,
        schedule: str = "constant",
        dense_share: float = 0.0,
        rounds: int | None = None,
        operator: str = "soft",
        l1: float = 0.0,
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"expected a schedule among {', '.join(SCHEDULES)}, received {schedule!r}")
        if (max_xi is None) != (schedule == "constant"):
            raise ValueError(
                f"expected max_xi with every schedule but 'constant', received max_xi={max_xi!r} with {schedule!r}"
            )
        most = sys.float_info.max
        if not is_number(xi) or not 0 <= xi <= most or (xi == 0 and schedule == "exp_linear"):
            raise ValueError(f"expected a threshold xi of at least 0 (above 0 for 'exp_linear'), received {shown(xi)}")
        if max_xi is not None and (not is_number(max_xi) or not xi <= max_xi <= most):
            raise ValueError(f"expected max_xi to be a number of at least xi={xi!r}, received {shown(max_xi)}")
        if not is_number(dense_share) or not 0 <= dense_share < 1:
            raise ValueError(f"expected dense_share from 0 to below 1, received {shown(dense_share)}")
        if rounds is not None and (not isinstance(rounds, int) or rounds < 2):
            raise ValueError(f"expected rounds to be an integer of at least 2 or None, received {shown(rounds)}")
        if operator not in OPERATORS:
            raise ValueError(f"expected an operator among {', '.join(OPERATORS)}, received {operator!r}")
        if not is_number(l1) or not 0 <= l1 <= most:
            raise ValueError(f"expected l1 to be a number of at least 0, received {shown(l1)}")
        self.xi, self.max_xi, self.schedule = xi, max_xi, schedule
        self.dense_share, self.rounds, self.operator, self.l1 = dense_share, rounds, operator, l1

    def threshold(self, step: int, max_steps: int) -> float:
        """The threshold after optimizer step ``step`` (from 0) of ``max_steps``."""
        progress = step / max(1, max_steps - 1)
        if progress < self.dense_share:
            return 0.0
        progress = min(1.0, (progress - self.dense_share) / (1 - self.dense_share))
        if self.rounds is not None:
            progress = min(self.rounds - 1, int(progress * self.rounds)) / (self.rounds - 1)
        return threshold_at(progress, self.xi, self.max_xi, self.schedule)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _gates(kwargs["model"], None)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.l1 > 0:
            gates = [gate for gate in _gates(kwargs["model"], None) if gate.grad is not None]
            total = sum(gate.numel() for gate in gates)
            for gate in gates:
                gate.grad.add_(gate.detach().sign(), alpha=self.l1 / total)  # type: ignore[union-attr]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        xi = self.threshold(state.global_step, state.max_steps)
        sora_proximal_step(kwargs["model"], xi, operator=self.operator)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # for the callbacks after this one, and for the history, of which the Trainer has made a copy already
        for record in (kwargs["logs"], state.log_history[-1]):
            record["sora_sparsity"] = sora_sparsity(kwargs["model"])
