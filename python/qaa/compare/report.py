"""What a reader sees: the sentence that sums up, the tables, the figures, the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import figures
from .config import UNTOUCHED
from .sources import write_text

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
        scored="bleu" in report["methods"][0],
        best=_best(report["methods"]),
        light=figures.css_variables(report, 0),
        dark=figures.css_variables(report, 1),
        adapted=_adapted(report),
    )
    path = out / "report.html"
    write_text(path, page)
    return path


# -------------------------------------------------------------------------------------------------------- words


def headline(report: dict[str, Any]) -> str:
    """One sentence on what was found, worded by the figures and no further than they go.

    It sets the rows of QAA (of more than two the one with the lowest validation loss) against the first reference.
    """
    rows = {row["name"]: row for row in report["methods"]}
    reference = rows.get(_first_reference(report) or "")
    ours = [row for row in rows.values() if row["method"].startswith("qaa") and row is not reference]
    if not ours or reference is None:
        best = min((row for name, row in rows.items() if name != UNTOUCHED), key=lambda row: row["test_loss"])
        return (
            f"{best['label']} ends lowest, at a test loss of {_loss(best['test_loss'])} against "
            f"{_loss(rows[UNTOUCHED]['test_loss'])} for the untouched model."
        )
    chosen = ours if len(ours) <= 2 else [min(ours, key=lambda row: row["validation_loss"])]
    found = {d["method"]: _place(d) for d in report["differences"] if d["reference"] == reference["name"]}
    name = reference["label"]
    losses = " and ".join(
        f"{_loss(row['test_loss'])} ({_share(row['trainable_parameters'], reference['trainable_parameters'])} of "
        "its parameters)"
        for row in chosen
    )
    first, last = chosen[0], chosen[-1]
    places = found[first["name"]], found[last["name"]]
    if len(chosen) == 1:
        said = f"{first['label']} ends {places[0]} {name}"
    elif places[0] == places[1]:
        said = f"{first['label']} and {last['label']} end {places[0]} {name}"
    else:
        said = f"{first['label']} ends {places[0]} {name} and {last['label']} {places[1]} it"
    of_many = f", which of {len(ours)} rows of QAA has the lowest validation loss," if len(ours) > 2 else ""
    said = said.replace(" ends", f"{of_many} ends", 1)
    return f"{said}: a test loss of {losses} against {_loss(reference['test_loss'])}."


def _first_reference(report: dict[str, Any]) -> str | None:
    """The first reference that was trained."""
    return next((name for name in report["references"] if name != UNTOUCHED), None)


def _place(difference: dict[str, Any]) -> str:
    if difference["low"] <= 0 <= difference["high"]:
        return "level with"
    return "below" if difference["high"] < 0 else "above"


def _share(count: int, of: int) -> str:
    return f"{100 * count / of:.0f}\N{NO-BREAK SPACE}%"


def findings(report: dict[str, Any]) -> list[str]:
    """Further sentences, each of them read off the figures."""
    rows = {row["name"]: row for row in report["methods"]}
    trained = sorted((row for row in report["methods"] if row["name"] != UNTOUCHED), key=lambda row: row["test_loss"])
    untouched = rows[UNTOUCHED]
    said = [
        "Lowest test loss first: "
        + _comma([row["label"] for row in trained]).join(f"{row['label']} {_loss(row['test_loss'])}" for row in trained)
        + f"; the untouched model has {_loss(untouched['test_loss'])}."
    ]
    from_untouched = [d for d in report["differences"] if d["reference"] == UNTOUCHED]
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
    for reference in report["references"]:
        found = {d["method"]: d for d in report["differences"] if d["reference"] == reference}
        level = [rows[name]["label"] for name, d in found.items() if _place(d) == "level with"]
        if level and reference != UNTOUCHED:
            said.append(
                f"{_listed(level)} cannot be told from {rows[reference]['label']}: the 95 % interval of the "
                "difference includes zero."
            )
    at_edge = [row["label"] for row in trained if _is_at_edge(row["learning_rate"])]
    if at_edge:
        said.append(
            f"The chosen learning rate of {_listed(at_edge)} lies at the edge of the rates that were tried; "
            "others may do better."
        )
    tied = [row["label"] for row in trained if _is_tied(row["learning_rate"])]
    if tied:
        said.append(
            f"All learning rates that were tried for {_listed(tied)} gave exactly the same loss; the smallest one was "
            "taken."
        )
    return said + _noise_findings(report, rows)


def _is_at_edge(chosen: dict[str, Any] | None) -> bool:
    """Whether the rate that was used is the smallest or the largest of several that were tried."""
    tried = sorted(rate for rate, _ in chosen["grid"]) if chosen else []
    return len(tried) > 1 and chosen is not None and chosen["rate"] in (tried[0], tried[-1])


def _is_tied(chosen: dict[str, Any] | None) -> bool:
    """Whether several rates were tried and all of them have one loss."""
    losses = [loss for _, loss in chosen["grid"]] if chosen else []
    return len(losses) > 1 and losses[0] is not None and len(set(losses)) == 1


def _noise_findings(report: dict[str, Any], rows: dict[str, dict[str, Any]]) -> list[str]:
    """How far the error probability may rise until half of a row's gain is gone."""
    noise: dict[str, Any] = report.get("noise", {"rows": {}})
    said = []
    for name, runs in noise["rows"].items():
        row, untouched = rows[name], rows[UNTOUCHED]["test_loss"]
        gain = untouched - row["test_loss"]
        if gain <= 0:
            continue
        losses = [sum(each) / len(each) for each in zip(*runs, strict=True)]
        kept = [p for p, loss in zip(noise["probabilities"], losses, strict=True) if untouched - loss >= gain / 2]
        words = "keeps at least half of its gain up to" if kept else "loses more than half of its gain already at"
        where, highest = max(kept, default=noise["probabilities"][0]), noise["probabilities"][-1]
        said.append(
            f"On a noisy circuit, {row['label']} {words} an error probability of {_percent(100 * where)} per gate; at "
            f"{_percent(100 * highest)} its test loss is {_loss(losses[-1])}."
        )
    return said


def limits(report: dict[str, Any]) -> list[str]:
    """What the figures do not show."""
    settings, protocol = report["settings"], report["protocol"]
    seeds = len(settings["seeds"])
    said = []
    if settings["budget"] == "smoke":
        said.append("This is a smoke test: its runs are far too short to say which method is better.")
    if seeds == 1:
        covered = "cover the choice of test examples, not of the seed, data or model."
    else:
        covered = "cover the choice of seeds and of test examples, not of data or model."
        if seeds < 5:
            covered += f" Where seeds differ more than examples do, an interval from only {seeds} seeds is too narrow."
    said.append(
        f"{'One seed' if seeds == 1 else f'{seeds} seeds'}, {settings['steps']} steps and one data set. The intervals "
        f"{covered}"
    )
    if settings["generate"]:
        said.append(
            f"BLEU, ROUGE and BERTScore compare {settings['test_examples']} answers of at most "
            f"{settings['max_new_tokens']} tokens with one reference each; on so few answers, differences of a few "
            "BLEU points mean little. The losses are the steadier figure."
        )
    if protocol["first"]:
        methods = {row["method"] for row in report["methods"]}
        words = f"Only the top {protocol['n_layers'] - protocol['first']} of {protocol['n_layers']} layers were adapted"
        if "full" in methods:
            words += "; full fine-tuning trained all weights of these layers and no others"
        if "prefix" in methods:
            words += (
                ". Prefix changes every layer by its nature: it reaches deeper than the others and must run the whole "
                "model, so neither its loss nor its time is a like-for-like comparison"
            )
        said.append(f"{words}.")
    searches = [row["learning_rate"] for row in report["methods"] if row.get("learning_rate")]
    if any(len(search["grid"]) > 1 for search in searches):
        steps, whole = settings["tuning_steps"], settings["steps"]
        how = f"runs of {steps} steps, a fraction of a full run" if steps < whole else "whole runs with the first seed"
        said.append(f"Learning rates were chosen in {how}, on few examples. No other setting was tuned.")
    if report.get("noise", {"rows": {}})["rows"]:
        said.append(
            "Noise is depolarizing and stands after the gates of the circuits alone: preparing a state from a vector, "
            "which takes far more gates, is taken to be perfect, and outcomes are not counted in shots."
        )
    if "Q4_1" in report["sources"]["model"]["origin"]:
        said.append("The model's weights had been quantized to 4 bits, which raises every loss somewhat.")
    return said


def table(report: dict[str, Any]) -> str:
    """The paper's table as text for a terminal."""
    scored = "bleu" in report["methods"][0]
    header = ["", "trainable", "%", "test loss", "val. loss"]
    header += ["BLEU", "ROUGE-1", "ROUGE-2", "ROUGE-L", "BERTScore"] if scored else []
    header += ["train"]
    rows = [
        [
            row["label"],
            _count(row["trainable_parameters"]),
            _percent(row["trainable_percent"]),
            _loss(row["test_loss"]),
            _loss(row["validation_loss"]),
            *([f"{row['bleu']:.1f}"] if scored else []),
            *(_score(row[key]) for key in ("rouge1", "rouge2", "rougeL", "bertscore") if scored),
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
    comma = _comma(items)
    last = f"{comma}and" if comma == "; " else " and"
    return items[0] if len(items) == 1 else f"{comma.join(items[:-1])}{last} {items[-1]}"


def _comma(items: Sequence[str]) -> str:
    """A comma, or a semicolon where items have commas of their own, as labels of variants do."""
    return "; " if any(", " in item for item in items) else ", "


def _best(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """For every column the name of the best trained row; none where several have the best value."""
    trained = [row for row in rows if row["name"] != UNTOUCHED]
    smallest = ("test_loss", "best_validation_loss", "final_validation_loss")
    found = {}
    for key in (*smallest, "bleu", "rouge1", "rouge2", "rougeL", "bertscore"):
        known = [row for row in trained if row.get(key) is not None]
        if known:
            best = (min if key in smallest else max)(row[key] for row in known)
            first, *others = [row["name"] for row in known if row[key] == best]
            if not others:
                found[key] = first
    return found


def _adapted(report: dict[str, Any]) -> str:
    protocol = report["protocol"]
    count = protocol["n_layers"] - protocol["first"]
    targets = _listed([target.rsplit(".", 1)[-1] for target in protocol["targets"]])
    which = f"the top {count} of {protocol['n_layers']} layers" if protocol["first"] else f"all {count} layers"
    return f"{targets} in {which}"
