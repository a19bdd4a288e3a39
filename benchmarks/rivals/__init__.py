"""The table of rivals: in which environment each one runs, and which function builds it from a task."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from benchmarks.task import Rival, Task


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Args:
        kind: "qaa"; "by hand" or "library", which simulate the same circuit; "yardstick", which simulates nothing.
        environment: a name in :mod:`benchmarks.environments`; "own" is the environment of the driver.
        module, function: what builds the rival.
    """

    kind: str
    environment: str
    module: str
    function: str

    @property
    def simulates(self) -> bool:
        """Whether its features and gradients are held to the oracle."""
        return self.kind != "yardstick"

    def build(self, task: Task) -> Rival:
        module = importlib.import_module(f"benchmarks.{self.module}")
        rival: Any = getattr(module, self.function)(task)
        assert isinstance(rival, Rival)
        return rival


RIVALS = {
    "qaa": Entry("qaa", "own", "rivals.qaa_and_lora", "features"),
    "qaa, angles of each row": Entry("qaa", "own", "rivals.qaa_and_lora", "angles_of_each_row"),
    "qaa kernel": Entry("qaa", "own", "rivals.qaa_and_lora", "kernel"),
    "qaa kernel on one thread": Entry("qaa", "own", "rivals.qaa_and_lora", "kernel_on_one_thread"),
    "NumPy, Kronecker": Entry("by hand", "own", "rivals.numpy_by_hand", "kronecker"),
    "torch, gate by gate": Entry("by hand", "own", "rivals.torch_by_hand", "gate_by_gate"),
    "torch, Kronecker": Entry("by hand", "own", "rivals.torch_by_hand", "kronecker"),
    "torch, Kronecker, compiled": Entry("by hand", "own", "rivals.torch_by_hand", "kronecker_compiled"),
    "torch, dense unitary": Entry("by hand", "own", "rivals.torch_by_hand", "dense"),
    "torch, dense unitary, compiled": Entry("by hand", "own", "rivals.torch_by_hand", "dense_compiled"),
    "JAX, Kronecker": Entry("by hand", "jax", "rivals.jax_by_hand", "kronecker"),
    "TensorCircuit-NG": Entry("library", "jax", "rivals.tensorcircuit_ng", "build"),
    "PennyLane default.qubit": Entry("library", "own", "rivals.pennylane", "default_qubit"),
    "PennyLane lightning.qubit": Entry("library", "own", "rivals.pennylane", "lightning_qubit"),
    "DeepQuantum": Entry("library", "torch-libraries", "rivals.deepquantum", "build"),
    "pyqtorch": Entry("library", "torch-libraries", "rivals.pyqtorch", "build"),
    "qandle": Entry("library", "torch-libraries", "rivals.qandle", "build"),
    "TorchQuantum": Entry("library", "torchquantum", "rivals.torchquantum", "build"),
    "Qulacs": Entry("library", "qulacs", "rivals.qulacs", "build"),
    "Qiskit Aer": Entry("library", "qiskit-aer", "rivals.qiskit_aer", "build"),
    "qaa adapter": Entry("yardstick", "own", "rivals.qaa_and_lora", "adapter"),
    "multiply-adds alone": Entry("yardstick", "own", "rivals.qaa_and_lora", "multiply_adds_alone"),
    "an empty autograd function": Entry("yardstick", "own", "rivals.qaa_and_lora", "nothing"),
    "LoRA r = 8": Entry("yardstick", "own", "rivals.qaa_and_lora", "lora_in_peft"),
    "LoRA r = 8, addmm_": Entry("yardstick", "own", "rivals.qaa_and_lora", "lora"),
    "SQUARE, qaa": Entry("yardstick", "own", "square", "with_circuit"),
    "SQUARE, MLP": Entry("yardstick", "own", "square", "mlp"),
    "SQUARE, MLP behind 16 factors": Entry("yardstick", "own", "square", "scaled_mlp"),
    "fine-tuning, QAA paper": Entry("yardstick", "own", "finetune", "qaa_paper"),
    "fine-tuning, QAA paper, one circuit for q and v": Entry("yardstick", "own", "finetune", "qaa_paper_shared"),
    "fine-tuning, QAA default": Entry("yardstick", "own", "finetune", "qaa_default"),
    "fine-tuning, QAA compact": Entry("yardstick", "own", "finetune", "qaa_compact"),
    "fine-tuning, LoRA r = 8": Entry("yardstick", "own", "finetune", "lora"),
    "fine-tuning, LoRA r = 4": Entry("yardstick", "own", "finetune", "lora_4"),
    "sixty layers, LoRA r = 8": Entry("yardstick", "own", "finetune", "layers_lora"),
    "sixty layers, LoRA r = 4": Entry("yardstick", "own", "finetune", "layers_lora_4"),
    "sixty layers, QAA default": Entry("yardstick", "own", "finetune", "layers_default"),
    "sixty layers, QAA compact": Entry("yardstick", "own", "finetune", "layers_compact"),
}

SIMULATORS = tuple(name for name, entry in RIVALS.items() if entry.kind in ("by hand", "library"))
