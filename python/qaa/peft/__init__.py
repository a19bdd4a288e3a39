"""QAA and SoRA as methods of PEFT: importing this module registers ``"QAA"`` and ``"SORA"``.

``peft.get_peft_model``, ``PeftModel.from_pretrained``, ``AutoPeftModel`` and transformers' ``load_adapter`` then treat
them like PEFT's own methods. Without the import, loading such an adapter fails with ``KeyError: 'QAA'``.

Example:
    >>> import peft, torch
    >>> from qaa.peft import QaaConfig
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 4))
    >>> adapted = peft.get_peft_model(model, QaaConfig(target_modules=["0"]))
    >>> adapted.get_nb_trainable_parameters()
    (68, 136)
"""

from __future__ import annotations

from .config import QaaConfig
from .export import to_dense, to_lora
from .layer import QaaLayer
from .model import QaaModel, calibrate, parameter_groups, set_noise
from .sora import (
    SoraCallback,
    SoraConfig,
    SoraLayer,
    SoraModel,
    soft_threshold,
    sora_l1,
    sora_proximal_step,
    sora_sparsity,
)
from .tuner import register

__all__ = [
    "QaaConfig",
    "QaaLayer",
    "QaaModel",
    "SoraCallback",
    "SoraConfig",
    "SoraLayer",
    "SoraModel",
    "calibrate",
    "parameter_groups",
    "set_noise",
    "soft_threshold",
    "sora_l1",
    "sora_proximal_step",
    "sora_sparsity",
    "to_dense",
    "to_lora",
]

register("qaa", QaaConfig, QaaModel)
register("sora", SoraConfig, SoraModel)
