"""Gradients at the start of training and after some of it: ``python -m benchmarks.trainability`` measures and draws.

*Variance*: how the gradient of one angle spreads over random angles and inputs, against wires and layers, for every
angle initialisation, which is where a barren plateau would show. *Flow*: the norm of each adapter's gradient in every
decoder layer of a language model, before and after a few training steps. Numbers and tables go to
``reports/trainability``, figures to ``docs/figures`` (with ``--quick``, which shows that it runs, beside the numbers).
Everything is seeded; ``--draw`` draws the numbers that are there.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import qaa
from qaa.nn import INIT_ANGLES

Array = NDArray[Any]


# ------------------------------------------------------------------------------------------------------ variance


@dataclass(frozen=True)
class Quantity:
    """A loss whose gradient is looked at: ``Re(sum_k w_k f_k)`` of some features f."""

    label: str
    readout: Callable[[int], Any]  # of the number of wires
    weights: Callable[[np.random.Generator, int], Array]  # of the number of features


def _one(rng: np.random.Generator, count: int) -> Array:
    return np.ones(count)


def _normal(rng: np.random.Generator, count: int) -> Array:
    return rng.standard_normal(count)


QUANTITIES = {
    "local": Quantity("⟨Z₀⟩", lambda n: ["Z" + "I" * (n - 1)], _one),
    "global": Quantity("⟨Z…Z⟩", lambda n: ["Z" * n], _one),
    "z": Quantity("Σ wₖ⟨Zₖ⟩", lambda n: "z", _normal),
    "state": Quantity("Σ wₖ Re φₖ, k < 16", lambda n: f"state[:{min(16, 2**n)}]", _normal),
}
INPUTS: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "0…0": lambda rng, n: np.eye(1, 2**n)[0],
    "random": lambda rng, n: rng.standard_normal(2**n),
}
#: A variance below this is rounding of a gradient that is zero.
NOTHING = 1e-28
ALL_LAYERS = (1, 2, 4, 8, 16)
ALL_WIRES = (2, 4, 6, 8, 10, 12, 14)
#: The published results for local and global costs are for alternating layers of gates on neighbouring wires.
CONTROL = "brick"


@dataclass(frozen=True)
class Setting:
    """A circuit, how its angles are drawn (a key of ``INIT_ANGLES``) and its input (a key of ``INPUTS``)."""

    ansatz: str
    n_wires: int
    n_layers: int
    init: str
    input: str


@dataclass(frozen=True)
class Point(Setting):
    """The variance of dE/dtheta_k over draws of angles, input and weights, averaged over all angles k."""

    quantity: str
    variance: float
    error: float  # its standard error


def variances(wires: Sequence[int], layers: Sequence[int], draws: int, seed: int = 0) -> Iterator[Point]:
    """Every combination; of the control, uniform angles and the two observables on the basis state 0…0 alone."""
    for ansatz in ("ring", CONTROL):
        for i, init in enumerate(INIT_ANGLES):
            for j, kind in enumerate(INPUTS):
                is_control = ansatz == CONTROL
                if (is_control and (init, j) != ("uniform", 0)) or (INIT_ANGLES[init] == 0 and j == 0):
                    continue  # with angles and input fixed, nothing varies
                quantities = ("local", "global") if is_control else tuple(QUANTITIES)
                for n in wires:
                    for depth in layers:
                        rng = np.random.default_rng([seed, i, j, n, depth, is_control])
                        yield from points(Setting(ansatz, n, depth, init, kind), quantities, draws, rng)


def points(
    setting: Setting,
    quantities: Iterable[str],
    draws: int,
    rng: np.random.Generator,
    inputs: Mapping[str, Callable[[np.random.Generator, int], Array]] = INPUTS,
) -> Iterator[Point]:
    """The variances of several quantities over the same draws."""
    n, half_width = setting.n_wires, INIT_ANGLES[setting.init]
    circuit = qaa.ansatz(setting.ansatz, n, setting.n_layers)
    found: dict[str, list[Array]] = {name: [] for name in quantities}
    for _ in range(draws):
        theta = rng.uniform(-half_width, half_width, circuit.parameter_shape)
        x = inputs[setting.input](rng, n)[None]
        for name, gradients in found.items():
            quantity = QUANTITIES[name]
            readout = qaa.Readout.parse(quantity.readout(n), n)
            weights = quantity.weights(rng, readout.n_outputs)[None]
            grad = weights.astype(np.complex128) if readout.kind == "state" else weights
            gradients.append(qaa.arrays.backward(circuit, theta, x, grad, readout, threads=1)[0].ravel())
    for name, gradients in found.items():
        all_of = np.array(gradients)
        squares = ((all_of - all_of.mean(0)) ** 2).mean(1) * draws / (draws - 1)
        error = float(squares.std(ddof=1)) / math.sqrt(draws)
        yield Point(**asdict(setting), quantity=name, variance=float(squares.mean()), error=error)


def slope(measured: Sequence[Point], smallest: int = 4) -> float | None:
    """Of log2 variance against wires, fitted from ``smallest`` wires on: -1 is a plateau that falls as ``2**-n``."""
    line = [p for p in measured if p.n_wires >= smallest and p.variance > NOTHING]
    if len(line) < 2:
        return None
    return float(np.polyfit([p.n_wires for p in line], [math.log2(p.variance) for p in line], 1)[0])


def variance_table(measured: Sequence[Point]) -> str:
    """Fitted slopes, and the variance at the most wires, as Markdown."""
    layers = sorted({p.n_layers for p in measured})
    most = max(p.n_wires for p in measured)
    lines = [
        f"| circuit | angles | input | gradient of | {' | '.join(f'L = {depth}' for depth in layers)} |",
        f"|---|---|---|---|{'---:|' * len(layers)}",
    ]
    for ansatz, init, kind, name in dict.fromkeys((p.ansatz, p.init, p.input, p.quantity) for p in measured):
        cells = []
        for depth in layers:
            of_line = [
                p
                for p in measured
                if (p.ansatz, p.init, p.input, p.quantity, p.n_layers) == (ansatz, init, kind, name, depth)
            ]
            fitted, last = slope(of_line), next(p for p in of_line if p.n_wires == most)
            cells.append(f"{'–' if fitted is None else f'{fitted:+.2f}'} ({last.variance:.0e})")
        lines.append(f"| {ansatz} | {init} | {kind} | {QUANTITIES[name].label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_variance(measured: Sequence[Point], path: Path) -> None:
    """One row an initialisation, one column a quantity; colours are depths, dashes the basis state 0…0."""
    plt = _pyplot()
    inits = [init for init in INIT_ANGLES if any(p.init == init for p in measured)]
    layers = sorted({p.n_layers for p in measured})
    colours = plt.get_cmap("viridis_r")(np.linspace(0.12, 1, len(layers)))
    figure, panels = plt.subplots(
        len(inits), len(QUANTITIES), figsize=(13, 2.9 * len(inits) + 0.8), sharex=True, sharey=True, squeeze=False
    )
    wires = sorted({p.n_wires for p in measured})
    for row, init in zip(panels, inits, strict=True):
        for panel, (name, quantity) in zip(row, QUANTITIES.items(), strict=True):
            for depth, colour in zip(layers, colours, strict=True):
                for kind in INPUTS:
                    line = [
                        (p.n_wires, p.variance)
                        for p in measured
                        if (p.ansatz, p.init, p.quantity, p.n_layers, p.input) == ("ring", init, name, depth, kind)
                    ]
                    line = [(n, value if value > NOTHING else math.nan) for n, value in line]
                    if line:
                        style = {"linestyle": "-", "marker": "o"} if kind == "random" else {"linestyle": "--"}
                        panel.plot(*zip(*line, strict=True), color=colour, markersize=3.5, linewidth=1.4, **style)
            panel.plot(wires, [0.5**n for n in wires], color="black", linestyle=(0, (1, 2)), linewidth=1.2)
            panel.set(yscale="log", ylim=(5e-6, 2))
            panel.set_xticks(wires)
            panel.minorticks_off()
            panel.grid(True, which="major", alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
            if init == inits[0]:
                panel.set_title(f"E = {quantity.label}")
            if init == inits[-1]:
                panel.set_xlabel("wires n")
        width = {"uniform": "uniform in [-π, π)", "small": "small, in [-0.1, 0.1)"}.get(init, init)
        row[0].set_ylabel(f"angles: {width}\nVar ∂E/∂θ")
    line_of = plt.Line2D
    handles = [line_of([], [], color=c, linewidth=2, label=f"L = {d}") for d, c in zip(layers, colours, strict=True)]
    handles += [
        line_of([], [], color="grey", marker="o", markersize=3.5, label="random input"),
        line_of([], [], color="grey", linestyle="--", label="input |0…0⟩"),
        line_of([], [], color="black", linestyle=(0, (1, 2)), label="2⁻ⁿ"),
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    figure.suptitle("Variance of an angle's gradient, mean over the angles of `ring`", fontsize=11)
    _save(figure, path)


# ---------------------------------------------------------------------------------------------------------- flow

_PARAMETER = re.compile(r"\.layers\.(\d+)\..*?(\w+)\.(qaa_\w+|lora_[AB])\.")
PARTS = {"qaa_theta": "angles", "qaa_up": "V", "qaa_mix": "M", "qaa_bias": "c", "lora_A": "A", "lora_B": "B"}


@dataclass(frozen=True)
class Norm:
    """The norm of the gradient of one part of the adapter on one linear layer: the root mean square over batches."""

    method: str
    step: int
    layer: int
    module: str
    part: str
    parameters: int
    norm: float


def hidden_variances(
    model: Any, batches: Sequence[Any], target: str, draws: int, seed: int = 0
) -> list[dict[str, Any]]:
    """The variance of d<Z_0>/dtheta for what really enters adapters, as a share of the bound for random inputs.

    Rows are those that reach ``target`` in some decoder layers, as they are and with every channel divided by its rms;
    the circuit is the paper form's, ``ring`` with four layers.
    """
    import torch

    from qaa.compare.models import decoder_layers

    layers = decoder_layers(model)
    chosen = sorted({round(part * (len(layers) - 1)) for part in (0, 1 / 3, 2 / 3, 1)})
    caught: dict[int, list[Any]] = {index: [] for index in chosen}
    handles = [
        next(
            module for name, module in layers[index].named_modules() if name.endswith(target)
        ).register_forward_pre_hook(lambda module, args, index=index: caught[index].append(args[0]))
        for index in chosen
    ]
    with torch.no_grad():
        for batch in batches:
            model(**{key: value for key, value in batch.items() if key != "labels"})
    for handle in handles:
        handle.remove()
    found = []
    for index in chosen:
        kept = [x[batch["attention_mask"].bool()] for x, batch in zip(caught[index], batches, strict=True)]
        plain = torch.cat(kept).double().numpy()
        n = max(1, (plain.shape[1] - 1).bit_length())
        row: dict[str, Any] = {"layer": index, "n_wires": n}
        for what, rows in (("as they are", plain), ("scaled", plain / np.sqrt((plain**2).mean(0)))):
            for i, init in enumerate(("uniform", "small")):
                rng = np.random.default_rng([seed, index, i])
                inputs = {"rows": lambda rng, n, rows=rows: rows[rng.integers(len(rows))]}
                setting = Setting("ring", n, 4, init, "rows")
                (point,) = points(setting, ["local"], draws, rng, inputs)
                row[f"{what}, {init}"] = [point.variance * (2**n + 2) / 2, point.error * (2**n + 2) / 2]
        found.append(row)
    return found


def hidden_table(data: dict[str, Any]) -> str:
    """Of :func:`hidden_variances`, as Markdown."""
    columns = [key for key in data["hidden"][0] if key not in ("layer", "n_wires")]
    lines = [f"| decoder layer | {' | '.join(columns)} |", f"|---:|{'---:|' * len(columns)}"]
    for row in data["hidden"]:
        cells = [f"{row[column][0]:.2f} ± {row[column][1]:.2f}" for column in columns]
        lines.append(f"| {row['layer']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def flow(options: argparse.Namespace, seed: int = 0) -> dict[str, Any]:
    """Norms before the first training step and after the last, for LoRA and every form of QAA in the comparison.

    The comparison's protocol: its data and chat template, loss on answers, AdamW, clipping to norm 1, the middle one of
    each method's learning rates. All layers are adapted.
    """
    import torch

    from qaa.compare import sources
    from qaa.compare.config import settings
    from qaa.compare.data import read_examples, split, training_order
    from qaa.compare.methods import METHODS, Row, Scope, adapted_targets, build, calibrate, optimizer_groups
    from qaa.compare.models import answer_losses, decoder_layers, load_model, load_tokenizer, padded_batch

    given = {name: value for name, value in (("model", options.model), ("data", options.data)) if value}
    steps, batch_size, probes = options.steps, options.batch_size, options.probes
    chosen = settings(
        max_tokens=96,
        batch_size=batch_size,
        train_examples=batch_size * max(steps, 4),
        validation_examples=batch_size * probes,
        test_examples=1,
        **given,
    )
    cache = Path(chosen.cache)
    model_source = sources.resolve("model", chosen.model, chosen.source, cache, sources.model_from_hub)
    data_source = sources.resolve("data", chosen.data, chosen.source, cache, sources.data_from_hub)
    path = sources.plain_model(model_source, cache)
    tokenizer = load_tokenizer(path)
    splits = split(read_examples(data_source.path), tokenizer, chosen)
    order = training_order([len(e) for e in splits.train], batch_size, max(steps, 4), seed)
    training = [padded_batch([splits.train[i] for i in batch], tokenizer.pad_token_id) for batch in order]
    probing = [
        padded_batch(splits.validation[at : at + batch_size], tokenizer.pad_token_id)
        for at in range(0, batch_size * probes, batch_size)
    ]
    model = load_model(path, "cpu")
    hidden = hidden_variances(model, probing, adapted_targets(model, chosen.targets)[0], options.draws, seed)
    norms: list[Norm] = []
    losses: dict[str, list[float]] = {}
    for name, method in METHODS.items():
        if name != "lora" and not name.startswith("qaa"):
            continue
        torch.manual_seed(seed)
        base = load_model(path, "cpu")
        scope = Scope(0, len(decoder_layers(base)), adapted_targets(base, chosen.targets))
        model, _ = build(Row(name, method, {}), base, tokenizer, scope)
        calibrate(model, training[:4])
        rate = method.learning_rates[len(method.learning_rates) // 2]
        optimizer = torch.optim.AdamW(optimizer_groups(method, model, rate), lr=rate, weight_decay=0.0)
        trained = {key: p for key, p in model.named_parameters() if p.requires_grad}

        def measure(step: int, method: Any = method, model: Any = model, trained: Any = trained) -> None:
            squares = dict.fromkeys(trained, 0.0)
            for batch in probing:
                model.zero_grad()
                answer_losses(model, batch)[0].mean().backward()  # type: ignore[no-untyped-call]
                for key, parameter in trained.items():
                    if parameter.grad is not None:
                        squares[key] += float(parameter.grad.double().square().sum()) / probes
            for key, square in squares.items():
                found = _PARAMETER.search(key)
                if found is None:
                    raise ValueError(f"expected an adapter's parameter in a decoder layer, received {key}")
                layer, module, part = int(found[1]), found[2], PARTS.get(found[3], found[3])
                norms.append(Norm(method.label, step, layer, module, part, trained[key].numel(), math.sqrt(square)))

        measure(0)
        losses[method.label] = []
        for batch in training[:steps]:
            model.zero_grad()
            loss = answer_losses(model, batch)[0].mean()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            losses[method.label].append(loss.item())
        measure(steps)
    return {
        "model": f"{model_source.name}, from {model_source.origin}",
        "data": f"{data_source.name}, from {data_source.origin}",
        "steps": steps,
        "batch_size": batch_size,
        "probes": probes,
        "hidden": hidden,
        "losses": losses,
        "norms": [asdict(norm) for norm in norms],
    }


def _by_layer(norms: Sequence[Norm]) -> list[tuple[int, float]]:
    """Over the linear layers of each decoder layer."""
    squares: dict[int, float] = {}
    for norm in norms:
        squares[norm.layer] = squares.get(norm.layer, 0.0) + norm.norm**2
    return [(layer, math.sqrt(square)) for layer, square in sorted(squares.items())]


def flow_table(data: dict[str, Any]) -> str:
    """For every method and part: the median over decoder layers, the largest over the smallest, first and last."""
    norms = [Norm(**norm) for norm in data["norms"]]
    lines = [
        "| method | part | parameters | step | first layer | median | last layer | largest / smallest |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for method, part, step in dict.fromkeys((norm.method, norm.part, norm.step) for norm in norms):
        chosen = [norm for norm in norms if (norm.method, norm.part, norm.step) == (method, part, step)]
        line = [value for _, value in _by_layer(chosen)]
        ratio = f"{max(line) / min(line):.0f}" if min(line) > 0 else "–"
        values = " | ".join(f"{value:.1e}" if value else "0" for value in (line[0], float(np.median(line)), line[-1]))
        count = sum(norm.parameters for norm in chosen)
        lines.append(f"| {method} | {part} | {count:,} | {step} | {values} | {ratio} |")
    return "\n".join(lines)


def draw_flow(data: dict[str, Any], path: Path) -> None:
    """One panel a method: the norm in each decoder layer, dotted before the first step and solid after the last."""
    plt = _pyplot()
    norms = [Norm(**norm) for norm in data["norms"]]
    methods = list(dict.fromkeys(norm.method for norm in norms))
    colours = {"angles": "#c1121f", "V": "#1f77b4", "c": "#7f7f7f", "A": "#c1121f", "B": "#1f77b4"}
    figure, panels = plt.subplots(
        1, len(methods), figsize=(4.4 * len(methods), 4.8), sharex=True, sharey=True, squeeze=False
    )
    for panel, method in zip(panels[0], methods, strict=True):
        of_method = [norm for norm in norms if norm.method == method]
        for part in dict.fromkeys(norm.part for norm in of_method):
            for step in (0, data["steps"]):
                line = _by_layer([norm for norm in of_method if (norm.part, norm.step) == (part, step)])
                if all(value > 0 for _, value in line):
                    is_last = step == data["steps"]
                    style = {"marker": "o", "markersize": 3} if is_last else {"linestyle": ":"}
                    label = f"{part}, after {step} steps" if is_last else f"{part}, at the start"
                    panel.plot(*zip(*line, strict=True), color=colours.get(part, "#2ca02c"), label=label, **style)
        panel.set(title=method, xlabel="decoder layer", yscale="log")
        panel.minorticks_off()
        panel.grid(True, which="major", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    panels[0][0].set_ylabel("norm of the gradient")
    _save(figure, path)


# --------------------------------------------------------------------------------------------------------- command


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "qaa", "figure.constrained_layout.use": True})
    return plt


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Date": None})
    print(f"written to {path}")
    _pyplot().close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainability", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=("variance", "flow"), default=["variance", "flow"])
    parser.add_argument("--draw", action="store_true", help="draw the numbers that are there, measure nothing")
    parser.add_argument("--quick", action="store_true", help="few wires, draws and steps: does it run?")
    parser.add_argument("--draws", type=int, help="of angles, inputs and weights at each point (default: 128)")
    parser.add_argument("--steps", type=int, help="training steps before the second look (default: 8)")
    parser.add_argument("--batch-size", type=int, default=2, help="examples (default: %(default)s)")
    parser.add_argument("--probes", type=int, help="batches that the norms are measured on (default: 4)")
    parser.add_argument("--model", help="hub name or path of a causal language model (default: the comparison's)")
    parser.add_argument("--data", help="hub name or path of instruction data (default: the comparison's)")
    parser.add_argument("--folder", type=Path, default=Path("reports/trainability"), help="default: %(default)s")
    parser.add_argument("--figures", type=Path, help="folder of the figures (default: docs/figures)")
    options = parser.parse_args(arguments)
    quick = options.quick
    options.draws = options.draws or (6 if quick else 128)
    options.steps = options.steps or (2 if quick else 8)
    options.probes = options.probes or (2 if quick else 4)
    figures = options.figures or (options.folder if quick else Path("docs/figures"))
    options.folder.mkdir(parents=True, exist_ok=True)
    if "variance" in options.parts:
        path = options.folder / "variance.json"
        if not options.draw:
            wires, layers = ((2, 3, 4), (1, 2)) if quick else (ALL_WIRES, ALL_LAYERS)
            found = [asdict(point) for point in variances(wires, layers, options.draws)]
            path.write_text(json.dumps({"draws": options.draws, "points": found}, indent=1) + "\n")
        measured = [Point(**point) for point in json.loads(path.read_text())["points"]]
        print(_kept(options.folder / "variance.md", variance_table(measured)))
        draw_variance(measured, figures / "gradient_variance.svg")
    if "flow" in options.parts:
        path = options.folder / "flow.json"
        if not options.draw:
            path.write_text(json.dumps(flow(options), indent=1) + "\n")
        data = json.loads(path.read_text())
        print(_kept(options.folder / "hidden.md", hidden_table(data)))
        print(_kept(options.folder / "flow.md", flow_table(data)))
        draw_flow(data, figures / "gradient_flow.svg")


def _kept(path: Path, text: str) -> str:
    path.write_text(text + "\n", encoding="utf-8")
    return text


if __name__ == "__main__":
    main()
