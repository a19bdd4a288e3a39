"""Adapters on quantised weights; ``PYTHONPATH=build/torchao python tests/peft_quantized.py FOLDER``.

The same adapter on the same weights, dequantised, has to give the same losses over four steps. What is tested depends
on what is installed. ``--fetch`` puts torchao into a folder of its own: where transformers finds it, every trainer
imports it, and its libraries for GPUs complain on a machine without one.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qaa.peft import QaaConfig, SoraConfig, to_dense

PACKAGES = Path(__file__).parent.parent / "build" / "torchao"
IDS = torch.arange(3 * 8).reshape(3, 8) * 7 % 60
ADAPTERS: dict[str, Callable[[], Any]] = {
    "paper": lambda: QaaConfig.preset("paper", init_weights=False),
    "default": lambda: QaaConfig.preset("default", init_weights=False),
    "SoRA": lambda: SoraConfig(init_weights=False),
}


def _torchao_int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _bitsandbytes(**options: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


#: name -> (package, configuration, what the losses may differ by: 8 bits of bitsandbytes quantise activations as well)
QUANTISATIONS: dict[str, tuple[str, Callable[[], Any], float]] = {
    "torchao int8": ("torchao", _torchao_int8, 1e-4),
    "bitsandbytes nf4": (
        "bitsandbytes", lambda: _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 1e-4,
    ),
    "bitsandbytes int8": ("bitsandbytes", lambda: _bitsandbytes(load_in_8bit=True), 2e-2),
}  # fmt: skip


def fetch() -> None:
    """Installs torchao into a folder of its own."""
    if not PACKAGES.is_dir():
        options = ("--quiet", "--no-deps", "--target", str(PACKAGES))
        subprocess.run([sys.executable, "-m", "pip", "install", *options, "torchao==0.18.0"], check=True)


def adapted(base: nn.Module, name: str) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base, ADAPTERS[name]())


def dequantised(folder: Path, quantised: nn.Module) -> nn.Module:
    """The float model with the weights that the quantised one computes with."""
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, module in quantised.named_modules():
            if isinstance(module, nn.Linear):
                model.get_submodule(name).weight.copy_(dequantize_module_weight(module))
    return model


def train(model: nn.Module, steps: int = 4) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, lr=1e-2), []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
        optimizer.step()
        losses.append(loss.item())
    return losses


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def check(quantisation: str, name: str, folder: Path) -> None:
    _, config, tolerance = QUANTISATIONS[quantisation]

    def base() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config(), device_map="cpu")

    quantised = base()
    weight = type(quantised.model.layers[0].self_attn.q_proj.weight)
    assert weight is not nn.Parameter
    plain = adapted(dequantised(folder, quantised), name)
    model = adapted(quantised, name)
    expected, received = train(plain), train(model)
    assert expected[-1] < expected[0] - 0.05, expected
    torch.testing.assert_close(received, expected, rtol=tolerance, atol=0)

    ours = logits(model)
    torch.testing.assert_close(logits(to_dense(model)), ours, rtol=1e-4, atol=1e-4)
    model.save_pretrained(folder / name)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), folder / name)), ours)
    try:
        merged = model.merge_and_unload()
    except ValueError as error:
        assert name == "paper" and "quadratic" in str(error), error
        return
    assert name != "paper" and type(merged.model.layers[0].self_attn.q_proj.weight) is weight
    # quantised once more: not further from the adapted model than quantising took the base from the float model
    cost = (logits(base()) - logits(LlamaForCausalLM.from_pretrained(folder))).abs().max()
    assert (logits(merged) - ours).abs().max() < 3 * cost


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=60, initializer_range=0.1)).save_pretrained(folder)
    for quantisation, (package, _, _) in QUANTISATIONS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{quantisation}: {package} is not installed")
            continue
        for name in ADAPTERS:
            check(quantisation, name, folder)
        print(f"{quantisation}: {len(ADAPTERS)} adapters as on dequantised weights")


if __name__ == "__main__":
    if sys.argv[1:] == ["--fetch"]:
        fetch()
    else:
        main(Path(sys.argv[1]))
