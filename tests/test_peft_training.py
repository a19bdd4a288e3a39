"""Adapted models in the programs that people train and serve with: PEFT's own tests, processes, TRL, graphs, ONNX."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

import peft_quantized
import peft_suite
import qaa
from qaa.nn import DenseCircuit, QuantumLayer
from qaa.peft import QaaConfig, SoraConfig, to_dense

HERE = Path(__file__).parent
WHITENED = {"scale_channels": True, "center_channels": True, "standardize_features": True}
CONFIGS = {
    "paper": lambda **kwargs: QaaConfig.preset("paper", init_weights=False, **kwargs),
    "whitened": lambda **kwargs: QaaConfig.preset("paper", init_weights=False, **WHITENED, **kwargs),
    "default": lambda **kwargs: QaaConfig.preset("default", init_weights=False, **kwargs),
    "one circuit": lambda **kwargs: QaaConfig.preset(
        "paper",
        init_weights=False,
        **WHITENED,
        target_modules=["q_proj", "k_proj"],
        shared_circuit=["q_proj", "k_proj"],
        **kwargs,
    ),
    "SoRA": lambda **kwargs: SoraConfig(init_weights=False, **kwargs),
    "rows": lambda **kwargs: QaaConfig(readout="state[:10]", init_weights=False, **kwargs),
}


def run(*command: str, **variables: str) -> str:
    """The output of a program, which has to succeed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    result = subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


def decoder() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=60, initializer_range=0.3))


def adapted_layers(name: str) -> nn.Module:
    """Two layers, with statistics that are not neutral."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(13, 24), nn.Tanh(), nn.Linear(24, 5), nn.Linear(5, 4))
    model = get_peft_model(base, CONFIGS[name](target_modules=["0", "2"])).eval()
    for parameter_name, parameter in model.named_parameters():
        if "qaa_" in parameter_name and not parameter.requires_grad:
            parameter.data.uniform_(0.5, 1.5)
    return model


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    # multi_gpu is what accelerate calls its launcher of several processes; these use gloo and the CPU
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launch = (sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--main_process_port", "0")
    output = run(*launch, str(HERE / "peft_processes.py"), str(tmp_path))
    assert "6 adapters on 2 processes: as on one" in output


def test_pefts_own_tests_pass() -> None:
    """A part of them: the presets on two layers, and every method on a decoder. All: make peft-suite."""
    if not peft_suite.TESTS.is_dir():
        pytest.skip(f"the tests of PEFT are not in {peft_suite.TESTS}: python tests/peft_suite.py --fetch")
    files = ("test_custom_models.py", "test_decoder_models.py")
    selection = "(QAA and MLP and 4) or test_mixed_adapter_batches or (TestDecoderModels and random-Llama)"
    assert peft_suite.run(*files, "-k", selection, "--maxfail=20") == 0


def test_adapters_train_on_quantised_weights(tmp_path: Path) -> None:
    if not peft_quantized.PACKAGES.is_dir():
        pytest.skip(f"torchao is not in {peft_quantized.PACKAGES}: python tests/peft_quantized.py --fetch")
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(peft_quantized.PACKAGES)])
    skip = {"TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1"}
    output = run(sys.executable, str(HERE / "peft_quantized.py"), str(tmp_path), PYTHONPATH=path, **skip)
    assert "torchao int8: 3 adapters as on dequantised weights" in output


def test_trl_trains_an_adapter(tmp_path: Path) -> None:
    output = run(sys.executable, str(HERE.parent / "examples" / "sft.py"), str(tmp_path))
    first, last = (float(number) for number in output.rpartition("loss ")[2].split(" -> "))
    assert last < first - 0.3
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", ["default", "one circuit", "SoRA"])
def test_trl_compares_a_trained_adapter_with_itself(name: str, tmp_path: Path) -> None:
    """The reference of DPO is the adapter as it was loaded, so that the first loss is that of equals, ln 2."""
    model = get_peft_model(decoder(), CONFIGS[name]())
    for parameter_name, parameter in model.named_parameters():
        if "qaa_" in parameter_name and not parameter.requires_grad:
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(decoder(), tmp_path, is_trainable=True)
    words = [f"w{i}" for i in range(57)]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    args = {"per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
    trainer = DPOTrainer(
        model,
        args=DPOConfig(str(tmp_path), **args, report_to=[], use_cpu=True, bf16=False, save_strategy="no"),
        train_dataset=Dataset.from_list([{"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w5 w6"}] * 4),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special),
    )
    reference = {key: p.clone() for key, p in trainer.model.named_parameters() if ".ref." in key}
    trainer.train()
    first, second = (record["loss"] for record in trainer.state.log_history[:2])
    assert first == pytest.approx(math.log(2), abs=1e-5) and second < first - 1e-3
    after = dict(trainer.model.named_parameters())
    assert reference and all(torch.equal(after[key], p) for key, p in reference.items())


def test_a_whole_decoder_compiles_without_graph_breaks() -> None:
    model = get_peft_model(decoder(), CONFIGS["paper"]()).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)  # layers alone: test_peft_qaa.py
    for batch, length in ((3, 7), (2, 5)):
        ids = torch.arange(batch * length).reshape(batch, length)
        result, expected = (m(input_ids=ids, labels=ids) for m in (compiled, model))
        torch.testing.assert_close(result.logits, expected.logits, rtol=1e-4, atol=1e-5)
    result.loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["paper", "default", "rows"])
def test_an_adapted_layer_exports(name: str) -> None:
    """The ops of the library are in the graph, and the batch is free."""
    model = adapted_layers(name)
    free = {0: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(model, (torch.randn(3, 13),), dynamic_shapes=((free,),))
    ops = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert "qaa.forward.default" in ops
    x = torch.randn(5, 13)
    torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("readout", ["z", "probs", "probs[:5]", ["ZIII", "XYZI", "YYXI", "IXIX", "IIYI", "YYYZ"]])
def test_a_dense_circuit_has_the_features_of_its_circuit(readout: str | list[str]) -> None:
    torch.manual_seed(0)
    layer = QuantumLayer(qaa.ansatz("strongly_entangling", n_wires=4, n_layers=2), readout).double()
    x = torch.randn(6, 13, dtype=torch.float64)
    x[2] = 0
    dense = DenseCircuit(layer.circuit, layer.theta, readout, width=13)
    torch.testing.assert_close(dense(x), layer(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["paper", "whitened", "default"])
def test_onnx_computes_what_the_model_computes(name: str, tmp_path: Path) -> None:
    model = adapted_layers(name)
    plain = to_dense(model)
    assert type(plain) is nn.Sequential and not any(p.requires_grad for p in plain.parameters())
    assert plain[0].base.weight.data_ptr() == model.base_model.model[0].base_layer.weight.data_ptr()
    free = {0: torch.export.Dim.DYNAMIC}
    path = tmp_path / "model.onnx"
    torch.onnx.export(plain, (torch.randn(3, 13),), path, dynamo=True, dynamic_shapes=(free,), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(7, 13)
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(result, model(x).detach().numpy(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)


def test_to_dense_keeps_what_is_active() -> None:
    model, x = adapted_layers("paper"), torch.randn(4, 13)
    model.add_adapter("other", CONFIGS["paper"](target_modules=["0"], modules_to_save=["3"]))
    for active in ("default", "other"):
        model.set_adapter(active)
        torch.testing.assert_close(to_dense(model)(x), model(x), rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(to_dense(model)(x), model(x))
    half = adapted_layers("whitened").bfloat16()
    torch.testing.assert_close(to_dense(half)(x.bfloat16()), half(x.bfloat16()), rtol=0.05, atol=0.05)
    with pytest.raises(TypeError, match="expected a PeftModel with QAA or SoRA adapters, received a Linear"):
        to_dense(nn.Linear(2, 2))
