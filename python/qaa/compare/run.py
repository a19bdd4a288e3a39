"""The whole comparison: inputs, runs, scores, ``results.json`` and the report. Finished runs are not repeated."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from . import sources
from .config import UNTOUCHED, CompareError, Settings
from .ranks import PAUSE, Ranks

_PACKAGE = Path(__file__).resolve().parent.parent
_PROTOCOL = ("data.py", "models.py", "methods.py", "training.py")  # a change in these changes every run
_SAMPLES = 6
_NOT_SHOWN = ("answers", "name", "test_counts")  # of a run, in results.json
_LARGEST_HIDDEN_FILE = 16 << 30  # bytes; beyond, the lower layers are computed at each step
_LARGEST_DIFFERENCE = 1e-3  # nats per token that stored states may change a loss by


def compare(chosen: Settings, command: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Runs the comparison and writes everything below ``chosen.out``; returns the content of ``results.json``.

    Of several processes (:mod:`.ranks`) the first one writes and returns, and the others return None.

    Raises:
        CompareError: a request that cannot be met, before anything is trained where that can be known.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    ranks = Ranks.join()
    out, cache = _writable(Path(chosen.out)), _writable(Path(chosen.cache))
    with _alone(out) if ranks.rank == 0 else nullcontext():
        try:
            return _compare(chosen, out, cache, command, ranks)
        except OSError as error:
            # a full disk, a folder that vanished: what is finished is in its files
            where = f" at {error.filename}" if error.filename else ""
            raise CompareError(
                f"expected to read and write files below {out}, received: {error.strerror or error}{where}"
            ) from None


def _compare(
    chosen: Settings, out: Path, cache: Path, command: Sequence[str] | None, ranks: Ranks
) -> dict[str, Any] | None:
    began = time.perf_counter()
    if ranks.rank > 0:
        job, facts, base, os.environ["HF_HUB_OFFLINE"] = ranks.announced()
        _sweeps(_Results(job, facts, base, ranks), out)
        return None
    try:
        found = _resolve(chosen, cache)
        if not any(source.origin.startswith("hub ") for source in found.values()):
            os.environ["HF_HUB_OFFLINE"] = "1"  # nothing below may wait for a hub that does not answer
        prepared = time.perf_counter()
        job, facts = _prepare(chosen, found, cache, out)
        base = _fingerprint(job, found)
    except BaseException:
        ranks.announce(None)
        raise
    ranks.announce((job, facts, base, os.environ.get("HF_HUB_OFFLINE", "")))
    once = _Results(job, facts, base, ranks)
    results, rates, losses = _sweeps(once, out)

    work = out / "work"
    stored = _read(work / "hidden.json")
    if stored is not None and stored["fingerprint"] == base and stored["worst"] <= _LARGEST_DIFFERENCE:
        facts.update(stored_states=True, stored_states_seconds=stored["seconds"])
    if chosen.generate:
        _say("scoring the answers")
    wall = {"preparing": prepared - began, "runs": once.seconds(), "this_call": 0.0}
    report = _summary(chosen, found, facts, results, rates, command)
    if chosen.noise:
        report["noise"] = {"probabilities": list(chosen.noise), "trajectories": chosen.trajectories, "rows": losses}
    wall["this_call"] = time.perf_counter() - began
    report["wall_seconds"] = wall
    from .report import write_report

    write_report(report, out)
    sources.write_json(out / "results.json", report)
    if facts["hidden_path"]:
        Path(facts["hidden_path"]).unlink(missing_ok=True)
    return report


class _Results:
    """Results in files, each from a process of its own, made once and by one of the ranks."""

    def __init__(self, job: Any, facts: dict[str, Any], base: str, ranks: Ranks) -> None:
        self.facts, self.base, self.ranks = facts, base, ranks
        self.job = replace(job, device=ranks.see_one_gpu(job.device))
        self._work = Path(job.splits).parent
        self._names = list(_names(job.settings))
        self._claims = ranks.claims(self._work / ".claims")
        self._found: dict[str, dict[str, Any]] = {}

    def __call__(
        self, name: str, print_: str, function: Any, *arguments: Any, needed: Path | None = None
    ) -> dict[str, Any] | None:
        """The stored result ``name`` if its fingerprint is ``print_``, else a new one; None while a rank is at it.

        A stored result whose file ``needed`` has gone is made anew.
        """
        if name not in self._found:
            with self._claims.claim(self._names.index(name)) as is_ours:
                if not is_ours:
                    return None
                stored = self.stored(name, print_) if needed is None or needed.is_file() else None
                if stored is not None and self.ranks.rank == 0:
                    _say(f"{self._heading(name)}: done{' before' if self.ranks.world == 1 else ''}")
                self._found[name] = stored or self._new(name, print_, function, arguments)
        return dict(self._found[name]["result"])

    def seconds(self) -> float:
        """What all results took."""
        return float(sum(stored["wall_seconds"] for stored in self._found.values()))

    def stored(self, name: str, print_: str) -> dict[str, Any] | None:
        """What is stored of the result ``name`` if its fingerprint is ``print_``."""
        stored = _read(self._work / f"{name}.json")
        if stored is None or stored.get("fingerprint") != print_ or not {"result", "wall_seconds"} <= stored.keys():
            return None
        return stored

    def _new(self, name: str, print_: str, function: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
        _say(self._heading(name) + (f", process {self.ranks.rank}" if self.ranks.world > 1 else ""))
        if self.facts["hidden_path"] and self.job.hidden is None:
            with self._claims.claim(len(self._names), wait=True):
                self.job = _with_hidden_states(self.job, self.facts, self.base)
        started = time.perf_counter()
        result = _in_process(function, self.job, *arguments, log=self._work / f"{name}.log")
        stored = {"fingerprint": print_, "wall_seconds": time.perf_counter() - started, "result": result}
        sources.write_json(self._work / f"{name}.json", stored)
        return stored

    def _heading(self, name: str) -> str:
        return f"[{self._names.index(name) + 1}/{len(self._names)}] {name}"


def _names(chosen: Settings) -> Iterator[str]:
    """Of all results, in the order in which a single process makes them."""
    yield UNTOUCHED
    for name in chosen.methods:
        if _is_searched(chosen, name):
            yield f"{name}-rate"
        for seed in chosen.seeds:
            yield f"{name}-seed{seed}"
            if _is_noisy(chosen, name):
                yield f"{name}-seed{seed}-noise"


def _is_searched(chosen: Settings, name: str) -> bool:
    from .methods import row

    return len(row(chosen, name).method.learning_rates) > 1


def _is_noisy(chosen: Settings, name: str) -> bool:
    from .methods import row
    from .noise import has_noise

    return bool(chosen.noise) and has_noise(row(chosen, name))


_Runs = dict[tuple[str, int], dict[str, Any]]
_Rates = dict[str, dict[str, Any]]
_Losses = dict[str, list[list[float]]]


def _sweeps(once: _Results, out: Path) -> tuple[_Runs, _Rates, _Losses]:
    """Goes through all results until each is there: runs, learning rates, and losses under noise."""
    while (found := _sweep(once, out)) is None:
        time.sleep(PAUSE)
    return found


def _sweep(once: _Results, out: Path) -> tuple[_Runs, _Rates, _Losses] | None:
    """Takes what is there and makes what can be made now; None if something is missing at the end."""
    from .methods import row
    from .noise import evaluate_noise
    from .training import run, run_untouched, tune

    chosen: Settings = once.job.settings
    runs: dict[tuple[str, int], Any] = {(UNTOUCHED, 0): once(UNTOUCHED, once.base, run_untouched)}
    rates: dict[str, Any] = {}
    losses: dict[str, list[Any]] = {name: [] for name in chosen.methods if _is_noisy(chosen, name)}
    for name in chosen.methods:
        own = _digest(once.base, *_row_parts(row(chosen, name)))
        if _is_searched(chosen, name):
            rates[name] = once(f"{name}-rate", _digest(own, str(chosen.seeds[0])), tune, name, chosen.seeds[0])
        else:
            rates[name] = {"rate": row(chosen, name).method.learning_rates[0], "grid": [], "at_edge": False}
        if rates[name] is None:
            continue
        for seed in chosen.seeds:
            folder = str(out / "adapters" / f"{name}-seed{seed}")
            title, rate = f"{name}-seed{seed}", rates[name]["rate"]
            print_ = _digest(own, str(seed), repr(rate))
            if name not in losses:
                runs[name, seed] = once(title, print_, run, name, seed, rate, folder)
                continue
            how = chosen.noise, chosen.trajectories
            of_noise = _digest(print_, repr(how), sources.file_hash(_PACKAGE / "compare" / "noise.py"))
            is_read = once.stored(f"{title}-noise", of_noise) is None  # the adapter, to be tested under noise
            needed = Path(folder) / "adapter_model.safetensors" if is_read else None
            runs[name, seed] = once(title, print_, run, name, seed, rate, folder, needed=needed)
            if runs[name, seed] is not None:
                found = once(f"{title}-noise", of_noise, evaluate_noise, name, seed, folder, *how)
                losses[name].append(found and found["test_losses"])
    is_complete = None not in (*runs.values(), *rates.values(), *(loss for some in losses.values() for loss in some))
    return (runs, rates, losses) if is_complete else None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        try:
            probe.write_bytes(bytes(1 << 16))
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CompareError(f"expected a folder that can be written, received {folder}: {reason}") from None
    return folder


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Holds ``out`` for this process; the system lets go of it when the process ends, however that happens."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (out / ".lock").open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.seek(0)
            who = stream.read().strip() or "of unknown number"
            raise CompareError(f"expected no other run in {out}, received the one of process {who}") from None
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def _in_process(function: Any, job: Any, *arguments: Any, log: Path) -> Any:
    """``function(job, *arguments)`` in a process of its own; what goes wrong there is a sentence here."""
    from .training import run_in_process

    try:
        return run_in_process(function, job, *arguments, log=log)
    except RuntimeError as error:
        _writable(log.parent)  # the likeliest reason has a sentence of its own
        raise CompareError(f"expected {log.stem} to finish, received {error}; the same command continues") from None


def _resolve(chosen: Settings, cache: Path) -> dict[str, sources.Source]:
    hub = {"data": sources.data_from_hub, "model": sources.model_from_hub}
    if chosen.generate:
        hub["encoder"] = sources.model_from_hub
    names = {"data": chosen.data, "model": chosen.model, "encoder": chosen.encoder}
    found = {what: sources.resolve(what, names[what], chosen.source, cache, hub[what]) for what in hub}
    for what, source in found.items():
        _say(f"{what}: {source.name}, from {source.origin}")
    return found


def _prepare(chosen: Settings, found: dict[str, sources.Source], cache: Path, out: Path) -> tuple[Any, dict[str, Any]]:
    """Checks model, data, targets and device, writes the splits, and says what there is to say about them."""
    from .data import read_examples, save_splits, split
    from .methods import adapted_targets, check_options, row
    from .models import decoder_layers, first_adapted_layer, load_tokenizer, skeleton
    from .training import Job, choose_device

    for name in chosen.methods:
        check_options(row(chosen, name))
    device = choose_device(chosen.device)
    examples = read_examples(found["data"].path)
    model_path = sources.plain_model(found["model"], cache)
    model, tokenizer = skeleton(model_path), load_tokenizer(model_path)
    if chosen.generate:
        from .metrics import check_encoder

        check_encoder(found["encoder"].path, found["encoder"].name)
    splits = split(examples, tokenizer, chosen)
    n_layers = len(decoder_layers(model))
    first = first_adapted_layer(n_layers, chosen.layers)
    targets = adapted_targets(model, chosen.targets)
    work = out / "work"
    splits_path = work / "splits.json"
    save_splits(splits, splits_path)
    job = Job(chosen, str(model_path), device, str(splits_path), None, first, targets)
    width = model.config.hidden_size
    tokens = sum(len(example) for example in splits.all())
    storable = first > 0 and 4 * width * tokens <= _LARGEST_HIDDEN_FILE
    facts = {
        "n_layers": n_layers,
        "first": first,
        "targets": list(targets),
        "device": device,
        "model_parameters": model.num_parameters(),
        "splits": {
            name: {
                "examples": len(part),
                "tokens": sum(map(len, part)),
                "answer_tokens": sum(len(example.response_ids) for example in part),
            }
            for name, part in (("train", splits.train), ("validation", splits.validation), ("test", splits.test))
        },
        "examples_available": len(examples),
        "test": [
            ("\n\n".join(filter(None, (example.system, example.prompt))), example.response) for example in splits.test
        ],
        "test_counts": [len(example.response_ids) for example in splits.test],
        "test_groups": splits.test_groups(),
        "hidden_path": str(work / "hidden.npy") if storable else None,
        "stored_states": False,
        "stored_states_seconds": 0.0,
    }
    return job, facts


def _with_hidden_states(job: Any, facts: dict[str, Any], base: str) -> Any:
    """The job with stored hidden states; without, if this model does not give the same losses from them."""
    from .training import cache_hidden_states

    path = Path(facts["hidden_path"])
    note = path.with_suffix(".json")
    stored = _read(note)
    size = path.stat().st_size if path.exists() else None
    is_there = size is not None and stored is not None and size == stored.get("bytes", size)
    is_useless = stored is not None and stored["worst"] > _LARGEST_DIFFERENCE
    if stored is None or stored["fingerprint"] != base or not (is_there or is_useless):
        _say(f"computing what enters layer {job.first}, once for all methods")
        seconds, worst = _in_process(cache_hidden_states, job, path, log=path.with_suffix(".log"))
        stored = {"fingerprint": base, "seconds": seconds, "worst": worst, "bytes": path.stat().st_size}
        sources.write_json(note, stored)
    if stored["worst"] > _LARGEST_DIFFERENCE:
        _say(f"stored states change the loss by {stored['worst']:.2g}: every layer is computed each time instead")
        path.unlink(missing_ok=True)
        facts["hidden_path"] = None
        return job
    return replace(job, hidden=str(path))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "fingerprint" in content else None


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _fingerprint(job: Any, found: dict[str, sources.Source]) -> str:
    """Changes with everything that can change a run: settings, inputs, code and library versions."""
    settings = job.settings.as_dict()
    elsewhere = ("methods", "seeds", "variants", "references", "budget", "noise", "trajectories")
    for key in ("out", "cache", "encoder", "source", *elsewhere):
        settings.pop(key)
    code = [_PACKAGE / "compare" / name for name in _PROTOCOL]
    parts = [json.dumps(settings, sort_keys=True), job.device, str(job.first), *job.targets]
    parts += [Path(job.splits).read_text(encoding="utf-8"), json.dumps(versions(), sort_keys=True)]
    parts += [_model_digest(Path(job.model)), *(sources.file_hash(path) for path in code)]
    return _digest(*parts)


def _row_parts(row: Any) -> list[str]:
    """What a row's runs depend on beside the comparison's base: not its name or label."""
    from .controls import CONTROLS

    method = row.method
    plain = [method.name, dict(row.options), method.learning_rates, method.angle_rate]
    code = _adapter_code() if method.own else ""
    if method.name in CONTROLS:
        code = sources.file_hash(_PACKAGE / "compare" / "controls.py")
    return [json.dumps(plain, sort_keys=True, default=str), code]


def _adapter_code() -> str:
    """Changes with the code of this package that runs when its own adapters are trained."""
    paths = [
        p for p in sorted(_PACKAGE.rglob("*.py")) if p.parent.name != "compare" and p.name[:3] not in ("cli", "__m")
    ]
    return _digest(*(sources.file_hash(path) for path in paths))


def _model_digest(folder: Path) -> str:
    """Names, sizes and times of the weights, and the content of the small files."""
    parts = []
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        large = path.stat().st_size > 16 << 20
        parts.append(f"{path.name} {path.stat().st_size} {'' if large else sources.file_hash(path)}")
    return _digest(*parts)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that can change a figure."""
    names = (
        "qaa numpy torch transformers peft accelerate datasets evaluate sacrebleu rouge-score bert-score safetensors"
    )
    found = {"python": platform.python_version()}
    for name in names.split():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    if found["qaa"] == "not installed":  # used from its source folder
        found["qaa"] = "source"
    return found


def _machine(device: str) -> dict[str, Any]:
    import torch

    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "device": device,
        "gpu": None,
    }
    if device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


# --------------------------------------------------------------------------------------------------- summary


def _summary(
    chosen: Settings,
    found: dict[str, sources.Source],
    facts: dict[str, Any],
    results: dict[tuple[str, int], dict[str, Any]],
    rates: dict[str, dict[str, Any]],
    command: Sequence[str] | None,
) -> dict[str, Any]:
    from .methods import row

    if chosen.generate:
        _score(results, facts, found["encoder"])
    shown = {name: row(chosen, name) for name in chosen.methods}
    methods = [
        _row(name, [r for (other, _), r in results.items() if other == name], rates.get(name), shown.get(name))
        for name in (*chosen.methods, UNTOUCHED)
    ]
    machine = _machine(facts["device"])
    return {
        "schema": 2,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(command) if command else None,
        "settings": chosen.as_dict(),
        "sources": {what: {"name": source.name, "origin": source.origin} for what, source in found.items()},
        "versions": versions(),
        "machine": machine,
        "protocol": {key: value for key, value in facts.items() if key not in ("test", "hidden_path")},
        "references": _references(chosen),
        "differences": _differences(results, _references(chosen), facts["test_groups"]),
        "methods": methods,
        "samples": _samples(chosen, facts, results) if chosen.generate else [],
    }


def _score(results: dict[tuple[str, int], dict[str, Any]], facts: dict[str, Any], encoder: sources.Source) -> None:
    """Adds the text scores of every run's answers."""
    from .metrics import text_scores

    references = [response for _, response in facts["test"]]
    for result in results.values():
        result["scores"] = text_scores(result["answers"], references, encoder.path, facts["device"], encoder.name)


def _samples(chosen: Settings, facts: dict[str, Any], results: dict[tuple[str, int], Any]) -> list[dict[str, Any]]:
    """Prompts at even distances in the test split, with the answers of every row's first seed."""
    step = max(1, len(facts["test"]) // _SAMPLES)
    first = {name: (name, chosen.seeds[0]) for name in chosen.methods} | {UNTOUCHED: (UNTOUCHED, 0)}
    return [
        {
            "prompt": facts["test"][at][0],
            "reference": facts["test"][at][1],
            "answers": {name: results[key]["answers"][at] for name, key in first.items()},
        }
        for at in list(range(0, len(facts["test"]), step))[:_SAMPLES]
    ]


def _row(name: str, runs: list[dict[str, Any]], rate: dict[str, Any] | None, shown: Any) -> dict[str, Any]:
    """One entry of ``methods``: means over seeds, their standard deviations, and what each seed gave."""

    def over_seeds(get: Any) -> float:
        return float(mean(get(run) for run in runs))

    keys = ("bleu", "rouge1", "rouge2", "rougeL", "bertscore") if "scores" in runs[0] else ()
    figures = {
        "validation_loss": over_seeds(lambda r: r["best_validation_loss"]),
        "best_validation_loss": over_seeds(lambda r: r["best_validation_loss"]),
        "final_validation_loss": over_seeds(
            lambda r: float("nan") if r["final_validation_loss"] is None else r["final_validation_loss"]
        ),
        "test_loss": over_seeds(lambda r: r["test_loss"]),
        **{key: over_seeds(lambda r, key=key: r["scores"][key]) for key in keys},
        "train_seconds": over_seeds(lambda r: r["train_seconds"]),
    }
    spread = {
        key: float(stdev(values)) if len(values) > 1 else None
        for key, values in {
            "test_loss": [r["test_loss"] for r in runs],
            "best_validation_loss": [r["best_validation_loss"] for r in runs],
            **{key: [r["scores"][key] for r in runs] for key in keys},
        }.items()
    }
    first = runs[0]
    return {
        "name": name,
        "method": shown.method.name if shown else UNTOUCHED,
        "label": shown.label if shown else "Untouched model",
        "about": shown.about if shown else "the model as it came",
        "trainable_parameters": first["trainable_parameters"],
        "trainable_percent": 100 * first["trainable_parameters"] / first["total_parameters"],
        **{key: None if value != value else value for key, value in figures.items()},
        "peak_memory_bytes": max(r["peak_memory_bytes"] for r in runs),
        "adapter_bytes": first["adapter_bytes"],
        "seeds": [r["seed"] for r in runs] if shown else [],
        "spread": spread,
        "learning_rate": rate,
        **({key: first["scores"][key] for key in ("bleu_signature", "rouge_words", "bertscore_layer")} if keys else {}),
        "runs": [{k: _rounded(v) for k, v in r.items() if k not in _NOT_SHOWN} for r in runs],
    }


def _rounded(value: Any) -> Any:
    """Lists of floats to five significant digits: what the report draws, at a third of the size."""
    if isinstance(value, (list, tuple)):
        return [float(f"{item:.5g}") if isinstance(item, float) else _rounded(item) for item in value]
    return value


def _references(chosen: Settings) -> list[str]:
    """The rows that the others are subtracted from."""
    wanted = chosen.references or ("lora", UNTOUCHED)
    return [name for name in wanted if name in (*chosen.methods, UNTOUCHED)]


def _differences(
    results: dict[tuple[str, int], dict[str, Any]], references: Sequence[str], groups: Sequence[int]
) -> list[dict[str, Any]]:
    """Test-loss differences of every row to each reference with 95 % intervals over seeds and groups of examples."""
    from .metrics import paired_interval

    sums: dict[str, list[list[float]]] = {}
    for (name, _), result in results.items():
        sums.setdefault(name, []).append(result["test_sums"])
    tokens = results[UNTOUCHED, 0]["test_counts"]
    found = []
    for reference in references:
        for name in sums:
            if name not in (reference, UNTOUCHED):
                difference, low, high = paired_interval(sums[name], sums[reference], tokens, groups)
                found.append(
                    {"method": name, "reference": reference, "difference": difference, "low": low, "high": high}
                )
    return found
