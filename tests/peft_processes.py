"""Adapted models on several processes; ``torchrun --nproc-per-node 2 tests/peft_processes.py FOLDER`` (gloo, no GPU).

Every process first trains alone on the whole batch, then all train together, each on its part: losses and adapters
have to be the same. ``accelerate launch`` starts the same file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from accelerate import Accelerator
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from qaa.peft import QaaConfig, SoraConfig, calibrate

SHARED = ["q_proj", "v_proj"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "paper": lambda: QaaConfig.preset("paper"),
    "default": lambda: QaaConfig.preset("default"),
    "first_batch": lambda: QaaConfig.preset("default", center_channels=True, calibration="first_batch"),
    "SoRA": SoraConfig,
    "one circuit": lambda: QaaConfig.preset("paper", shared_circuit=SHARED),
    "first_batch of one circuit": lambda: QaaConfig.preset(
        "default", center_channels=True, calibration="first_batch", shared_circuit=SHARED
    ),
}
TOKENS = torch.arange(4 * 8).reshape(4, 8) * 13 % 60


def base_model() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, vocab_size=60,
            initializer_range=0.3,
        )
    )  # fmt: skip


def adapted(name: str, data: Tensor | None = None, seed: int = 1) -> PeftModel:
    """The model with a fresh adapter, which is calibrated, where that is explicit, on the data or on this part."""
    model = base_model()
    torch.manual_seed(seed)
    model = get_peft_model(model, CONFIGS[name]())
    if name == "default":
        calibrate(model, [{"input_ids": share() if data is None else data}])
    return model


def share() -> Tensor:
    """The part of the batch that belongs to this process."""
    return TOKENS.chunk(dist.get_world_size())[dist.get_rank()]


def train(model: nn.Module, batch: Tensor, steps: int = 4) -> list[float]:
    """The loss of each step, the mean over processes (whose parts are equally large)."""
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def shard(model: nn.Module) -> nn.Module:
    """FSDP2, a group of parameters for each decoder layer and one for the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a sharded model, on the first process; nothing on the others."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def shards_of_adapter(model: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in get_model_state_dict(model).items() if "qaa_" in name or "sora_" in name}


def check_close(what: str, ours: Any, expected: Any) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5, msg=lambda text: f"{what}: {text}")


def check_data_parallel(name: str) -> tuple[list[float], dict[str, Tensor]]:
    """DDP against one process; returns the losses and the adapter of the latter."""
    alone = adapted(name)
    expected = train(alone, TOKENS)
    assert expected[-1] < expected[0] - 0.01, (name, expected)
    state = get_peft_model_state_dict(alone)
    parallel = nn.parallel.DistributedDataParallel(adapted(name))
    check_close(f"{name} with DDP", train(parallel, share()), expected)
    check_close(f"{name} with DDP", get_peft_model_state_dict(parallel.module), state)
    return expected, state


def check_sharded(name: str, expected: list[float], state: dict[str, Tensor], folder: Path) -> None:
    """FSDP2 against one process; then the adapter as PEFT's folder and as shards, each written and read."""
    sharded = shard(adapted(name))
    check_close(f"{name} with FSDP2", train(sharded, share()), expected)

    whole = whole_state(sharded)
    if dist.get_rank() == 0:
        sharded.save_pretrained(folder / name, state_dict=whole)
        loaded = PeftModel.from_pretrained(base_model(), folder / name)
        check_close(f"{name}, saved whole", get_peft_model_state_dict(loaded), state)

    checkpoint.save(shards_of_adapter(sharded), checkpoint_id=folder / f"{name}-shards")
    fresh = shard(adapted(name))
    shards = shards_of_adapter(fresh)
    checkpoint.load(shards, checkpoint_id=folder / f"{name}-shards")
    set_model_state_dict(fresh, shards, options=StateDictOptions(strict=False))
    whole = whole_state(fresh)
    if dist.get_rank() == 0:
        check_close(f"{name}, saved by shards", get_peft_model_state_dict(fresh, state_dict=whole), state)


def check_first_batch_is_refused_with_shards(name: str) -> None:
    """What is measured in a forward would be lost with the gathered parameters that it is written to."""
    model = shard(adapted(name))
    try:
        train(model, share(), steps=2)
    except RuntimeError as error:
        assert "qaa.peft.calibrate" in str(error), error
    else:
        raise AssertionError("expected the second step to be refused")


def check_calibration_is_shared() -> None:
    """Each process calibrates on its part, and all get the statistics of the whole; different angles are refused."""
    ours, whole = get_peft_model_state_dict(adapted("default")), get_peft_model_state_dict(adapted("default", TOKENS))
    for name, tensor in ours.items():
        copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, tensor.contiguous())
        assert all(torch.equal(copy, tensor) for copy in copies), name
        check_close(name, tensor, whole[name])
    try:
        adapted("default", seed=dist.get_rank())
    except ValueError as error:
        assert "angles" in str(error), error
    else:
        raise AssertionError("expected different angles to be refused")


def check_accelerate(expected: list[float]) -> None:
    accelerator = Accelerator(cpu=True)
    model = adapted("paper")
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    data = torch.utils.data.DataLoader(TOKENS, batch_size=len(TOKENS) // dist.get_world_size())
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    losses = []
    for _ in range(len(expected)):
        for batch in data:
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(accelerator.reduce(loss.detach(), reduction="mean").item())
    check_close("accelerate", losses, expected)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    check_calibration_is_shared()
    for name in CONFIGS:
        expected, state = check_data_parallel(name)
        if "first_batch" in name:
            check_first_batch_is_refused_with_shards(name)
        else:
            check_sharded(name, expected, state, folder)
        if name == "paper":
            check_accelerate(expected)
    dist.barrier()
    if dist.get_rank() == 0:
        print(f"{len(CONFIGS)} adapters on {dist.get_world_size()} processes: as on one")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
