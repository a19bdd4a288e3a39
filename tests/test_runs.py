"""Long runs of qaa compare survive what happens to long runs: signals, full disks, damaged files, a second run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import psutil
import torch

from compare_tiny import write_data, write_model
from qaa.cli import main
from qaa.compare import run, sources
from qaa.compare.config import CompareError
from qaa.compare.ranks import Claims, Ranks

KILLS = int(os.environ.get("QAA_KILLS", "1"))  # more than one by hand: longer rows, killed at random moments
MEASURED = ("created", "command", "out", "cache", "origin", "peak_memory_bytes")  # and every number of seconds


def setting_up(folder: Path) -> Path:
    """The configuration of a comparison of two rows that takes seconds."""
    config = {
        "model": str(write_model(folder / "model")), "data": str(write_data(folder / "data.json")), "budget": "smoke",
        "source": "local", "cache": str(folder / "cache"), "train_examples": 24, "validation_examples": 12,
        "test_examples": 12, "max_tokens": 80, "layers": 2, "steps": 6 if KILLS == 1 else 40,
        "tuning_steps": 2, "evaluations": 2 if KILLS == 1 else 20, "batch_size": 4, "generate": False,
        "seeds": [0] if KILLS == 1 else [0, 1], "methods": ["lora", "qaa"],
        "variants": {name: {"learning_rates": [1e-3]} for name in ("lora", "qaa")},
    }  # fmt: skip
    path = folder / "compare.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The configuration and the results of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs")
    config = setting_up(folder)
    assert main(["compare", "--config", str(config), "--out", str(folder / "out")]) == 0
    return config, comparable(folder / "out")


def comparable(out: Path) -> Any:
    """results.json without what is measured anew each time."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {k: v for k, v in value.items() if k not in MEASURED and "seconds" not in k}
            return {key: without(inner) for key, inner in kept.items()}
        return [without(inner) for inner in value] if isinstance(value, list) else value

    return without(json.loads((out / "results.json").read_text("utf-8")))


def start(config: Path, out: Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "qaa", "compare", "--config", str(config), "--out", str(out)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **options)


def launch(config: Path, out: Path) -> subprocess.Popen[str]:
    """The same under ``accelerate launch``, in two processes (multi_gpu is its word for them; there need be no GPU)."""
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--main_process_port", "0"]
    command = [*launcher, "-m", "qaa", "compare", "--config", str(config), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def has_begun(out: Path, job: str) -> Any:
    """Whether the files of ``job``'s training are there: it is at work, or done."""
    return lambda: (out / "adapters" / job).exists()


def row_at_work(out: Path, since: float) -> str | None:
    """The row that has evaluated its model since then, and has no result yet."""
    for best in sorted((out / "adapters").glob("*/best.part")):
        with contextlib.suppress(FileNotFoundError):
            if best.stat().st_mtime > since and not (out / "work" / f"{best.parent.name}.json").exists():
                return best.parent.name
    return None


def test_a_killed_run_continues_to_the_same_results(undisturbed: tuple[Path, Any], tmp_path: Path) -> None:
    """Killed while it trains, with its temporary files lying about, and continued; QAA_KILLS asks for more kills."""
    config, expected = undisturbed
    report = json.loads((config.parent / "out" / "results.json").read_text("utf-8"))
    seconds = max(row["train_seconds"] for row in report["methods"])
    generator, killed = random.Random(0), []
    for kill in range(KILLS):
        began = time.time()
        process = start(config, tmp_path)
        if KILLS == 1:
            wait_for(has_begun(tmp_path, "qaa-seed0"), process)
        else:  # some rows end before
            wait_for(lambda began=began: row_at_work(tmp_path, began), process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(generator.uniform(0, 1.2 * seconds))
        row = row_at_work(tmp_path, began)
        process.kill()
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            killed.append(row)
        for path in (tmp_path / "work").glob("*.json"):
            json.loads(path.read_text("utf-8"))  # whole
        print(f"kill {kill + 1}: exit {process.returncode}, {time.time() - began:.1f} s after the start, in {row}")
    assert killed
    if KILLS > 1:
        assert len(set(killed) - {None}) > 1 and sum(row is not None for row in killed) > KILLS / 2
    assert main(["compare", "--config", str(config), "--out", str(tmp_path)]) == 0
    assert comparable(tmp_path) == expected


def test_sigterm_ends_parent_and_child_in_a_sentence(undisturbed: tuple[Path, Any], tmp_path: Path) -> None:
    """Also where SIGINT is ignored, as for a job in the background of a script."""
    config, _ = undisturbed
    process = start(config, tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    wait_for(has_begun(tmp_path, "lora-seed0"), process)
    second = rf"expected no other run in .*, received the one of process {process.pid}"
    with pytest.raises(CompareError, match=second), run._alone(tmp_path):
        pass
    process.terminate()
    _, said = process.communicate(timeout=200)
    assert process.returncode == 143, said
    assert "qaa compare: terminated; the same command continues" in said.splitlines()
    assert "Traceback" not in said
    with run._alone(tmp_path):  # nobody is left
        pass


def test_two_processes_share_the_work(undisturbed: tuple[Path, Any], tmp_path: Path) -> None:
    config, expected = undisturbed
    process = launch(config, tmp_path)
    shown, said = process.communicate(timeout=550)
    assert process.returncode == 0, said
    begun = re.findall(r"^\[(\d)/3\] .*, process [01]$", said, re.MULTILINE)
    assert sorted(begun) == ["1", "2", "3"]  # each once
    assert shown.count("report: ") == 1
    assert comparable(tmp_path) == expected


def test_a_process_that_dies_ends_the_others_and_the_run_continues(
    undisturbed: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, expected = undisturbed
    process = launch(config, tmp_path)
    wait_for(has_begun(tmp_path, "lora-seed0"), process)
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
    ranks["1"].kill()
    _, said = process.communicate(timeout=200)
    assert process.returncode == 1
    assert said.count("qaa compare: terminated; the same command continues") == 1
    assert not (tmp_path / "results.json").exists()
    capsys.readouterr()
    assert main(["compare", "--config", str(config), "--out", str(tmp_path)]) == 0
    assert "[1/3] untouched: done before" in capsys.readouterr().err
    assert comparable(tmp_path) == expected


def test_a_claim_ends_with_its_holder(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from qaa.compare.ranks import Claims\n"
        "with Claims(Path(sys.argv[1])).claim(3): print('held', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "claims")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        claims = Claims(tmp_path / "claims")
        with claims.claim(3) as is_ours:
            assert not is_ours
        with claims.claim(4) as is_ours:
            assert is_ours
        holder.kill()
        with claims.claim(3, wait=True) as is_ours:
            assert is_ours


def test_trainings_know_nothing_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")
    for name, value in zip(names, ("0", "1", "0", "127.0.0.1", "none", "bf16"), strict=True):
        monkeypatch.setenv(name, value)
    assert Ranks.join() == Ranks(0, 1, 0)
    assert not any(name in os.environ for name in names)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        CompareError, match=r"expected the variables of torchrun or accelerate launch, received: .*MASTER"
    ):
        Ranks.join()


@pytest.mark.parametrize(
    ("device", "local", "visible", "expected"),
    [("cuda", 2, "5,6,7", "7"), ("cuda", 4, None, "1"), ("cuda:1", 0, "5,6,7", "6"), ("cpu", 1, "5,6,7", "5,6,7")],
)
def test_a_training_sees_one_gpu(
    device: str, local: int, visible: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    assert Ranks(local, 8, local).see_one_gpu(device) == device.partition(":")[0]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_processes_that_wait_learn_that_there_will_be_nothing() -> None:
    store = torch.distributed.HashStore()
    Ranks(0, 2, 0, store).announce({"a": 1})
    assert Ranks(1, 2, 1, store).announced() == {"a": 1}
    Ranks(0, 2, 0, store).announce(None)
    with pytest.raises(
        CompareError, match="expected process 0 to prepare the comparison, received its end in process 1"
    ):
        Ranks(1, 2, 1, store).announced()


def altered(config: Path, out: Path, **settings: Any) -> Any:
    """The results of the configuration with these settings, in ``out``."""
    path = config.with_name("altered.yaml")
    path.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    assert main(["compare", "--config", str(path), "--out", str(out)]) == 0
    return comparable(out)


def test_a_rate_that_another_seed_chose_is_searched_again(
    undisturbed: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = undisturbed
    searched = {"methods": ["lora"], "variants": {"lora": {"learning_rates": [1e-3, 1e-2]}}, "grid_extensions": 0}
    altered(config, tmp_path / "out", **searched, seeds=[0])
    capsys.readouterr()
    after = altered(config, tmp_path / "out", **searched, seeds=[1])
    assert re.findall(r"\] (\S+)\n", capsys.readouterr().err) == ["lora-rate", "lora-seed1"]
    assert after["methods"] == altered(config, tmp_path / "fresh", **searched, seeds=[1])["methods"]
    altered(config, tmp_path / "out", **searched, seeds=[1, 0])
    assert re.findall(r"\] (lora-rate)\n", capsys.readouterr().err) == ["lora-rate"]  # of the fresh folder


def test_what_an_earlier_row_of_a_name_left_is_not_counted(undisturbed: tuple[Path, Any], tmp_path: Path) -> None:
    config, _ = undisturbed
    sizes = []
    for folder, method in (("out", "full"), ("out", "lora"), ("fresh", "lora")):
        mine = {"methods": ["mine"], "variants": {"mine": {"method": method, "learning_rates": [1e-3]}}}
        results = altered(config, tmp_path / folder, **mine)
        sizes.append(results["methods"][0]["adapter_bytes"])
    assert sizes[1] == sizes[2] < sizes[0]
    assert not (tmp_path / "out" / "adapters" / "mine-seed0" / "trained_weights.safetensors").exists()


def test_a_full_disk_is_a_sentence_and_loses_nothing(
    undisturbed: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = undisturbed
    out = config.parent / "out"
    before = {path: path.read_bytes() for path in [*(out / "work").glob("*.json"), out / "results.json"]}
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert main(["compare", "--config", str(config), "--out", str(out)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("qaa compare: expected to read and write files below") and "No space left" in said
    assert {path: path.read_bytes() for path in before} == before
    assert not list(out.rglob("*.part"))
    monkeypatch.undo()
    assert main(["compare", "--config", str(config), "--out", str(out)]) == 0


def test_a_file_limit_stops_a_write_without_a_trace(tmp_path: Path) -> None:
    """The kernel's own refusal, in the middle of a file that exists already."""
    path = tmp_path / "results.json"
    sources.write_json(path, {"old": True})
    program = (
        "import resource, signal, sys; from pathlib import Path; from qaa.compare import sources\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: sources.write_json(Path(sys.argv[1]), {'new': 'x' * 100_000})\n"
        "except OSError as error: print(error.strerror)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "File too large\n", done.stderr
    assert json.loads(path.read_text()) == {"old": True} and [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("place", ["/proc/qaa", "/dev/null/qaa"])
def test_a_folder_that_cannot_be_written_is_a_sentence(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--out", place]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"qaa compare: expected a folder that can be written, received {place}: ")
    assert said.count("\n") == 1


def test_a_damaged_cache_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "made"
    for content in (b"whole", b"whole again"):
        made.write_bytes(content)
        target = tmp_path / "packages" / "file.gguf"
        target.parent.mkdir(exist_ok=True)
        sources._keep(made, target)
        assert sources._is_whole(target) and target.read_bytes() == content
        target.write_bytes(content[:3])
        assert not sources._is_whole(target) and not target.exists()
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[1]", "{", '"text"', '{"fingerprint": 1}', "{}"])
def test_a_damaged_result_counts_as_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "lora-seed0.json"
    path.write_text(content)
    stored = run._read(path)
    assert stored is None or stored == {"fingerprint": 1}


def test_info_into_a_pipe_that_closes() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "qaa", "info"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
