"""The configuration of QAA as a PEFT method."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftType

from qaa.circuit import ANSATZE, MAX_LAYERS, MAX_WIRES, Readout, check_count, shown
from qaa.nn import INIT_ANGLES, check_flag, check_key, check_scaling

from .tuner import check_flags, settle_modules

CALIBRATIONS = ("explicit", "first_batch")
UP_PROJECTIONS = ("full", "random", "circuit")
_CHOICES: dict[str, Collection[str]] = {
    "ansatz": ANSATZE,
    "init_angles": INIT_ANGLES,
    "calibration": CALIBRATIONS,
    "up_projection": UP_PROJECTIONS,
}

_LINEAR = {"ansatz": "ring", "adapter_bias": False, "scale_channels": True, "standardize_features": True}

#: name -> fields; see :meth:`QaaConfig.preset`
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"n_layers": 4, "ansatz": "ring", "readout": "z", "adapter_bias": True},
    "default": {**_LINEAR, "n_layers": 4, "readout": "state[:1/2]", "r": 4},
    "compact": {**_LINEAR, "n_layers": 4, "readout": "state[:64]", "r": 4},
    "tiny": {**_LINEAR, "n_layers": 2, "readout": "state[:16]", "up_projection": "random"},
}


@dataclass
class QaaConfig(PeftConfig):
    """Configuration of quantum-amplitude embedded adaptation, ``y = W x + b + s (V f(x) + c)``.

    f(x) are the features of a parameterized quantum circuit U(theta) on ``ceil(log2(d_in))`` wires whose amplitudes
    hold x; V (``d_out`` x K), c and the angles theta are trained, W and b are frozen. See :class:`qaa.nn.Adapter`
    for the features, :class:`qaa.nn.Whitening` for what is done to x and f with statistics of the data (off by
    default), :func:`qaa.ansatz` for the circuits.

    Args:
        target_modules: names of the linear layers to adapt (a list of names or endings, a regular expression, or
            ``"all-linear"``); None chooses what PEFT's LoRA adapts in this architecture, mostly q and v.
        exclude_modules: names that are not adapted although they match.
        layers_to_transform: indices of the layers to adapt; the upper layers alone train faster.
        layers_pattern: name of the module list that ``layers_to_transform`` counts in, if it is an unusual one.
        modules_to_save: other modules that are trained in full and saved, such as a new classification head.
        n_layers: depth L of the circuit; deeper circuits mix more amplitudes, at L * n * 3 angles for ``"ring"``.
        ansatz: circuit, ``"ring"``, ``"basic_entangler"``, ``"strongly_entangling"`` or ``"brick"``.
        readout: ``"z"``, Pauli strings, ``"probs"``, ``"state"``, or a part of either, ``"state[:K]"`` or, for
            layers of any width, ``"state[:1/2]"``; see :class:`qaa.Readout`.
        adapter_bias: whether there is a c; None means yes for Pauli readouts, no otherwise.
        scaling: s; None means 1, but ``sqrt(2**n_wires + 1)`` for quadratic readouts that are not standardised.
        init_weights: True for V = 0 (or g = 0) and c = 0, an exact no-op; False for random ones (tests).
        init_angles: ``"uniform"`` in ``[-pi, pi)``, ``"small"`` in ``[-0.1, 0.1)`` radians, or ``"zero"``.
        scale_channels: whether each input channel is first multiplied by a frozen factor, 1/std if the channels are
            centred, else 1/rms; one until :func:`qaa.peft.calibrate` has measured the channels.
        center_channels: whether the frozen mean of each input channel is first subtracted.
        standardize_features: whether features are multiplied by a frozen factor before V, 1/std after their mean is
            subtracted if there is a c, else 1/rms, so that no constant appears in an adapter without one.
        calibration: ``"explicit"``, the statistics of these three are measured by :func:`qaa.peft.calibrate`, or
            ``"first_batch"``, by the first forward in training mode with gradients enabled; see the help of the field.
        up_projection: ``"full"``, V is trained; ``"random"``, ``V = R diag(g) / sqrt(K)`` with K trained gains g and
            frozen signs R, see :func:`qaa.nn.random_signs`; or ``"circuit"``, ``V = sqrt(2**m / K) W^T diag(g)`` with
            ``W = Re U(phi)[:K, :d_out]`` of a second trained circuit on ``m = ceil(log2(d_out))`` wires.
        r: rank of V, ``V = B M`` with ``B`` (``d_out`` x r, in the place of V above) and ``M`` (r x K) trained; None
            for V itself. At most K.
        max_wires: most wires of a circuit, 1 to 16; a layer whose input has more than ``2**max_wires`` numbers goes
            through its circuit in blocks of equal width, whose features stand one after the other, K for each. None:
            a layer has one block, and at most 65,536 inputs.
        projection_key: an integer that R is drawn from.
        train_circuit: whether theta is trained; otherwise it keeps its initial values and is saved with the adapter.
        reupload: whether each vector adds to the angles of its circuit, by trained rates; see
            :class:`qaa.nn.Adapter`. For readouts other than ``"state"``.
        shared_circuit: names of modules that share one circuit, with its angles and statistics, where they have one
            parent and one input width, as ``["q_proj", "k_proj", "v_proj"]``; None: each has its own.

    Raises:
        ValueError: a field is out of range; the sentence names what was expected and what was received.

    Example:
        >>> config = QaaConfig(target_modules=["q_proj", "v_proj"], readout="state[:8]")
        >>> config.peft_type.value, config.n_layers
        ('QAA', 4)
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the linear layers to adapt: a list of names or endings, a regular expression, or "
            "'all-linear'. None adapts what PEFT's LoRA adapts in this architecture, mostly q and v; name more "
            "layers when the task is far from what the model knows."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names that are not adapted although they match; pays together with 'all-linear'."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={
            "help": "Indices of the layers to adapt, one or a list. The upper layers alone save backward passes "
            "through the lower ones and pay when training time is short."
        },
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Name of the module list that layers_to_transform counts in; needed only where the first number "
            "in a module's name is not the layer."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Other modules that are trained in full and saved with the adapter; needed for a randomly "
            "initialised head, as in sequence classification."
        },
    )
    n_layers: int = field(
        default=4,
        metadata={
            "help": "Depth L of the circuit, at most 10000. Angles are few (3 n L for 'ring') beside V, so that depth "
            "costs time rather than parameters; it pays until the amplitudes are well mixed."
        },
    )
    ansatz: str = field(
        default="ring",
        metadata={
            "help": "Circuit: 'ring' (RY RZ, CNOT ring, RY), 'basic_entangler', 'strongly_entangling' or 'brick'. "
            "'brick' stays real and is the cheapest with the 'state' readout."
        },
    )
    readout: str | list[str] = field(
        default="z",
        metadata={
            "help": "Features: 'z' (<Z> of every wire, the paper's form), a list of Pauli strings, "
            "'probs[:K]', or 'state[:K]' (the real parts of K amplitudes of the input that is not normalised); "
            "'state[:1/2]' is K = 2**n_wires / 2, whatever a layer's width. "
            "'state' is linear in x: it pays when the adapter is to be merged or exported as a LoRA, or when training "
            "time counts, since no state is simulated per token. The others are quadratic in x and cannot be merged."
        },
    )
    adapter_bias: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the adapter adds a constant c. None means yes for Pauli readouts, whose features are "
            "small numbers around a mean, and no otherwise; without it, and without center_channels, a 'state' adapter "
            "is a plain LoRA."
        },
    )
    scaling: float | None = field(
        default=None,
        metadata={
            "help": "Factor s of the adapter. None means 1, but sqrt(2**n_wires + 1) for quadratic readouts without "
            "standardize_features, because <Z> of a spread-out state deviates by only 1/sqrt(2**n_wires + 1). Change "
            "it to change the step size of V without changing that of other parameters."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "True: V = 0 and c = 0, so that a fresh adapter is an exact no-op. False: random, for tests."
        },
    )
    init_angles: str = field(
        default="uniform",
        metadata={
            "help": "Initial angles: 'uniform' in [-pi, pi), 'small' in [-0.1, 0.1) radians, or 'zero'. Uniform ones "
            "spread a state over many amplitudes and give features of full rank; small ones keep it where it was."
        },
    )
    scale_channels: bool = field(
        default=False,
        metadata={
            "help": "Whether each input channel is first multiplied by a frozen factor: 1 until it is measured, then "
            "1/rms of that channel, or 1/std with center_channels. A few channels of an LLM's hidden states are "
            "hundreds of times larger than the rest and would fill the state alone; it pays for every readout, at d_in "
            "numbers per layer that are saved but not trained."
        },
    )
    center_channels: bool = field(
        default=False,
        metadata={
            "help": "Whether the mean of each input channel is subtracted first: 0 until it is measured, which makes "
            "the factors of scale_channels 1/std. It pays where channels have a mean far from zero, most for the "
            "quadratic readouts, whose state would otherwise be mostly that mean; it costs d_in numbers per layer that "
            "are saved but not trained. A 'state' adapter gets a constant term from it, so that it merges only where "
            "the base layer has a bias, and its LoRA needs a server that knows lora_bias."
        },
    )
    standardize_features: bool = field(
        default=False,
        metadata={
            "help": "Whether the features are brought to unit size before V: multiplied by 1/rms, or, in adapters that "
            "have a c, freed of their mean and multiplied by 1/std, measured with the initial angles. It pays because "
            "one ordinary learning rate (1e-2 or so) then serves V and the angles alike; it costs K numbers per layer, "
            "2 K with a c, that are saved but not trained, and no pass over the batch."
        },
    )
    calibration: str = field(
        default="explicit",
        metadata={
            "help": "When the statistics of scale_channels, center_channels and standardize_features are measured: "
            "'explicit', by qaa.peft.calibrate on batches of your choice, or 'first_batch', on what reaches each layer "
            "in its first training forward (padding counts), summed over all processes of torch.distributed, each of "
            "which has to reach the layer and to hold all of its parameters (DDP; FSDP is refused). It pays in "
            "training programs that cannot be changed; several batches give statistics with less noise. Either way "
            "they are saved and measured once. A graph compiled with fullgraph=True has no room for the measurement: "
            "calibrate explicitly, or train one step before compiling."
        },
    )
    up_projection: str = field(
        default="full",
        metadata={
            "help": "'full': V is trained, d_out K numbers per layer, most of the adapter. 'random': V = R diag(g) / "
            "sqrt(K) with K trained gains g and signs R that follow from projection_key and the layer's shape, so that "
            "they are not saved. It pays where the adapter has to be tiny, as in one of very many tasks: K + 3 n L "
            "numbers per layer with 'ring', which leaves the learning to the angles. 'circuit': V = sqrt(2^m / K) W^T "
            "diag(g), where W are the first K rows of a second circuit of the same ansatz and depth, on "
            "m = ceil(log2(d_out)) wires, cut to d_out: two circuits with gains between them, as in Quantum-PEFT "
            "(Koike-Akino et al., ICLR 2025), at K + 3 (n + m) L numbers. It pays where the columns of V should learn "
            "as well and the adapter has to stay tiny; K must not exceed d_out."
        },
    )
    r: int | None = field(
        default=None,
        metadata={
            "help": "Rank r of V = B M, with B (d_out x r) in the place of V and M (r x K) trained, normal with "
            "variance 1/K at the start; None: V is of full rank K. It pays with 'state[:K]' and many amplitudes: the "
            "adapter learns which combinations of them it uses, at r (d_out + K) numbers per layer instead of "
            "d_out K, and a step simulates r states instead of K. In the study half of all amplitudes under r = 4 had "
            "losses below LoRA's of r = 4 on function calls, and above them on Alpaca. It merges and exports as a LoRA "
            "of rank r."
        },
    )
    max_wires: int | None = field(
        default=None,
        metadata={
            "help": "Most wires that a circuit may have. A wider input is cut into as few blocks as do, of equal "
            "width; each goes through the same circuit, normalised by itself, and has K features of its own. It pays "
            "where a device has few qubits, in layers of thousands of inputs under a quadratic readout, whose states "
            "cost 2^n n each, and in layers of more than 65,536 inputs. None: one block."
        },
    )
    projection_key: int = field(
        default=0,
        metadata={
            "help": "What the signs of a random up-projection are drawn from; another key gives another draw, for "
            "trying several."
        },
    )
    train_circuit: bool = field(
        default=True,
        metadata={
            "help": "Whether the angles are trained. False keeps their random initial values (they are saved all the "
            "same), which makes training faster and is the control that tells what the circuit contributes."
        },
    )
    reupload: bool = field(
        default=False,
        metadata={
            "help": "Whether each vector x sets angles as well as amplitudes (data re-uploading): angle + omega z, "
            "with z the vector's n projections of unit size and a trained omega, 0 at the start, for every "
            "angle. It pays where a quadratic readout is wanted and time is not scarce: it doubles the "
            "angles, which are few, and every vector then has a circuit of its own, which takes several "
            "times as long; in the study its losses were a little lower. For readouts other than 'state'; "
            "noise and to_dense know no such adapters."
        },
    )
    shared_circuit: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of modules, such as ['q_proj', 'k_proj', 'v_proj'], that share one circuit where they have "
            "one parent and one input width: the first of them has its angles and the statistics of its input, each "
            "has V, M and c of its own. It pays with quadratic readouts, whose states are simulated once for all "
            "that PeftModel's forward pass gives the same tensor; with 'state' it saves angles and statistics alone. "
            "Name only modules that read the same vectors: o_proj, which reads others, would have the statistics of "
            "q_proj's."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType.QAA  # type: ignore[attr-defined]
        settle_modules(self)
        measured = ("scale_channels", "center_channels", "standardize_features")
        check_flags(self, "init_weights", "train_circuit", "reupload", *measured)
        if self.adapter_bias is not None:
            check_flag("adapter_bias", self.adapter_bias)
        if self.scaling is not None:
            self.scaling = check_scaling(self.scaling)
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise ValueError(f"expected {name} among {', '.join(known)}, received {shown(value)}")
        if self.calibration == "first_batch" and not any(getattr(self, name) for name in measured):
            raise ValueError(f"expected one of {', '.join(measured)} with calibration 'first_batch', received none")
        check_key(self.projection_key)
        if self.shared_circuit is not None:
            names = self.shared_circuit
            is_list = isinstance(names, (list, tuple, set, frozenset)) and all(isinstance(name, str) for name in names)
            if not is_list or len(set(names)) < 2:
                raise ValueError(
                    f"expected shared_circuit to be a list of at least two names of modules, received {shown(names)}"
                )
            self.shared_circuit = sorted(set(names))
        if self.r is not None:
            self.r = check_count("r", self.r, 2**MAX_WIRES)
        if self.max_wires is not None:
            self.max_wires = check_count("max_wires", self.max_wires, MAX_WIRES)
        self.n_layers = check_count("n_layers", self.n_layers, MAX_LAYERS)
        if isinstance(self.readout, tuple):
            self.readout = list(self.readout)
        # how many wires there are depends on the layer: here only the form is checked
        first = self.readout[0] if isinstance(self.readout, list) and self.readout else None
        if isinstance(first, str) and not 1 <= len(first) <= MAX_WIRES:
            raise ValueError(f"expected Pauli strings of 1 to {MAX_WIRES} letters, received {shown(first)}")
        parsed = Readout.parse(self.readout, len(first) if isinstance(first, str) else MAX_WIRES)
        if self.reupload and self.init_weights and not self.train_circuit:
            raise ValueError("expected train_circuit with reupload, whose rates start at 0, received a frozen circuit")
        if self.reupload and parsed.kind == "state":
            raise ValueError(f"expected Pauli strings or 'probs' with reupload, received {shown(self.readout)}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> QaaConfig:
        """A configuration by name; ``overrides`` are fields that replace or complete it.

        ``"paper"``: <Z> of every wire, V and c, four layers of ``ring``. On q and v of a 24-layer model of width 2048
        (n = 11) that is ``48 * (11 * 2048 + 2048 + 4 * 11 * 3) = 1,185,984`` parameters, 0.09 % of GPT-Neo-1.3B, the
        share that the paper reports; that this is the paper's layer list is our inference.
        ``"default"``: real parts of half of the amplitudes of the input, with scaled channels, standardised, and V of
        rank 4, ``4 * (2**n / 2 + d_out) + 4 * n * 3`` numbers per layer: 0.17 % of SmolLM2-135M and 0.045 % of
        GPT-Neo-1.3B on q and v, less than LoRA r = 4. It is linear in x and without a constant, so that it merges and
        exports as a LoRA of rank 4 that any server of LoRAs can serve, and wants layers of more than 4 inputs.
        Call :func:`qaa.peft.calibrate` before training, or add ``calibration="first_batch"``.
        ``"compact"``: likewise with 64 amplitudes, ``4 * (64 + d_out) + 4 * n * 3`` numbers per layer: 0.085 % of
        SmolLM2-135M and 0.031 % of GPT-Neo-1.3B on q and v. It wants layers of more than 32 inputs. Calibrate it, too.
        ``"tiny"``: 16 such amplitudes, two layers and a random up-projection of which 16 gains are trained,
        ``16 + 2 * n * 3`` numbers per layer: 0.0034 % of SmolLM2-135M on q and v. Calibrate it as well.

        Raises:
            ValueError: there is no preset of that name.

        Example:
            >>> config = QaaConfig.preset("default", target_modules=["v_proj"])
            >>> config.readout, config.r
            ('state[:1/2]', 4)
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"expected a preset among {', '.join(PRESETS)}, received {shown(name)}")
        return cls(**{**PRESETS[name], **overrides})
