"""What is trained: each method turns the frozen model into one with trainable parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .config import CompareError, Settings
from .controls import CONTROLS, check_control_options, controls, wrap
from .controls import calibrate as calibrate_controls
from .models import answer_losses, decoder_layers

PREFIX_TEXT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)


@dataclass(frozen=True)
class Method:
    """What a row trains, and how it is shown: names, the learning rates to choose from, where the method reaches."""

    name: str
    label: str
    learning_rates: tuple[float, ...]
    top_layers_only: bool = True  # False: it changes every layer, whatever ``layers`` says
    angle_rate: float = 1.0  # learning rate of circuit angles relative to that of the other parameters
    about: str = ""
    own: bool = False  # its layers are this package's, so that a change of their code changes it

    @property
    def is_qaa(self) -> bool:
        """Whether the method is a form of QAA."""
        return self.name.startswith("qaa")


_RATES = (1e-3, 3e-3, 1e-2)

METHODS = {
    method.name: method
    for method in (
        Method(
            "qaa-paper", "QAA (paper form)", (1e-4, 3e-4, 1e-3), angle_rate=10.0, own=True,
            about="amplitude embedding, 4-layer circuit, <Z> of every wire, up-projection and bias",
        ),
        Method(
            "qaa", "QAA", _RATES, own=True,
            about="amplitude embedding, 4-layer circuit, half of the scaled input's amplitudes, V of rank 4",
        ),
        Method("lora", "LoRA", _RATES, about="rank 8, alpha 16, PEFT's own"),
        Method("sora", "SoRA", _RATES, own=True,
               about="rank 8 with a gate per rank, soft threshold after each step"),
        Method(
            "prefix", "Prefix", (3e-3, 1e-2, 3e-2), top_layers_only=False,
            about="8 virtual tokens in every layer, PEFT's own, started from the keys and values of a real text",
        ),
        Method("full", "Full fine-tuning", (1e-4, 3e-4, 1e-3), about="every weight of the adapted layers"),
        Method("rslora", "rsLoRA", _RATES, about="LoRA of rank 8, alpha 16, scaled by alpha over the rank's root"),
        Method("vera", "VeRA", (1e-2, 3e-2, 1e-1),
               about="frozen random matrices of rank 256 shared by all layers, trained vectors, PEFT's own"),
        Method("ia3", "IA3", (1e-2, 3e-2, 1e-1), about="a trained factor for every output channel, PEFT's own"),
        Method("road", "RoAd", (1e-2, 3e-2, 1e-1),
               about="trained rotations and scales of pairs of output channels, PEFT's own"),
        Method("bias", "Bias only", (1e-2, 3e-2, 1e-1), about="a trained bias of every adapted linear layer"),
        Method("random-projection", "Random projection", _RATES,
               about="control: 10 random orthonormal projections of the scaled input, frozen and standardised"),
        Method("random-squares", "Random squares", _RATES,
               about="control: squares of 10 random projections of the scaled, normalised input, standardised"),
        Method("whitened-lora", "LoRA, scaled channels", _RATES,
               about="control: LoRA of rank 8, alpha 16, on inputs scaled channel by channel"),
        Method("largest-channels", "Largest channels", _RATES,
               about="control: the 10 input channels of largest rms, scaled"),
        Method("lora-frozen-a", "LoRA, A frozen", _RATES,
               about="control: LoRA of rank 10, alpha 20, whose A is frozen"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row of the table: a name, and a method with options."""

    name: str
    method: Method
    options: Mapping[str, Any]

    @property
    def label(self) -> str:
        """What readers see."""
        return self.method.label

    @property
    def about(self) -> str:
        """One line on what is trained."""
        changed = ", ".join(f"{key} = {value}" for key, value in self.options.items())
        return f"{self.method.about}; here with {changed}" if changed else self.method.about


def row(chosen: Settings, name: str) -> Row:
    """The row ``name`` of a comparison: the method with what its variant changes."""
    variant = chosen.row(name)
    method = METHODS[variant.method]
    method = replace(
        method,
        # a variant that only changes a method keeps the method's label
        label=variant.label or (method.label if name == method.name else name),
        learning_rates=variant.learning_rates or method.learning_rates,
        angle_rate=method.angle_rate if variant.angle_rate is None else variant.angle_rate,
    )
    return Row(name, method, variant.options)


@dataclass(frozen=True)
class Scope:
    """Which part of the model is adapted: layers ``first`` to ``n_layers - 1`` and the linear layers in ``targets``."""

    first: int
    n_layers: int
    targets: tuple[str, ...]

    @property
    def layers(self) -> list[int] | None:
        """The adapted layers as PEFT's ``layers_to_transform``; None for all."""
        return list(range(self.first, self.n_layers)) if self.first else None


def adapted_targets(model: Any, targets: Sequence[str] | None) -> tuple[str, ...]:
    """The names of the adapted linear layers; None takes PEFT's default for the architecture.

    Raises:
        CompareError: no module has such a name, or PEFT has no default.
    """
    if targets is None:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as defaults

        if model.config.model_type not in defaults:
            raise CompareError(f"expected targets for a model of type {model.config.model_type!r}, received none")
        targets = defaults[model.config.model_type]
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    for target in targets:
        if target.rsplit(".", 1)[-1] not in names:
            raise CompareError(f"expected targets to name modules of {type(model).__name__}, received {target!r}")
    return tuple(targets)


def adapted_layers(model: Any, scope: Scope) -> list[str]:
    """The full names of the adapted linear layers."""
    inside = {id(part) for layer in decoder_layers(model)[scope.first :] for part in layer.modules()}
    endings = tuple(f".{target}" for target in scope.targets)
    return [name for name, part in model.named_modules() if id(part) in inside and f".{name}".endswith(endings)]


def build(row: Row, model: Any, tokenizer: Any, scope: Scope) -> tuple[Any, list[Any]]:
    """The model with the row's parameters trainable and all others frozen, and callbacks for the ``Trainer``.

    Raises:
        CompareError: an option that the method's configuration does not have, or refuses.
    """
    with _refusals_of(row):
        return _BUILDERS[row.method.name](row.method.name, model, tokenizer, scope, dict(row.options))


@contextmanager
def _refusals_of(row: Row) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise CompareError(f"method {row.name} cannot be set up: {error}") from error


Built = tuple[Any, list[Any]]


def peft_config(method: str, options: Mapping[str, Any], **where: Any) -> Any:
    """The configuration of a method that is PEFT's or made for it, with a row's options; None for other methods."""
    import peft

    from qaa.peft import QaaConfig, SoraConfig

    if method in ("qaa", "qaa-paper"):
        return QaaConfig.preset("paper" if method == "qaa-paper" else "default", **{**where, **options})
    rank = 10 if method == "lora-frozen-a" else 8
    lora = {"r": rank, "lora_alpha": 2 * rank, "use_rslora": method == "rslora"}
    known: dict[str, tuple[Any, dict[str, Any]]] = {
        "sora": (SoraConfig, {"r": 8}),
        **dict.fromkeys(("lora", "rslora", "lora-frozen-a"), (peft.LoraConfig, lora)),
        "vera": (peft.VeraConfig, {}),
        "ia3": (peft.IA3Config, {"feedforward_modules": []}),
        "road": (peft.RoadConfig, {}),
        "prefix": (peft.PrefixTuningConfig, {"num_virtual_tokens": 8}),
    }
    if method not in known:
        return None
    kind, fixed = known[method]
    return kind(**{"task_type": "CAUSAL_LM", **fixed, **where, **options})


def check_options(row: Row) -> None:
    """Refuses options that the row's method does not have, before there is a model.

    Raises:
        CompareError: an option that is unknown, or that the method's configuration refuses.
    """
    options, method = dict(row.options), row.method.name
    with _refusals_of(row):
        if method in CONTROLS:
            check_control_options(CONTROLS[method], options)
        elif method in ("bias", "full"):
            _no_options(options)
        else:
            peft_config(method, {key: value for key, value in options.items() if key not in _OWN.get(method, ())})


_OWN = {"sora": ("xi",), "prefix": ("text",)}  # options of a row that its configuration does not know


def _adapted(name: str, model: Any, scope: Scope, options: Mapping[str, Any]) -> Any:
    import peft

    where = {"target_modules": list(scope.targets), "layers_to_transform": scope.layers, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft_config(name, options, **where))


def _plain(name: str, model: Any, tokenizer: Any, scope: Scope, options: dict[str, Any]) -> Built:
    return _adapted(name, model, scope, options), []


def _sora(name: str, model: Any, tokenizer: Any, scope: Scope, options: dict[str, Any]) -> Built:
    from qaa.peft import SoraCallback

    callback = SoraCallback(xi=float(options.pop("xi", 1e-3)))
    return _adapted(name, model, scope, options), [callback]


def _lora_frozen_a(name: str, model: Any, tokenizer: Any, scope: Scope, options: dict[str, Any]) -> Built:
    adapted = _adapted(name, model, scope, options)
    for key, parameter in adapted.named_parameters():
        if ".lora_A." in key:
            parameter.requires_grad_(False)
    return adapted, []


def _named(name: str, model: Any, tokenizer: Any, scope: Scope, options: dict[str, Any]) -> Built:
    """IA3 and RoAd, which know no ``layers_to_transform``: every layer is named."""
    import peft

    names = adapted_layers(model, scope)
    where: dict[str, Any] = {"target_modules": names}
    if name == "road":
        # pairs of channels are formed inside groups, which have to divide every layer's width
        where["group_size"] = math.gcd(64, *(model.get_submodule(layer).out_features for layer in names))
    return peft.get_peft_model(model, peft_config(name, options, **where)), []


def _bias(name: str, model: Any, tokenizer: Any, scope: Scope, options: dict[str, Any]) -> Built:
    _no_options(options)
    for key in adapted_layers(model, scope):
        layer = model.get_submodule(key)
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_features))
        layer.bias.requires_grad_(True)
    return model, []


def _control(name: str, model: Any, tokenizer: Any, scope: Scope, options: dict[str, Any]) -> Built:
    wrap(model, adapted_layers(model, scope), CONTROLS[name], options)
    return model, []


def _full(name: str, model: Any, tokenizer: Any, scope: Scope, options: dict[str, Any]) -> Built:
    _no_options(options)
    for part in decoder_layers(model)[scope.first :] if scope.first else [model]:
        part.requires_grad_(True)
    return model, []


def _no_options(options: dict[str, Any]) -> None:
    if options:
        raise TypeError(f"expected no options, received {', '.join(options)}")


def _prefix(name: str, model: Any, tokenizer: Any, scope: Scope, options: dict[str, Any]) -> Built:
    import peft

    text = options.pop("text", PREFIX_TEXT)
    config = peft_config(name, options)
    adapted = peft.get_peft_model(model, config)
    if not config.prefix_projection:
        # random keys and values would swamp the attention of every layer: start from those of a text
        peft.initialize_kv_prefix_from_text(
            adapted, tokenizer, text=text, use_chat_template=bool(tokenizer.chat_template)
        )
    return adapted, []


_BUILDERS: dict[str, Callable[[str, Any, Any, Scope, dict[str, Any]], Built]] = {
    **dict.fromkeys(("qaa-paper", "qaa", "lora", "rslora", "vera"), _plain),
    **dict.fromkeys(("ia3", "road"), _named),
    "sora": _sora, "prefix": _prefix, "full": _full, "bias": _bias, "lora-frozen-a": _lora_frozen_a,
    **dict.fromkeys(CONTROLS, _control),
}  # fmt: skip


def calibrate(model: Any, batches: Iterable[Any]) -> None:
    """Measures inputs and features of adapters that scale them, on a few batches; leaves other models alone."""
    measured = ("scale_channels", "center_channels", "standardize_features")
    is_qaa = any(
        any(getattr(config, key, False) for key in measured) and getattr(config, "calibration", "") != "first_batch"
        for config in getattr(model, "peft_config", {}).values()
    )
    if not is_qaa and not controls(model):
        return
    on_device = [{key: value.to(model.device) for key, value in batch.items()} for batch in batches]
    if is_qaa:
        import qaa.peft

        qaa.peft.calibrate(model, on_device, forward=answer_losses)
    calibrate_controls(model, on_device, answer_losses)


def optimizer_groups(method: Method, model: Any, rate: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: one rate, and another one for the angles where ``method.angle_rate`` is not 1."""
    if method.is_qaa and method.angle_rate != 1.0:
        from qaa.peft import parameter_groups

        return parameter_groups(model, rate, rate * method.angle_rate)
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": rate}]


def trainable_state(model: Any) -> dict[str, torch.Tensor]:
    """The trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def saved_state(model: Any) -> dict[str, torch.Tensor]:
    """What a model that is no PEFT model needs to be rebuilt: what was trained, and the buffers of controls."""
    buffers = {
        f"{name}.{key}": value for name, layer in controls(model).items() for key, value in layer.named_buffers()
    }
    return {**trainable_state(model), **buffers}


def parameter_counts(model: Any) -> tuple[int, int]:
    """Trainable parameters, and all parameters (adapter included, tied ones once)."""
    return (
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        sum(p.numel() for p in model.parameters()),
    )
