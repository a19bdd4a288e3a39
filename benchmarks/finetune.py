"""One fine-tuning step of a 135 M-parameter language model, with adapters on q and v.

The architecture is SmolLM2-135M's; its weights are random, which costs the same. AdamW; ``task.batch`` sequences of 64
tokens. Memory is the most that the process has held, so every method needs a process of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.task import Rival, Task
from qaa.peft import QaaConfig

TOKENS = 64
TARGETS = ["q_proj", "v_proj"]


def lora(task: Task) -> Rival:
    return _training(task, LoraConfig(r=8, target_modules=TARGETS))


def qaa_paper(task: Task) -> Rival:
    return _training(task, QaaConfig.preset("paper", target_modules=TARGETS))


def qaa_default(task: Task) -> Rival:
    return _training(task, QaaConfig.preset("default", target_modules=TARGETS))


def qaa_compact(task: Task) -> Rival:
    return _training(task, QaaConfig.preset("compact", target_modules=TARGETS))


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
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    tokens = torch.randint(config.vocab_size, (task.batch, TOKENS))

    def step() -> tuple[Tensor, None, None]:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        return loss, None, None

    count = sum(p.numel() for p in trainable)
    return Rival(None, step, 1, f"{task.batch} x {TOKENS} tokens, {count:,} trainable parameters")
