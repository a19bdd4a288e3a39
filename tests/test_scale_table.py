"""The table of docs/parameters.md is what its generator counts, and the generator counts what formulas on paper say."""

from __future__ import annotations

import pytest
from peft import LoraConfig
from transformers import LlamaConfig

import qaa
import scale_table
from qaa.peft import QaaConfig
from qaa.program import program

TOTALS = {  # published numbers of parameters
    "GPT-2": 124_439_808,
    "GPT-Neo-1.3B": 1_315_575_808,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
}
TARGETS = {  # inputs and outputs of what is adapted in each of so many blocks
    "GPT-2": (12, [(768, 2304)]),
    "GPT-Neo-1.3B": (24, [(2048, 2048)] * 2),
    "Llama-3.2-3B": (28, [(3072, 3072), (3072, 1024)]),
    "Llama-3.1-8B": (32, [(4096, 4096), (4096, 1024)]),
    "Llama-3.1-70B": (80, [(8192, 8192), (8192, 1024)]),
}


@pytest.fixture(scope="module")
def table() -> list[scale_table.Row]:
    return list(scale_table.rows())


def test_the_document_holds_the_generators_table(table, monkeypatch):
    monkeypatch.setattr(scale_table, "rows", lambda: table)
    document = scale_table.DOCUMENT.read_text(encoding="utf-8")
    expected = scale_table.replaced(document, scale_table.table())
    assert document == expected, "docs/parameters.md is out of date: run python tests/scale_table.py --write"


def test_models_have_their_published_sizes(table):
    assert {row.model: row.total for row in table} == TOTALS
    assert len(table) == len(TOTALS) * len(scale_table.methods())


@pytest.mark.parametrize("model", TOTALS)
def test_lora_and_the_papers_form_by_hand(table, model):
    blocks, shapes = TARGETS[model]
    lora, paper = (
        next(row for row in table if (row.model, row.method) == (model, method))
        for method in ("LoRA r = 8", "QAA `paper`")
    )
    assert lora.trainable == blocks * sum(8 * (d + out) for d, out in shapes)
    assert vars(lora.operations) == {
        "token_forward": 2 * lora.trainable,
        "token_both": 6 * lora.trainable,
        "step_forward": 0,
        "step_both": 0,
    }
    trainable = forward = both = 0
    for d, out in shapes:
        n = (d - 1).bit_length()
        trainable += out * n + out + 4 * n * 3
        plan = program(qaa.ansatz("ring", n, 4), "z", True).plan
        of_circuit, backward, reading = plan.operations(d)  # ops read the strings again
        forward += 2 * round(of_circuit) + 2 * n * out
        both += 2 * round(of_circuit) + 2 * round(backward + reading) + 6 * n * out
    assert (paper.trainable, paper.frozen, paper.bytes) == (blocks * trainable, 0, 16 * blocks * trainable)
    assert (paper.operations.token_forward, paper.operations.token_both) == (blocks * forward, blocks * both)
    assert paper.operations.step_both == 0


def test_a_linear_form_simulates_once_a_step():
    shape = LlamaConfig(
        hidden_size=48, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    config = QaaConfig(readout="state[:5]", scale_channels=True, n_layers=2, target_modules=["q_proj"])
    row = scale_table.count("small", shape, "linear", config)
    lora = scale_table.count("small", shape, "LoRA", LoraConfig(r=5, target_modules=["q_proj"]))
    assert (row.trainable, row.frozen) == (48 * 5 + 2 * 6 * 3, 48)
    assert row.bytes == 16 * row.trainable + 4 * 48
    assert row.operations.token_forward == lora.operations.token_forward
    assert row.operations.token_both == lora.operations.token_both
    plan = program(qaa.ops._transposed(qaa.ansatz("ring", 6, 2)), "state[:48]", False).plan
    forward, backward, _ = plan.operations(5)
    assert row.operations.step_forward == 2 * 5 * forward
    assert row.operations.step_both == 2 * 5 * (forward + backward)
