"""The whole comparison on a tiny model, its resumption, and its report in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("evaluate")

from compare_browser import Browser, find_chromium
from compare_tiny import write_data, write_encoder, write_model
from qaa.cli import main
from qaa.compare import study
from qaa.compare.config import DEFAULT_METHODS, METHOD_NAMES
from qaa.compare.report import write_report

#: what every entry of ``methods`` in results.json has
KEYS = [
    "name",
    "trainable_parameters",
    "trainable_percent",
    "validation_loss",
    "bleu",
    "rouge1",
    "rouge2",
    "rougeL",
    "bertscore",
    "train_seconds",
    "peak_memory_bytes",
    "adapter_bytes",
    "seeds",
    "test_loss",
    "best_validation_loss",
    "final_validation_loss",
    "learning_rate",
]
NEW = [name for name in METHOD_NAMES if name not in DEFAULT_METHODS]
FIGURES = ["difference", "trade_off", "validation_loss", "loss_over_time", "training_loss", "gradient_norm"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished comparison of all methods with two seeds: its output folder and its command."""
    folder = tmp_path_factory.mktemp("comparison")
    model, encoder = write_model(folder / "model"), write_encoder(folder / "encoder")
    config = folder / "compare.yaml"
    config.write_text(
        f"model: {model}\ndata: {write_data(folder / 'data.json')}\nencoder: {encoder}\nsource: local\nbudget: smoke\n"
        "train_examples: 24\nvalidation_examples: 12\ntest_examples: 12\nmax_tokens: 80\nmax_new_tokens: 6\nlayers: 2\n"
        "steps: 6\ntuning_steps: 2\nevaluations: 2\nbatch_size: 4\n"
        "variants: {full: {learning_rates: [1.0e-3, 1.0e-2]}}\n"
    )
    command = ["compare", "--config", str(config), "--out", str(folder / "out"), "--cache", str(folder / "cache")]
    command += ["--seeds", "0", "1"]
    assert main(command) == 0
    return folder / "out", command


def read(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "results.json").read_text(encoding="utf-8")))


def test_results_hold_every_method_and_column(finished: tuple[Path, list[str]]) -> None:
    out, _command = finished
    results = read(out)
    rows = {row["name"]: row for row in results["methods"]}
    assert list(rows) == [*DEFAULT_METHODS, "untouched"]
    assert all(key in row for row in rows.values() for key in KEYS)
    untouched = rows["untouched"]
    assert untouched["trainable_parameters"] == 0 and untouched["seeds"] == []
    # q and v of two layers: rank 8, and 8 tokens of keys and values in all four layers
    assert (
        rows["lora"]["trainable_parameters"]
        == 2 * (8 * (32 + 32) + 8 * (32 + 16))
        == rows["sora"]["trainable_parameters"] - 32
    )
    assert rows["prefix"]["trainable_parameters"] == 8 * 4 * 2 * 16
    for name in DEFAULT_METHODS:
        row = rows[name]
        assert row["seeds"] == [0, 1] and len(row["runs"]) == 2
        assert row["validation_loss"] == row["best_validation_loss"] <= row["final_validation_loss"] + 1e-9
        assert row["train_seconds"] > 0 and row["peak_memory_bytes"] > 1e8 and row["adapter_bytes"] > 1000
        assert row["runs"][0]["test_sums"] != row["runs"][1]["test_sums"]  # seeds differ
        assert row["spread"]["test_loss"] is not None
        assert (out / "adapters" / f"{name}-seed1").is_dir()
        assert row["learning_rate"]["rate"] in [rate for rate, _ in row["learning_rate"]["grid"]]
    assert rows["full"]["learning_rate"]["grid"][0][0] == 1e-3
    assert results["command"].endswith("--seeds 0 1")
    assert all(source["origin"].startswith("local path") for source in results["sources"].values())
    assert results["protocol"]["stored_states"] and results["versions"]["torch"]
    for name in [*FIGURES, "seed_spread"]:
        assert (out / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_call_trains_nothing_and_an_interrupted_one_only_what_is_missing(
    finished: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, command = finished
    before = read(out)
    stored = {path: path.stat().st_mtime_ns for path in (out / "work").glob("*.json")}
    assert main(command) == 0
    assert capsys.readouterr().err.count("done before") == 1 + 3 * len(DEFAULT_METHODS)
    assert read(out)["methods"] == before["methods"]

    missing = out / "work" / "lora-seed1.json"
    missing.unlink()
    (out / "work" / "sora-seed0.json").write_text('{"fingerprint": "of another run"')  # cut off while written
    assert main([*command, "--encoder", str(out.parent / "encoder")]) == 0
    assert capsys.readouterr().err.count("done before") == 3 * len(DEFAULT_METHODS) - 1
    after = {path: path.stat().st_mtime_ns for path in (out / "work").glob("*.json")}
    redone = {path.name for path, changed in after.items() if stored.get(path) != changed}
    assert redone - {"splits.json", "hidden.json"} == {"lora-seed1.json", "sora-seed0.json"}
    rows = {row["name"]: row for row in read(out)["methods"]}
    for row in before["methods"]:
        assert rows[row["name"]]["test_loss"] == pytest.approx(row["test_loss"], abs=1e-6)


def test_stored_adapters_are_tested_under_noise_and_trained_no_more(
    finished: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, command = finished
    out = tmp_path / "out"
    shutil.copytree(source, out)
    noisy = [*command, "--out", str(out), "--noise", "1e-9", "0.5", "--trajectories", "3"]
    assert main(noisy) == 0
    said = capsys.readouterr().err
    assert said.count("done before") == 1 + 3 * len(DEFAULT_METHODS)
    assert re.findall(r"\] (\S+-noise)\n", said) == ["qaa-paper-seed0-noise", "qaa-paper-seed1-noise"]
    results = read(out)
    assert results["methods"] == read(source)["methods"] and "noise" not in read(source)
    assert results["noise"]["probabilities"] == [1e-9, 0.5] and results["noise"]["trajectories"] == 3
    assert list(results["noise"]["rows"]) == ["qaa-paper"]  # amplitudes are no observable
    row = next(row for row in results["methods"] if row["name"] == "qaa-paper")
    for run, losses in zip(row["runs"], results["noise"]["rows"]["qaa-paper"], strict=True):
        assert losses[0] == pytest.approx(run["test_loss"], abs=1e-4)
        assert losses[1] != pytest.approx(run["test_loss"], abs=1e-4)
    assert (out / "plots" / "noise.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "What noise does to them" in page and "an amplitude is no observable" in page
    assert "What noise does to them" not in (source / "report.html").read_text(encoding="utf-8")
    # an adapter that is needed and has gone is trained again, one that is not needed is not
    (out / "work" / "qaa-paper-seed1-noise.json").unlink()
    for seed in (0, 1):
        (out / "adapters" / f"qaa-paper-seed{seed}" / "adapter_model.safetensors").unlink()
    assert main(noisy) == 0
    made = re.findall(r"\] (\S+)\n", capsys.readouterr().err)
    assert made == ["qaa-paper-seed1", "qaa-paper-seed1-noise"]
    again = read(out)["noise"]["rows"]["qaa-paper"]
    assert again == [pytest.approx(losses, abs=1e-6) for losses in results["noise"]["rows"]["qaa-paper"]]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished comparison of losses alone with many rows, variants and two references: its results and folder."""
    folder = tmp_path_factory.mktemp("wide")
    ranks = {f"lora-{r}": {"method": "lora", "label": f"LoRA r = {r}", "options": {"r": r}} for r in (1, 2, 4)}
    frozen = {"method": "qaa", "label": "QAA, circuit frozen", "options": {"train_circuit": False}}
    variants = {**ranks, "qaa-frozen": frozen}
    config = {
        "model": str(write_model(folder / "model")), "data": str(write_data(folder / "data.json")), "budget": "smoke",
        "source": "local", "cache": str(folder / "cache"), "out": str(folder / "out"), "train_examples": 24,
        "validation_examples": 12, "test_examples": 12, "max_tokens": 80, "layers": 2, "steps": 2, "tuning_steps": 2,
        "evaluations": 1, "batch_size": 4, "encoder": "/nowhere", "generate": False, "seeds": [0],
        "methods": [*variants, "lora", *NEW], "references": ["lora-2", "random-projection"],
        "variants": {**variants, **{name: {"learning_rates": [1e-3]} for name in ("lora", *NEW)}},
    }  # fmt: skip
    for row in ranks.values():
        row["learning_rates"] = [1e-3]
    frozen["learning_rates"] = [1e-3]
    path = folder / "wide.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    assert main(["compare", "--config", str(path)]) == 0
    return {"results": read(folder / "out"), "out": folder / "out", "command": ["compare", "--config", str(path)]}


def test_losses_alone_of_every_method_and_of_variants(wide: dict[str, Any]) -> None:
    results, out = wide["results"], wide["out"]
    rows = {row["name"]: row for row in results["methods"]}
    assert list(rows) == ["lora-1", "lora-2", "lora-4", "qaa-frozen", "lora", *NEW, "untouched"]
    assert [rows[f"lora-{r}"]["trainable_parameters"] for r in (1, 2, 4)] == [r * 2 * (64 + 48) for r in (1, 2, 4)]
    assert rows["qaa-frozen"]["trainable_parameters"] == 4 * 2 * (16 + 32 + 16 + 16)  # B and M of q and of v
    assert all(
        row["learning_rate"] == {"rate": 1e-3, "grid": [], "at_edge": False} for row in rows.values() if row["seeds"]
    )
    assert rows["lora-1"]["method"] == "lora" and rows["lora-1"]["about"].endswith("here with r = 1")
    assert not any("bleu" in row or "rougeL" in row for row in rows.values())
    assert results["samples"] == [] and "encoder" not in results["sources"]
    assert results["references"] == ["lora-2", "random-projection"]
    assert len(results["differences"]) == 2 * (len(rows) - 2)
    for difference in results["differences"]:
        first, second = (rows[difference[key]]["runs"][0]["test_sums"] for key in ("method", "reference"))
        by_hand = (sum(first) - sum(second)) / sum(results["protocol"]["test_counts"])
        assert difference["difference"] == pytest.approx(by_hand, abs=1e-3)
        assert difference["low"] <= difference["difference"] <= difference["high"]
    assert sorted(p.name for p in (out / "plots").glob("diff*")) == [
        "difference-random-projection.png", "difference.png",
    ]  # fmt: skip
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "BLEU" not in page and "What they say" not in page and "Random squares" in page
    assert "paired bootstrap over test examples" in page


def test_a_changed_variant_repeats_its_own_runs_only(wide: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(wide["command"][-1])
    config = json.loads(path.read_text())
    config["variants"]["lora-4"]["label"] = "another label"
    config["variants"]["lora-2"]["options"]["lora_alpha"] = 3
    config["references"] = ["lora"]
    changed = path.with_name("changed.yaml")
    changed.write_text(json.dumps(config))
    assert main(["compare", "--config", str(changed)]) == 0
    said = capsys.readouterr().err
    assert said.count("done before") == 1 + len(config["methods"]) - 1
    assert "] lora-2-seed0\n" in said


PAGE = """# A page
<!-- losses results.json -->
old
<!-- end -->
between
<!-- differences results.json lora-2 -->
<!-- end -->
<!-- rates results.json -->
<!-- end -->
<!-- figure trade_off results.json -->
<!-- end -->
after
"""


def test_a_page_gets_its_tables_and_figures_from_results(
    wide: dict[str, Any], finished: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    results = wide["results"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert study.main([str(page), "--check"]) == 1 and page.read_text() == PAGE
    assert study.main([str(page)]) == 0 and study.main([str(page), "--check"]) == 0
    rows = {row["name"]: row for row in results["methods"]}
    text = page.read_text()
    assert text.startswith("# A page\n<!-- losses") and "\nbetween\n" in text and text.endswith("after\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    losses = {line[0]: line for line in cells[2 : 2 + len(rows)]}
    assert list(losses) == [row["label"] for row in rows.values()]
    gain = rows["untouched"]["test_loss"] - rows["lora-4"]["test_loss"]
    assert losses[rows["lora-4"]["label"]][3] == f"{rows['lora-4']['test_loss']:.4f}"
    assert losses[rows["lora-4"]["label"]][4].replace("\N{MINUS SIGN}", "-") == f"{gain:.4f}"
    found = [line for line in cells[2 + len(rows) :] if line[1].startswith(("+", "\N{MINUS SIGN}"))]
    assert len(found) == len(rows) - 2 and all(line[3] in ("above", "level", "below") for line in found)
    values = [float(line[1].replace("\N{MINUS SIGN}", "-")) for line in found]
    assert values == sorted(values)
    assert (tmp_path / "results-trade-off.png").read_bytes().startswith(b"\x89PNG")
    # with several seeds, and with a search for the rate
    shutil.copy(finished[0] / "results.json", tmp_path)
    assert study.main([str(page)]) == 2 and "expected a reference among lora, untouched" in capsys.readouterr().err
    page.write_text(PAGE.replace("lora-2", "lora"))
    assert study.main([str(page)]) == 0 and " ± " in page.read_text() and "**1e\N{MINUS SIGN}3: " in page.read_text()
    # with the scores of answers
    page.write_text("<!-- scores results.json -->\n<!-- end -->\n")
    assert study.main([str(page)]) == 0
    _, heads, _, *lines, _ = page.read_text().splitlines()
    found_rows = json.loads((finished[0] / "results.json").read_text())["methods"]
    assert heads.count("|") == 9 and len(lines) == len(found_rows)
    for line, row in zip(lines, found_rows, strict=True):
        shown = [cell.strip() for cell in line.strip("|").split("|")]
        assert shown[0] == row["label"] and shown[3:5] == [f"{row['test_loss']:.3f}", f"{row['bleu']:.1f}"]
        assert shown[5:7] == [f"{row['rougeL']:.3f}", f"{row['bertscore']:.3f}"]


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        ("losses", "expected 1 words after 'losses', received ''"),
        ("losses absent.json", "absent.json to be a results.json of qaa compare, received FileNotFoundError"),
        ("scores results.json", "expected results of a comparison with answers, received one of losses alone"),
        ("figure nothing results.json", "expected a figure among difference, .*, received 'nothing'"),
    ],
)
def test_a_page_with_an_impossible_block_is_left_alone(
    block: str, sentence: str, wide: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"<!-- {block} -->\n<!-- end -->\n")
    (tmp_path / "results.json").write_text(json.dumps(wide["results"]))
    before = page.read_text()
    assert study.main([str(page)]) == 2 and page.read_text() == before
    assert re.search(sentence, capsys.readouterr().err)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if find_chromium() is None:
        pytest.skip("needs chromium (Debian: apt-get install chromium)")
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def labels_outside(browser: Browser) -> Any:
    """The texts of figures that reach beyond their figure."""
    return browser.evaluate(
        "[...document.querySelectorAll('figure svg')].flatMap(s => { const b = s.getBoundingClientRect();"
        " return [...s.querySelectorAll('text')].filter(t => { const r = t.getBoundingClientRect();"
        " return r.left < b.left - 1 || r.right > b.right + 1 || r.top < b.top - 1 || r.bottom > b.bottom + 1 })"
        ".map(t => t.textContent) })"
    )


def test_thirty_rows_keep_their_labels_inside_and_apart(wide: dict[str, Any], browser: Browser, tmp_path: Path) -> None:
    report = json.loads(json.dumps(wide["results"]))
    more = [{**row, "name": f"{row['name']}-b", "label": f"{row['label']}, again"} for row in report["methods"][:-1]]
    report["methods"] = [*report["methods"][:-1], *more, report["methods"][-1]]
    report["differences"] += [{**d, "method": f"{d['method']}-b"} for d in report["differences"]]
    browser.open(write_report(report, tmp_path).as_uri())
    assert labels_outside(browser) == []
    overlaps = (
        "((id) => { const t = [...document.querySelectorAll(`#figure-${id} svg text`)].filter(e => /[A-Za-z]/.test("
        "e.textContent)).map(e => [e.textContent, e.getBoundingClientRect()]); const found = [];"
        " for (const [i, [a, p]] of t.entries()) for (const [b, q] of t.slice(i + 1))"
        " if (p.left < q.right && q.left < p.right && p.top + 2 < q.bottom - 2 && q.top + 2 < p.bottom - 2)"
        " found.push([a, b]); return found })"
    )
    for name in (*FIGURES, "difference-random-projection"):
        assert browser.evaluate(f"{overlaps}('{name}')") == [], name


def test_the_report_renders_without_errors_and_without_requests(
    finished: tuple[Path, list[str]], browser: Browser, tmp_path: Path
) -> None:
    page = tmp_path / "moved" / "report.html"  # alone, away from its folder
    page.parent.mkdir()
    shutil.copy(finished[0] / "report.html", page)
    browser.open(page.as_uri())
    boxes = browser.evaluate(
        "[...document.querySelectorAll('figure')].map(f => {"
        " const s = f.querySelector('svg'), b = s.getBoundingClientRect();"
        " return [f.id, b.width, b.height, s.querySelectorAll('path').length, s.querySelectorAll('text').length] })"
    )
    assert sorted(box[0] for box in boxes) == sorted(f"figure-{name}" for name in [*FIGURES, "seed_spread"])
    for name, width, height, paths, texts in boxes:
        assert width > 300 and height > 80 and paths > 5 and texts > 4, name
    assert labels_outside(browser) == []
    assert browser.evaluate("document.querySelectorAll('table.sortable tbody tr').length") == 13
    assert browser.evaluate("document.querySelectorAll('.sample').length") == 6
    for scheme in ("dark", "light"):
        browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        strokes = browser.evaluate(
            "[...document.querySelectorAll('#figure-validation_loss path')].map(p => getComputedStyle(p).stroke)"
        )
        assert ("rgb(108, 182, 255)" in strokes) == (scheme == "dark")  # the curves follow the theme
        assert ("rgb(11, 99, 181)" in strokes) == (scheme == "light")
    requests = [event["request"]["url"] for event in browser.named("Network.requestWillBeSent")]
    assert requests == [page.as_uri()]
    assert browser.named("Runtime.exceptionThrown") == []
    assert browser.named("Log.entryAdded") == []
    assert browser.named("Runtime.consoleAPICalled") == []


def test_the_browser_test_can_fail(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('no'); undefined.x</script>")
    browser.open(page.as_uri())
    assert len(browser.named("Network.requestWillBeSent")) == 2
    assert browser.named("Runtime.exceptionThrown") and browser.named("Runtime.consoleAPICalled")
    assert browser.named("Log.entryAdded")


def test_tables_sort_when_their_heads_are_clicked(finished: tuple[Path, list[str]], browser: Browser) -> None:
    browser.open((finished[0] / "report.html").as_uri())
    click = "document.querySelector('table.sortable thead tr').cells[1].querySelector('button').click()"
    read_column = "[...document.querySelector('table.sortable').tBodies[0].rows].map(r => +r.cells[1].dataset.v)"
    original = browser.evaluate(read_column)
    browser.evaluate(click)
    assert browser.evaluate(read_column) == sorted(original)
    browser.evaluate(click)
    assert browser.evaluate(read_column) == sorted(original, reverse=True)
    browser.evaluate(click)
    assert browser.evaluate(read_column) == original


def test_texts_of_the_data_cannot_become_markup(finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    report = read(finished[0])
    report["samples"][0]["prompt"] = "<script>alert(1)</script>"
    report["samples"][0]["answers"]["lora"] = "</p><img src=x>"
    page = write_report(report, tmp_path).read_text(encoding="utf-8")
    assert "<script>alert" not in page and "<img" not in page and "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize(("tuning_steps", "rule"), [(2, "within one standard error of the best"), (6, "lowest loss")])
def test_the_report_names_the_rule_that_chose_the_rates(
    tuning_steps: int, rule: str, finished: tuple[Path, list[str]], tmp_path: Path
) -> None:
    report = read(finished[0])
    report["settings"]["tuning_steps"] = tuning_steps
    page = write_report(report, tmp_path).read_text(encoding="utf-8")
    assert len(re.findall(r"(?:the smallest|the smallest rate) within one standard error", page)) == 2 * (
        tuning_steps < 6
    )
    assert len(re.findall(r"(?:that|the rate) of the lowest loss", page)) == 2 * (tuning_steps == 6)
    assert rule in page
    assert "drawn once from 80; those longer than 80 tokens were left out" in page
    # what the scores were counted in
    assert "tok:13a" in page and "rouge-score (of words of letters and digits" in page and "(layer 2, no idf" in page


def test_a_single_seed_without_qaa_or_lora_still_makes_a_report(
    finished: tuple[Path, list[str]], tmp_path: Path
) -> None:
    report = read(finished[0])
    report["methods"] = [row for row in report["methods"] if row["name"] in ("full", "untouched")]
    report["methods"][0]["runs"] = report["methods"][0]["runs"][:1]
    report["differences"] = [
        d for d in report["differences"] if d["method"] == "full" and d["reference"] == "untouched"
    ]
    report["settings"]["seeds"] = [0]
    report["references"] = ["untouched"]
    page = write_report(report, tmp_path).read_text(encoding="utf-8")
    assert "Full fine-tuning ends lowest" in page
    assert 'id="figure-difference"' not in page and 'id="figure-seed_spread"' not in page
