"""Drawings of circuits, as text and as SVG: wires are rows, gates stand in the earliest column that has room."""

from __future__ import annotations

import math

from qaa.circuit import Circuit, Gate

#: The symbols of two-wire gates, control or first wire first; None is a box with the name of what is controlled.
_SYMBOLS: dict[str, tuple[str, str | None]] = {
    "CNOT": ("●", "⊕"),
    "CZ": ("●", "●"),
    "SWAP": ("×", "×"),
    "CRX": ("●", None),
    "CRY": ("●", None),
    "CRZ": ("●", None),
}


def draw(circuit: Circuit, output: str = "text") -> str:
    """See :meth:`qaa.Circuit.draw`."""
    writers = {"text": _text, "svg": _svg}
    if output not in writers:
        raise ValueError(f"expected output 'text' or 'svg', received {output!r}")
    return writers[output](circuit)


def columns(circuit: Circuit) -> list[list[Gate]]:
    """The gates, column after column: in one column no two of them share a wire or cross."""
    used = [0] * circuit.n_wires  # columns that are taken on each wire
    result: list[list[Gate]] = []
    for gate in circuit.gates:
        span = slice(min(gate.wires), max(gate.wires) + 1)
        column = max(used[span])
        used[span] = [column + 1] * (span.stop - span.start)
        if column == len(result):
            result.append([])
        result[column].append(gate)
    return result


def _entries(circuit: Circuit, gate: Gate) -> list[str]:
    """``θ[0,1,2]`` for each parameter: its index in theta of the circuit's shape."""
    names = []
    for parameter in gate.parameters:
        index: list[int] = []
        for size in reversed(circuit.parameter_shape):
            parameter, remainder = divmod(parameter, size)
            index.insert(0, remainder)
        names.append(f"θ[{','.join(map(str, index))}]")
    return names


def _parts(circuit: Circuit, gate: Gate) -> dict[int, tuple[str, list[str]]]:
    """What stands on each of the gate's wires: a symbol or a name, and the angles of a box."""
    entries = _entries(circuit, gate)
    if gate.name not in _SYMBOLS:
        return {gate.wires[0]: (gate.name, entries)}
    first, second = _SYMBOLS[gate.name]
    box = (gate.name[1:], entries) if second is None else (second, [])
    return {gate.wires[0]: (first, []), gate.wires[1]: box}


# ---------------------------------------------------------------------------------------------------- text


def _text(circuit: Circuit) -> str:
    n = circuit.n_wires
    margin = len(str(n - 1))
    lines = [f"{k // 2:>{margin}}: ─" if k % 2 == 0 else " " * (margin + 3) for k in range(2 * n - 1)]
    for gates in columns(circuit):
        cells: list[str] = ["─", " "] * n  # wires, and what is between them
        for gate in gates:
            for between in range(2 * min(gate.wires) + 1, 2 * max(gate.wires)):
                cells[between] = "│" if between % 2 else "┼"
            for wire, (name, entries) in _parts(circuit, gate).items():
                cells[2 * wire] = f"{name}({','.join(entries)})" if entries else name
        width = max(map(len, cells))
        centre = (width - 1) // 2
        for k, cell in enumerate(cells[: 2 * n - 1]):
            before = centre - (len(cell) - 1) // 2
            fill = "─" if k % 2 == 0 else " "
            lines[k] += fill * before + cell + fill * (width - before - len(cell) + 1)
    return "\n".join(line.rstrip() for line in lines)


# ---------------------------------------------------------------------------------------------------- SVG

_ROW, _BOX, _LEFT, _PAD = 52, 36, 44, 22  # distances in pixels
_COLOURS = {  # fill, line and text of a box
    "RX": ("#fde8e8", "#d64545", "#8f1f1f"),
    "RY": ("#e3f0fd", "#2f7fd1", "#154a80"),
    "RZ": ("#e2f6ec", "#2f9e6b", "#14573a"),
    "Rot": ("#efe9fc", "#7a57d1", "#43298c"),
    "PhaseShift": ("#fdf3dc", "#c98a12", "#7a5207"),
}
_PLAIN = ("#f1f4f8", "#64748b", "#1f2a3a")
_INK = "#1f2a3a"
_STYLE = (
    "text{font-family:ui-sans-serif,system-ui,'Segoe UI',Helvetica,Arial,sans-serif;text-anchor:middle}"
    ".name{font-size:14px;font-weight:600}.angle{font-size:10px}.wire{font-size:13px;fill:#64748b;text-anchor:end}"
)


def _box_width(name: str, entries: list[str]) -> int:
    return max(_BOX, 9 * len(name) + 16, math.ceil(5.6 * len(" ".join(entries))) + 14)


def _svg(circuit: Circuit) -> str:
    n = circuit.n_wires
    centres = [_PAD + _BOX // 2 + _ROW * wire for wire in range(n)]
    shapes: list[str] = []
    x = _LEFT + 14
    for gates in columns(circuit):
        parts = [_parts(circuit, gate) for gate in gates]
        boxes = [_box_width(*part) for each in parts for part in each.values() if part[0].isalpha()]
        width = max(boxes, default=22)
        centre = x + width // 2
        for gate, each in zip(gates, parts, strict=True):
            shapes.append(f"<g><title>{gate.name} on {', '.join(map(str, gate.wires))}</title>")
            if len(each) == 2:
                top, bottom = sorted(centres[wire] for wire in each)
                shapes.append(f'<path d="M{centre} {top}V{bottom}" stroke="{_INK}" stroke-width="1.6"/>')
            for wire, (name, entries) in each.items():
                shapes += _shape(centre, centres[wire], name, entries)
            shapes.append("</g>")
        x += width + 14
    width, height = x + 14 + _PAD, centres[-1] + _BOX // 2 + _PAD
    title = f"Circuit of {n} wire(s), {len(circuit.gates)} gate(s) and theta of shape {circuit.parameter_shape}"
    wires = [f'<path d="M{_LEFT} {y}H{x + 14}" stroke="#94a3b8" stroke-width="1.4"/>' for y in centres]
    labels = [f'<text class="wire" x="{_LEFT - 10}" y="{y + 5}">{wire}</text>' for wire, y in enumerate(centres)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" aria-label="{title}">',
            f"<title>{title}</title><style>{_STYLE}</style>",
            f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>',
            *wires,
            *labels,
            *shapes,
            "</svg>",
        ]
    )


def _shape(x: int, y: int, name: str, entries: list[str]) -> list[str]:
    """A control, a target, a cross, or a box with a name and its angles."""
    if name == "●":
        return [f'<circle cx="{x}" cy="{y}" r="5" fill="{_INK}"/>']
    if name == "⊕":
        return [
            f'<circle cx="{x}" cy="{y}" r="11" fill="#ffffff" stroke="{_INK}" stroke-width="1.6"/>',
            f'<path d="M{x - 11} {y}H{x + 11}M{x} {y - 11}V{y + 11}" stroke="{_INK}" stroke-width="1.6"/>',
        ]
    if name == "×":
        return [f'<path d="M{x - 6} {y - 6}l12 12m0 -12l-12 12" stroke="{_INK}" stroke-width="2"/>']
    fill, line, ink = _COLOURS.get(name, _PLAIN)
    width, half = _box_width(name, entries), _BOX // 2
    shape = f'<rect x="{x - width // 2}" y="{y - half}" width="{width}" height="{_BOX}" rx="6" '
    shape += f'fill="{fill}" stroke="{line}" stroke-width="1.4"/>'
    label = f'<text class="name" x="{x}" y="{y if entries else y + 5}" fill="{ink}">{name}</text>'
    angles = [f'<text class="angle" x="{x}" y="{y + 12}" fill="{ink}">{" ".join(entries)}</text>'] if entries else []
    return [shape, label, *angles]
