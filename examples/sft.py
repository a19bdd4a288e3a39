"""Supervised fine-tuning with TRL: ``python examples/sft.py [FOLDER]``, a minute on a CPU, without a network.

The model is tiny and random and the tokenizer knows sixteen words, so that the example runs anywhere; with a model's
name in place of ``tiny_model()`` and its own tokenizer, nothing else changes.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from qaa.peft import QaaConfig

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WORDS = ["<pad>", "<s>", "</s>", "?", ":", "what", "comes", "after", *NUMBERS]


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(WORDS), pad_token_id=0, bos_token_id=1, eos_token_id=2))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "?"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def main(folder: Path) -> list[float]:
    """Trains, saves the adapter, loads it again; returns the losses."""
    pairs = list(pairwise(NUMBERS))
    data = Dataset.from_dict(
        {"prompt": [f"what comes after {a} ? :" for a, _ in pairs], "completion": [f" {b}" for _, b in pairs]}
    )
    trainer = SFTTrainer(
        model=tiny_model(),
        processing_class=tiny_tokenizer(),
        train_dataset=data,
        # the statistics of the channels are measured on the first batch, because the trainer owns the loop
        peft_config=QaaConfig.preset("default", target_modules="all-linear", calibration="first_batch"),
        args=SFTConfig(
            output_dir=str(folder),
            learning_rate=2e-2,
            per_device_train_batch_size=8,
            num_train_epochs=30,
            logging_steps=5,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
    )
    trainer.train()
    trainer.save_model(str(folder))
    PeftModel.from_pretrained(tiny_model(), folder)
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


if __name__ == "__main__":
    losses = main(Path(sys.argv[1] if len(sys.argv) > 1 else "reports/sft"))
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
