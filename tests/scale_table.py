"""What adapters cost on models from 124 M to 70 B parameters, counted on modules without memory.

``python tests/scale_table.py`` prints the table, ``--write`` puts it into ``docs/parameters.md``, and
``test_scale_table.py`` compares. Every model is built from its configuration on the meta device and adapted through
PEFT; parameters are those of the modules, operations are what ``FlopCounterMode`` sees of the adapted layers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoConfig, LlamaConfig, PretrainedConfig

from qaa.peft import QaaConfig
from qaa.peft.config import PRESETS

DOCUMENT = Path(__file__).parent.parent / "docs/parameters.md"
BEGIN, END = "<!-- scale: begin -->", "<!-- scale: end -->"


def _llama(width: int, inner: int, layers: int, heads: int, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128_256,
        tie_word_embeddings=tied,
    )


#: The published shapes.
MODELS: dict[str, PretrainedConfig] = {
    "GPT-2": GPT2Config(n_embd=768, n_layer=12, n_head=12, n_positions=1024, vocab_size=50_257),
    "GPT-Neo-1.3B": GPTNeoConfig(
        hidden_size=2048,
        num_layers=24,
        num_heads=16,
        attention_types=[[["global", "local"], 12]],
        max_position_embeddings=2048,
        vocab_size=50_257,
    ),
    "Llama-3.2-3B": _llama(3072, 8192, 28, 24, tied=True),
    "Llama-3.1-8B": _llama(4096, 14_336, 32, 32, tied=False),
    "Llama-3.1-70B": _llama(8192, 28_672, 80, 64, tied=False),
}


def methods() -> dict[str, Callable[[], PeftConfig]]:
    """Every preset of QAA, and LoRA of rank 8, each on PEFT's default layers for the architecture."""
    found: dict[str, Callable[[], PeftConfig]] = {"LoRA r = 8": lambda: LoraConfig(r=8)}
    for name in PRESETS:
        found[f"QAA `{name}`"] = lambda name=name: QaaConfig.preset(name)
    return found


@dataclass(frozen=True)
class Operations:
    """FLOP of all adapters of a model, a multiply-add being two: for every token, and once for every step."""

    token_forward: int = 0
    token_both: int = 0
    step_forward: int = 0
    step_both: int = 0

    def __add__(self, other: Operations) -> Operations:
        return Operations(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Row:
    """One method on one model."""

    model: str
    method: str
    total: int  # parameters of the model that is adapted
    targets: tuple[str, ...]
    layers: int
    trainable: int
    frozen: int  # numbers that the adapter holds and does not train
    frozen_bytes: int
    operations: Operations

    @property
    def bytes(self) -> int:
        """During training in float32: each trained number with its gradient and AdamW's two moments."""
        return 16 * self.trainable + self.frozen_bytes


def rows(models: dict[str, PretrainedConfig] = MODELS) -> Iterator[Row]:
    """The table, one model after the other."""
    for name, config in models.items():
        for method, make in methods().items():
            yield count(name, config, method, make())


def count(name: str, config: PretrainedConfig, method: str, adapter: PeftConfig) -> Row:
    """One method on one model."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    before = {id(tensor) for tensor in _tensors(base)}
    total = sum(p.numel() for p in base.parameters())
    if isinstance(adapter, LoraConfig):
        adapter.fan_in_fan_out = isinstance(config, GPT2Config)  # how its Conv1D stores weights
    model = get_peft_model(base, adapter)
    added = [tensor for tensor in _tensors(model) if id(tensor) not in before]
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    known: dict[tuple[int, int], Operations] = {}
    operations = Operations()
    for layer in layers.values():
        shape = (layer.in_features, layer.out_features)
        if shape not in known:
            known[shape] = operations_of(layer)
        operations += known[shape]
    return Row(
        name,
        method,
        total,
        tuple(sorted({name.rsplit(".", 1)[1] for name in layers})),
        len(layers),
        sum(t.numel() for t in added if t.requires_grad),
        sum(t.numel() for t in added if not t.requires_grad),
        sum(t.nbytes for t in added if not t.requires_grad),
        operations,
    )


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())


def operations_of(layer: Any) -> Operations:
    """What the adapter adds to its layer: counts for some rows and for twice as many tell rows from steps."""

    def counted(n_rows: int, backward: bool) -> int:
        def run(module: Any) -> int:
            x = torch.empty(n_rows, layer.in_features, device="meta", requires_grad=True)
            with FlopCounterMode(display=False) as counter:
                y = module(x)
                if backward:
                    y.sum().backward()
            return counter.get_total_flops()

        return run(layer) - run(layer.get_base_layer())

    n = 64
    tokens, steps = [], []
    for backward in (False, True):
        once, twice = counted(n, backward), counted(2 * n, backward)
        assert (twice - once) % n == 0
        tokens.append((twice - once) // n)
        steps.append(2 * once - twice)
    layer.zero_grad(set_to_none=True)
    return Operations(*tokens, *steps)


def _millions(flop: int) -> str:
    return "0" if flop == 0 else f"{flop / 1e6:,.3g}" if flop < 1e8 else f"{flop / 1e6:,.0f}"


def _two_digits(percent: float) -> str:
    """Two significant digits, without an exponent."""
    return f"{percent:.{max(0, 1 - math.floor(math.log10(percent)))}f}"


def table() -> str:
    """The table as Markdown."""
    titles = ["model", "method", "trainable", "share", "frozen", "MiB"]
    titles += ["token, forward", "token, both", "step, forward", "step, both"]
    lines = [f"| {' | '.join(titles)} |", "|---|---|" + "---:|" * (len(titles) - 2)]
    seen = ""
    for row in rows():
        model = f"**{row.model}**, {row.total:,} parameters; {row.layers} layers: {', '.join(row.targets)}"
        o = row.operations
        cells = [
            "" if row.model == seen else model,
            row.method,
            f"{row.trainable:,}",
            f"{_two_digits(100 * row.trainable / row.total)} %",
            f"{row.frozen:,}",
            f"{row.bytes / 2**20:.3g}",
            *map(_millions, (o.token_forward, o.token_both, o.step_forward, o.step_both)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        seen = row.model
    return "\n".join(lines)


def replaced(document: str, new: str) -> str:
    """The document with what is between its markers replaced."""
    head, _, rest = document.partition(BEGIN)
    _, _, tail = rest.partition(END)
    assert tail, f"expected {BEGIN} and {END} in the document"
    return f"{head}{BEGIN}\n{new}\n{END}{tail}"


if __name__ == "__main__":
    text = table()
    if "--write" in sys.argv[1:]:
        DOCUMENT.write_text(replaced(DOCUMENT.read_text(encoding="utf-8"), text), encoding="utf-8")
    print(text)
