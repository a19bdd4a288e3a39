"""The QAA layer: ``y = W x + b + sum_a s_a (V_a f_a(x) + c_a)`` over the active adapters a."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qaa.nn import Adapter, draw_angles, is_private_result

from .tuner import AdditiveLayer


class QaaLayer(AdditiveLayer):
    """A linear layer with QAA adapters; what an adapter computes is in :class:`qaa.nn.Adapter`."""

    method = "QAA"
    adapter_layer_names = ("qaa_theta", "qaa_up", "qaa_bias", "qaa_channels")
    other_param_names = ("qaa_adapter",)

    def _create_containers(self) -> None:
        self.qaa_theta = nn.ParameterDict()  # angles in radians, the circuit's shape
        self.qaa_up = nn.ParameterDict()  # V, (out_features, K)
        self.qaa_bias = nn.ParameterDict()  # c, (out_features,), if the adapter has one
        self.qaa_channels = nn.ParameterDict()  # frozen factors of the input channels, (in_features,), if it has them
        self.qaa_adapter: dict[str, Adapter] = {}

    def _create_adapter(self, adapter_name: str, config: Any) -> None:
        adapter = Adapter.create(self.in_features, config.n_layers, config.ansatz, config.readout, config.scaling)
        has_bias = adapter.readout.kind == "expval" if config.adapter_bias is None else config.adapter_bias
        self.qaa_adapter[adapter_name] = adapter
        self.qaa_theta[adapter_name] = draw_angles(torch.empty(adapter.circuit.parameter_shape), config.init_angles)
        self.qaa_up[adapter_name] = torch.zeros(self.out_features, adapter.n_features)
        if has_bias:
            self.qaa_bias[adapter_name] = torch.zeros(self.out_features)
        if not config.init_weights:
            for parameters in (self.qaa_up, self.qaa_bias):
                if adapter_name in parameters:
                    nn.init.normal_(parameters[adapter_name], std=adapter.n_features**-0.5)
        if config.scale_channels:
            self.qaa_channels[adapter_name] = torch.ones(self.in_features)
        frozen = ("qaa_channels",) if config.train_circuit else ("qaa_channels", "qaa_theta")
        self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: frozen}

    def _parameters_of(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        bias, channels = self.qaa_bias.get(adapter_name), self.qaa_channels.get(adapter_name)
        return self.qaa_theta[adapter_name], self.qaa_up[adapter_name], bias, channels

    def delta(self, adapter_name: str, x: Tensor) -> Tensor:
        parameters = self._parameters_of(adapter_name)
        return self.qaa_adapter[adapter_name].delta(self._cast_input_dtype(x, parameters[1].dtype), *parameters)

    def add_to(self, base: Tensor, adapter_name: str, x: Tensor) -> Tensor:
        parameters = self._parameters_of(adapter_name)
        x = self._cast_input_dtype(x, parameters[1].dtype)
        in_place = is_private_result(self.base_layer)
        return self.qaa_adapter[adapter_name].add_to(base, x, *parameters, in_place=in_place)

    def lora_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        adapter = self.qaa_adapter[adapter_name]
        if not adapter.is_linear:
            raise ValueError(not_mergeable(adapter_name))
        theta, up, bias, channels = self._parameters_of(adapter_name)
        down = adapter.down(theta)
        down = down if channels is None else down * channels.to(down.dtype)
        up, bias = up.to(down.dtype), None if bias is None else bias.to(down.dtype) * adapter.scaling
        return down, up * adapter.scaling, bias

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.qaa_adapter[adapter_name].is_linear and adapter_name not in self.qaa_bias


def not_mergeable(adapter_name: str) -> str:
    return (
        f"the QAA adapter {adapter_name!r} is quadratic in its layer's input, so that it cannot be merged into a "
        "weight or exported as a LoRA; only the readout 'state' can"
    )
