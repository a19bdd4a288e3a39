"""What QAA and SoRA share as PEFT methods: registration, and linear layers whose adapters add to the output.

PEFT has no entry point for methods of other packages. :func:`register` makes the name a real member of ``PeftType``
and then calls PEFT's own ``register_peft_method``; it runs when :mod:`qaa.peft` is imported.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
    check_target_module_exists,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
    quantization_extra_repr,
    register_peft_method,
    resolve_quantization_backend,
)
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from qaa.circuit import shown
from qaa.nn import check_flag

#: type of a model -> names of layers whose weights its kernels, or some of them, read without calling the layers
_NEVER_CALLED = {
    **dict.fromkeys(("mamba", "falcon_mamba"), ("out_proj", "dt_proj")),
    "jamba": ("dt_proj",),
    **dict.fromkeys(("mamba2", "falcon_h1", "nemotron_h", "bamba", "granitemoehybrid", "zamba2"), ("out_proj",)),
    "wavlm": ("q_proj", "k_proj", "v_proj", "out_proj"),
}


def register(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Makes ``name`` (lower case) a PEFT method; does nothing new when called again.

    Raises:
        ImportError: this version of PEFT has a method of that name itself.
    """
    member = PeftType.__members__.get(name.upper()) or _add_peft_type(name.upper())
    owner = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if owner is None:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
    elif owner.__module__.partition(".")[0] == __name__.partition(".")[0]:
        PEFT_TYPE_TO_CONFIG_MAPPING[member] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[member] = model_cls
    else:
        raise ImportError(
            f"expected the PEFT method name {member.value} to be free, but peft {peft.__version__} has it as "
            f"{owner.__module__}.{owner.__qualname__}; upgrade qaa or install an earlier peft"
        )


def _add_peft_type(value: str) -> PeftType:
    """A real member of the enum, because PEFT and transformers compare, pickle and call ``.value`` on it."""
    member = str.__new__(PeftType, value)
    member._name_ = member._value_ = value
    PeftType._member_names_.append(value)
    PeftType._member_map_[value] = member
    PeftType._value2member_map_[value] = member
    type.__setattr__(PeftType, value, member)
    return member


class Held(nn.Module):
    """A parameter as a module of its own. Not named ``weight``: PEFT's policy for FSDP would wrap it, like a layer."""

    value: nn.Parameter

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.value.shape))


class AdapterParameters(nn.ParameterDict):
    """One parameter for each adapter; the module around each makes its name end in ``.default.value``.

    So the adapter's name stands between dots, as in LoRA's ``lora_A.default.weight``: TRL copies what has ``.default.``
    in its name into a reference adapter.

    Example:
        >>> parameters = AdapterParameters({"default": torch.ones(2)})
        >>> parameters["default"].tolist(), [name for name, _ in parameters.named_parameters()]
        ([1.0, 1.0], ['default.value'])
    """

    def __getitem__(self, key: str) -> Any:
        return self._modules[key].value  # type: ignore[union-attr]

    def __setitem__(self, key: str, value: Tensor) -> None:
        if key not in self._keys:
            self.add_module(key, Held())
            self._keys[key] = None
        held: Any = self._modules[key]
        held.value = value if isinstance(value, nn.Parameter) else nn.Parameter(value)

    def extra_repr(self) -> str:
        return ""


class AdditiveLayer(nn.Module, BaseTunerLayer):
    """A frozen linear layer plus the outputs of its active adapters: ``y = W x + b + sum_a delta_a(x)``.

    A method derives from this class and says how an adapter is built (:meth:`_create_adapter`), how it is added
    (:meth:`add_to`) and, where it is linear in x, by which weight and bias (:meth:`lora_factors`).
    """

    method: str  # the name in messages and in repr

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: PeftConfig, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # flag to enable/disable casting of input to weight dtype during forward call
        self.cast_input_dtype_enabled = True
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        assert in_features is not None and out_features is not None  # AdditiveModel accepts linear layers only
        self.in_features, self.out_features = in_features, out_features
        self._create_containers()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    # ------------------------------------------------------------------------------ what a method has to define

    def _create_containers(self) -> None:
        """Creates the dictionaries named in ``adapter_layer_names`` and ``other_param_names``."""
        raise NotImplementedError

    def _create_adapter(self, adapter_name: str, config: Any) -> None:
        """Creates and initialises the parameters of one adapter."""
        raise NotImplementedError

    def add_to(self, base: Tensor, adapter_name: str, x: Tensor) -> Tensor:
        """``base`` plus what the adapter adds to the output for the input x."""
        raise NotImplementedError

    def lora_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(A, B, c)`` with ``delta(x) = B A x + c``, shapes ``(r, in)``, ``(out, r)`` and ``(out,)``.

        Raises:
            ValueError: the adapter is not linear in x.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------- the layer

    def update_layer(self, adapter_name: str, config: PeftConfig) -> None:
        """Adds an adapter to the layer, in place of one of that name; one that is refused changes nothing."""
        replaced = self._contents(adapter_name)
        self._take_out(adapter_name)
        try:
            self._create_adapter(adapter_name, config)
        except ValueError:
            self._put_back(adapter_name, replaced)
            raise
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _contents(self, adapter_name: str) -> dict[str, Any]:
        """Everything that the layer has of the adapter, by the attribute that holds it."""
        names = (*self.adapter_layer_names, *self.other_param_names, "frozen_peft_weight_names")
        held = {name: getattr(self, name) for name in names}
        return {name: container[adapter_name] for name, container in held.items() if adapter_name in container}

    def _take_out(self, adapter_name: str) -> None:
        for name in self._contents(adapter_name):
            del getattr(self, name)[adapter_name]

    def _put_back(self, adapter_name: str, contents: dict[str, Any]) -> None:
        """Has the layer hold these contents of the adapter, and nothing else of it."""
        self._take_out(adapter_name)
        for name, value in contents.items():
            getattr(self, name)[adapter_name] = value

    def _has_adapter(self, adapter_name: str) -> bool:
        return adapter_name in getattr(self, self.adapter_layer_names[0])

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or (self.merged and adapter_names is None):
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        if not isinstance(result, Tensor):
            raise TypeError(
                f"expected a layer that returns a tensor, received a {type(self.get_base_layer()).__name__}, which "
                f"returns a {type(result).__name__}: name it in exclude_modules"
            )
        dtype = result.dtype
        if adapter_names is None:
            for name in filter(self._has_adapter, self.active_adapters):
                result = self.add_to(result, name, x)
        else:
            self._check_mixed_batch(x, adapter_names)
            for name in filter(self._has_adapter, dict.fromkeys(adapter_names)):
                rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
                result = result.index_copy(0, rows, self.add_to(result[rows], name, x[rows]).to(dtype))
        return result.to(dtype)

    def _check_loaded(self, adapter_name: str, parameter: Tensor, x: Tensor) -> None:
        """Refuses offloaded parameters: accelerate loads those of modules that run, and an adapter's are of none that
        does, so that torch would multiply by memory that nobody has written."""
        if parameter.is_meta and not x.is_meta:
            raise RuntimeError(
                f"expected the {self.method} adapter {adapter_name!r} to be loaded, received parameters on the meta "
                f"device; offload with accelerate.dispatch_model(..., preload_module_classes=[{type(self).__name__!r}])"
                ", or with the class of what is around the layers that share a circuit"
            )

    def _check_mixed_batch(self, x: Tensor, adapter_names: Sequence[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The weight that the adapter adds, in the layout of the base layer's weight."""
        return self._weight_of(*self.lora_factors(adapter_name)[:2])

    def _weight_of(self, down: Tensor, up: Tensor) -> Tensor:
        delta = up @ down
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def check_mergeable(self, adapter_name: str) -> None:
        """Raises ``ValueError`` where the adapter is no weight, or has a bias and the base layer has none."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters (the active ones for None) to the base weight; ``safe_merge`` refuses NaN and infinity.

        Raises:
            ValueError: an adapter is not linear in x, has a bias where the base layer has none, or is not finite.
        """
        names = list(filter(self._has_adapter, check_adapters_to_merge(self, adapter_names)))
        for name in names:
            self.check_mergeable(name)
        for name in names:
            self._add_to_base(name, 1, safe_merge)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Takes the merged adapters off the base weight again."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if self._has_adapter(name):
                self._add_to_base(name, -1)

    @torch.no_grad()
    def _add_to_base(self, adapter_name: str, sign: int, check_finite: bool = False) -> None:
        base_layer = self.get_base_layer()
        base_bias: Any = getattr(base_layer, "bias", None)
        down, up, delta_bias = self.lora_factors(adapter_name)
        delta = self._weight_of(down, up)
        # the sum is taken in the wider of both types and rounded once
        weight: Tensor = self.get_base_weight()
        weight = (weight + sign * delta).to(weight.dtype)
        bias = None if delta_bias is None else (base_bias + sign * delta_bias).to(base_bias.dtype)
        if check_finite and not all(t.isfinite().all() for t in (weight, bias) if t is not None):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")
        self.set_base_weight(weight)
        if bias is not None:
            base_bias.data = bias

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Refuses adapters of another width in one sentence, before torch lists every tensor."""
        for name, tensor in self.named_parameters():
            loaded = state_dict.get(prefix + name)
            is_ours = name.partition(".")[0] in self.adapter_layer_names
            if is_ours and loaded is not None and loaded.shape != tensor.shape:
                raise RuntimeError(
                    f"expected {self.method} weights for a layer of {self.in_features} inputs and {self.out_features} "
                    f"outputs, received a size mismatch for {prefix}{name}: {tuple(loaded.shape)} instead of "
                    f"{tuple(tensor.shape)}"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return f"{self.method.lower()}.{super().__repr__()}"

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


class AdditiveModel(BaseTuner):
    """A tuner that replaces linear layers by ``tuner_layer_cls``, a subclass of :class:`AdditiveLayer`."""

    tuner_layer_cls: type[AdditiveLayer]
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; an adapter that is refused leaves every layer as it was."""
        layers = [module for module in model.modules() if isinstance(module, AdditiveLayer)]
        before = {layer: layer._contents(adapter_name) for layer in layers}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._finish_injection(model, adapter_name)
        except BaseException:
            for parent in list(model.modules()):
                for name, child in list(parent._modules.items()):
                    if isinstance(child, AdditiveLayer) and child not in before:
                        setattr(parent, name, child.base_layer)
            for layer, contents in before.items():
                layer._put_back(adapter_name, contents)
            raise

    def _finish_injection(self, model: nn.Module, adapter_name: str) -> None:
        """What a method does once all layers have the adapter."""

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if reason := _never_called(self.model, current_key, base_layer):
            raise ValueError(
                f"expected target_modules without {target_name!r} {reason}, received {current_key!r}: name it in "
                "exclude_modules"
            )
        kwargs = get_quantization_kwargs(self)
        if not isinstance(base_layer, (nn.Linear, Conv1D)):
            backend = resolve_quantization_backend(base_layer, **kwargs)
            if backend is None or backend.layer_type != "linear":
                raise TypeError(
                    f"Target module {current_key} is not supported: expected a torch.nn.Linear (optionally quantized) "
                    f"or a transformers Conv1D, received {type(base_layer).__name__}"
                )
        try:
            if isinstance(target, self.tuner_layer_cls):
                target.update_layer(adapter_name, peft_config)
                return
            new_module = self.tuner_layer_cls(target, adapter_name, peft_config, **kwargs)
        except ValueError as error:
            raise ValueError(f"cannot adapt the module {current_key}: {error}") from error
        if adapter_name not in self.active_adapters:
            # adding an additional adapter: it is not automatically trainable
            new_module.requires_grad_(False)
        if isinstance(parent, nn.TransformerEncoderLayer):
            new_module.register_forward_hook(_keep_result)
            for encoder in self.model.modules():  # nested tensors are for that kernel
                if isinstance(encoder, nn.TransformerEncoder) and parent in encoder.layers:
                    encoder.use_nested_tensor = False
        self._replace_module(parent, target_name, new_module, target)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's; an adapter that a layer cannot take in is refused before any layer has changed."""
        self._check_every_layer(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False, adapter_names: Any = None
    ) -> Any:
        if merge:
            self._check_every_layer(adapter_names)
        unload: Any = super()._unload_and_optionally_merge
        return unload(merge, progressbar, safe_merge, adapter_names)

    def _check_every_layer(self, adapter_names: list[str] | None) -> None:
        self._check_merge_allowed()  # type: ignore[no-untyped-call]
        for layer in (module for module in self.modules() if isinstance(module, AdditiveLayer)):
            for name in filter(layer._has_adapter, adapter_names or layer.active_adapters):
                if name not in layer.merged_adapters:
                    layer.check_mergeable(name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT puts new parameters in place of those that it casts; those of frozen ones stay frozen here."""
        layers = [module for module in self.modules() if isinstance(module, AdditiveLayer)]
        containers = [getattr(layer, name) for layer in layers for name in layer.adapter_layer_names]
        containers = [c for c in containers if adapter_name in c]
        required = [c[adapter_name].requires_grad for c in containers]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for container, requires_grad in zip(containers, required, strict=True):
            container[adapter_name].requires_grad_(requires_grad)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Leaves out of "all-linear", with a warning, what is never called."""
        names = peft_config.target_modules
        if isinstance(names, str) and names.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            _maybe_include_all_linear_layers(peft_config, model)
            layers = {name: model.get_submodule(name) for name in peft_config.target_modules}
            reasons = {name: why for name, layer in layers.items() if (why := _never_called(model, name, layer))}
            peft_config.target_modules -= reasons.keys()
            named = [
                name
                for name in reasons
                if not isinstance(check_target_module_exists(peft_config, name), _ExcludedModule)
            ]
            if named:
                where = " and ".join(sorted({reasons[name] for name in named}))
                warnings.warn(
                    f"'all-linear' leaves out {', '.join(sorted({name.rpartition('.')[2] for name in named}))} {where}",
                    stacklevel=2,
                )
        super()._prepare_model(peft_config, model)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's names for those in a file; files of earlier versions have them without ``.value``."""
        names = tuple(f".{name}" for name in cls.tuner_layer_cls.adapter_layer_names)
        state_dict = {f"{key}.value" if key.endswith(names) else key: value for key, value in state_dict.items()}
        remap: Any = super()._remap_adapter_state_dict_for_load
        return remap(model, config, adapter_name, state_dict)  # type: ignore[no-any-return]

    def _around_forward(self) -> AbstractContextManager[None]:
        """What a forward pass of the model happens in."""
        return nullcontext()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Passes ``adapter_names``, one adapter for each row of the batch, to the layers of this method."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            with self._around_forward():
                yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [module for module in self.modules() if isinstance(module, AdditiveLayer)]
        known = {name for layer in layers for name in layer._get_available_adapters()}
        unknown = set(adapter_names) - known - {"__base__"}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        # Beam search repeats every row in turn, but for those that an encoder sees.
        beams = kwargs.get("num_beams") or 1
        encoder = getattr(self.model, "get_encoder", lambda: None)() if beams > 1 else None
        in_encoder = {id(module) for module in encoder.modules()} if encoder not in (None, self.model) else set()
        repeated = [name for name in adapter_names for _ in range(beams)]
        handles = []
        for module in self.modules():
            if isinstance(module, (AdditiveLayer, AuxiliaryTrainingWrapper)):
                names = adapter_names if id(module) in in_encoder else repeated
                hook = partial(_insert_adapter_names, adapter_names=names)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _keep_result(module: nn.Module, args: Any, result: Tensor) -> None:
    """A hook that does nothing, but any hook keeps torch from a kernel that reads weights and calls no layer."""


def _never_called(model: nn.Module, name: str, layer: nn.Module) -> str | None:
    """Of a linear layer whose weight is read without calling it: where that is; None for all others."""
    model_type = str(getattr(getattr(model, "config", None), "model_type", None))
    if name.rpartition(".")[2] in _NEVER_CALLED.get(model_type, ()):
        return f"in a {model_type} model, whose kernels read that layer's weight and never call it"
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "of a torch.nn.MultiheadAttention, which reads that layer's weight and never calls it"
    return None


def _insert_adapter_names(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: Sequence[str]) -> Any:
    return args, {**kwargs, "adapter_names": adapter_names}


def settle_modules(config: Any) -> None:
    """Checks which modules a configuration selects, and puts names and indices into the containers that PEFT saves.

    Refused are names that are no text, indices of layers that are no integers from 0, and what PEFT would ignore:
    indices beside a pattern of module names, and a pattern of layers without indices.
    """
    _check_modules(config)
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if value is not None and not isinstance(value, str):
            setattr(config, name, set(value))
    for name in ("layers_to_transform", "layers_pattern", "modules_to_save"):
        value = getattr(config, name)
        if isinstance(value, (tuple, set, frozenset, range)):
            setattr(config, name, sorted(value) if isinstance(value, (set, frozenset)) else list(value))
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(config.target_modules, str) and getattr(config, name) is not None:
            raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")


def _check_modules(config: Any) -> None:
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = getattr(config, name)
        is_list = isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(item, str) for item in value)
        if value is not None and not is_list and (name == "modules_to_save" or not isinstance(value, str)):
            raise ValueError(f"expected {name} to be a list of names, received {shown(value)}")
    layers = config.layers_to_transform
    indices = layers if isinstance(layers, (list, tuple, set, frozenset, range)) else [layers]
    if layers is not None and any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in indices):
        raise ValueError(f"expected layers_to_transform to be integers of at least 0, received {shown(layers)}")


def check_flags(config: Any, *names: str) -> None:
    """Refuses anything but True and False in the named fields."""
    for name in names:
        check_flag(name, getattr(config, name))
