"""The report's figures, drawn once with matplotlib and written twice: as SVG that follows the page's theme, as PNG.

In the SVG every colour is a CSS variable (``var(--lora)``), so that light and dark pages both fit.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

#: method -> (light, dark, marker, dashes): hues that stay apart for colour-blind readers, doubled by shape and dash
STYLES: dict[str, tuple[str, str, str, Any]] = {
    "qaa": ("#0b63b5", "#6cb6ff", "o", "solid"),
    "qaa-paper": ("#0a8fa8", "#5ad1e0", "D", (0, (5, 1.6))),
    "lora": ("#c4501b", "#ff9a6b", "s", "solid"),
    "sora": ("#a87900", "#f0c14d", "^", (0, (5, 1.6))),
    "prefix": ("#a0438d", "#e59ad6", "v", (0, (1.4, 1.4))),
    "full": ("#3d7a3a", "#8fd08a", "P", (0, (7, 1.6, 1.4, 1.6))),
    "rslora": ("#d1493f", "#ff8d84", "p", (0, (7, 1.6, 1.4, 1.6))),
    "vera": ("#8a5a9e", "#c79ddb", "<", (0, (1.4, 1.4))),
    "ia3": ("#b0518a", "#ea98c5", ">", (0, (3, 1.4))),
    "road": ("#7a63c4", "#b3a2f0", "h", (0, (5, 1.6))),
    "bias": ("#9a6a7c", "#d3a5b6", "*", (0, (1, 2.2))),
    "random-projection": ("#4f7a1e", "#a4cf6d", "d", "solid"),
    "random-squares": ("#6f7f10", "#c3cf60", "H", (0, (5, 1.6))),
    "whitened-lora": ("#8f6240", "#d0a27d", "8", (0, (3, 1.4))),
    "largest-channels": ("#2f8268", "#7fcfb3", "X", (0, (7, 1.6, 1.4, 1.6))),
    "lora-frozen-a": ("#7d6a55", "#bdaa94", "s", (0, (1.4, 1.4))),
    "untouched": ("#6b6862", "#a5a39d", "X", (0, (1, 2.2))),
}
#: the other colours, under names that no row can have
INKS = {
    "@ink": ("#22211f", "#ecebe7"),
    "@muted": ("#6b6862", "#a5a39d"),
    "@rule": ("#dcd8cf", "#383b40"),
    "@page": ("#fbfaf7", "#16181b"),
}
_MARKERS = ("o", "D", "s", "^", "v", "P", "<", ">", "h", "d", "p", "X")
_MANY = 10  # rows; with more of them, points carry numbers and rows stand closer


def row_styles(report: dict[str, Any]) -> dict[str, tuple[str, str, str, Any]]:
    """The style of every row: its method's, and for further rows of the same method a shade of that with other marks.

    Example:
        >>> rows = [{"name": "a", "method": "lora"}, {"name": "b", "method": "lora"}]
        >>> found = row_styles({"methods": rows})
        >>> found["a"][0], found["b"][0]
        ('#c4501b', '#a5471c')
    """
    seen: dict[str, int] = {}
    found = {}
    for row in report["methods"]:
        number = seen[row["method"]] = seen.get(row["method"], -1) + 1
        light, dark, marker, dashes = STYLES[row["method"]]
        if number:
            step = min(0.2 * number, 0.7)
            light, dark = _mixed(light, "#2a2320", step), _mixed(dark, "#f4f1ea", step)
            marker = _MARKERS[(_MARKERS.index(marker) + number) % len(_MARKERS) if marker in _MARKERS else number]
            dashes = ("solid", (0, (5, 1.6)), (0, (1.4, 1.4)), (0, (7, 1.6, 1.4, 1.6)))[number % 4]
        found[row["name"]] = light, dark, marker, dashes
    return found


def _mixed(colour: str, other: str, share: float) -> str:
    pairs = ((int(c[at : at + 2], 16) for c in (colour, other)) for at in (1, 3, 5))
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in pairs)


class Palette:
    """The colours of one drawing, by row or ink, and the rows' markers and dashes."""

    def __init__(self, styles: dict[str, tuple[str, str, str, Any]], placeholders: bool) -> None:
        self.styles = styles
        self.variables = {**{name: f"row-{name}" for name in styles}, **{name: name[1:] for name in INKS}}
        numbered = {name: f"#{number:04x}fe" for number, name in enumerate([*INKS, *styles], 1)}
        plain = {**{n: inks[0] for n, inks in INKS.items()}, **{n: style[0] for n, style in styles.items()}}
        self.colours = numbered if placeholders else plain

    def __call__(self, name: str) -> str:
        return self.colours[name]

    def marker(self, name: str) -> str:
        """The matplotlib marker of a row."""
        return self.styles[name][2]

    def dashes(self, name: str) -> Any:
        """The matplotlib line style of a row."""
        return self.styles[name][3]


@dataclass(frozen=True)
class Drawing:
    """A finished figure: a name, what to read from it, a text for those who cannot see it, and its SVG."""

    name: str
    title: str
    caption: str
    alt: str
    svg: str


def draw_all(report: dict[str, Any], folder: Path) -> dict[str, Drawing]:
    """Draws every figure that the report has data for; writes the PNG files into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    styles = row_styles(report)
    light, themed = Palette(styles, placeholders=False), Palette(styles, placeholders=True)
    drawn: dict[str, Drawing] = {}
    for name, (draw, title, caption, alt) in _figures(report).items():
        with matplotlib.rc_context(_RC):
            figure = draw(report, light)
            if figure is None:
                continue
            figure.savefig(folder / f"{name}.png", dpi=180, facecolor="white")
            stream = io.StringIO()
            draw(report, themed).savefig(
                stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
            )
        drawn[name] = Drawing(name, title, caption, alt, _themed(stream.getvalue(), name, alt, themed))
    return drawn


def css_variables(report: dict[str, Any], theme: int) -> str:
    """The colours as CSS variables; ``theme`` 0 is light, 1 is dark."""
    pairs = [(f"row-{name}", style[theme]) for name, style in row_styles(report).items()]
    return " ".join(f"--{name}: {colour};" for name, colour in [*pairs, *((n[1:], c[theme]) for n, c in INKS.items())])


_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qaa",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.solid_capstyle": "round",
}


def _themed(svg: str, name: str, alt: str, palette: Palette) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for key, placeholder in palette.colours.items():
        svg = svg.replace(placeholder, f"var(--{palette.variables[key]})")
    svg = re.sub(r"font: ([^;\"']*?)([\d.]+px) [^;\"]*", r"font-size: \2; font-family: inherit", svg)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r"<svg ", f'<svg role="img" aria-label="{alt}" ', svg, count=1)
    return re.sub(
        r'(<svg [^>]*?)width="[\d.]+pt" height="[\d.]+pt"|(<svg [^>]*?)height="[\d.]+pt"', _no_size, svg, count=1
    )


def _no_size(match: re.Match[str]) -> str:
    return re.sub(r' ?\b(width|height)="[\d.]+pt"', "", match[0])


# ------------------------------------------------------------------------------------------------------- parts


def _axes(palette: Palette, width: float, height: float, left: float, right: float, bottom: float = 0.55) -> Any:
    """A figure of ``width`` x ``height`` inches with margins in inches, and its axes with quiet lines."""
    figure = Figure(figsize=(width, height))
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + 0.15) / height)
    axes = figure.add_axes(box)
    axes.grid(axis="y", color=palette("@rule"), linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(palette("@rule"))
    axes.tick_params(colors=palette("@muted"), length=0, labelsize=9.5, pad=5)
    return figure, axes


def _axis_labels(axes: Any, palette: Palette, x: str, y: str) -> None:
    axes.set_xlabel(x, color=palette("@muted"), fontsize=9.5, labelpad=6)
    axes.set_ylabel(y, color=palette("@muted"), fontsize=9.5, labelpad=8)


def spread_labels(wanted: Sequence[float], gap: float, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """Positions near ``wanted`` at least ``gap`` apart: groups that touch are centred on their mean, inside the limits.

    Example:
        >>> [round(p, 3) for p in spread_labels([1.0, 1.0, 3.0], gap=0.5)]
        [0.75, 1.25, 3.0]
        >>> [round(p, 3) for p in spread_labels([1.0, 1.0, 3.0], gap=0.5, low=1.0, high=2.5)]
        [1.0, 1.5, 2.5]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[list[int]] = []
    starts: list[float] = []
    for index in order:
        groups.append([index])
        starts.append(wanted[index])
        while len(groups) > 1 and starts[-1] < starts[-2] + gap * len(groups[-2]) - 1e-12:
            merged = groups[-2] + groups[-1]
            groups[-2:] = [merged]
            centre = sum(wanted[i] for i in merged) / len(merged)
            starts[-2:] = [centre - gap * (len(merged) - 1) / 2]
    placed = [0.0] * len(wanted)
    for group, start in zip(groups, starts, strict=True):
        for offset, index in enumerate(group):
            placed[index] = start + gap * offset
    for place, index in enumerate(order):
        placed[index] = max(placed[index], low + gap * place)
    for place, index in enumerate(reversed(order)):
        placed[index] = min(placed[index], high - gap * place)
    return placed


def _end_labels(axes: Any, palette: Palette, ends: Sequence[tuple[str, str, float, float]]) -> None:
    """Labels (name, text, x, y) to the right of the axes, moved apart, with a hair line to the curve's end."""
    low, high = axes.get_ylim()
    height = axes.figure.get_figheight() * axes.get_position().height
    gap = (high - low) * 0.185 / height
    right = axes.get_xlim()[1]
    span = right - axes.get_xlim()[0]
    for (name, text, x, y), place in zip(ends, spread_labels([e[3] for e in ends], gap, low, high), strict=True):
        inside = min(max(y, low), high)
        axes.plot(
            [x, right + 0.018 * span, right + 0.03 * span], [inside, place, place],
            color=palette(name), linewidth=0.7, clip_on=False,
        )  # fmt: skip
        axes.text(right + 0.04 * span, place, text, color=palette(name), va="center", fontsize=10)
    axes.set_ylim(low, high)
    axes.set_xlim(axes.get_xlim()[0], right)


def _smoothed(values: Sequence[float | None], weight: float = 0.9) -> list[float]:
    """The exponential moving average, corrected for its start."""
    average, total, found = 0.0, 0.0, []
    for value in values:
        if value is not None:
            average = weight * average + (1 - weight) * value
            total = weight * total + (1 - weight)
        found.append(average / total if total else math.nan)
    return found


def _trained(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in report["methods"] if row["name"] != "untouched"]


def _untouched(report: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in report["methods"] if row["name"] == "untouched")


def _mean_curve(curves: Sequence[Sequence[float | None]]) -> list[float | None]:
    columns = zip(*curves, strict=True)
    return [sum(known) / len(known) if (known := [v for v in c if v is not None]) else None for c in columns]


# ----------------------------------------------------------------------------------------------------- figures


def _row_inches(count: int) -> float:
    return 0.46 if count <= _MANY else 0.3


def _label_inches(labels: Sequence[str]) -> float:
    return max(1.5, 0.082 * max(map(len, labels)) + 0.25)


def _difference(report: dict[str, Any], palette: Palette, reference: str) -> Any:
    found = [d for d in report["differences"] if d["reference"] == reference]
    if not found:
        return None
    labels = {row["name"]: row["label"] for row in report["methods"]}
    found = sorted(found, key=lambda d: -d["difference"])
    left = _label_inches([labels[d["method"]] for d in found])
    figure, axes = _axes(palette, 5.7 + left, _row_inches(len(found)) * len(found) + 0.95, left, 2.2)
    axes.grid(False)
    axes.grid(axis="x", color=palette("@rule"), linewidth=0.7)
    axes.axvline(0, color=palette(reference), linewidth=1.3)
    for place, item in enumerate(found):
        name = item["method"]
        axes.plot([item["low"], item["high"]], [place, place], color=palette(name), linewidth=2.4)
        axes.plot(item["difference"], place, palette.marker(name), color=palette(name), markersize=8)
        text = f"{_signed(item['difference'])}  ({_signed(item['low'])} to {_signed(item['high'])})"
        axes.text(
            1.03, place, text, transform=axes.get_yaxis_transform(), color=palette("@ink"), va="center", fontsize=9.5
        )
    axes.set_yticks(range(len(found)), [labels[item["method"]] for item in found])
    axes.tick_params(axis="y", labelcolor=palette("@ink"), labelsize=10.5)
    axes.set_ylim(-0.6, len(found) - 0.4)
    edge = max(abs(bound) for item in found for bound in (item["low"], item["high"])) * 1.08 or 0.01
    axes.set_xlim(-edge, edge)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _signed(value)))
    axes.spines["left"].set_visible(False)
    _axis_labels(axes, palette, f"test loss minus that of {labels[reference]}, nats per token   (left is better)", "")
    return figure


def _signed(value: float) -> str:
    text = f"{value:+.3f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else "0.000"


def _trade_off(report: dict[str, Any], palette: Palette) -> Any:
    rows = _trained(report)
    if not rows:
        return None
    many = len(rows) > _MANY
    margin = 0.083 * max(len(row["label"]) for row in rows) + 0.65 if many else 1.5
    figure, axes = _axes(palette, 5.85 + margin, max(4.0, 0.2 * len(rows) + 1.2), 0.9, margin)
    axes.set_xscale("log")
    losses = [row["test_loss"] for row in rows]
    reference = _untouched(report)["test_loss"]
    low, high = min(losses), max([*losses, reference])
    axes.set_ylim(low - 0.14 * (high - low), high + 0.1 * (high - low))
    shares = [row["trainable_percent"] for row in rows]
    left, right = min(shares) / 2, max(shares) * 2
    axes.set_xlim(left, right)
    axes.axhline(reference, color=palette("untouched"), linewidth=1.2, linestyle=palette.dashes("untouched"))
    beside: dict[str, Any] = {"x": right * 1.06, "y": reference, "va": "center"}
    if many:  # the right margin belongs to the key
        beside = {"x": left * 1.1, "y": reference, "va": "bottom"}
    axes.text(s=f"untouched {reference:.3f}", color=palette("untouched"), fontsize=10, **beside)
    for row in rows:
        name = row["name"]
        for one in row["runs"] if len(row["runs"]) > 1 else []:
            axes.plot(row["trainable_percent"], one["test_loss"], "_", color=palette(name), markersize=9)
        axes.plot(
            row["trainable_percent"], row["test_loss"], palette.marker(name), color=palette(name), markersize=10,
            markeredgecolor=palette("@page"), markeredgewidth=1,
        )  # fmt: skip
    if many:
        _numbered(axes, palette, rows)
    else:
        _place_beside(axes, palette, rows)
    axes.xaxis.set_major_locator(FixedLocator([10.0**power for power in range(-5, 3)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    _axis_labels(axes, palette, "trainable share of the model's parameters, logarithmic", "test loss, nats per token")
    return figure


def _numbered(axes: Any, palette: Palette, rows: Sequence[dict[str, Any]]) -> None:
    """A number at each point, lowest loss first, and a key of the numbers to the right of the axes."""
    ordered = sorted(rows, key=lambda row: row["test_loss"])
    height = axes.figure.get_figheight() * axes.get_position().height
    short = [{**row, "label": str(number)} for number, row in enumerate(ordered, 1)]
    _place_beside(axes, palette, short)
    for number, row in enumerate(ordered, 1):
        place = 1 - 0.2 * (number - 0.5) / height
        axes.text(1.06, place, str(number), transform=axes.transAxes, color=palette(row["name"]), va="center",
                  ha="right", fontsize=9.5)  # fmt: skip
        axes.plot(1.08, place, palette.marker(row["name"]), transform=axes.transAxes, color=palette(row["name"]),
                  markersize=6, clip_on=False)  # fmt: skip
        axes.text(1.1, place, row["label"], transform=axes.transAxes, color=palette("@ink"), va="center", fontsize=9.5)


def _place_beside(axes: Any, palette: Palette, rows: Sequence[dict[str, Any]]) -> None:
    """The label of each point on the side where it covers least of other labels and points, inside the edges."""
    box = axes.get_position()
    inches_x = axes.figure.get_figwidth() * box.width
    inches_y = axes.figure.get_figheight() * box.height
    (left, right), (low, high) = map(math.log, axes.get_xlim()), axes.get_ylim()

    def place(row: dict[str, Any]) -> tuple[float, float]:
        share = (math.log(row["trainable_percent"]) - left) / (right - left)
        return share * inches_x, (row["test_loss"] - low) / (high - low) * inches_y

    taken = [(x - 0.09, y - 0.09, x + 0.09, y + 0.09) for x, y in map(place, rows)]
    for number, row in enumerate(rows):
        x, y = place(row)
        width = 0.083 * len(row["label"])
        sides = [
            ("left", x + 0.13, y - 0.09), ("right", x - 0.13 - width, y - 0.09), ("center", x - width / 2, y + 0.12),
            ("center", x - width / 2, y - 0.3), ("left", x + 0.11, y + 0.08), ("left", x + 0.11, y - 0.26),
            ("right", x - 0.11 - width, y + 0.08), ("right", x - 0.11 - width, y - 0.26),
        ]  # fmt: skip

        def clashes(side: tuple[str, float, float], width: float = width, own: int = number) -> float:
            _, x0, y0 = side
            outside = max(0.0, -x0) + max(0.0, x0 + width - inches_x - 1.3) + max(0.0, -y0)
            covered = sum(
                max(0.0, min(x0 + width, b[2]) - max(x0, b[0])) * max(0.0, min(y0 + 0.18, b[3]) - max(y0, b[1]))
                for i, b in enumerate(taken)
                if i != own
            )
            return float(covered + outside)

        aligned, x0, y0 = min(sides, key=clashes)
        taken.append((x0, y0, x0 + width, y0 + 0.18))
        anchor = {"left": x0, "right": x0 + width, "center": x0 + width / 2}[aligned]
        axes.text(
            anchor / inches_x, (y0 + 0.09) / inches_y, row["label"], transform=axes.transAxes, ha=aligned, va="center",
            color=palette(row["name"]), fontsize=10,
        )  # fmt: skip


def _validation(report: dict[str, Any], palette: Palette, timed: bool = False) -> Any:
    """Validation loss over optimizer steps, or over seconds of training."""
    rows = _trained(report)
    if timed:
        rows = [row for row in rows if "validation_seconds" in row["runs"][0]]
    if not rows:
        return None
    margin = _label_inches([row["label"] for row in rows]) + 0.6
    figure, axes = _axes(palette, 5.1 + margin, max(3.9, 0.2 * len(rows) + 1.0), 0.75, margin)
    start = _untouched(report)["best_validation_loss"]
    ends, lows, lasts, right = [], [], [start], 0.0
    for row in rows:
        places = [_places(run, timed) for run in row["runs"]]
        for place, run in zip(places, row["runs"], strict=True) if len(places) > 1 else []:
            axes.plot(place, [v if v is not None else math.nan for _, v in run["validation"]],
                      color=palette(row["name"]), linewidth=0.7, alpha=0.45)  # fmt: skip
        place = [sum(each) / len(each) for each in zip(*places, strict=True)]
        curve = _mean_curve([[v for _, v in run["validation"]] for run in row["runs"]])
        points = [math.nan if v is None else v for v in curve]
        axes.plot(place, points, color=palette(row["name"]), linewidth=1.9, linestyle=palette.dashes(row["name"]),
                  marker=palette.marker(row["name"]), markersize=4.5)  # fmt: skip
        known = [p for p in points if not math.isnan(p)]
        lows.append(min(known))
        lasts.append(known[-1])
        right = max(right, *(each[-1] for each in places))
        ends.append((row["name"], f"{row['label']} {known[-1]:.3f}", place[-1], known[-1]))
    low, high = min(lows), max(lasts)
    axes.set_ylim(low - 0.06 * (high - low), high + 0.12 * (high - low))
    axes.set_xlim(0, right)
    axes.axhline(start, color=palette("untouched"), linewidth=1.2, linestyle=palette.dashes("untouched"))
    ends.append(("untouched", f"untouched {start:.3f}", right, start))
    _finish_steps(
        axes, palette, "validation loss, nats per token", "seconds of training" if timed else "optimizer step"
    )
    _end_labels(axes, palette, ends)
    return figure


def _places(run: dict[str, Any], timed: bool) -> list[float]:
    """Where a run's validations stand on the horizontal axis."""
    return run["validation_seconds"] if timed else [float(step) for step, _ in run["validation"]]


def _finish_steps(axes: Any, palette: Palette, what: str, x: str = "optimizer step") -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    _axis_labels(axes, palette, x, what)


def _per_step(key: str, what: str, faint: bool, log: bool) -> Callable[[dict[str, Any], Palette], Any]:
    def draw(report: dict[str, Any], palette: Palette) -> Any:
        rows = [row for row in _trained(report) if len(row["runs"][0][key]) > 1]
        if not rows:
            return None
        margin = _label_inches([row["label"] for row in rows]) + 0.1
        figure, axes = _axes(palette, 5.6 + margin, max(3.7, 0.2 * len(rows) + 1.0), 0.75, margin)
        scale: Callable[[float], float] = math.log10 if log else lambda value: value
        ends, values = [], []
        for row in rows:
            curve = _mean_curve([run[key] for run in row["runs"]])
            raw = [math.nan if v is None or (log and v <= 0) else scale(v) for v in curve]
            smooth = _smoothed([None if math.isnan(v) else v for v in raw])
            steps = list(range(1, len(raw) + 1))
            if faint:
                axes.plot(steps, raw, color=palette(row["name"]), linewidth=0.6, alpha=0.3)
            axes.plot(steps, smooth, color=palette(row["name"]), linewidth=1.9, linestyle=palette.dashes(row["name"]))
            values += smooth[len(smooth) // 20 :]
            ends.append((row["name"], row["label"], float(steps[-1]), smooth[-1]))
        known = [v for v in values if not math.isnan(v)]
        low, high = min(known), max(known)
        margin = (high - low or 0.1) * 0.12
        axes.set_ylim(low - margin, high + margin)
        axes.set_xlim(1, max(end[2] for end in ends))
        _finish_steps(axes, palette, what)
        if log:
            ticks = [
                t
                for p in range(-6, 7)
                for f in (1, 2, 5)
                if low - margin <= (t := math.log10(f * 10.0**p)) <= high + margin
            ]
            axes.yaxis.set_major_locator(FixedLocator(ticks))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{10**value:.3g}"))
        _end_labels(axes, palette, ends)
        return figure

    return draw


def _seeds(report: dict[str, Any], palette: Palette) -> Any:
    rows = [row for row in _trained(report) if len(row["runs"]) > 1]
    if not rows:
        return None
    rows = sorted(rows, key=lambda row: -row["test_loss"])
    left = _label_inches([row["label"] for row in rows])
    figure, axes = _axes(palette, 5.7 + left, _row_inches(len(rows)) * len(rows) + 0.95, left, 1.2)
    axes.grid(False)
    axes.grid(axis="x", color=palette("@rule"), linewidth=0.7)
    for place, row in enumerate(rows):
        losses = [run["test_loss"] for run in row["runs"]]
        axes.plot([min(losses), max(losses)], [place, place], color=palette(row["name"]), linewidth=1.2)
        axes.plot(
            losses,
            [place] * len(losses),
            palette.marker(row["name"]),
            color=palette(row["name"]),
            markersize=7,
            alpha=0.8,
        )
        axes.text(1.03, place, f"{row['test_loss']:.3f} ± {row['spread']['test_loss']:.3f}", va="center", fontsize=9.5,
                  transform=axes.get_yaxis_transform(), color=palette("@ink"))  # fmt: skip
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes.tick_params(axis="y", labelcolor=palette("@ink"), labelsize=10.5)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    _axis_labels(axes, palette, "test loss of each seed, nats per token", "")
    return figure


def _noise(report: dict[str, Any], palette: Palette) -> Any:
    """Test loss over the probability of an error per gate, on a logarithmic axis that begins with no error."""
    noise = report.get("noise", {"rows": {}})
    rows = [row for row in _trained(report) if row["name"] in noise["rows"]]
    if not rows:
        return None
    margin = _label_inches([row["label"] for row in rows]) + 0.6
    figure, axes = _axes(palette, 5.1 + margin, 3.9, 0.75, margin)
    places = [math.log10(p) for p in noise["probabilities"]]
    places = [places[0] - 0.5, *places]
    ends = []
    for row in rows:
        name = row["name"]
        runs = [[run["test_loss"], *losses] for run, losses in zip(row["runs"], noise["rows"][name], strict=True)]
        for losses in runs if len(runs) > 1 else []:
            axes.plot(places, losses, color=palette(name), linewidth=0.7, alpha=0.45)
        curve = [sum(losses) / len(losses) for losses in zip(*runs, strict=True)]
        axes.plot(places, curve, color=palette(name), linewidth=1.9, linestyle=palette.dashes(name),
                  marker=palette.marker(name), markersize=5)  # fmt: skip
        ends.append((name, f"{row['label']} {curve[-1]:.3f}", places[-1], curve[-1]))
    reference = _untouched(report)["test_loss"]
    axes.axhline(reference, color=palette("untouched"), linewidth=1.2, linestyle=palette.dashes("untouched"))
    ends.append(("untouched", f"untouched {reference:.3f}", places[-1], reference))
    axes.set_xlim(places[0] - 0.1, places[-1] + 0.1)
    labels = ["0", *(f"{100 * p:g} %" for p in noise["probabilities"])]
    axes.set_xticks(places, labels)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    _axis_labels(axes, palette, "probability of an error after every gate, on each wire", "test loss, nats per token")
    _end_labels(axes, palette, ends)
    return figure


_Figure = tuple[Callable[[dict[str, Any], Palette], Any], str, str, str]


def _figures(report: dict[str, Any]) -> dict[str, _Figure]:
    """The figures by name: the differences to every trained reference, then what does not depend on one."""
    labels = {row["name"]: row["label"] for row in report["methods"]}
    resampled = "seeds and test examples" if len(report["settings"]["seeds"]) > 1 else "the test examples"
    found: dict[str, _Figure] = {}
    for reference in report["references"]:
        if reference != "untouched" and reference in labels:
            found[f"difference-{reference}" if found else "difference"] = (
                partial(_difference, reference=reference),
                f"How far from {labels[reference]}, and how sure",
                f"Each mark is a method's test loss minus that of {labels[reference]} on the same answers; the bar is "
                f"a 95 % interval from resampling {resampled}. A bar that crosses the line is a difference that this "
                "comparison cannot settle.",
                f"Difference of test loss to {labels[reference]} with 95 percent intervals, one row per method",
            )
    return {**found, **_FIGURES}


_FIGURES: dict[str, _Figure] = {
    "trade_off": (
        _trade_off,
        "Loss against size",
        "Down and to the left is better: a low test loss with few trained parameters. With several seeds, short "
        "strokes are the seeds and the mark is their mean.",
        "Test loss of each method against the trainable share of parameters on a logarithmic axis",
    ),
    "validation_loss": (
        _validation,
        "Validation loss",
        "The mean over all answer tokens of the validation split. The step with the lowest value is the one that was "
        "tested.",
        "Validation loss of each method over optimizer steps",
    ),
    "loss_over_time": (
        partial(_validation, timed=True),
        "Validation loss over time",
        "The same losses against the time that the training steps took, evaluations left out; with several seeds the "
        "mean of their times.",
        "Validation loss of each method over seconds of training",
    ),
    "training_loss": (
        _per_step("train_loss", "training loss, nats per token", faint=False, log=False),
        "Training loss",
        "The moving average over steps (weight 0.9). All methods see the same batches in the same order, so they share "
        "the same bumps.",
        "Training loss of each method over optimizer steps",
    ),
    "gradient_norm": (
        _per_step("gradient_norm", "gradient norm, logarithmic", faint=True, log=True),
        "Gradient norms",
        "The Euclidean norm over all trained parameters before clipping at 1; faint per step, bold its moving average. "
        "Parameters differ in number and scale between methods: compare shapes, not heights.",
        "Gradient norm of each method over optimizer steps on a logarithmic axis",
    ),
    "noise": (
        _noise,
        "On a noisy circuit",
        "The trained adapters once more on the test split, with depolarizing noise after every gate of their circuits, "
        "on each of its wires; nothing was trained with noise. Features are means over a few trajectories, whose own "
        "scatter is part of the loss. The embedding is free of noise.",
        "Test loss of adapters with circuits over the probability of an error per gate",
    ),
    "seed_spread": (
        _seeds,
        "Spread over seeds",
        "One mark per seed; the figure is the mean and the sample standard deviation.",
        "Test loss of every seed, one row per method",
    ),
}
