"""Adapters that are linear in their input, written as a plain LoRA of PEFT's."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .tuner import AdditiveLayer, AdditiveModel

_PREFIX = "base_model.model."


@torch.no_grad()
def to_lora(peft_model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default") -> LoraConfig:
    """Writes a QAA adapter with the ``"state"`` readout, or a SoRA adapter, as a LoRA with the same outputs.

    QAA: ``A = Re U(theta)[:K, :d_in]``, ``B = s V``, bias ``s c``; rank K; whitening and standardisation are multiplied
    into A, B and the bias, which there is only with c or centred channels. SoRA: A and ``(alpha / r) B diag(g)``
    without the ranks whose gate is zero; layers without any rank left are not adapted. Factors are multiplied into B,
    so that LoRA's own scaling ``alpha / r`` is 1. Plain PEFT loads the folder, ``qaa`` need not be installed there.

    Args:
        peft_model: a model from ``peft.get_peft_model`` or ``PeftModel.from_pretrained``.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` are written; created if missing.
        adapter_name: which adapter of the model.

    Returns:
        The configuration that was written.

    Raises:
        TypeError: ``peft_model`` is no ``PeftModel`` with QAA or SoRA adapters.
        ValueError: there is no such adapter, it is quadratic in its input, or all of its gates are zero.

    Example:
        >>> import peft, tempfile, torch
        >>> from qaa.peft import QaaConfig
        >>> config = QaaConfig(target_modules=["0"], readout="state[:4]")
        >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 2)), config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     to_lora(model, folder).r
        4
    """
    if not isinstance(peft_model, PeftModel) or not isinstance(peft_model.base_model, AdditiveModel):
        raise TypeError(f"expected a PeftModel with QAA or SoRA adapters, received a {type(peft_model).__name__}")
    if adapter_name not in peft_model.peft_config:
        known = ", ".join(peft_model.peft_config)
        raise ValueError(f"expected an adapter among {known}, received {adapter_name!r}")
    config: Any = peft_model.peft_config[adapter_name]
    base_model = peft_model.get_base_model()
    layers = {
        name: layer
        for name, layer in base_model.named_modules()
        if isinstance(layer, AdditiveLayer) and layer._has_adapter(adapter_name)
    }
    factors = {name: layer.lora_factors(adapter_name) for name, layer in layers.items()}
    factors = {name: (down, up, bias) for name, (down, up, bias) in factors.items() if len(down)}
    if not factors:
        raise ValueError(f"expected an adapter with a gate that is not zero, received {adapter_name!r} without any")

    ranks = {name: len(down) for name, (down, _, _) in factors.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    other_ranks = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    lora_config = LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        rank_pattern=other_ranks,
        alpha_pattern=other_ranks,
        lora_bias=any(bias is not None for _, _, bias in factors.values()),
        fan_in_fan_out=any(isinstance(layers[name].get_base_layer(), Conv1D) for name in factors),
        modules_to_save=config.modules_to_save,
    )
    _select_modules(lora_config, config, base_model, set(factors))

    prefixes = tuple(f"{_PREFIX}{name}.{attribute}" for name in layers for attribute in _tensor_names(layers[name]))
    state = get_peft_model_state_dict(peft_model, adapter_name=adapter_name)
    weights: dict[str, Tensor] = {key: value for key, value in state.items() if not key.startswith(prefixes)}
    for name, (down, up, bias) in factors.items():
        weights[f"{_PREFIX}{name}.lora_A.weight"] = down
        weights[f"{_PREFIX}{name}.lora_B.weight"] = up
        if bias is not None:
            weights[f"{_PREFIX}{name}.lora_B.bias"] = bias
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.detach().cpu().clone().contiguous() for key, value in weights.items()},
        folder / SAFETENSORS_WEIGHTS_NAME,
        metadata={"format": "pt"},
    )
    lora_config.save_pretrained(str(folder))
    return lora_config


def _tensor_names(layer: AdditiveLayer) -> tuple[str, ...]:
    return layer.adapter_layer_names + layer.other_param_names


def _select_modules(lora_config: LoraConfig, config: PeftConfig, base_model: nn.Module, wanted: set[str]) -> None:
    """Makes ``lora_config`` select exactly the modules ``wanted``, by the simplest of three ways that does."""
    candidates = [name for name, _ in base_model.named_modules() if ".base_layer" not in name]
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    as_trained = {name: getattr(config, name) for name in fields}
    by_name = dict.fromkeys(fields) | {"target_modules": wanted}
    by_pattern = dict.fromkeys(fields) | {"target_modules": "|".join(re.escape(name) for name in sorted(wanted))}
    for selection in (as_trained, by_name, by_pattern):
        for name, value in selection.items():
            setattr(lora_config, name, value)
        if {name for name in candidates if check_target_module_exists(lora_config, name)} == wanted:
            return
