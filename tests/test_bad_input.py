"""Every bad argument gets one sentence: what was expected, what was received. The table is in bad_input.txt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch

import qaa.nn
import qaa.peft
from qaa import ops
from qaa.compare.config import settings

LINES = [line for line in Path(__file__).with_name("bad_input.txt").read_text("utf-8").splitlines() if line[:1] != "#"]
TABLE = list(zip(LINES[::2], LINES[1::2], strict=True))


def small_model() -> Any:
    return torch.nn.Sequential(torch.nn.Linear(16, 4), torch.nn.ReLU())


def names() -> dict[str, Any]:
    """What the table's expressions refer to: two wires, three rows."""
    circuit = qaa.ansatz("ring", 2)
    return {
        "qaa": qaa, "np": np, "torch": torch, "C": circuit, "T": np.zeros((1, 2, 3)), "X": np.ones((3, 4)),
        "G": np.ones((3, 2)), "TT": torch.zeros(1, 2, 3), "TX": torch.ones(3, 4), "TG": torch.ones(3, 2),
        "F": qaa.arrays.forward, "B": qaa.arrays.backward, "S": qaa.shots.forward, "SB": qaa.shots.backward,
        "Q": ops.quantum_features, "A": ops.amplitude_rows, "M": ops.mixed_rows, "P": ops.project,
        "O": torch.ops.qaa, "N": qaa.nn,
        "PROGRAM": str(ops.program(circuit, "z", True)), "STATE": str(ops.program(circuit, "state", False)),
        "QC": qaa.peft.QaaConfig, "SC": qaa.peft.SoraConfig, "GP": peft.get_peft_model, "MODEL": small_model,
        "CS": settings,
    }  # fmt: skip


def test_the_table_is_long_and_without_repetitions() -> None:
    assert len(TABLE) >= 350 and len({expression for expression, _ in TABLE}) == len(TABLE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("expression", "error"), TABLE, ids=[expression[:60] for expression, _ in TABLE])
def test_a_bad_argument_gets_its_sentence(expression: str, error: str) -> None:
    known = names()
    kind, message = error.strip().split(": ", 1)
    with pytest.raises(Exception) as caught:
        eval(expression, known)
    assert type(caught.value).__name__ == kind
    text = str(caught.value)
    assert text == message or (message.endswith(" ...") and text.startswith(message[:-4]))
    assert re.search("expected .+, received .+", text) and "\n" not in text
    # nothing was written to what was passed
    fresh = names()
    assert all(np.array_equal(known[name], fresh[name]) for name in ("T", "X", "G"))
    assert all(torch.equal(known[name].detach(), fresh[name]) for name in ("TT", "TG", "TX"))


def test_what_does_not_fit_into_memory_is_a_memory_error() -> None:
    """Rows that are one number in memory ask for features of 2^46 and more bytes."""
    circuit, theta = qaa.ansatz("ring", 2), np.zeros((1, 2, 3))
    for rows in (2**44, 2**60):
        with pytest.raises(MemoryError):
            qaa.arrays.forward(circuit, theta, np.broadcast_to(np.float16(1), (rows, 2)))
    many = np.broadcast_to(np.float32(1), (2**44, 2))
    with pytest.raises((MemoryError, ValueError)):
        qaa.arrays.backward(circuit, theta, many, np.broadcast_to(np.float32(1), many.shape))


def test_more_numbers_than_31_bits_count() -> None:
    """32,800 rows of 65,536 amplitudes are 2^31 and more; one row in memory, with stride 0, stands for all."""
    circuit = qaa.Circuit(16, (qaa.Gate("RY", 15, 0),), (1,))
    row = np.zeros((1, 2**16), np.float32)
    row[0, :2] = 1
    rows = 2**15 + 32
    features = qaa.arrays.forward(circuit, [0.5], np.broadcast_to(row, (rows, 2**16)), ["I" * 15 + "Z"])
    assert features.shape == (rows, 1) and np.all(features == features[0])
    np.testing.assert_allclose(features[0], -np.sin(0.5), atol=1e-6)
