"""The QAA tuner, and parameter groups for its optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from .layer import QaaLayer, not_mergeable
from .tuner import AdditiveModel


class QaaModel(AdditiveModel):
    """Creates a QAA model from a pretrained one; use it through ``peft.get_peft_model(model, QaaConfig(...))``."""

    prefix = "qaa_"
    tuner_layer_cls = QaaLayer

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()  # type: ignore[no-untyped-call]
        # with both kinds of adapters present, the layers know which one is meant
        configs: dict[str, Any] = self.peft_config
        if not any(str(config.readout).startswith("state") for config in configs.values()):
            raise ValueError(not_mergeable(next(iter(self.peft_config))))


def parameter_groups(model: nn.Module, lr: float, angle_lr: float) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer that give the angles of QAA adapters their own learning rate.

    Angles are a few numbers of order one; V starts at zero and multiplies features whose size depends on the readout
    and on the scaling, so that one rate rarely suits both. For ``"z"``, 5e-3 with 5e-2 for the angles is a start.

    Args:
        model: a model with QAA adapters (PEFT's, or a plain one with injected adapters).
        lr: learning rate of every other trainable parameter.
        angle_lr: learning rate of the trainable angles, which get no weight decay.

    Raises:
        ValueError: the model has no QAA adapter, or a learning rate is not positive.

    Example:
        >>> import peft, torch
        >>> from qaa.peft import QaaConfig
        >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 2)), QaaConfig(target_modules=["0"]))
        >>> groups = parameter_groups(model, lr=5e-3, angle_lr=5e-2)
        >>> [(group["lr"], sum(p.numel() for p in group["params"])) for group in groups]
        [(0.05, 36), (0.005, 8)]
    """
    for name, value in (("lr", lr), ("angle_lr", angle_lr)):
        if not value > 0:
            raise ValueError(f"expected {name} to be positive, received {value!r}")
    layers = [module for module in model.modules() if isinstance(module, QaaLayer)]
    if not layers:
        raise ValueError(f"expected a model with QAA adapters, received a {type(model).__name__} without any")
    angles = {id(theta): theta for layer in layers for theta in layer.qaa_theta.values() if theta.requires_grad}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in angles]
    groups: list[dict[str, Any]] = [
        {"params": list(angles.values()), "lr": angle_lr, "weight_decay": 0.0},
        {"params": others, "lr": lr},
    ]
    return [group for group in groups if group["params"]]
