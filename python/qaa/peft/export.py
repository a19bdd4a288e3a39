"""Adapters that leave the library: as a plain LoRA of PEFT's, or as torch's own ops."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qaa.nn import Adapter, DenseCircuit, Whitening

from .layer import QaaLayer
from .tuner import AdditiveLayer, AdditiveModel

_PREFIX = "base_model.model."


@torch.no_grad()
def to_lora(peft_model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default") -> LoraConfig:
    """Writes a QAA adapter with the ``"state"`` readout, or a SoRA adapter, as a LoRA with the same outputs.

    QAA: ``A = Re U(theta)[:K, :d_in]``, ``B = s V``, bias ``s c``; rank K, or with ``V = B M`` rank r and M A for A;
    whitening and standardisation are multiplied into A, B and the bias, which there is only with c or centred channels.
    SoRA: A and ``(alpha / r) B diag(g)`` without the ranks whose gate is zero; layers without any rank left are not
    adapted. All layers are written with the largest rank of any, behind their own with zeros: servers scale by one
    ``alpha / r``, and not all know ranks of single layers. Factors are multiplied into B, so that LoRA's own scaling
    ``alpha / r`` is 1. Plain PEFT loads the folder, ``qaa`` need not be installed there.

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

    rank = max(len(down) for down, _, _ in factors.values())
    lora_config = LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        lora_bias=any(bias is not None for _, _, bias in factors.values()),
        fan_in_fan_out=any(isinstance(layers[name].get_base_layer(), Conv1D) for name in factors),
        modules_to_save=config.modules_to_save,
    )
    _select_modules(lora_config, config, base_model, set(factors))

    prefixes = tuple(f"{_PREFIX}{name}.{attribute}" for name in layers for attribute in _tensor_names(layers[name]))
    state = get_peft_model_state_dict(peft_model, adapter_name=adapter_name)
    weights: dict[str, Tensor] = {key: value for key, value in state.items() if not key.startswith(prefixes)}
    for name, (down, up, bias) in factors.items():
        missing = rank - len(down)
        weights[f"{_PREFIX}{name}.lora_A.weight"] = nn.functional.pad(down, (0, 0, 0, missing))
        weights[f"{_PREFIX}{name}.lora_B.weight"] = nn.functional.pad(up, (0, missing))
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


class DenseAdapted(nn.Module):
    """A linear layer and what its active adapters add, in ops of torch's own; see :func:`to_dense`."""

    def __init__(self, layer: AdditiveLayer) -> None:
        super().__init__()
        self.base = layer.get_base_layer()
        active: list[str] = [] if layer.disable_adapters or layer.merged else layer.active_adapters
        self.adapters = nn.ModuleList(_dense(layer, name) for name in active if layer._has_adapter(name))

    @property
    def weight(self) -> Tensor:  # some models look at its dtype before they call the layer
        weight: Any = self.base.weight
        return weight  # type: ignore[no-any-return]

    @property
    def bias(self) -> Tensor | None:
        bias: Any = self.base.bias
        return bias  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x)
        dtype = result.dtype
        for adapter in self.adapters:
            result = result + adapter(x.to(next(adapter.parameters()).dtype))
        return result.to(dtype)


class _Whiten(nn.Module):
    """``u = (x - mu) sigma`` as one multiplication and one addition."""

    scale: Tensor
    shift: Tensor

    def __init__(self, channels: Tensor, center: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("scale", channels.clone())
        self.register_buffer("shift", torch.zeros_like(channels) if center is None else -center * channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class _Cut(nn.Module):
    """The blocks of the input, one after the other in the last dimension but one."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter._cut(x)


def _dense(layer: AdditiveLayer, name: str) -> nn.Module:
    if not isinstance(layer, QaaLayer) or layer.qaa_adapter[name].is_linear:
        down, up, bias = layer.lora_factors(name)
        return nn.Sequential(_linear(down), _linear(up, bias))
    adapter = layer.qaa_adapter[name]
    if adapter.reupload:
        raise ValueError(f"expected adapters of one circuit for all vectors, received {name!r} with reupload")
    # adapters in half precision compute in float32 here, as the kernels do
    theta, up, bias, whitening, mix = layer._parameters_of(name)
    theta, up, bias, mix = map(_wide, (theta, up, bias, mix))
    whitening = Whitening(*map(_wide, whitening))
    up, bias, mix = adapter._folded(up, bias, whitening, mix)
    up = up if mix is None else up @ mix
    parts: list[nn.Module] = []
    if whitening.channels is not None or whitening.center is not None:
        ones = theta.new_ones(layer.in_features)
        parts.append(_Whiten(ones if whitening.channels is None else whitening.channels, whitening.center))
    circuit = DenseCircuit(adapter.circuit, theta, adapter.readout, adapter._width)
    parts += [circuit] if adapter.blocks == 1 else [_Cut(adapter), circuit, nn.Flatten(-2)]
    parts.append(_linear(up * adapter.scaling, None if bias is None else bias * adapter.scaling))
    return nn.Sequential(*parts)


def _wide(tensor: Any) -> Any:
    return None if tensor is None else tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias is not None, weight.device, weight.dtype)
    linear.weight.data = weight.detach().clone()
    if bias is not None:
        linear.bias.data = bias.detach().clone()
    return linear.requires_grad_(False)


@torch.no_grad()
def to_dense(peft_model: PeftModel) -> nn.Module:
    r"""The adapted model in ops of torch's own, for ONNX and whatever else does not know ``torch.ops.qaa``.

    Each adapted layer becomes its frozen layer plus matrix products: two for an adapter that is linear in x; for a
    quadratic one the circuit's unitary, applied to the normalised (whitened) vector, squares, signed sums and V, see
    :class:`qaa.nn.DenseCircuit`. With ``<Z>`` or Pauli strings that is a matrix of ``2 * 2**n * d_in`` numbers for each
    adapted layer, twice the size of a square frozen weight: the price of ops that every server has.

    Args:
        peft_model: a model with QAA or SoRA adapters from ``peft.get_peft_model`` or ``PeftModel.from_pretrained``; the
            active adapters are kept, the others left out.

    Returns:
        The base model's class with replaced layers. Frozen weights are shared with ``peft_model``, not copied; nothing
        of an adapter is trainable any more.

    Raises:
        TypeError: ``peft_model`` is no ``PeftModel`` with QAA or SoRA adapters.
        ValueError: an adapter re-uploads its input, so that every vector has a unitary of its own.

    Example:
        >>> import peft, torch
        >>> from qaa.peft import QaaConfig
        >>> config = QaaConfig.preset("paper", target_modules=["0"], init_weights=False)
        >>> model, x = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(12, 2)), config), torch.randn(3, 12)
        >>> torch.allclose(to_dense(model)(x), model(x), atol=1e-5)
        True
    """
    if not isinstance(peft_model, PeftModel) or not isinstance(peft_model.base_model, AdditiveModel):
        raise TypeError(f"expected a PeftModel with QAA or SoRA adapters, received a {type(peft_model).__name__}")
    shared = {id(tensor): tensor for tensor in (*peft_model.parameters(), *peft_model.buffers())}
    model = copy.deepcopy(peft_model, shared)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, AdditiveLayer):
                setattr(parent, name, DenseAdapted(child))
    tuner: Any = model.base_model
    plain: nn.Module = tuner.unload()  # takes modules that were trained in full out of their wrappers
    return plain


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
