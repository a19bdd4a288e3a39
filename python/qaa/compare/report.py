"""What a reader sees: the sentence that sums up, the tables, the figures, the page."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import figures

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write_report(report: dict[str, Any], out: Path) -> Path:
    """Adds ``headline`` and ``findings`` to ``report``; writes the plots and ``report.html`` below ``out``."""
    import jinja2

    report["headline"] = headline(report)
    report["findings"] = findings(report)
    report["limits"] = limits(report)
    drawings = figures.draw_all(report, out / "plots")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(
        loss=_loss, count=_count, percent=_percent, seconds=_seconds, size=_bytes, score=_score, rate=_rate,
        signed=figures._signed,
    )  # fmt: skip
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        rows=report["methods"],
        drawings=drawings,
        labels={row["name"]: row["label"] for row in report["methods"]},
        lora={d["method"]: d for d in report["differences"] if d["reference"] == "lora"},
        best=_best(report["methods"]),
        light=figures.css_variables(0),
        dark=figures.css_variables(1),
        adapted=_adapted(report),
    )
    path = out / "report.html"
    scratch = path.with_suffix(".part")
    scratch.write_text(page, encoding="utf-8")
    os.replace(scratch, path)
    return path


# -------------------------------------------------------------------------------------------------------- words


def headline(report: dict[str, Any]) -> str:
    """One sentence on what was found, worded by the figures and no further than they go."""
    rows = {row["name"]: row for row in report["methods"]}
    lora = rows.get("lora")
    forms = {name.removeprefix("qaa-"): rows[name] for name in ("qaa-paper", "qaa-best") if name in rows}
    if not forms or lora is None:
        best = min((row for name, row in rows.items() if name != "untouched"), key=lambda row: row["test_loss"])
        return (
            f"{best['label']} ends lowest, at a test loss of {_loss(best['test_loss'])} against "
            f"{_loss(rows['untouched']['test_loss'])} for the untouched model."
        )
    found = {d["method"]: d for d in report["differences"] if d["reference"] == "lora"}
    places = {form: _place(found[row["name"]]) for form, row in forms.items()}
    losses = " and ".join(
        f"{_loss(row['test_loss'])} ({form} form, {_share(row['trainable_parameters'], lora['trainable_parameters'])})"
        for form, row in forms.items()
    )
    kinds = set(places.values())
    if len(forms) == 1:
        form = next(iter(forms))
        said = f"QAA in its {form} form ends {places[form]} LoRA"
    elif len(kinds) == 1:
        said = f"Both forms of QAA end {kinds.pop()} LoRA"
    else:
        said = f"QAA ends {places['paper']} LoRA in its paper form and {places['best']} it in its best form"
    return f"{said}: a test loss of {losses} against {_loss(lora['test_loss'])}."


def _place(difference: dict[str, Any]) -> str:
    if difference["low"] <= 0 <= difference["high"]:
        return "level with"
    return "below" if difference["high"] < 0 else "above"


def _share(count: int, of_lora: int) -> str:
    return f"{100 * count / of_lora:.0f}\N{NO-BREAK SPACE}% of LoRA's parameters"


def findings(report: dict[str, Any]) -> list[str]:
    """Further sentences, each of them read off the figures."""
    rows = {row["name"]: row for row in report["methods"]}
    trained = sorted((row for row in report["methods"] if row["name"] != "untouched"), key=lambda row: row["test_loss"])
    untouched = rows["untouched"]
    said = [
        "Lowest test loss first: "
        + ", ".join(f"{row['label']} {_loss(row['test_loss'])}" for row in trained)
        + f"; the untouched model has {_loss(untouched['test_loss'])}."
    ]
    from_untouched = [d for d in report["differences"] if d["reference"] == "untouched"]
    unclear = [rows[d["method"]]["label"] for d in from_untouched if d["high"] >= 0]
    if from_untouched and not unclear:
        smallest = max(from_untouched, key=lambda d: d["difference"])
        said.append(
            "Every method learned: even the smallest gain over the untouched model, "
            f"{_loss(-smallest['difference'])} nats per token for {rows[smallest['method']]['label']}, has a 95 % "
            "interval that excludes zero."
        )
    elif unclear:
        verb = "is" if len(unclear) == 1 else "are"
        said.append(f"{_listed(unclear)} {verb} not clearly below the untouched model on this test split.")
    if "lora" in rows:
        found = {d["method"]: d for d in report["differences"] if d["reference"] == "lora"}
        level = [rows[name]["label"] for name, d in found.items() if _place(d) == "level with"]
        if level:
            said.append(
                f"{_listed(level)} cannot be told from LoRA: the 95 % interval of the difference includes zero."
            )
    at_edge = [row["label"] for row in trained if row["learning_rate"] and row["learning_rate"]["at_edge"]]
    if at_edge:
        said.append(
            f"The chosen learning rate of {_listed(at_edge)} lies at the edge of the rates that were tried; "
            "others may do better."
        )
    return said


def limits(report: dict[str, Any]) -> list[str]:
    """What the figures do not show."""
    settings, protocol = report["settings"], report["protocol"]
    seeds = len(settings["seeds"])
    said = []
    if settings["budget"] == "smoke":
        said.append("This is a smoke test: its runs are far too short to say which method is better.")
    said.append(
        f"{'One seed' if seeds == 1 else f'{seeds} seeds'}, {settings['steps']} steps and one data set. The intervals "
        "cover the choice of test examples, not of seeds, data or model."
    )
    said.append(
        f"BLEU, ROUGE and BERTScore compare {settings['test_examples']} answers of at most "
        f"{settings['max_new_tokens']} tokens with one reference each; on so few answers, differences of a few BLEU "
        "points mean little. The losses are the steadier figure."
    )
    if protocol["first"]:
        said.append(
            f"Only the top {protocol['n_layers'] - protocol['first']} of {protocol['n_layers']} layers were adapted; "
            "full fine-tuning trained all weights of these layers and no others. Prefix changes every layer by its "
            "nature: it reaches deeper than the others and must run the whole model, so neither its loss nor its time "
            "is a like-for-like comparison."
        )
    said.append(
        f"Learning rates were chosen in runs of {settings['tuning_steps']} steps, a fraction of a full run, on few "
        "examples. No other setting was tuned."
    )
    if "Q4_1" in report["sources"]["model"]["origin"]:
        said.append("The model's weights had been quantized to 4 bits, which raises every loss somewhat.")
    return said


def table(report: dict[str, Any]) -> str:
    """The paper's table as text for a terminal."""
    header = ["", "trainable", "%", "test loss", "val. loss", "BLEU"]
    header += ["ROUGE-1", "ROUGE-2", "ROUGE-L", "BERTScore", "train"]
    rows = [
        [
            row["label"],
            _count(row["trainable_parameters"]),
            _percent(row["trainable_percent"]),
            _loss(row["test_loss"]),
            _loss(row["validation_loss"]),
            f"{row['bleu']:.1f}",
            *(_score(row[key]) for key in ("rouge1", "rouge2", "rougeL")),
            _score(row["bertscore"]),
            _seconds(row["train_seconds"]),
        ]
        for row in report["methods"]
    ]
    widths = [max(len(line[at]) for line in [header, *rows]) for at in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in [header, *rows]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# ------------------------------------------------------------------------------------------------------ numbers


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _score(value: float) -> str:
    return f"{value:.3f}"


def _count(value: int) -> str:
    return f"{value:,}"


def _percent(value: float) -> str:
    """Two significant digits, plain.

    Example:
        >>> _percent(0.0381), _percent(15.77), _percent(0.0)
        ('0.038\xa0%', '16\xa0%', '0\xa0%')
    """
    if value == 0:
        return "0\N{NO-BREAK SPACE}%"
    digits = max(0, 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}\N{NO-BREAK SPACE}%"


def _seconds(value: float) -> str:
    if value == 0:
        return "–"
    if value < 100:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _bytes(value: float | None) -> str:
    if not value:
        return "–"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            amount = value / scale
            return f"{amount:.2f} {unit}" if amount < 10 else f"{amount:.0f} {unit}"
    return f"{value:.0f} B"


def _rate(value: float) -> str:
    mantissa, exponent = f"{value:.0e}".split("e") if f"{value:.0e}" == f"{value:.1e}" else f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "\N{MINUS SIGN}")


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _best(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """For every column the name of the best trained row."""
    trained = [row for row in rows if row["name"] != "untouched"]
    smallest = ("test_loss", "best_validation_loss", "final_validation_loss")
    found = {}
    for key in (*smallest, "bleu", "rouge1", "rouge2", "rougeL", "bertscore"):
        known = [row for row in trained if row[key] is not None]
        if known:
            found[key] = (min if key in smallest else max)(known, key=operator.itemgetter(key))["name"]
    return found


def _adapted(report: dict[str, Any]) -> str:
    protocol = report["protocol"]
    count = protocol["n_layers"] - protocol["first"]
    targets = _listed([target.rsplit(".", 1)[-1] for target in protocol["targets"]])
    which = f"the top {count} of {protocol['n_layers']} layers" if protocol["first"] else f"all {count} layers"
    return f"{targets} in {which}"
