"""The language model: loading it, the loss of its answers, and skipping the frozen layers below the adapted ones.

When only the top layers are adapted, what enters the first of them never changes. It is computed once per example,
stored, and fed back as the input of a model whose lower layers pass their input through.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .config import CompareError, reason
from .data import Example, turn_end

IGNORED = -100
NOW = datetime(2025, 1, 1)  # to chat templates that ask for the date: token ids must not change at midnight


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer in ``path``, with a padding token; raises ``CompareError`` if it has no end-of-text token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers raises many kinds
        raise CompareError(
            f"expected {path} to hold a tokenizer that transformers can load, received {reason(error)}"
        ) from None
    if tokenizer.eos_token_id is None:
        raise CompareError(f"expected the tokenizer in {path} to have an end-of-text token, received one without")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = at_fixed_time(tokenizer.chat_template)
    return tokenizer


def at_fixed_time(template: str) -> str:
    """The chat template with ``strftime_now`` at ``NOW``; a template that does not ask for the time as it is.

    Example:
        >>> at_fixed_time("{{ messages[0]['content'] }}")
        "{{ messages[0]['content'] }}"
    """
    if "strftime_now" not in template:
        return template
    codes = [(f"%{letter}", NOW.strftime(f"%{letter}")) for letter in "aAbBdHIjmMpSyY"]
    codes += [(f"%-{code[1]}", text.lstrip("0") or "0") for code, text in codes]
    filters = "".join(f"|replace({json.dumps(code)}, {json.dumps(text)})" for code, text in codes)
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"


def skeleton(path: str | Path) -> Any:
    """The causal language model in ``path`` without its weights.

    Raises:
        CompareError: transformers cannot build it, or it sees what comes after a token.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    expected = f"expected {path} to hold a causal language model that transformers can build, received"
    try:
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:  # transformers raises many kinds
        raise CompareError(f"{expected} {reason(error)}") from None
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise CompareError(f"{expected} a model of type {config.model_type!r}, which sees what comes after a token")
    return model


def load_model(path: str | Path, device: str) -> Any:
    """The causal language model in ``path``, float32, frozen, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = model.to(device)
    model.config.use_cache = True
    return model.requires_grad_(False).eval()


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of decoder layers (``model.layers`` of Llama, ``transformer.h`` of GPT-2, ...)."""
    count = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise CompareError(f"expected a model with a list of {count} decoder layers, received {type(model).__name__}")


def first_adapted_layer(n_layers: int, top: int | None) -> int:
    """The index of the first of the ``top`` layers; 0 for all of them.

    Example:
        >>> first_adapted_layer(30, 6), first_adapted_layer(30, None)
        (24, 0)
    """
    if top is not None and top > n_layers:
        raise CompareError(f"expected at most {n_layers} layers (the model has no more), received layers={top}")
    return 0 if top is None else n_layers - top


@contextlib.contextmanager
def lower_layers_skipped(model: Any, first: int) -> Iterator[None]:
    """Layers below ``first`` return their input, so that ``inputs_embeds`` is what layer ``first`` sees."""
    skipped = decoder_layers(model)[:first]
    for layer in skipped:
        layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        yield
    finally:
        for layer in skipped:
            del layer.forward


def padded_batch(
    examples: Sequence[Example], pad: int, hidden: Sequence[np.ndarray] | None = None
) -> dict[str, Tensor]:
    """Right-padded tensors of a batch: ``attention_mask`` and ``labels`` (only answers count), shape (batch, tokens),
    with ``input_ids``, or with ``inputs_embeds`` of shape (batch, tokens, width) made of ``hidden``."""
    width = max(map(len, examples))
    ids = torch.full((len(examples), width), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        length, start = len(example), len(example.prompt_ids)
        ids[row, :length] = torch.tensor(example.prompt_ids + example.response_ids)
        mask[row, :length] = 1
        labels[row, start:length] = ids[row, start:length]
    if hidden is None:
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    embedded = torch.zeros(len(examples), width, hidden[0].shape[-1])
    for row, states in enumerate(hidden):
        embedded[row, : len(states)] = torch.from_numpy(np.array(states))
    return {"inputs_embeds": embedded, "attention_mask": mask, "labels": labels}


def answer_losses(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood of every answer token, shape (answer tokens,), and its row in the batch.

    The projection onto the vocabulary is computed for these tokens only; it costs more than a few layers.
    """
    labels = batch["labels"]
    counted = labels[:, 1:] != IGNORED  # position t predicts token t + 1
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, args: (args[0][:, -labels.shape[1] : -1][counted],))
    try:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    losses = nn.functional.cross_entropy(logits.float(), labels[:, 1:][counted], reduction="none")
    return losses, counted.nonzero()[:, 0]


@torch.no_grad()
def example_losses(model: Any, batches: Sequence[dict[str, Tensor]]) -> tuple[list[float], list[int]]:
    """Per example: the summed negative log-likelihood of its answer, and the answer's number of tokens."""
    training = model.training
    model.eval()
    sums: list[float] = []
    counts: list[int] = []
    for batch in batches:
        batch = {key: value.to(model.device) for key, value in batch.items()}
        losses, rows = answer_losses(model, batch)
        size = len(batch["labels"])
        sums += torch.zeros(size, dtype=torch.float64).index_add_(0, rows.cpu(), losses.double().cpu()).tolist()
        counts += torch.bincount(rows.cpu(), minlength=size).tolist()
    model.train(training)
    return sums, counts


def mean_loss(sums: Sequence[float], counts: Sequence[int]) -> float:
    """The mean over all answer tokens, in nats per token.

    Example:
        >>> mean_loss([6.0, 2.0], [3, 1])
        2.0
    """
    return sum(sums) / max(1, sum(counts))


class HiddenStates:
    """What enters layer ``first``, per example: a memory-mapped float32 array on disk, shape (all tokens, width)."""

    def __init__(self, path: Path, lengths: Sequence[int]) -> None:
        self.array: np.ndarray = np.load(path, mmap_mode="r")
        self.ends = np.cumsum(lengths)
        self.lengths = lengths

    def __getitem__(self, index: int) -> np.ndarray:
        states: np.ndarray = self.array[self.ends[index] - self.lengths[index] : self.ends[index]]
        return states

    @staticmethod
    @torch.no_grad()
    def write(path: Path, model: Any, examples: Sequence[Example], first: int, pad: int, batch_size: int = 16) -> None:
        """Runs the layers below ``first`` once over all examples, in batches of similar length."""
        order = sorted(range(len(examples)), key=lambda index: len(examples[index]))
        found: dict[int, Tensor] = {}
        caught: list[Tensor] = []
        hook = decoder_layers(model)[first].register_forward_pre_hook(
            lambda module, args, kwargs: caught.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        skipped = decoder_layers(model)[first:]
        for layer in skipped:
            layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
        try:
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                batch = padded_batch([examples[index] for index in chosen], pad)
                inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
                caught.clear()
                model(**inputs, use_cache=False, logits_to_keep=1)
                for index, states in zip(chosen, caught[0].float().cpu(), strict=True):
                    found[index] = states[: len(examples[index])].clone()
        finally:
            hook.remove()
            for layer in skipped:
                del layer.forward
        np.save(path, torch.cat([found[index] for index in range(len(examples))]).numpy())


@torch.no_grad()
def generate_answers(
    model: Any, tokenizer: Any, examples: Sequence[Example], max_new_tokens: int, batch_size: int
) -> list[str]:
    """Greedy answers to the examples' prompts, in their order, batched by prompt length with padding on the left."""
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].prompt_ids))
    answers = [""] * len(examples)
    pad, ends = tokenizer.pad_token_id, _ends(model, tokenizer)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(examples[index].prompt_ids) for index in chosen)
        ids = torch.full((len(chosen), width), pad)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            prompt = torch.tensor(examples[index].prompt_ids)
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        produced = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=sorted(ends),
            pad_token_id=pad,
        )
        for row, index in enumerate(chosen):
            said = itertools.takewhile(lambda token: token not in ends, produced[row, width:].tolist())
            answers[index] = tokenizer.decode(list(said), skip_special_tokens=True).strip()
    return answers


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: that of the chat template, end-of-text, and what the model's own settings name."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {
        turn_end(tokenizer),
        tokenizer.eos_token_id,
        *(own if isinstance(own, list) else [] if own is None else [own]),
    }
