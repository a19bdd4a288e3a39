"""Trained adapters on a noisy circuit: the test loss against the probability of an error after every gate.

Nothing is trained here. Depolarizing noise stands after every gate of an adapter's circuit, on each of the gate's
wires (:class:`qaa.noise.NoiseModel`); features are means over a few trajectories. The embedding has none.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import CompareError
from .training import Job, _quiet, _skipping, _start


def has_noise(row: Any) -> bool:
    """Whether the row's features are observables: QAA with a quadratic readout; amplitudes of a state are none."""
    from .methods import peft_config

    return row.method.is_qaa and not str(peft_config(row.method.name, row.options).readout).startswith("state")


def evaluate_noise(
    job: Job, name: str, seed: int, folder: str, rates: Sequence[float], trajectories: int
) -> dict[str, Any]:
    """The test loss of the row's stored adapter at each error probability, features being means over trajectories.

    Raises:
        CompareError: the folder holds no adapter.
    """
    import torch
    from peft import load_peft_weights, set_peft_model_state_dict

    from qaa.noise import NoiseModel
    from qaa.peft import set_noise

    from .models import mean_loss

    _quiet()
    began = time.perf_counter()
    if not (Path(folder) / "adapter_model.safetensors").is_file():
        raise CompareError(f"expected the trained adapter of {name} in {folder}, received a folder without")
    _, model, inputs, _, base = _start(job, name, seed)
    set_peft_model_state_dict(model, load_peft_weights(folder, device=job.device))
    model.eval()
    losses = []
    with _skipping(job, inputs, base), torch.no_grad():
        for rate in rates:
            torch.manual_seed(seed)
            set_noise(model, NoiseModel(depolarizing=rate), trajectories)
            losses.append(mean_loss(*inputs.losses(model, inputs.test)))
    return {"test_losses": losses, "seconds": time.perf_counter() - began}
