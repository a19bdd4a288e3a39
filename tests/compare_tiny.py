"""A language model of a few thousand random weights, its tokenizer, a sentence encoder and examples, on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ANIMALS = ["cat", "dog", "cow", "hen", "pig", "fox", "owl", "bee", "ant", "bat"]
COLOURS = ["red", "blue", "green", "white", "black", "brown", "pink", "grey"]


def rows() -> list[dict[str, str]]:
    """Eighty instructions whose answers can be learned."""
    return [
        {"instruction": f"What colour is the {animal} {number}?", "input": "", "output": f"The {animal} is {colour}."}
        for number, colour in enumerate(COLOURS)
        for animal in ANIMALS
    ]


def tokenizer() -> Any:
    """A byte-level tokenizer of 320 entries with a chat template."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([row["instruction"] + row["output"] for row in rows()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>", chat_template=CHAT)


def write_model(folder: Path) -> Path:
    """A Llama of four layers and width 32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_encoder(folder: Path) -> Path:
    """A BERT of two layers."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_data(path: Path) -> Path:
    """The examples as JSON."""
    path.write_text(json.dumps(rows()), encoding="utf-8")
    return path
