"""What is trained: each method turns the frozen model into one with trainable parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .config import CompareError
from .models import decoder_layers

UNTOUCHED = "untouched"
PREFIX_TEXT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)


@dataclass(frozen=True)
class Method:
    """A row of the table: names, the learning rates to choose from, and where the method reaches."""

    name: str
    label: str
    learning_rates: tuple[float, ...]
    top_layers_only: bool = True  # False: it changes every layer, whatever ``layers`` says
    angle_rate: float = 1.0  # learning rate of circuit angles relative to that of the other parameters
    about: str = ""


METHODS = {
    method.name: method
    for method in (
        Method(
            "qaa-paper", "QAA (paper form)", (1e-4, 3e-4, 1e-3), angle_rate=10.0,
            about="amplitude embedding, 4-layer circuit, <Z> of every wire, up-projection and bias",
        ),
        Method(
            "qaa-best", "QAA (best form)", (1e-3, 3e-3, 1e-2),
            about="amplitude embedding, 4-layer circuit, 16 real amplitudes of the scaled input, up-projection",
        ),
        Method("lora", "LoRA", (1e-3, 3e-3, 1e-2), about="rank 8, alpha 16, PEFT's own"),
        Method("sora", "SoRA", (1e-3, 3e-3, 1e-2), about="rank 8 with a gate per rank, soft threshold after each step"),
        Method(
            "prefix", "Prefix", (3e-3, 1e-2, 3e-2), top_layers_only=False,
            about="8 virtual tokens in every layer, PEFT's own, started from the keys and values of a real text",
        ),
        Method("full", "Full fine-tuning", (1e-4, 3e-4, 1e-3), about="every weight of the adapted layers"),
    )
}  # fmt: skip


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


def build(
    method: Method, model: Any, tokenizer: Any, scope: Scope, options: Mapping[str, Any]
) -> tuple[Any, list[Any]]:
    """The model with ``method``'s parameters trainable and all others frozen, and callbacks for the ``Trainer``.

    Raises:
        CompareError: an option that the method's configuration does not have, or refuses.
    """
    settings = dict(options)
    common: dict[str, Any] = {"target_modules": list(scope.targets), "layers_to_transform": scope.layers}
    try:
        if method.name == "full":
            return _full(model, scope, settings), []
        if method.name == "prefix":
            return _prefix(model, tokenizer, settings), []
        import peft

        if method.name == "lora":
            config: Any = peft.LoraConfig(
                **{"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", **common, **settings},
            )
            return peft.get_peft_model(model, config), []
        from qaa.peft import QaaConfig, SoraCallback, SoraConfig

        if method.name == "sora":
            callback = SoraCallback(xi=float(settings.pop("xi", 1e-3)))
            config = SoraConfig(**{"r": 8, "task_type": "CAUSAL_LM", **common, **settings})
            return peft.get_peft_model(model, config), [callback]
        preset = method.name.removeprefix("qaa-")
        config = QaaConfig.preset(preset, **{"task_type": "CAUSAL_LM", **common, **settings})
        return peft.get_peft_model(model, config), []
    except (TypeError, ValueError) as error:
        raise CompareError(f"method {method.name} cannot be set up: {error}") from error


def _full(model: Any, scope: Scope, settings: dict[str, Any]) -> Any:
    if settings:
        raise TypeError(f"expected no options, received {', '.join(settings)}")
    for part in decoder_layers(model)[scope.first :] if scope.first else [model]:
        part.requires_grad_(True)
    return model


def _prefix(model: Any, tokenizer: Any, settings: dict[str, Any]) -> Any:
    import peft

    text = settings.pop("text", PREFIX_TEXT)
    config = peft.PrefixTuningConfig(**{"num_virtual_tokens": 8, "task_type": "CAUSAL_LM", **settings})
    adapted = peft.get_peft_model(model, config)
    if not config.prefix_projection:
        # random keys and values would swamp the attention of every layer: start from those of a text
        peft.initialize_kv_prefix_from_text(
            adapted, tokenizer, text=text, use_chat_template=bool(tokenizer.chat_template)
        )
    return adapted


def calibrate(model: Any, batches: Iterable[Any]) -> None:
    """Measures the input channels of QAA adapters that scale them, on a few batches; leaves other models alone."""
    if not any(getattr(config, "scale_channels", False) for config in getattr(model, "peft_config", {}).values()):
        return
    import qaa.peft

    from .models import answer_losses

    on_device = ({key: value.to(model.device) for key, value in batch.items()} for batch in batches)
    qaa.peft.calibrate(model, on_device, forward=answer_losses)


def optimizer_groups(method: Method, model: Any, rate: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: one rate, and another one for the angles where ``method.angle_rate`` is not 1."""
    if method.name.startswith("qaa") and method.angle_rate != 1.0:
        from qaa.peft import parameter_groups

        return parameter_groups(model, rate, rate * method.angle_rate)
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": rate}]


def trainable_state(model: Any) -> dict[str, torch.Tensor]:
    """The trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_counts(model: Any) -> tuple[int, int]:
    """Trainable parameters, and all parameters (adapter included, tied ones once)."""
    return (
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        sum(p.numel() for p in model.parameters()),
    )
