"""Tables and figures of Markdown pages, from committed results: ``python -m qaa.compare.study docs/study/README.md``.

A page says where they go and what they show; everything between a mark and its end is written anew::

    <!-- losses alpaca.json -->
    <!-- end -->

The marks are ``losses FILE`` (sizes, losses and their spread, gains over the untouched model), ``scores FILE`` (sizes,
losses and the scores of answers), ``differences FILE REFERENCE`` (test loss minus that of a reference, with intervals),
``rates FILE`` (learning rates that were tried) and ``figure NAME FILE`` (a figure of the report, written as PNG beside
the page). FILE is a ``results.json`` of ``qaa compare``, by its path from the page. With ``--check`` nothing is
written, and a page that is not up to date gives exit code 1.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .config import UNTOUCHED, CompareError
from .report import _count, _loss, _percent, _rate, _score, _seconds

#: The kinds of marks, and how many words follow each.
_WORDS = {"losses": 1, "scores": 1, "differences": 2, "rates": 1, "figure": 2}
_BLOCK = re.compile(rf"(<!-- ({'|'.join(_WORDS)})\b([^>]*?)-->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)
_MINUS = str.maketrans("-", "\N{MINUS SIGN}")


def written(page: str, folder: Path, figures: bool = True) -> str:
    """``page`` with every block filled from the results in ``folder``; figures are drawn there unless told not to.

    Raises:
        CompareError: a block names a file, row or figure that there is not.

    Example:
        >>> written("No blocks, no change.", Path("."))
        'No blocks, no change.'
    """
    tables: dict[str, Callable[..., str]] = {table.__name__: table for table in (losses, scores, differences, rates)}

    def fill(match: re.Match[str]) -> str:
        kind, words = match[2], match[3].split()
        if len(words) != _WORDS[kind]:
            raise CompareError(f"expected {_WORDS[kind]} words after {kind!r}, received {' '.join(words)!r}")
        if kind == "figure":
            return f"{match[1]}{_figure(words[0], words[1], folder, figures)}\n{match[5]}"
        return f"{match[1]}{tables[kind](_results(folder / words[0]), *words[1:])}\n{match[5]}"

    return _BLOCK.sub(fill, page)


def _results(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {**found, "by_name": {row["name"]: row for row in found["methods"]}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompareError(
            f"expected {path} to be a results.json of qaa compare, received {type(error).__name__}: {error}"
        ) from None


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    escaped = ([re.sub(r"[|<]", r"\\\g<0>", cell) for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _size(row: dict[str, Any]) -> list[str]:
    """The first cells of a row: its label, and how much it trains."""
    if row["name"] == UNTOUCHED:
        return [row["label"], "–", "–"]
    return [row["label"], _count(row["trainable_parameters"]), _percent(row["trainable_percent"])]


def losses(results: dict[str, Any]) -> str:
    """Every row with its size, its test loss (and standard deviation over seeds), gain and training time."""
    base = results["by_name"][UNTOUCHED]["test_loss"]
    rows = []
    for row in results["methods"]:
        spread = row["spread"]["test_loss"]
        trained = row["name"] != UNTOUCHED
        rows.append([
            *_size(row),
            f"{row['test_loss']:.4f}" + (f" ± {spread:.4f}" if spread is not None else ""),
            f"{base - row['test_loss']:.4f}".translate(_MINUS) if trained else "–",
            f"{row['validation_loss']:.4f}",
            _seconds(row["train_seconds"]),
        ])  # fmt: skip
    return _table(["row", "trainable", "share", "test loss", "gain", "validation loss", "training"], rows)


def scores(results: dict[str, Any]) -> str:
    """The paper's table: every row with its size, its test loss, what its answers score, and its training time."""
    if "bleu" not in results["methods"][0]:
        raise CompareError("expected results of a comparison with answers, received one of losses alone")
    rows = [
        [
            *_size(row),
            _loss(row["test_loss"]),
            f"{row['bleu']:.1f}",
            _score(row["rougeL"]),
            _score(row["bertscore"]),
            _seconds(row["train_seconds"]),
        ]
        for row in results["methods"]
    ]
    return _table(["row", "trainable", "share", "test loss", "BLEU", "ROUGE-L", "BERTScore", "training"], rows)


def differences(results: dict[str, Any], reference: str) -> str:
    """Test loss minus that of ``reference`` with 95 % intervals, lowest first."""
    found = [d for d in results["differences"] if d["reference"] == reference]
    if not found:
        known = ", ".join(results["references"])
        raise CompareError(f"expected a reference among {known}, received {reference!r}")
    rows = [
        [
            results["by_name"][d["method"]]["label"],
            f"{d['difference']:+.4f}".translate(_MINUS),
            f"{d['low']:+.4f} to {d['high']:+.4f}".translate(_MINUS),
            "level" if d["low"] <= 0 <= d["high"] else "below" if d["high"] < 0 else "above",
        ]
        for d in sorted(found, key=lambda d: float(d["difference"]))
    ]
    return _table([f"row, minus {results['by_name'][reference]['label']}", "test loss", "95 % interval", ""], rows)


def rates(results: dict[str, Any]) -> str:
    """The learning rates that were tried, with their validation losses; the chosen one is bold."""
    rows = []
    for row in results["methods"]:
        chosen = row["learning_rate"]
        if chosen:
            tried = [
                ("**{}: {}**" if rate == chosen["rate"] else "{}: {}").format(
                    _rate(rate), "diverged" if loss is None else f"{loss:.3f}"
                )
                for rate, loss in chosen["grid"]
            ]
            rows.append([row["label"], ", ".join(tried) or f"**{_rate(chosen['rate'])}**, given"])
    return _table(["row", "rate: validation loss"], rows)


def _figure(name: str, file: str, folder: Path, draw: bool) -> str:
    from .figures import draw_all

    results = _results(folder / file)
    target = folder / f"{Path(file).stem}-{name.replace('_', '-')}.png"
    with tempfile.TemporaryDirectory() as scratch:
        drawn = draw_all(results, Path(scratch))
        if name not in drawn:
            raise CompareError(f"expected a figure among {', '.join(drawn)}, received {name!r}")
        if draw:
            shutil.copyfile(Path(scratch) / f"{name}.png", target)
    return f"![{drawn[name].alt}]({target.name})\n\n{drawn[name].caption}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the blocks of the page; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m qaa.compare.study", description="Tables and figures of a page.")
    parser.add_argument("page", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if something would change")
    given = parser.parse_args(arguments)
    try:
        before = given.page.read_text(encoding="utf-8")
        after = written(before, given.page.parent, figures=not given.check)
    except (CompareError, OSError) as error:
        print(f"qaa.compare.study: {error}", file=sys.stderr)
        return 2
    if given.check:
        if before != after:
            print(f"qaa.compare.study: {given.page} is not up to date", file=sys.stderr)
        return int(before != after)
    given.page.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
