"""The QAA tuner, and parameter groups for its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qaa.circuit import is_number, shown
from qaa.noise import NoiseModel, check_noise

from .layer import STAGES, QaaLayer, made_together
from .tuner import AdditiveModel


class QaaModel(AdditiveModel):
    """Creates a QAA model from a pretrained one; use it through ``peft.get_peft_model(model, QaaConfig(...))``."""

    prefix = "qaa_"
    tuner_layer_cls = QaaLayer

    def _finish_injection(self, model: nn.Module, adapter_name: str) -> None:
        config: Any = self.peft_config[adapter_name]
        if config.shared_circuit and not self._share_circuits(model, adapter_name, config.shared_circuit):
            raise ValueError(
                "expected modules of one parent, one input width and one device among shared_circuit "
                f"{config.shared_circuit}, received none"
            )

    @staticmethod
    def _share_circuits(model: nn.Module, adapter_name: str, names: list[str]) -> bool:
        """Has the first of every group of modules own its circuit; whether there is such a group."""
        is_any = False
        for parent in list(model.modules()):
            owners: dict[Any, QaaLayer] = {}
            for name, layer in parent.named_children():
                if name not in names or not isinstance(layer, QaaLayer) or not layer._has_adapter(adapter_name):
                    continue
                owner = owners.setdefault((layer.in_features, layer.qaa_up[adapter_name].device), layer)
                if owner is not layer:
                    layer.share_circuit(adapter_name, owner)
                    is_any = True
        return is_any

    def _around_forward(self) -> AbstractContextManager[None]:
        return made_together(self.model)


def parameter_groups(model: nn.Module, lr: float, angle_lr: float) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer that give the angles of QAA adapters their own learning rate.

    Angles are a few numbers of order one; V starts at zero and multiplies features whose size depends on the readout
    and on the scaling, so that one rate rarely suits both. For the paper's form 3e-4, with
    3e-3 for the angles, is a start.

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
        >>> groups = parameter_groups(model, lr=3e-4, angle_lr=3e-3)
        >>> [(group["lr"], sum(p.numel() for p in group["params"])) for group in groups]
        [(0.003, 36), (0.0003, 8)]
    """
    for name, value in (("lr", lr), ("angle_lr", angle_lr)):
        if not is_number(value) or not 0 < value < float("inf"):
            raise ValueError(f"expected {name} to be a positive number, received {shown(value)}")
    layers = [module for module in model.modules() if isinstance(module, QaaLayer)]
    if not layers:
        raise ValueError(f"expected a model with QAA adapters, received a {type(model).__name__} without any")
    everything = (a for layer in layers for name in layer.angle_names for a in getattr(layer, name).values())
    angles = {id(a): a for a in everything if a.requires_grad}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in angles]
    groups: list[dict[str, Any]] = [
        {"params": list(angles.values()), "lr": angle_lr, "weight_decay": 0.0},
        {"params": others, "lr": lr},
    ]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    adapter_name: str = "default",
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> int:
    r"""Measures the channels and features of an adapter on a few batches and sets its frozen statistics.

    .. math::
        u = (x - \mu) \odot \sigma, \qquad \sigma_i = 1 / \operatorname{std} x_i \ \text{ or, without centre, } \
        \bigl(\operatorname{mean} x_i^2\bigr)^{-1/2}

    over all vectors that reach a layer, and then in the same way m and rho of the features ``f(u)`` with the angles as
    they are; see :class:`qaa.nn.Whitening`. What does not vary (or, without centre, is zero) keeps the factor 1, and no
    factor is more than 1000 times the layer's median: what was nearly silent may speak later. Sums are float64 and
    streaming. Adapters with ``standardize_features`` take a second pass over the batches, for which those of an
    iterator are kept in memory.

    Run it once, before training, on a few batches of the training data (padding counts as data); with
    ``calibration="first_batch"`` the adapter then leaves its statistics as they are. The adapter has to be active, so
    that the layers above see what it adds. A fresh adapter is an exact no-op before and after; a trained one changes
    its outputs. Where ``torch.distributed`` is initialised, every process has to call it, each with batches of its own,
    and all get the statistics of all of them; the model must not be sharded yet, and the angles have to be the same
    everywhere.

    Args:
        model: a model with QAA adapters.
        batches: what ``forward`` takes, one after the other; dictionaries of keyword arguments by default.
        adapter_name: which adapter.
        forward: ``forward(model, batch)`` runs the model; by default ``model(**batch)``.

    Returns:
        How many layers were set.

    Raises:
        ValueError: no layer has such an adapter with ``scale_channels``, ``center_channels`` or
            ``standardize_features``, it is not active, there is no batch, or none left for the second pass, a layer was
            not reached, its input is not finite, or processes hold different angles. The statistics are then as before.

    Example:
        >>> import peft, torch
        >>> from qaa.peft import QaaConfig
        >>> config = QaaConfig(target_modules=["0"], readout="state[:4]", scale_channels=True)
        >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 3)), config)
        >>> calibrate(model, [torch.full((5, 16), 4.0)], forward=lambda model, x: model(x))
        1
        >>> model.base_model.model[0].qaa_channels["default"][:2]
        tensor([0.2500, 0.2500])
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QaaLayer) and module.stages(adapter_name)
    }
    if not layers:
        raise ValueError(
            f"expected a model whose QAA adapter {adapter_name!r} has scale_channels, center_channels or "
            "standardize_features, received one without any"
        )
    for layer in layers.values():
        if adapter_name not in layer.active_adapters:
            raise ValueError(
                f"expected the QAA adapter {adapter_name!r} to be active while it is measured, received a model whose "
                f"active adapters are {', '.join(layer.active_adapters)}: call model.set_adapter({adapter_name!r})"
            )
        if layer.merged:
            raise ValueError(
                f"expected the QAA adapter {adapter_name!r} to be measured unmerged, received merged weights, of which "
                "unmerging would then take off others than were added: call model.unmerge_adapter()"
            )
    if isinstance(batches, (Mapping, Tensor)):
        raise ValueError(f"expected batches to be a list of batches, received one {type(batches).__name__}")
    _check_same_angles(list(layers.values()), adapter_name)
    stages = [stage for stage in STAGES if any(stage in layer.stages(adapter_name) for layer in layers.values())]
    if "features" in stages and isinstance(batches, Iterator):
        batches = list(batches)
    with _restored_on_failure(layers.values(), adapter_name):
        for stage in stages:
            _measure(model, batches, adapter_name, forward, layers, stage)
    for layer in layers.values():
        layer.set_calibrated(adapter_name)
    return len(layers)


def _measure(
    model: nn.Module, batches: Iterable[Any], adapter_name: str, forward: Any, layers: dict[str, QaaLayer], stage: str
) -> None:
    """Sets the statistics of one stage."""
    measured = {layer: layer.moments(adapter_name, stage) for layer in layers.values()}

    def observe(layer: QaaLayer, args: tuple[Tensor, ...]) -> None:
        layer.observe(adapter_name, stage, args[0], measured[layer])

    n_batches = _run_with_hooks(model, batches, forward, list(measured), observe)
    for moments in measured.values():
        moments.all_reduce()
    missed = [name for name, layer in layers.items() if not measured[layer].count]
    if len(missed) == len(layers) and not n_batches:
        raise ValueError(
            f"expected batches for every pass over them, received a {type(batches).__name__} that had none (left): "
            "batches that can be gone through only once have to be in a list"
        )
    if missed:
        raise ValueError(
            f"expected batches that reach every adapted layer, received none that reach {', '.join(missed)}: name "
            "layers that are never called in exclude_modules"
        )
    for name, layer in layers.items():
        if not torch.isfinite(measured[layer].sums).all():
            raise ValueError(f"expected finite inputs of {name}, received NaN or infinity")
    for layer, moments in measured.items():
        layer.set_statistics(adapter_name, stage, moments)


@contextmanager
def _restored_on_failure(layers: Iterable[QaaLayer], adapter_name: str) -> Iterator[None]:
    """What fails in one stage leaves the statistics of the other as they were, too."""
    statistics = [tensor for layer in layers for tensor in layer._whitening_of(adapter_name) if tensor is not None]
    before = [tensor.clone() for tensor in statistics]
    try:
        yield
    except BaseException:
        for tensor, value in zip(statistics, before, strict=True):
            tensor.copy_(value)
        raise


def _check_same_angles(layers: list[QaaLayer], adapter_name: str) -> None:
    """Refuses processes that have drawn different angles: their features are not those of one adapter."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    angles = torch.cat([layer._get("qaa_theta", adapter_name).detach().flatten() for layer in layers])
    extremes = torch.stack([angles, -angles])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if not torch.equal(extremes[0], -extremes[1]):
        raise ValueError(
            f"expected the angles of the QAA adapter {adapter_name!r} to be the same in all processes, received "
            "different ones: set the seed before get_peft_model, or calibrate after DistributedDataParallel"
        )


def _run_with_hooks(
    model: nn.Module, batches: Iterable[Any], forward: Any, layers: Iterable[nn.Module], hook: Callable[..., None]
) -> int:
    """Runs the model in evaluation mode on every batch with a forward pre-hook on each of the layers.

    What was compiled before knows nothing of the hooks: it runs uncompiled. Returns the number of batches.
    """
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    n_batches = 0
    try:
        with torch.compiler.set_stance("force_eager"):
            for batch in batches:
                if forward is None and not isinstance(batch, Mapping):
                    raise ValueError(
                        "expected batches of the model's keyword arguments (dictionaries), or forward=, received a "
                        f"batch of type {type(batch).__name__}"
                    )
                model(**batch) if forward is None else forward(model, batch)
                n_batches += 1
    finally:
        for module, was_training in modes:
            module.training = was_training
        for handle in handles:
            handle.remove()
    return n_batches


def set_noise(
    model: nn.Module, noise: NoiseModel | None, trajectories: int | None = None, adapter_name: str = "default"
) -> int:
    """Puts noise after every gate of an adapter's circuits, for evaluation, or takes it away again with None.

    Features are then estimates from ``trajectories`` runs for each vector (:mod:`qaa.noise`), drawn from torch's own
    generator. Gradients do not pass a noisy adapter: call the model under ``torch.no_grad()``. Noise is not saved.

    Args:
        model: a model with QAA adapters whose readout is quadratic; the amplitudes of ``"state"`` are no observable.
        noise, trajectories: as for :func:`qaa.noise.forward`.
        adapter_name: which adapter.

    Returns:
        How many layers were set.

    Raises:
        ValueError: no layer has such an adapter, its readout is ``"state"``, it re-uploads its input, or there is noise
            without trajectories.

    Example:
        >>> import peft, torch
        >>> from qaa.noise import NoiseModel
        >>> from qaa.peft import QaaConfig
        >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 3)), QaaConfig(target_modules=["0"]))
        >>> set_noise(model, NoiseModel(depolarizing=0.01), trajectories=8)
        1
    """
    layers = [m for m in model.modules() if isinstance(m, QaaLayer) and adapter_name in m.qaa_adapter]
    if not layers:
        raise ValueError(f"expected a model with a QAA adapter {adapter_name!r}, received one without")
    if (noise is None) != (trajectories is None):
        raise ValueError(f"expected noise and trajectories together, received {noise} and {trajectories}")
    if noise is not None:
        check_noise(noise, trajectories)
    noisy = [layer.qaa_adapter[adapter_name].with_noise(noise, trajectories) for layer in layers]
    for layer, adapter in zip(layers, noisy, strict=True):
        layer.qaa_adapter[adapter_name] = adapter
    return len(layers)
