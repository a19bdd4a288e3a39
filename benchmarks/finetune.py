"""One fine-tuning step of a 135 M-parameter language model, with adapters on q and v, and of these layers alone.

The architecture is SmolLM2-135M's; its weights are random, which costs the same. AdamW; ``task.batch`` sequences of 64
tokens. Memory is the most that the process has held, so every method needs a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.task import Rival, Task
from qaa.peft import QaaConfig

TOKENS = 64
TARGETS = ["q_proj", "v_proj"]


def lora(task: Task) -> Rival:
    return _training(task, LoraConfig(r=8, target_modules=TARGETS))


def lora_4(task: Task) -> Rival:
    return _training(task, LoraConfig(r=4, target_modules=TARGETS))


def qaa_paper(task: Task) -> Rival:
    return _training(task, QaaConfig.preset("paper", target_modules=TARGETS))


def qaa_paper_shared(task: Task) -> Rival:
    return _training(task, QaaConfig.preset("paper", target_modules=TARGETS, shared_circuit=TARGETS))


def qaa_default(task: Task) -> Rival:
    return _training(task, QaaConfig.preset("default", target_modules=TARGETS))


def qaa_compact(task: Task) -> Rival:
    return _training(task, QaaConfig.preset("compact", target_modules=TARGETS))


class _Layers(nn.Module):
    """q and v of 30 layers one after the other: what adapters cost stands out."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.ModuleList([nn.Linear(576, 576, bias=False) for _ in range(30)])
        self.v_proj = nn.ModuleList([nn.Linear(576, 192, bias=False) for _ in range(30)])

    def forward(self, x: Tensor) -> Tensor:
        for q, v in zip(self.q_proj, self.v_proj, strict=True):
            x = x + 0.1 * q(x) + 0.1 * v(x).repeat(1, 1, 3)
        return x


def layers_lora(task: Task) -> Rival:
    return _layers(task, LoraConfig(r=8, target_modules=_LAYERS))


def layers_lora_4(task: Task) -> Rival:
    return _layers(task, LoraConfig(r=4, target_modules=_LAYERS))


def layers_default(task: Task) -> Rival:
    return _layers(task, QaaConfig.preset("default", target_modules=_LAYERS))


def layers_compact(task: Task) -> Rival:
    return _layers(task, QaaConfig.preset("compact", target_modules=_LAYERS))


_LAYERS = r"[qv]_proj\.\d+"


def _layers(task: Task, adapter: Any) -> Rival:
    torch.manual_seed(0)
    model = get_peft_model(_Layers(), adapter).train()
    x = torch.randn(task.batch, TOKENS, 576)

    def loss() -> Tensor:
        result: Tensor = model(x.clone().requires_grad_()).square().mean()  # the layers below want a gradient
        return result

    return _steps(model, loss, f"60 layers, {task.batch} x {TOKENS} tokens")


def _training(task: Task, adapter: Any) -> Rival:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    model = get_peft_model(LlamaForCausalLM(config), adapter).train()
    tokens = torch.randint(config.vocab_size, (task.batch, TOKENS))
    return _steps(model, lambda: model(input_ids=tokens, labels=tokens).loss, f"{task.batch} x {TOKENS} tokens")


def _steps(model: nn.Module, loss_of: Callable[[], Tensor], note: str) -> Rival:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)

    def step() -> tuple[Tensor, None, None]:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss, None, None

    return Rival(None, step, 1, f"{note}, {sum(p.numel() for p in trainable):,} trainable parameters")
