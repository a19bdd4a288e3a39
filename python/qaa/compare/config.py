"""What one comparison is: :class:`Settings`, from defaults, a budget, a YAML file and options, in that order."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


class CompareError(Exception):
    """A request that cannot be met, in one sentence; the command line prints it and exits with code 2."""


def reason(error: BaseException) -> str:
    """The kind of an exception and the first line of what it says.

    Example:
        >>> reason(ValueError("no such thing: further"))
        'ValueError: no such thing: further'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no reason given'}"


UNTOUCHED = "untouched"

#: The rows of the paper's table, in its order. ``untouched`` is always added as the reference.
DEFAULT_METHODS = ("qaa-paper", "qaa", "lora", "sora", "prefix", "full")

#: What a row can train; the last five are controls, which could do without a circuit what QAA does.
METHOD_NAMES = (
    *DEFAULT_METHODS, "rslora", "vera", "ia3", "road", "bias", "random-projection", "random-squares", "whitened-lora",
    "largest-channels", "lora-frozen-a",
)  # fmt: skip

#: What each budget sets. Times are for two cores that multiply float32 matrices at about 170 GFLOP/s together.
BUDGETS: dict[str, dict[str, Any]] = {
    # A few minutes: shows that everything works, not which method is better.
    "smoke": {
        "train_examples": 32,
        "validation_examples": 8,
        "test_examples": 8,
        "max_tokens": 96,
        "max_new_tokens": 16,
        "steps": 8,
        "tuning_steps": 2,
        "evaluations": 2,
        "layers": 4,
        "grid_extensions": 0,
        "seeds": (0,),
    },
    # About a quarter of an hour: the upper layers only, one seed.
    "quick": {
        "train_examples": 304,
        "validation_examples": 48,
        "test_examples": 54,
        "max_tokens": 128,
        "max_new_tokens": 56,
        "steps": 48,
        "tuning_steps": 12,
        "evaluations": 4,
        "layers": 12,
        "grid_extensions": 1,
        "seeds": (0,),
    },
    # For a GPU: every layer, three seeds, long examples.
    "full": {
        "train_examples": 8000,
        "validation_examples": 256,
        "test_examples": 256,
        "max_tokens": 512,
        "max_new_tokens": 256,
        "steps": 1500,
        "tuning_steps": 150,
        "evaluations": 15,
        "batch_size": 16,
        "layers": None,
        "grid_extensions": 2,
        "seeds": (0, 1, 2),
    },
}

SOURCES = ("auto", "hub", "packages", "local")

#: Error probabilities per gate that ``noise: true`` stands for.
NOISE = (0.0003, 0.001, 0.003, 0.01, 0.03)


@dataclass(frozen=True)
class Variant:
    """A row: a method with options of its configuration. What is None comes from the method."""

    method: str
    label: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] | None = None
    angle_rate: float | None = None


@dataclass(frozen=True)
class Settings:
    """One comparison, complete: equal settings give equal training runs.

    ``model``, ``data`` and ``encoder`` are hub names or local paths. ``layers`` is the number of top decoder layers
    that are adapted (``None``: all). ``targets`` are the adapted linear layers (``None``: the default of PEFT for the
    model's architecture, query and value for Llama). ``methods`` are the rows: names of methods or of ``variants``.
    A variant may have a method's name and then changes that method. ``references`` are the rows that every other one
    is subtracted from (``None``: ``lora`` and ``untouched``). Without ``generate`` there are no answers and no scores.
    ``noise`` are error probabilities per gate at which trained adapters are tested once more, with ``trajectories``.

    Example:
        >>> settings(budget="smoke", seeds=[0, 1]).seeds
        (0, 1)
        >>> chosen = settings(methods=["lora-2"], variants={"lora-2": {"method": "lora", "options": {"r": 2}}})
        >>> chosen.row("lora-2").options, chosen.row("sora").method
        ({'r': 2}, 'sora')
        >>> settings(methods=["lorra"])
        Traceback (most recent call last):
        ...
        qaa.compare.config.CompareError: expected methods among qaa-paper, qaa, lora, sora, prefix, full, \
rslora, vera, ia3, road, bias, random-projection, random-squares, whitened-lora, largest-channels, lora-frozen-a, \
received 'lorra' (did you mean 'lora'?)
    """

    budget: str = "quick"
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    data: str = "tatsu-lab/alpaca"
    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    source: str = "auto"
    methods: tuple[str, ...] = DEFAULT_METHODS
    seeds: tuple[int, ...] = (0,)
    out: str = "reports/compare"
    cache: str = field(default_factory=lambda: os.environ.get("QAA_CACHE") or str(Path.home() / ".cache" / "qaa"))
    device: str = "auto"
    train_examples: int = 304
    validation_examples: int = 48
    test_examples: int = 54
    split_seed: int = 0
    max_tokens: int = 128
    max_new_tokens: int = 56
    steps: int = 48
    tuning_steps: int = 12
    evaluations: int = 4
    batch_size: int = 8
    layers: int | None = 12
    targets: tuple[str, ...] | None = None
    grid_extensions: int = 1
    generate: bool = True
    noise: tuple[float, ...] = ()
    trajectories: int = 16
    references: tuple[str, ...] | None = None
    variants: Mapping[str, Variant] = field(default_factory=dict)

    def row(self, name: str) -> Variant:
        """What the row ``name`` trains."""
        return self.variants.get(name) or Variant(name)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for YAML and JSON."""
        plain = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def settings(config: str | os.PathLike[str] | None = None, **given: Any) -> Settings:
    """The settings of a comparison: ``given`` values override the YAML file ``config``, which overrides the budget.

    Values of ``None`` in ``given`` count as not given.

    Raises:
        CompareError: an unknown key, a value of the wrong kind, an unknown method or an unreadable file.
    """
    chosen = {**(_read_yaml(Path(config)) if config is not None else {}), **_given(given)}
    known = [f.name for f in fields(Settings)]
    for key in chosen:
        if key not in known:
            raise CompareError(f"expected keys among {', '.join(known)}, received {key!r}{_hint(str(key), known)}")
    budget = chosen.get("budget", "quick")
    if not isinstance(budget, str) or budget not in BUDGETS:
        raise CompareError(f"expected budget to be one of {', '.join(BUDGETS)}, received {budget!r}")
    return _checked({"budget": budget, **BUDGETS[budget], **chosen})


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ModuleNotFoundError:
        raise CompareError(f"expected pyyaml to read {path}, received none: pip install 'qaa[compare]'") from None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompareError(f"expected a readable YAML file as config, received {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CompareError(f"expected {path} to be text in UTF-8, received: {error}") from None
    except yaml.YAMLError as error:
        raise CompareError(f"expected valid YAML in {path}, received: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise CompareError(f"expected {path} to hold 'key: value' lines, received a {type(content).__name__}")
    return content


def _hint(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


_MINIMUM = {
    "train_examples": 1,
    "validation_examples": 1,
    "test_examples": 1,
    "split_seed": 0,
    "max_tokens": 8,
    "max_new_tokens": 1,
    "steps": 2,  # the first step of the schedule has rate 0
    "tuning_steps": 2,
    "evaluations": 1,
    "batch_size": 1,
    "layers": 1,
    "grid_extensions": 0,
    "trajectories": 1,
}


def _checked(values: dict[str, Any]) -> Settings:
    for key, minimum in _MINIMUM.items():
        value = values.get(key, minimum)
        if key == "layers" and value in (None, "all"):
            values[key] = None
        elif isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise CompareError(f"expected {key} to be an integer of at least {minimum}, received {value!r}")
        elif value >= 2**31:
            received = value if value < 2**63 else f"one of {value.bit_length()} bits"
            raise CompareError(f"expected {key} to be an integer below {2**31}, received {received}")
    for key in ("model", "data", "encoder", "source", "out", "cache", "device"):
        if key in values and (not isinstance(values[key], (str, os.PathLike)) or not _is_text(str(values[key]))):
            raise CompareError(f"expected {key} to be text, received {values[key]!r}")
        if key in values:
            values[key] = os.path.expanduser(str(values[key]))
    if values.get("source", "auto") not in SOURCES:
        raise CompareError(f"expected source to be one of {', '.join(SOURCES)}, received {values['source']!r}")

    if not isinstance(values.get("generate", True), bool):
        raise CompareError(f"expected generate to be true or false, received {values['generate']!r}")

    if "noise" in values:
        values["noise"] = _error_probabilities(values["noise"])

    values["variants"] = {
        _row_name(name): _variant(name, entry)
        for name, entry in _mapping(values.get("variants", {}), "variants").items()
    }
    known = tuple(dict.fromkeys([*METHOD_NAMES, *values["variants"]]))
    methods = _listed(values.get("methods", DEFAULT_METHODS), "methods")
    for name in methods:
        _known(name, known, "methods")
    values["methods"] = tuple(dict.fromkeys(methods))
    if values.get("references") is not None:
        references = _listed(values["references"], "references")
        for name in references:
            _known(name, (*values["methods"], UNTOUCHED), "references")
        values["references"] = tuple(dict.fromkeys(references))

    seeds = _listed(values.get("seeds", (0,)), "seeds")
    if any(isinstance(seed, bool) or not isinstance(seed, int) or seed < 0 for seed in seeds):
        raise CompareError(f"expected seeds to be integers of at least 0, received {list(seeds)}")
    if max(seeds) >= 2**32:
        raise CompareError(f"expected seeds to be integers below {2**32}, received {list(seeds)}")
    values["seeds"] = tuple(dict.fromkeys(seeds))

    if values.get("targets") is not None:
        values["targets"] = tuple(str(name) for name in _listed(values["targets"], "targets"))
    return Settings(**values)


def _is_text(value: str) -> bool:
    return bool(value.strip()) and "\0" not in value


def _listed(value: Any, what: str) -> tuple[Any, ...]:
    items = (value,) if isinstance(value, (str, int)) else tuple(value) if isinstance(value, (list, tuple)) else ()
    if not items:
        raise CompareError(f"expected {what} to be a list of at least one entry, received {value!r}")
    return items


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CompareError(f"expected {what} to map names to values, received {value!r}")
    return value


def _known(name: Any, known: Sequence[str], what: str) -> str:
    if name not in known:
        raise CompareError(f"expected {what} among {', '.join(known)}, received {name!r}{_hint(str(name), known)}")
    return str(name)


def _row_name(name: Any) -> str:
    """Names of rows become names of files and of style rules."""
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or name == UNTOUCHED:
        raise CompareError(
            f"expected the names of variants to be lower-case words and digits with hyphens, not {UNTOUCHED!r}, "
            f"received {name!r}"
        )
    return name


def _variant(name: str, entry: Any) -> Variant:
    given = dict(_mapping(entry, f"variant {name}"))
    keys = [f.name for f in fields(Variant)]
    for key in given:
        _known(key, keys, f"the keys of variant {name}")
    if "method" not in given and name not in METHOD_NAMES:
        raise CompareError(f"expected variant {name} to have the key 'method', received {', '.join(given) or 'none'}")
    label, angle_rate = given.get("label"), given.get("angle_rate")
    if label is not None and (not isinstance(label, str) or not label.strip()):
        raise CompareError(f"expected the label of variant {name} to be text, received {label!r}")
    return Variant(
        _known(given.get("method", name), METHOD_NAMES, f"the method of variant {name}"),
        label,
        dict(_mapping(given.get("options", {}), f"options of {name}")),
        _rates(name, given["learning_rates"]) if given.get("learning_rates") is not None else None,
        None if angle_rate is None else _rates(name, angle_rate)[0],
    )


def _error_probabilities(given: Any) -> tuple[float, ...]:
    if isinstance(given, bool):
        return NOISE if given else ()
    listed = given if isinstance(given, (list, tuple)) else (given,)
    try:
        values = tuple(sorted({float(rate) for rate in listed}))
    except (TypeError, ValueError):
        values = (0.0,)
    if any(not 0 < rate <= 1 for rate in values):
        raise CompareError(f"expected noise to be true, false or probabilities in (0, 1], received {given!r}")
    return values


def _rates(name: str, rates: Any) -> tuple[float, ...]:
    # YAML 1.1 reads 2e-2 (without a point) as text
    listed = (rates,) if isinstance(rates, (int, float, str)) else rates
    try:
        values = () if any(isinstance(rate, bool) for rate in listed) else tuple(float(rate) for rate in listed)
    except (TypeError, ValueError):
        values = ()
    if not values or any(not 0 < rate < float("inf") for rate in values):
        raise CompareError(f"expected the learning rates of {name} to be positive numbers, received {rates!r}")
    return tuple(sorted(set(values)))
