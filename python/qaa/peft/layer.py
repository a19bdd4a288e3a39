"""The QAA layer: ``y = W x + b + sum_a s_a (V_a g_a(x) + c_a)`` over the active adapters a."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from qaa.circuit import MAX_WIRES
from qaa.nn import Adapter, Whitening, _Made, _made_together, _Member, draw_angles, is_private_result, random_signs
from qaa.ops import _autocast_dtype, _is_cast_back, _is_plain

from .tuner import AdapterParameters, AdditiveLayer

#: what is measured of an adapter, in this order: features depend on the statistics of the channels
STAGES = ("channels", "features")
_ROWS = 1024  # vectors that are held in float64 at a time
# what is done to tensors that autograd saves; checkpoints have hooks of their own
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class Moments:
    """Count, sum and sum of squares of vectors of one width, in float64.

    Example:
        >>> moments = Moments(2, torch.device("cpu"))
        >>> for rows in (torch.tensor([[1.0, 4.0]]), torch.tensor([[3.0, 4.0]])):
        ...     moments.add(rows)
        >>> moments.count, moments.mean.tolist(), moments.rms[1].item(), moments.deviation.tolist()
        (2.0, [2.0, 4.0], 4.0, [1.0, 0.0])
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.sums = torch.zeros(1 + 2 * width, dtype=torch.float64, device=device)  # in one tensor for one all-reduce

    def add(self, rows: Tensor) -> None:
        """Adds the rows of a matrix."""
        rows = rows.double()
        self.sums += torch.cat([self.sums.new_tensor([len(rows)]), rows.sum(0), rows.square().sum(0)])

    def all_reduce(self) -> None:
        """Adds up those of all processes, where there are several."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.sums)

    @property
    def count(self) -> float:
        return float(self.sums[0])

    @property
    def mean(self) -> Tensor:
        return self.sums[1:].chunk(2)[0] / self.sums[0]

    @property
    def rms(self) -> Tensor:
        return self._mean_square.sqrt()

    @property
    def deviation(self) -> Tensor:
        """Standard deviation; 0 where float64 cannot tell it from 0."""
        return (self._mean_square - self.mean.square()).clamp_min(0).sqrt()

    @property
    def _mean_square(self) -> Tensor:
        return self.sums[1:].chunk(2)[1] / self.sums[0]


def _reciprocal(size: Tensor, reference: Tensor) -> Tensor:
    """``1 / size``; 1 for constants and zeros, whose size is no more than float32's rounding of the reference.

    No factor is more than 1000 times that of the median of the others: what was nearly silent in the batches that were
    measured would drown everything else once it speaks.
    """
    varies = size > 1e-6 * reference
    floor = 1e-3 * size[varies].median() if varies.any() else 0.0
    return torch.where(varies, 1 / size.clamp_min(floor), 1.0)


class Sharing:
    """Layers whose adapters share one circuit: the one that has its angles and statistics, and how many they are."""

    def __init__(self, owner: QaaLayer) -> None:
        self.owner, self.count = owner, 1
        self.measured_by: QaaLayer | None = None  # who has calibrated it on its first batch


class QaaLayer(AdditiveLayer):
    """A linear layer with QAA adapters; what an adapter computes is in :class:`qaa.nn.Adapter`."""

    method = "QAA"
    whitening_names = ("qaa_channels", "qaa_center", "qaa_mean", "qaa_gain")
    frozen_names = (*whitening_names, "qaa_calibrated")
    angle_names = ("qaa_theta", "qaa_phi")
    shared_names = ("qaa_theta", *frozen_names)
    adapter_layer_names = ("qaa_up", *angle_names, "qaa_mix", "qaa_bias", *frozen_names)
    other_param_names = ("qaa_adapter", "qaa_pending", "qaa_sharing", "qaa_signs", "qaa_up_adapter")

    def _create_containers(self) -> None:
        self.qaa_theta = AdapterParameters()  # angles in radians, the circuit's shape; with re-uploading, then omega
        self.qaa_up = AdapterParameters()  # V, (out_features, K), or the gains g of one of the two below, (K,)
        self.qaa_mix = AdapterParameters()  # M, (r, K), of low rank V = B M; B is then what V is in the other lines
        self.qaa_signs = BufferDict(persistent=False)  # R of random up-projections V = R diag(g) / sqrt(K)
        self.qaa_phi = AdapterParameters()  # angles of a circuit whose rows W make V = sqrt(2**n / K) W^T diag(g)
        self.qaa_up_adapter: dict[str, Adapter] = {}  # that circuit, W = qaa_up_adapter.down(phi)
        self.qaa_bias = AdapterParameters()  # c, (out_features,), if the adapter has one
        # frozen statistics, see Whitening, each if the adapter has it; neutral until they are measured
        self.qaa_channels = AdapterParameters()  # sigma, (in_features,)
        self.qaa_center = AdapterParameters()  # mu, (in_features,)
        self.qaa_mean = AdapterParameters()  # m, (K,)
        self.qaa_gain = AdapterParameters()  # rho, (K,)
        # of adapters that calibrate themselves: a saved mark, (1,), not 0 once that is done
        self.qaa_calibrated = AdapterParameters()
        # what the next step of training has to do, so that it asks no tensor: "measure", then "verify" that the mark
        # has stayed; "warn", where others are to measure, if nobody has; or nothing
        self.qaa_pending: dict[str, str] = {}
        self.qaa_sharing: dict[str, Sharing] = {}  # of adapters that share their circuit with those of other layers
        self.qaa_adapter: dict[str, Adapter] = {}

    def _create_adapter(self, adapter_name: str, config: Any) -> None:
        scaling = 1.0 if config.scaling is None and config.standardize_features else config.scaling
        shape = (config.n_layers, config.ansatz, config.readout, scaling, config.max_wires, config.reupload)
        adapter = Adapter.create(self.in_features, *shape)
        has_bias = adapter.readout.kind == "expval" if config.adapter_bias is None else config.adapter_bias
        self.qaa_adapter[adapter_name] = adapter
        theta = draw_angles(torch.empty(adapter.parameter_shape), config.init_angles)
        if config.reupload and config.init_weights:
            theta[1] = 0.0
        self.qaa_theta[adapter_name] = theta
        n_columns = adapter.n_features
        if config.r is not None:
            if config.r > n_columns:
                raise ValueError(f"expected r of at most {n_columns}, the number of features, received {config.r}")
            n_columns = config.r
            self.qaa_mix[adapter_name] = torch.empty(n_columns, adapter.n_features)
            nn.init.normal_(self.qaa_mix[adapter_name], std=adapter.n_features**-0.5)
        if config.up_projection == "random":
            self.qaa_signs[adapter_name] = random_signs(self.out_features, n_columns, config.projection_key)
        elif config.up_projection == "circuit":
            mirrored = up_circuit(self.out_features, n_columns, config)
            self.qaa_up_adapter[adapter_name] = mirrored
            self.qaa_phi[adapter_name] = draw_angles(torch.empty(mirrored.circuit.parameter_shape), config.init_angles)
        is_full = config.up_projection == "full"
        self.qaa_up[adapter_name] = torch.zeros((self.out_features, n_columns) if is_full else n_columns)
        if has_bias:
            self.qaa_bias[adapter_name] = torch.zeros(self.out_features)
        if not config.init_weights:
            nn.init.normal_(self.qaa_up[adapter_name], std=n_columns**-0.5 if is_full else 1.0)
            if has_bias:
                nn.init.normal_(self.qaa_bias[adapter_name], std=n_columns**-0.5)
        if config.scale_channels:
            self.qaa_channels[adapter_name] = torch.ones(self.in_features)
        if config.center_channels:
            self.qaa_center[adapter_name] = torch.zeros(self.in_features)
        if config.standardize_features:
            self.qaa_gain[adapter_name] = torch.ones(adapter.n_features)
            if has_bias:  # without a bias, subtracting the mean would make one
                self.qaa_mean[adapter_name] = torch.zeros(adapter.n_features)
        if config.calibration == "first_batch":
            self.qaa_calibrated[adapter_name] = torch.zeros(1)
        if self.stages(adapter_name):
            self.qaa_pending[adapter_name] = self._to_do(adapter_name)
        frozen = self.frozen_names if config.train_circuit else (*self.frozen_names, *self.angle_names)
        self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: frozen}

    def share_circuit(self, adapter_name: str, owner: QaaLayer) -> None:
        """From now on the adapter has the angles and statistics of the owner's."""
        for name in self.shared_names:
            if adapter_name in (container := getattr(self, name)):
                del container[adapter_name]
        self.qaa_pending.pop(adapter_name, None)
        sharing = owner.qaa_sharing.setdefault(adapter_name, Sharing(owner))
        sharing.count += 1
        self.qaa_sharing[adapter_name] = sharing

    def _owner_of(self, adapter_name: str) -> QaaLayer:
        """The layer that has the adapter's angles and statistics."""
        sharing = self.qaa_sharing.get(adapter_name)
        return self if sharing is None else sharing.owner

    def _to_do(self, adapter_name: str) -> str:
        return "measure" if adapter_name in self.qaa_calibrated else "warn"

    def _parameters_of(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor | None, Whitening, Tensor | None]:
        """The angles, V (or B of V = B M), c, the statistics, and M."""
        theta, up, bias, mix, phi, signs = (
            self._get(name, adapter_name)
            for name in ("qaa_theta", "qaa_up", "qaa_bias", "qaa_mix", "qaa_phi", "qaa_signs")
        )
        if signs is not None:
            up = signs * (up * len(up) ** -0.5)
        elif phi is not None:
            mirrored = self.qaa_up_adapter[adapter_name]
            size = (2**mirrored.circuit.n_wires / mirrored.n_features) ** 0.5
            up = mirrored.down(phi).T * (up * size)
        return theta, up, bias, self._whitening_of(adapter_name), mix

    def _whitening_of(self, adapter_name: str) -> Whitening:
        return Whitening(*(self._get(name, adapter_name) for name in self.whitening_names))

    def _get(self, name: str, adapter_name: str) -> Any:
        """An adapter's tensor, or None; on every forward, hence without the detours of ``ParameterDict.get``."""
        container: Any = self._modules[name]
        held, found = container._modules.get(adapter_name), None
        if held is not None:
            parameters = held._parameters  # which a wrapper may gather when they are asked for
            found = parameters["value"] if "value" in parameters else None  # noqa: SIM401
            if found is None:  # a wrapper has put something in the parameter's place
                found = held.value
        elif adapter_name in container:  # a buffer
            found = container[adapter_name]
        elif name in self.shared_names and (owner := self._owner_of(adapter_name)) is not self:
            found = owner._get(name, adapter_name)
        return found

    def stages(self, adapter_name: str) -> tuple[str, ...]:
        """Those of :data:`STAGES` in which the adapter has statistics; none where there is no such adapter."""
        has = (adapter_name in self.qaa_channels or adapter_name in self.qaa_center, adapter_name in self.qaa_gain)
        return tuple(stage for stage, is_there in zip(STAGES, has, strict=True) if is_there)

    def moments(self, adapter_name: str, stage: str) -> Moments:
        """Moments of nothing yet, of the width and on the device of the stage's statistics."""
        width = self.in_features if stage == "channels" else self.qaa_adapter[adapter_name].n_features
        return Moments(width, self.qaa_up[adapter_name].device)

    @torch.no_grad()
    def observe(self, adapter_name: str, stage: str, x: Tensor, moments: Moments) -> None:
        """Adds the channels of the vectors x, or the features that the adapter has of them, in float64."""
        theta, _, _, whitening, _ = self._parameters_of(adapter_name)
        whitening = Whitening(*(None if t is None else t.double() for t in whitening))
        for rows in torch.split(x.detach().reshape(-1, x.shape[-1]), _ROWS):
            rows = rows.double()
            if stage == "features":
                rows = self.qaa_adapter[adapter_name].features(theta.double(), rows, whitening)
            moments.add(rows)

    @torch.no_grad()
    def set_statistics(self, adapter_name: str, stage: str, moments: Moments) -> None:
        """Sets what the adapter has of centre and factor (channels), or of mean and gain (features)."""
        is_channels = stage == "channels"
        means, factors = (self.qaa_center, self.qaa_channels) if is_channels else (self.qaa_mean, self.qaa_gain)
        # features of a layer have one natural size, channels have sizes of their own
        reference = moments.rms if is_channels else moments.rms.max()
        size = moments.rms
        if adapter_name in means:
            means[adapter_name].copy_(moments.mean)
            size = moments.deviation
        if adapter_name in factors:
            factors[adapter_name].copy_(_reciprocal(size, reference))

    @torch.no_grad()
    def set_calibrated(self, adapter_name: str) -> None:
        """Keeps an adapter from calibrating itself from now on, here and where it will be loaded."""
        if adapter_name in self.qaa_calibrated:
            self.qaa_calibrated[adapter_name].fill_(1)
        self.qaa_pending[adapter_name] = ""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _calibrate_on(self, adapter_name: str, x: Tensor) -> None:
        """Sets the statistics to those of x, unless the adapter has them already.

        A re-entrant checkpoint runs its first forward without gradients, so that this happens in the recomputation;
        that gives the same outputs, because V and c are still zero then.
        """
        if self.qaa_calibrated[adapter_name].item():
            self.qaa_pending[adapter_name] = ""
            return
        if self.qaa_pending[adapter_name] == "verify":
            raise RuntimeError(
                f"expected the QAA adapter {adapter_name!r} to keep the statistics of its first batch, received "
                "parameters that forget what is written to them, as those that FSDP gathers do; call "
                "qaa.peft.calibrate before the model is sharded"
            )
        for stage in self.stages(adapter_name):
            moments = self.moments(adapter_name, stage)
            self.observe(adapter_name, stage, x, moments)
            moments.all_reduce()
            if not moments.count:
                return  # an empty batch: the next one will do
            if not torch.isfinite(moments.sums).all():
                raise ValueError(
                    f"expected a finite first batch to calibrate the QAA adapter {adapter_name!r} on, received NaN or "
                    "infinity"
                )
            self.set_statistics(adapter_name, stage, moments)
        self.set_calibrated(adapter_name)
        if dist.is_available() and dist.is_initialized():
            self.qaa_pending[adapter_name] = "verify"

    def _calibrate_owner_on(self, adapter_name: str, owner: QaaLayer, x: Tensor) -> None:
        """Of the layers that share a circuit one measures, and the same one looks whether that has lasted."""
        sharing = self.qaa_sharing.get(adapter_name)
        if sharing is not None:
            if owner.qaa_pending[adapter_name] == "measure":
                sharing.measured_by = self
            elif sharing.measured_by is not self:
                return
        owner._calibrate_on(adapter_name, x)

    def _warn_if_neutral(self, adapter_name: str) -> None:
        """Warns, once, where training starts with statistics that nobody has measured or loaded."""
        self.qaa_pending[adapter_name] = ""
        neutral = (("qaa_channels", 1), ("qaa_center", 0)), (("qaa_gain", 1), ("qaa_mean", 0))  # of each stage
        values = [[(self._get(name, adapter_name), value) for name, value in stage] for stage in neutral]
        found = [[(tensor, value) for tensor, value in stage if tensor is not None] for stage in values]
        if any(stage and all(bool((tensor == value).all()) for tensor, value in stage) for stage in found):
            warnings.warn(
                f"the QAA adapter {adapter_name!r} starts to train with statistics that were never measured: call "
                "qaa.peft.calibrate(model, batches) before, or set calibration='first_batch'",
                stacklevel=2,
            )

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.qaa_pending = {name: self._to_do(name) for name in self.qaa_pending}

    def _cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """PEFT's cast of the input to an adapter's dtype, but not of what autocast would cast back."""
        return x if _is_cast_back(x, dtype) else self._cast_input_dtype(x, dtype)

    def add_to(self, base: Tensor, adapter_name: str, x: Tensor) -> Tensor:
        owner = self._owner_of(adapter_name)
        if owner is not self and getattr(self, "_is_replica", False):
            raise RuntimeError("expected shared_circuit without nn.DataParallel, received a replica of the model")
        up = self.qaa_up[adapter_name]
        self._check_loaded(adapter_name, up, x)
        if owner is not self:
            self._check_loaded(adapter_name, owner.qaa_theta[adapter_name], x)
        pending = owner.qaa_pending.get(adapter_name)
        if pending and self.training and torch.is_grad_enabled() and up.requires_grad:
            if pending != "warn":
                self._calibrate_owner_on(adapter_name, owner, x)
            elif _is_plain(up):
                owner._warn_if_neutral(adapter_name)
        given = x
        x = self._cast(x, up.dtype)
        made = None if torch.compiler.is_compiling() else _ready.of_layers.pop((self, adapter_name), None)
        if made is not None and not (_is_plain(x) and made.fits(x)):
            made = None
        in_place = is_private_result(self.base_layer)
        if made is not None and made.down is not None and made.factor is not None:
            return made.add_product(base, nn.functional.linear(x, made.down), in_place)
        parameters = self._parameters_of(adapter_name)
        adapter, features = self.qaa_adapter[adapter_name], None
        if adapter_name in self.qaa_sharing and not adapter.is_linear:
            features = self._features_of_all(adapter_name, given, x, parameters[0], parameters[3])
        return adapter.add_to(base, x, *parameters, in_place=in_place, made=made, features=features)

    def _features_of_all(
        self, adapter_name: str, given: Tensor, x: Tensor, theta: Tensor, whitening: Whitening
    ) -> Tensor | None:
        """Features of x, computed once for all layers that share the circuit and are given the same tensor in turn.

        So it is in a forward pass of the model, within a checkpointed part of it, and where a backward pass runs that
        again. A layer that is called by itself, whose graph may be freed before that of another one, has features of
        its own: None.
        """
        if torch.compiler.is_compiling() or not _is_plain(given) or _top_hooks is None:
            return None
        sharing, known = self.qaa_sharing[adapter_name], _ready.features
        # of a checkpointed part, in its first run or a later one: nothing else may be saved there, or less
        hooks = _top_hooks(True)
        task = torch._C._current_graph_task_id()  # of a backward pass, else -1
        if not _ready.is_open or task != -1:
            if hooks is None and task == -1:
                return None
            if any(each.state[:2] != (hooks, task) for each in known.values()):
                known.clear()
            if task != -1 and not known:
                torch.autograd.Variable._execution_engine.queue_callback(known.clear)
        version = None if given.is_inference() else given._version
        state = hooks, task, version, torch.is_grad_enabled(), x.dtype, _autocast_dtype(x)
        shared = known.get(sharing)
        if shared is None or shared.given is not given or shared.state != state or self in shared.takers:
            features = self.qaa_adapter[adapter_name]._quadratic(theta, x, whitening)
            shared = known[sharing] = _Shared(given, state, features, set())
        shared.takers.add(self)
        if len(shared.takers) >= sharing.count:
            del known[sharing]
        return shared.features

    def lora_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        adapter = self.qaa_adapter[adapter_name]
        if not adapter.is_linear:
            raise ValueError(not_mergeable(adapter_name))
        return adapter.low_rank(*self._parameters_of(adapter_name))

    def check_mergeable(self, adapter_name: str) -> None:
        if not self.qaa_adapter[adapter_name].is_linear:
            raise ValueError(not_mergeable(adapter_name))
        base_layer = self.get_base_layer()
        if self._has_constant(adapter_name) and getattr(base_layer, "bias", None) is None:
            raise ValueError(
                f"cannot merge the QAA adapter {adapter_name!r}: it has a bias, and the {type(base_layer).__name__} "
                "that it adapts has none"
            )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.qaa_adapter[adapter_name].is_linear and not self._has_constant(adapter_name)

    def _has_constant(self, adapter_name: str) -> bool:
        return adapter_name in self.qaa_bias or self._get("qaa_center", adapter_name) is not None


class _Shared(NamedTuple):
    """Features of a shared circuit, the tensor that they are of, and the layers that have taken them."""

    given: Tensor
    state: tuple[Any, ...]
    features: Tensor
    takers: set[QaaLayer]


class _Ready(threading.local):
    """What a forward pass has made in this thread for adapters that have not taken it yet."""

    def __init__(self) -> None:
        self.is_open = False  # whether a forward pass is on its way
        self.of_layers: dict[tuple[QaaLayer, str], _Made] = {}
        self.features: dict[Sharing, _Shared] = {}


_ready = _Ready()


def _active_adapters(model: nn.Module) -> Iterator[tuple[tuple[QaaLayer, str], _Member]]:
    """Adapters that a forward pass uses and that have nothing left to measure; nobody looks inside the layers."""
    modules = [model]
    while modules:
        module = modules.pop()
        if not isinstance(module, QaaLayer):
            modules.extend(child for child in module._modules.values() if child is not None)
            continue
        if module.disable_adapters or module.merged:
            continue
        for name in module.active_adapters:
            is_ready = module._owner_of(name).qaa_pending.get(name) not in ("measure", "verify")
            if name in module.qaa_adapter and is_ready:
                get = module._get
                is_full = get("qaa_signs", name) is None and get("qaa_phi", name) is None
                up = get("qaa_up", name) if is_full else None
                parts = module.qaa_adapter[name], get("qaa_theta", name), module._whitening_of(name)
                yield (module, name), _Member(*parts, get("qaa_mix", name), up, get("qaa_bias", name))


@contextmanager
def made_together(model: nn.Module) -> Iterator[None]:
    """Around a forward pass: what adapters make of their parameters, whatever x is, is made together before it.

    A layer makes its own where it finds none: when it is called by itself or for a second time, when a checkpointed
    part of the model is run again, or as long as it has statistics to measure.
    """
    if torch.compiler.is_compiling():
        yield
        return
    # without gradients there is little to make on a CPU, whose layers keep their matrices
    may_have_a_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    members: dict[tuple[QaaLayer, str], _Member] = {}
    if (torch.is_grad_enabled() or may_have_a_gpu) and _is_plain():
        members = dict(_active_adapters(model))
    outer = vars(_ready).copy()
    made = dict(zip(members, _made_together(list(members.values())), strict=True))
    vars(_ready).update(is_open=True, of_layers=made, features={})
    try:
        yield
    finally:
        vars(_ready).update(outer)


def up_circuit(out_features: int, n_features: int, config: Any) -> Adapter:
    """The circuit whose first K rows, cut to the layer's outputs, are the columns of V."""
    largest = 2**MAX_WIRES
    if not n_features <= out_features <= largest:
        raise ValueError(
            f"expected a layer with {n_features} to {largest} output features for up_projection 'circuit' and "
            f"{n_features} features, received {out_features}"
        )
    return Adapter.create(out_features, config.n_layers, config.ansatz, f"state[:{n_features}]")


def not_mergeable(adapter_name: str) -> str:
    return (
        f"the QAA adapter {adapter_name!r} is quadratic in its layer's input, so that it cannot be merged into a "
        "weight or exported as a LoRA; only the readout 'state' can"
    )
