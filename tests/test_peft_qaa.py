"""QAA as a PEFT method: what PEFT and transformers do with a method of their own, they must do with this one."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import peft
import pytest
import torch
from packaging.version import Version
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

import oracle
import qaa.peft
from qaa.peft import QaaConfig, QaaLayer, SoraConfig, calibrate, parameter_groups, to_dense, to_lora

STATE = "state[:5]"
READOUTS = ["z", "probs[:6]", ["ZIIII", "XYZII", "IIIXX"], STATE]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def llama(**kwargs):
    """Two decoder layers of width 24: five wires, eight amplitudes of padding."""
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 60}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **heads, **kwargs})).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=24, n_layer=2, n_head=4, n_positions=32)).eval()


def tokens(batch=3, length=7):
    return torch.arange(batch * length).reshape(batch, length) * 13 % 60


def random_config(readout="z", **kwargs):
    """A configuration whose adapters change the output from the start."""
    return QaaConfig(**{"readout": readout, "init_weights": False, "n_layers": 2, **kwargs})


def adapted(config=None, model=None, **kwargs):
    model = llama() if model is None else model
    torch.manual_seed(1)
    return get_peft_model(model, random_config() if config is None else config, **kwargs).eval()


def logits(model, **kwargs):
    with torch.no_grad():
        return model(tokens(), **kwargs).logits


def losses_of_training(model, optimizer, steps):
    losses = []
    for _ in range(steps):
        loss = model.train()(tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, QaaLayer)]


# ------------------------------------------------------------------------------------------------ the layer


def test_importing_registers_a_real_peft_type():
    assert PeftType("QAA") is PeftType.QAA and PeftType["QAA"] is PeftType.QAA
    assert PeftType.QAA in list(PeftType) and "QAA" in PeftType.__members__
    assert PeftType.QAA.value == "QAA" == PeftType.QAA and isinstance(PeftType.QAA, PeftType)
    for twin in (copy.deepcopy(PeftType.QAA), pickle.loads(pickle.dumps(PeftType.QAA))):
        assert twin is PeftType.QAA
    before = len(PeftType)
    qaa.peft.register("qaa", qaa.peft.QaaConfig, qaa.peft.QaaModel)
    assert len(PeftType) == before


def test_a_method_of_that_name_in_peft_is_refused():
    with pytest.raises(
        ImportError, match=r"expected the PEFT method name LORA to be free, but peft .*LoraConfig; upgrade"
    ):
        qaa.peft.register("lora", QaaConfig, qaa.peft.QaaModel)


def test_without_the_import_peft_says_which_method_is_missing(tmp_path):
    adapted().save_pretrained(tmp_path)
    code = f"import peft; peft.PeftConfig.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "KeyError: 'QAA'" in run.stderr


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_layer_computes_its_equation(readout, has_bias):
    model = adapted(random_config(readout, adapter_bias=has_bias))
    layer = layers_of(model)[0]
    adapter, x = layer.qaa_adapter["default"], torch.randn(2, 3, 24)
    features = oracle.features(
        adapter.circuit,
        layer.qaa_theta["default"].detach().double().numpy(),
        x.reshape(6, 24).double().numpy(),
        adapter.readout,
        normalize=not adapter.is_linear,
    )
    features = torch.from_numpy(np.ascontiguousarray(features.real)).float().reshape(2, 3, -1)
    scaling = 1 if adapter.is_linear else math.sqrt(33)
    expected = features @ layer.qaa_up["default"].T
    expected = expected + layer.qaa_bias["default"] if has_bias else expected
    torch.testing.assert_close(layer(x), layer.base_layer(x) + scaling * expected, **CLOSE)


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_fresh_adapter_is_an_exact_no_op(make, readout):
    expected = logits(make())
    model = adapted(QaaConfig(readout=readout), make())
    assert torch.equal(logits(model), expected)
    assert layers_of(model)


def test_angles_start_as_configured():
    angles = {
        name: torch.cat([layer.qaa_theta["default"].flatten() for layer in layers_of(adapted(config))]).abs().max()
        for name in ("uniform", "small", "zero")
        for config in [QaaConfig(init_angles=name)]
    }
    assert 2.5 < angles["uniform"] <= math.pi and 0.05 < angles["small"] <= 0.1 and angles["zero"] == 0


@pytest.mark.parametrize("readout", READOUTS)
def test_gradients_reach_every_trainable_parameter_and_nothing_else(readout):
    model = adapted(random_config(readout)).train()
    model(tokens(), labels=tokens()).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".qaa_" in name) == parameter.requires_grad, name
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("readout", ["z", STATE])
def test_training_reduces_the_loss(readout):
    model = adapted(QaaConfig(readout=readout, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=2e-2, angle_lr=5e-2))
    start = [layer.qaa_theta["default"].detach().clone() for layer in layers_of(model)]
    losses = losses_of_training(model, optimizer, 40)
    assert losses[-1] < losses[0] - 0.25
    assert all(
        (layer.qaa_theta["default"] - old).abs().max() > 0.05
        for layer, old in zip(layers_of(model), start, strict=True)
    )


def test_a_frozen_circuit_keeps_its_angles_and_still_saves_them(tmp_path):
    model = adapted(random_config(STATE, train_circuit=False)).train()
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all("qaa_up" in name for name in trainable)
    model.add_adapter("second", random_config(STATE))
    model.set_adapter("second")
    model.set_adapter("default")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "qaa_theta" in n)
    model(tokens(), labels=tokens()).loss.backward()
    model.eval().save_pretrained(tmp_path, selected_adapters=["default"])
    assert any("qaa_theta" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fields", [{"train_circuit": False}, {"scale_channels": True, "standardize_features": True}])
def test_what_is_frozen_stays_frozen_when_peft_casts_adapters_of_half_precision(dtype, fields):
    def trained(model):
        return {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}

    expected = trained(adapted(random_config(STATE, **fields)))
    model = adapted(random_config(STATE, **fields), llama().to(dtype))
    assert trained(model) == expected and set(expected.values()) == {torch.float32}
    model.add_adapter("second", random_config(STATE, **fields))
    assert trained(model) == expected
    model.set_adapter("second")
    assert trained(model) == {name.replace("default", "second"): torch.float32 for name in expected}


# -------------------------------------------------------------------------------------- which layers are adapted


@pytest.mark.parametrize(("index", "expected"), [(0, {0}), (1, {1}), ([0], {0}), ([0, 1], {0, 1}), (None, {0, 1})])
def test_layers_to_transform(index, expected):
    model = adapted(random_config(target_modules=["v_proj"], layers_to_transform=index))
    names = [name for name, module in model.named_modules() if isinstance(module, QaaLayer)]
    assert {int(name.split(".")[4]) for name in names} == expected and len(names) == len(expected)


def test_selection_by_pattern_by_exclusion_and_by_default():
    def names(**kwargs):
        model = adapted(random_config(**kwargs))
        return {n.partition("layers.")[2] for n, module in model.named_modules() if isinstance(module, QaaLayer)}

    assert names(target_modules=r".*\.1\..*q_proj") == {"1.self_attn.q_proj"}
    assert names() == {f"{i}.self_attn.{k}_proj" for i in (0, 1) for k in "qv"}
    everything = names(target_modules="all-linear")
    assert len(everything) == 14
    assert names(target_modules="all-linear", exclude_modules=["q_proj"]) == {
        n for n in everything if "q_proj" not in n
    }


def test_modules_to_save_are_trained_and_travel(tmp_path):
    model = adapted(random_config(target_modules=["v_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)


def test_conv1d_of_gpt2_is_adapted():
    model = adapted(random_config(STATE), gpt2())
    layers = layers_of(model)
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(24, 72)] * 2
    expected = logits(model)
    assert (expected - logits(gpt2())).abs().max() > 0.01
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, **CLOSE)


# -------------------------------------------------------------------------------------------------- several adapters


def test_adapters_are_switched_disabled_and_deleted():
    base = logits(llama())
    model = adapted(random_config("z"))
    model.add_adapter("second", random_config(STATE, target_modules=["q_proj", "k_proj"]))
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    assert min((a - b).abs().max() for a, b in ((base, first), (base, second), (first, second))) > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert not any("second" in name for name, _ in model.named_parameters())
    assert not any("second" in layer.qaa_adapter for layer in layers_of(model))
    assert torch.equal(logits(model.unload()), base)


def test_active_adapters_add_up():
    model = adapted(random_config("z"))
    model.add_adapter("second", random_config(STATE))
    layer, x = layers_of(model)[0], torch.randn(4, 24)
    expected = layer.base_layer(x)
    for name in ("default", "second"):
        expected = expected + layer.qaa_adapter[name].delta(x, *layer._parameters_of(name))
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(layer(x), expected, **CLOSE)


def test_a_quadratic_and_a_linear_adapter_are_trained_together():
    model = adapted(QaaConfig(readout="z"))
    model.add_adapter("linear", QaaConfig(readout="state[:1/2]", r=2))
    model.base_model.set_adapter(["default", "linear"])
    trained_parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained_parameters.values(), lr=1e-2)
    losses = losses_of_training(model, optimizer, 4)
    assert losses == sorted(losses, reverse=True)
    start = adapted(QaaConfig(readout="z"))
    start.add_adapter("linear", QaaConfig(readout="state[:1/2]", r=2))
    before = dict(start.named_parameters())
    assert all(not torch.equal(p, before[name]) for name, p in trained_parameters.items() if "theta" not in name)
    assert {name.split(".")[-2] for name in trained_parameters} == {"default", "linear"}


def test_a_batch_may_mix_adapters():
    model = adapted(random_config("z"))
    model.add_adapter("second", random_config(STATE, target_modules=["q_proj", "k_proj"]))
    expected = {"default": logits(model)}
    model.set_adapter("second")
    expected["second"] = logits(model)
    with model.disable_adapter():
        expected["__base__"] = logits(model)
    names = ["second", "__base__", "default"]
    mixed = logits(model, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], expected[name][row], **CLOSE)
    assert torch.equal(logits(model), expected["second"])  # the hooks are gone
    generated = model.generate(tokens(), adapter_names=names, max_new_tokens=2, do_sample=False)
    assert generated.shape == (3, 9)


@pytest.mark.parametrize(
    ("names", "kwargs", "message"),
    [
        (["default"], {}, "Length of `adapter_names` should be the same as the number of inputs, but got 1 and 3"),
        (["default", "nobody", "default"], {}, r"Trying to infer with non-existing adapter\(s\): nobody"),
        (["default"] * 3, {"train": True}, "Cannot pass `adapter_names` when the model is in training mode"),
        (["default"] * 3, {"merge": True}, "Cannot pass `adapter_names` when there are merged adapters"),
    ],
)
def test_bad_mixed_batches_are_refused(names, kwargs, message):
    model = adapted(random_config(STATE))
    if kwargs.get("merge"):
        model.merge_adapter()
    model.train(kwargs.get("train", False))
    with pytest.raises(ValueError, match=message):
        model(tokens(), adapter_names=names)


def test_beams_of_a_mixed_batch_are_those_of_its_adapters():
    model = adapted(random_config(STATE)).eval()
    model.add_adapter("second", random_config("z"))
    how = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False}
    names = ["second", "__base__", "default"]
    mixed = model.generate(tokens(), adapter_names=names, **how)
    for row, name in enumerate(names):
        with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            if name != "__base__":
                model.set_adapter(name)
            assert torch.equal(mixed[row], model.generate(tokens(), **how)[row])
    assert not torch.equal(mixed[0, 7:], mixed[1, 7:])


def test_beams_of_an_encoder_decoder_reach_the_encoder_once():
    torch.manual_seed(25)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    config = T5Config(**sizes, decoder_start_token_id=0)
    model = get_peft_model(T5ForConditionalGeneration(config), random_config(STATE, target_modules=["q", "v"])).eval()
    ids, how = torch.arange(2, 14).reshape(3, 4), {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    mixed = model.generate(input_ids=ids, adapter_names=["default", "__base__", "default"], **how)
    expected = model.generate(input_ids=ids, **how)
    assert torch.equal(mixed[[0, 2]], expected[[0, 2]])
    with model.disable_adapter():
        plain = model.generate(input_ids=ids, **how)
    assert torch.equal(mixed[1], plain[1])
    assert not torch.equal(plain[1], expected[1])


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("target_modules", [["wo"], "all-linear"])
def test_to_dense_of_a_model_that_reads_a_layers_dtype(preset, target_modules):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    config = T5Config(**sizes, decoder_start_token_id=0)
    options = {"target_modules": target_modules, "init_weights": False}
    model = get_peft_model(T5ForConditionalGeneration(config), QaaConfig.preset(preset, **options)).eval()
    ids = torch.arange(2, 14).reshape(3, 4)
    given = {"input_ids": ids, "decoder_input_ids": ids}
    torch.testing.assert_close(to_dense(model)(**given).logits, model(**given).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"readout": STATE}, {"readout": "z", "r": 3}], ids=["state", "z of low rank"])
def test_statistics_stay_float32_beside_parameters_of_sixteen_bits(options):
    """What TRL does to adapters of quantised bases: it casts what is trained, and nothing else."""
    model = adapted(random_config(**options, scale_channels=True, standardize_features=True)).eval()
    calibrate(model, [{"input_ids": tokens()}])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    expected = logits(model)
    close = {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(logits(to_dense(model)), expected, **close)
    mixed = model(tokens(), adapter_names=["default", "__base__", "default"]).logits
    torch.testing.assert_close(mixed[[0, 2]], expected[[0, 2]], **close)


def test_offloaded_adapters_are_refused_unless_accelerate_loads_them_whole(tmp_path):
    model = adapted(random_config(STATE))
    expected = logits(model)
    offloaded = accelerate.disk_offload(copy.deepcopy(model), tmp_path / "parts", execution_device="cpu")
    with pytest.raises(RuntimeError, match="expected the QAA adapter 'default' to be loaded"):
        logits(offloaded)
    whole = accelerate.disk_offload(
        model, tmp_path / "whole", execution_device="cpu", preload_module_classes=["QaaLayer"]
    )
    torch.testing.assert_close(logits(whole), expected, **CLOSE)
    # a shared circuit lies in another layer, which has been sent away again
    shared = ["q_proj", "v_proj"]
    model = adapted(random_config(STATE, target_modules=shared, shared_circuit=shared))
    expected = logits(model)
    parts, whole = (
        accelerate.disk_offload(
            copy.deepcopy(model), tmp_path / name, execution_device="cpu", preload_module_classes=[name]
        )
        for name in ("QaaLayer", "LlamaAttention")
    )
    with pytest.raises(RuntimeError, match="or with the class of what is around the layers that share a circuit"):
        logits(parts)
    torch.testing.assert_close(logits(whole), expected, **CLOSE)


def test_merged_weights_are_not_measured():
    model = adapted(random_config(STATE, scale_channels=True))
    before = copy.deepcopy(model.state_dict())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"expected the QAA adapter 'default' to be measured unmerged"):
        calibrate(model, [{"input_ids": tokens()}])
    model.unmerge_adapter()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], **CLOSE)


@pytest.mark.parametrize("config", [QaaConfig, SoraConfig])
@pytest.mark.parametrize("name", ["out_proj", "dt_proj"])
def test_layers_that_a_fused_kernel_passes_by_are_refused(config, name):
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 32}
    with pytest.raises(ValueError, match=f"expected target_modules without '{name}' in a mamba model"):
        get_peft_model(MambaForCausalLM(MambaConfig(**sizes)), config(target_modules=[name]))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0])


@pytest.mark.parametrize("config", [QaaConfig, SoraConfig])
def test_the_output_of_torchs_attention_is_refused_and_no_part_of_all_linear(config):
    with pytest.raises(ValueError, match=r"without 'out_proj' of a torch\.nn\.MultiheadAttention.* exclude_modules"):
        get_peft_model(Attention(), config(target_modules=["out_proj", "head"]))
    with pytest.warns(UserWarning, match=r"'all-linear' leaves out out_proj of a torch\.nn\.MultiheadAttention"):
        model = get_peft_model(Attention(), config(target_modules="all-linear"))
    assert model.targeted_module_names == ["head"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(Attention(), config(target_modules="all-linear", exclude_modules=["out_proj"]))


def test_layers_of_other_architectures_whose_weights_are_read():
    class Named(nn.Module):
        def __init__(self, model_type, name):
            super().__init__()
            self.config = MambaConfig()
            self.config.model_type = model_type
            self.add_module(name, nn.Linear(16, 4))

    for model_type, name in (("jamba", "dt_proj"), ("bamba", "out_proj"), ("wavlm", "k_proj")):
        with pytest.raises(ValueError, match=f"expected target_modules without '{name}' in a {model_type} model"):
            get_peft_model(Named(model_type, name), QaaConfig(target_modules=[name]))


@pytest.mark.parametrize("config", [random_config("z"), random_config(STATE), SoraConfig(init_weights=False)])
def test_torchs_encoder_layers_call_their_adapters_in_evaluation(config):
    config = dataclasses.replace(config, target_modules=["linear1", "linear2"])
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 2, 16, batch_first=True)
    model = get_peft_model(nn.TransformerEncoder(layer, 2), config).eval()
    x, padding = torch.randn(2, 5, 24), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = model(x, src_key_padding_mask=padding)
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), expected, **CLOSE)
        with model.disable_adapter():
            assert (model(x, src_key_padding_mask=padding) - expected).abs().max() > 1e-2
    assert not model.unload().layers[0].linear1._forward_hooks


def test_a_layer_that_returns_no_tensor_is_refused_by_name():
    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    model = get_peft_model(nn.Sequential(Router(16, 4)), QaaConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match="received a Router, which returns a tuple: name it in exclude_modules"):
        model(torch.randn(2, 16))


# ---------------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("readout", READOUTS)
def test_save_and_load(tmp_path, readout):
    model = adapted(random_config(readout))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".qaa_" in key and "default" not in key for key in weights)
    assert sum(w.numel() for w in weights.values()) == model.get_nb_trainable_parameters()[0]
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded), expected)
    loaded.load_adapter(tmp_path, adapter_name="again")
    loaded.set_adapter("again")
    assert torch.equal(logits(loaded), expected)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is QaaConfig and config.readout == readout and config.inference_mode


@pytest.mark.parametrize("config", [random_config(STATE, scale_channels=True), SoraConfig(init_weights=False)])
def test_files_whose_names_lack_the_module_around_a_parameter_load(tmp_path, config):
    model = adapted(config)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    assert all(key.endswith(".value") for key in weights)
    save_file({key.removesuffix(".value"): tensor for key, tensor in weights.items()}, file)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


@pytest.mark.parametrize("config", [random_config("z"), SoraConfig()])
def test_the_name_of_an_adapter_stands_between_dots_and_fsdp_wraps_no_parameter(config):
    model = adapted(config)
    names = [name for name, _ in model.named_parameters() if "default" in name]
    assert names and all(".default." in name for name in names)
    wraps = fsdp_auto_wrap_policy(model)
    around = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    assert not any(wraps(module, recurse=False, nonwrapped_numel=1) for module in around)


def test_auto_peft_model_finds_the_base_model(tmp_path):
    llama().model.save_pretrained(tmp_path / "base")
    model = adapted(random_config(), AutoModel.from_pretrained(tmp_path / "base").eval())
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).last_hidden_state, model(tokens()).last_hidden_state)


def loaded_by_transformers(path: Path) -> tuple[Any, torch.Tensor]:
    """A model with a folder's adapter "one" by transformers' own methods, and the logits to expect of it."""
    base, folder = path / "base", path / "adapter"
    llama().save_pretrained(base)
    model = adapted(random_config(STATE, task_type="CAUSAL_LM"), AutoModelForCausalLM.from_pretrained(base).eval())
    model.save_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    plain.load_adapter(str(folder), adapter_name="one")
    return plain, logits(model)


def test_auto_classes_and_transformers_load_the_folder(tmp_path):
    plain, expected = loaded_by_transformers(tmp_path)
    for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        torch.testing.assert_close(logits(auto.from_pretrained(tmp_path / "adapter").eval()), expected, **CLOSE)
    torch.testing.assert_close(logits(plain), expected, **CLOSE)


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"this transformers switches adapters of PEFT {MIN_PEFT_VERSION} or newer only",
)
def test_transformers_switches_and_deletes_adapters(tmp_path):
    plain, expected = loaded_by_transformers(tmp_path)
    plain.disable_adapters()
    assert torch.equal(logits(plain), logits(llama()))
    plain.enable_adapters()
    torch.manual_seed(5)
    plain.add_adapter(random_config("z"), adapter_name="two")
    plain.set_adapter("two")
    assert (logits(plain) - expected).abs().max() > 1e-3
    plain.set_adapter("one")
    torch.testing.assert_close(logits(plain), expected, **CLOSE)
    plain.delete_adapter("one")
    assert not any(".one" in name for name, _ in plain.named_parameters())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_injection_into_a_plain_model(low_cpu_mem_usage):
    torch.manual_seed(1)
    model = inject_adapter_in_model(random_config(), llama()).eval()
    state = get_peft_model_state_dict(model)
    other = inject_adapter_in_model(random_config(), llama(), low_cpu_mem_usage=low_cpu_mem_usage).eval()
    if low_cpu_mem_usage:
        assert all(p.device.type == "meta" for layer in layers_of(other) for p in layer.qaa_theta.values())
    assert not set_peft_model_state_dict(other, state, low_cpu_mem_usage=low_cpu_mem_usage).unexpected_keys
    assert torch.equal(logits(other), logits(model))


def test_deepcopy_and_pickle():
    model = adapted(random_config(STATE))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))


def test_unknown_fields_of_a_later_version_are_ignored_with_a_warning(tmp_path):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['from_the_future'\] for class QaaConfig"):
        assert PeftConfig.from_pretrained(tmp_path) == PeftConfig.from_pretrained(tmp_path)


def test_an_adapter_of_another_width_is_refused_in_one_sentence(tmp_path):
    adapted().save_pretrained(tmp_path)
    wide = llama(hidden_size=48)
    with pytest.raises(RuntimeError) as error:
        PeftModel.from_pretrained(wide, tmp_path)
    message = str(error.value)
    assert "\n" not in message
    assert "expected QAA weights for a layer of 48 inputs and 48 outputs" in message
    assert "(2, 5, 3) instead of (2, 6, 3)" in message


# ------------------------------------------------------------------------------------------------ merge and export


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_the_state_readout_merges_and_unmerges(make, safe_merge):
    base, model = make(), adapted(random_config(STATE), make())
    expected = logits(model)
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(base), **CLOSE)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    torch.testing.assert_close(logits(merged), expected, **CLOSE)
    assert not layers_of(merged)


def test_disabling_a_merged_adapter_unmerges_it():
    model = adapted(random_config(STATE))
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(llama()), **CLOSE)


def test_a_bias_merges_where_the_base_has_one():
    model = adapted(random_config(STATE, adapter_bias=True), gpt2())
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, **CLOSE)
    model = adapted(random_config(STATE, adapter_bias=True))
    with pytest.raises(ValueError, match="cannot merge the QAA adapter 'default': it has a bias, and the Linear"):
        model.merge_adapter()
    assert not any(layer.merged for layer in layers_of(model))


def test_safe_merge_refuses_numbers_that_are_not_finite():
    model = adapted(random_config(STATE))
    layer = layers_of(model)[-1]
    before = layer.get_base_layer().weight.clone()
    with torch.no_grad():
        layer.qaa_up["default"][0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"
    ):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)


@pytest.mark.parametrize("readout", READOUTS[:3])
def test_quadratic_readouts_refuse_to_merge_and_to_export(tmp_path, readout):
    model = adapted(random_config(readout))
    expected = logits(model)
    message = "the QAA adapter 'default' is quadratic in its layer's input, so that it cannot be merged"
    for action in (
        model.merge_adapter,
        model.merge_and_unload,
        layers_of(model)[0].merge,
        lambda: to_lora(model, tmp_path),
    ):
        with pytest.raises(ValueError, match=message) as error:
            action()
        assert "\n" not in str(error.value)
    assert torch.equal(logits(model), expected)


def test_vectors_that_set_angles_train_save_and_share(tmp_path):
    config = random_config(reupload=True, init_weights=True, scale_channels=True, standardize_features=True)
    model = adapted(config)
    (layer, *_), before = layers_of(model), logits(model)
    theta = layer.qaa_theta["default"]
    assert theta.shape == (2, 2, 5, 3) and theta[0].any() and not theta[1].any()
    assert torch.equal(before, logits(llama()))
    qaa.peft.calibrate(model, [{"input_ids": tokens()}])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = losses_of_training(model, optimizer, 12)
    assert losses[-1] < losses[0] - 0.02 and theta[1].abs().max() > 0.05
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model)) and loaded.peft_config["default"].reupload
    exact = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits(model).float(), exact, rtol=0, atol=0.02)
    assert (exact - before).abs().max() > 0.1
    with pytest.raises(ValueError, match="is quadratic in its layer's input"):
        model.merge_adapter()
    with pytest.raises(
        ValueError, match="expected adapters of one circuit for all vectors, received 'default' with reupl"
    ):
        qaa.peft.to_dense(model)
    with pytest.raises(ValueError, match="expected Pauli strings or 'probs' with reupload, received 'state'"):
        random_config("state", reupload=True)
    with pytest.raises(
        ValueError, match="expected train_circuit with reupload, whose rates start at 0, received a froz"
    ):
        QaaConfig(reupload=True, train_circuit=False)
    with pytest.raises(ValueError, match="expected reupload to be True or False, received 'yes'"):
        random_config(reupload="yes")

    targets = {"target_modules": SHARED, "shared_circuit": SHARED}
    shared = adapted(random_config(reupload=True, **targets))
    q, k, v = layers_of(shared)[:3]
    assert "default" not in k.qaa_theta and "default" not in v.qaa_theta
    shared(tokens(), labels=tokens()).loss.backward()
    assert q.qaa_theta["default"].grad[1].abs().max() > 0


@pytest.mark.parametrize("fields", [
    {"readout": "z"}, {"readout": STATE}, {"readout": "state[:1/2]", "r": 3}, {"readout": "probs[:1/2]", "r": 3},
])  # fmt: skip
def test_an_adapter_in_blocks_is_saved_exported_and_merged(tmp_path, fields):
    """On layers of 24 and 40 inputs: two and three blocks of at most 16."""
    config = random_config(target_modules=["q_proj", "down_proj"], max_wires=4, scale_channels=True,
                           standardize_features=True, **fields)  # fmt: skip
    model = adapted(config)
    calibrate(model, [{"input_ids": tokens()}])
    assert [layer.qaa_adapter["default"].blocks for layer in layers_of(model)] == [2, 3] * 2
    expected = logits(model)
    assert (expected - logits(llama())).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "qaa")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "qaa").eval()
    assert loaded.peft_config["default"].max_wires == 4 and torch.equal(logits(loaded), expected)
    torch.testing.assert_close(logits(qaa.peft.to_dense(model)), expected, **CLOSE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), expected, **CLOSE)
    if fields["readout"][0] == "s":
        to_lora(model, tmp_path / "lora")
        plain = PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
        torch.testing.assert_close(logits(plain), expected, **CLOSE)
        torch.testing.assert_close(logits(model.merge_and_unload(safe_merge=True)), expected, **CLOSE)


def test_of_two_adapters_the_linear_one_merges():
    model = adapted(random_config("z"))
    model.add_adapter("linear", random_config(STATE))
    with pytest.raises(ValueError, match="the QAA adapter 'default' is quadratic"):
        model.merge_adapter()
    model.set_adapter("linear")
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, **CLOSE)


SELECTIONS = [
    {},
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj"], "layers_to_transform": 0},
    {"target_modules": r".*1.*(q|v)_proj"},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_export_as_a_lora_gives_the_same_outputs(tmp_path, selection):
    model = adapted(random_config(STATE, scaling=0.5, modules_to_save=["lm_head"], **selection))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    config = to_lora(model, tmp_path / "new" / "folder")
    assert config.r == config.lora_alpha == 5 and not config.lora_bias
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "new" / "folder").eval()
    assert type(loaded.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    if "lm_head" not in str(selection):
        assert len([m for m in loaded.modules() if hasattr(m, "lora_A")]) == len(layers_of(model))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_export_with_a_bias_of_one_adapter_of_several(tmp_path, make):
    model = adapted(random_config("z"), make())
    model.add_adapter("linear", random_config(STATE, adapter_bias=True))
    model.set_adapter("linear")
    expected = logits(model)
    config = to_lora(model, tmp_path, adapter_name="linear")
    assert config.lora_bias and config.fan_in_fan_out == (make is gpt2)
    with warnings.catch_warnings():
        # without a base bias, PEFT warns that such a LoRA cannot be merged
        warnings.simplefilter("error" if make is gpt2 else "ignore", peft.PeftWarning)
        loaded = PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)


def test_the_exported_folders_need_no_qaa(tmp_path):
    """In a process in which qaa cannot be imported: a plain adapter, a whitened one, and one with a constant."""
    torch.save(tokens(), tmp_path / "tokens.pt")
    llama().save_pretrained(tmp_path / "base")
    whitened = {"scale_channels": True, "standardize_features": True}
    for name, fields in {
        "plain": {},
        "whitened": whitened,
        "centred": {**whitened, "center_channels": True, "adapter_bias": True},
    }.items():
        model = adapted(random_config(STATE, **fields))
        if fields:
            calibrate(model, [{"input_ids": tokens()}])
        assert to_lora(model, tmp_path / name).lora_bias == (name == "centred")
        torch.save(logits(model), tmp_path / f"{name}.pt")
    code = f"""
import sys, pathlib, torch, transformers, peft
sys.modules["qaa"] = None
folder = pathlib.Path({str(tmp_path)!r})
for name in ("plain", "whitened", "centred"):
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    model = peft.PeftModel.from_pretrained(base, folder / name).eval()
    with torch.no_grad():
        logits = model(torch.load(folder / "tokens.pt")).logits
    torch.testing.assert_close(logits, torch.load(folder / f"{{name}}.pt"), rtol=1e-5, atol=1e-5)
print("three adapters")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == "three adapters", run.stderr


def test_export_refuses_what_it_cannot_write(tmp_path):
    with pytest.raises(TypeError, match="expected a PeftModel with QAA or SoRA adapters, received a LlamaForCausalLM"):
        to_lora(llama(), tmp_path)
    with pytest.raises(TypeError, match="expected a PeftModel with QAA or SoRA adapters, received a PeftModel"):
        to_lora(get_peft_model(llama(), LoraConfig()), tmp_path)
    with pytest.raises(ValueError, match="expected an adapter among default, received 'other'"):
        to_lora(adapted(random_config(STATE)), tmp_path, adapter_name="other")
    assert not list(tmp_path.iterdir())


def test_pefts_own_conversion_accepts_the_state_readout_alone():
    from peft import convert_to_lora

    model = adapted(random_config(STATE))
    _, weights = convert_to_lora(model, rank=5)
    assert len(weights) == 8
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(adapted(random_config("z")), rank=5)


# --------------------------------------------------------------------------------------- precision, checkpointing


@pytest.mark.parametrize("readout", ["z", STATE])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base(dtype, readout, autocast_adapter_dtype):
    expected = logits(adapted(random_config(readout)))
    model = adapted(random_config(readout), llama().to(dtype), autocast_adapter_dtype=autocast_adapter_dtype)
    dtypes = {p.dtype for name, p in model.named_parameters() if "qaa_" in name}
    assert dtypes == {torch.float32 if autocast_adapter_dtype else dtype}
    result = logits(model)
    assert result.dtype == dtype
    assert (result.float() - expected).abs().max() < 0.1 * expected.abs().max()
    model.train()(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("readout", ["z", STATE])
def test_autocast(readout):
    model = adapted(random_config(readout)).train()
    expected = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(tokens(), labels=tokens())
    assert (output.logits.float() - expected).abs().max() < 0.1 * expected.abs().max()
    output.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def autocast_step(config, x):
    """One layer in bfloat16 under autocast: its output, the gradients, and how many ops with a kernel that took."""
    base = nn.Linear(72, 40, bias=False, dtype=torch.bfloat16)
    torch.manual_seed(0)
    model = get_peft_model(nn.ModuleDict({"q": base}), config).train()
    layer = model.base_model.model["q"]
    base.weight.data.normal_()
    layer.requires_grad_(False)
    trained = [p for name, p in layer.named_parameters() if name.split(".")[0] in TRAINED]
    for tensor in trained:
        tensor.data.normal_(std=0.3)
        tensor.requires_grad_(True).grad = torch.zeros_like(tensor)
    for name in ("qaa_channels", "qaa_gain"):
        for tensor in getattr(layer, name, nn.ParameterDict()).values():
            tensor.data.uniform_(0.5, 1.5)
    leaf = x.bfloat16().requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(leaf)
        output.backward(torch.ones_like(output))
    return output, [leaf.grad, *(p.grad for p in trained)], sum(map(has_kernel, profile.events()))


TRAINED = ("lora_A", "lora_B", "qaa_theta", "qaa_up", "qaa_mix", "qaa_bias")
KERNELS = ("mm", "addmm", "addmm_", "mul", "mul_", "add", "add_", "copy_", "neg", "neg_", "sum", "eye", "cat", "zero_")


def has_kernel(event):
    """Whether it is an op with a kernel on a GPU, and no part of another one."""
    is_op = event.name.removeprefix("aten::") in KERNELS
    while is_op and (event := event.cpu_parent) is not None:
        is_op = event.name.removeprefix("aten::") not in KERNELS
    return is_op


@pytest.mark.parametrize("preset", ["compact", "default"])
def test_a_step_of_a_linear_preset_takes_no_more_ops_than_one_of_a_lora(preset):
    """Beside the five kernels of the circuit: on a GPU, small layers wait for launches."""
    x = torch.randn(8, 72, generator=torch.Generator().manual_seed(0))
    lora = autocast_step(LoraConfig(r=8, target_modules=["q"]), x)[2]
    assert autocast_step(QaaConfig.preset(preset, target_modules=["q"]), x)[2] <= lora


def ops_of_a_layer(config, n=6):
    """Ops with a kernel that a step under autocast takes for each of n adapted layers."""
    base = nn.Sequential(*(nn.ModuleDict({"q": nn.Linear(72, 72, bias=False, dtype=torch.bfloat16)}) for _ in range(n)))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = base

        def forward(self, x):
            for layer in self.layers:
                x = layer["q"](x)
            return x

    model = get_peft_model(Net(), config).train()
    for layer in layers_of(model):
        layer.qaa_pending.clear()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    x = torch.randn(8, 72).bfloat16().requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        output.backward(torch.ones_like(output))
    return sum(map(has_kernel, profile.events())) / n


@pytest.mark.parametrize("preset", ["compact", "default", "paper"])
def test_a_model_of_adapters_takes_fewer_ops_than_one_of_loras(preset):
    """Beside the circuit's kernels: five for all of the linear presets, five a layer for others."""
    adapter = ops_of_a_layer(QaaConfig.preset(preset, target_modules=["q"]))
    assert adapter <= ops_of_a_layer(LoraConfig(r=8, target_modules=["q"])) - 5


@pytest.mark.parametrize("preset", ["compact", "default", "paper", "tiny"])
def test_a_step_under_autocast_agrees_with_one_in_full_precision(preset, monkeypatch):
    x = torch.randn(8, 72, generator=torch.Generator().manual_seed(0))
    config = QaaConfig.preset(preset, target_modules=["q"])
    output, grads, _ = autocast_step(config, x)
    monkeypatch.setattr(torch, "autocast", lambda *_: contextlib.nullcontext())
    expected, expected_grads, _ = autocast_step(config, x)
    for ours, theirs in zip((output, *grads), (expected, *expected_grads), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.float() - theirs.float()).abs().max() < 0.03 * theirs.float().abs().max()


@pytest.mark.parametrize("readout", ["z", STATE])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_identical_gradients(readout, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(random_config(readout)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


LOW_RANK = {"readout": STATE, "r": 2, "scale_channels": True, "standardize_features": True, "adapter_bias": False}


def counted_calls(monkeypatch):
    """Groups of rows in every call of the core's forward function from now on."""
    groups = []
    monkeypatch.setattr(
        qaa._core, "forward", lambda *args, forward=qaa._core.forward: groups.append(args[6]) or forward(*args)
    )
    return groups


def step_of(model, x=None, **kwargs):
    """Loss and gradients of a step of training; an empty tensor where there is none."""
    model.zero_grad()
    loss = model(tokens(), labels=tokens(), **kwargs).loss if x is None else model(x).square().sum()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *(torch.empty(0) if grad is None else grad for grad in grads)]


def alone(model, monkeypatch, *args, **kwargs):
    """The same step with layers that make their matrices by themselves."""
    with monkeypatch.context() as patch:
        patch.setattr(type(model.base_model), "_around_forward", lambda self: contextlib.nullcontext())
        return step_of(model, *args, **kwargs)


@pytest.mark.parametrize(
    "how",
    [
        *("plain", "checkpoints", "re-entrant checkpoints", "autocast", "frozen circuit", "float64"),
        *("full rank", "random", "autocast checkpoints", "autocast re-entrant checkpoints"),
    ],
)
def test_matrices_made_together_are_to_the_bit_those_that_layers_make_alone(how, monkeypatch):
    changes = {"r": None} if how == "full rank" else {"r": None, "up_projection": "random"} if how == "random" else {}
    config = random_config(**{**LOW_RANK, **changes}, train_circuit=how != "frozen circuit")
    model = adapted(config, llama().double() if how == "float64" else None).train()
    if "checkpoints" in how:
        model.gradient_checkpointing_enable({"use_reentrant": "re-entrant" in how})
        model.enable_input_require_grads()
    for layer in layers_of(model):
        for name in ("qaa_channels", "qaa_gain"):
            getattr(layer, name)["default"].uniform_(0.5, 1.5)
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in how):
        calls = counted_calls(monkeypatch)
        expected = alone(model, monkeypatch)
        assert set(calls) == {1}
        calls.clear()
        assert is_equal(step_of(model), expected)
        # a re-entrant checkpoint runs without gradients first, where matrices are kept, and then layer by layer
        assert calls[0] == len(layers_of(model)) == 4
        assert "checkpoints" in how or len(calls) == 1


@pytest.mark.parametrize("how", ["plain", "checkpoints", "standardised", "low rank"])
def test_up_projections_made_together_are_to_the_bit_those_that_layers_make_alone(how, monkeypatch):
    """Of quadratic readouts with a bias, under autocast; those of features with a mean are left to their layers."""
    changes = {"low rank": {"r": 2}, "standardised": {"standardize_features": True}}.get(how, {})
    model = adapted(random_config("z", **changes)).train()
    if how == "checkpoints":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    for layer in layers_of(model):
        layer.qaa_pending.clear()
    made = []
    monkeypatch.setattr(qaa.ops, "_factors", lambda *args, f=qaa.ops._factors: made.append(len(args[0])) or f(*args))
    with torch.autocast("cpu", torch.bfloat16):
        expected = alone(model, monkeypatch)
        assert set(made) == {1}
        made.clear()
        assert is_equal(step_of(model), expected)
        together = [n for n in made if n > 1]
        assert sum(together) == (0 if how == "standardised" else len(layers_of(model)))
        assert (1 in made) == (how in ("checkpoints", "standardised"))


@pytest.mark.filterwarnings("ignore:.* were never measured")
def test_layers_that_find_no_matrix_make_their_own(monkeypatch):
    torch.manual_seed(0)
    shared = nn.Linear(24, 24)
    net = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(24, 24), nn.Linear(24, 3))
    model = adapted(random_config(**LOW_RANK, target_modules=["0", "3", "4"]), net).train()
    first, _, again, middle, _ = model.base_model.model
    assert first is not again  # PEFT replaces a module in one place
    x, calls = torch.randn(5, 24), counted_calls(monkeypatch)
    assert is_equal(step_of(model, x), alone(model, monkeypatch, x))
    assert calls == [3, 1, 1, 1]
    calls.clear()
    middle(x).sum().backward()  # by itself
    assert calls == [1]
    calls.clear()
    net[2] = first  # twice in one pass
    assert is_equal(step_of(model, x), alone(model, monkeypatch, x))
    assert calls == [3, 1, *[1] * 4]
    calls.clear()
    model(x).sum() + model(x).sum()
    with torch.no_grad():
        model(x)
    assert calls == [3, 1, 3, 1, 1, 1, 1]  # without gradients matrices are kept, each layer's by itself
    calls.clear()
    with model.disable_adapter():
        model(x)
    assert calls == []
    middle.merge()
    calls.clear()
    assert is_equal(step_of(model, x), alone(model, monkeypatch, x))
    assert calls[:2] == [2, 1]


@pytest.mark.filterwarnings("ignore:.* were never measured")
@pytest.mark.parametrize("with_autocast", [False, True])
def test_a_layer_that_a_pass_leaves_out_gets_no_gradient(with_autocast):
    class Skipping(nn.Sequential):
        def forward(self, x):
            return self[2](self[0](x))

    net = Skipping(nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 3))
    model = adapted(random_config(**LOW_RANK, target_modules=["0", "1", "2"]), net).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=with_autocast):
        model(torch.randn(5, 24)).sum().backward()
    grads = [{p.grad is None for p in layer.parameters() if p.requires_grad} for layer in layers_of(model)]
    assert grads == [{False}, {True}, {False}]


@pytest.mark.filterwarnings("ignore:.* were never measured")
def test_models_may_train_in_several_threads_and_within_each_other(monkeypatch):
    x = torch.randn(5, 24)

    def net():
        return nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))

    inner = adapted(random_config(**LOW_RANK, target_modules=["0", "1"]), net()).train()

    class Outer(nn.Sequential):
        def forward(self, x):
            return self[1](inner(self[0](x)))

    outer = adapted(random_config(**LOW_RANK, target_modules=["0", "1"]), Outer(*net())).train()
    expected = alone(outer, monkeypatch, x)
    calls = counted_calls(monkeypatch)
    assert is_equal(step_of(outer, x), expected)
    assert calls == [2, 2]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        losses = list(pool.map(lambda _: outer(x).square().sum(), range(8)))
    for loss in losses:
        loss.backward()
    assert all(torch.equal(loss.detach(), expected[0]) for loss in losses)


@pytest.mark.filterwarnings("ignore:.* were never measured")
def test_adapters_of_several_shapes_are_made_by_shape(monkeypatch):
    net = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 40), nn.Linear(40, 5))
    model = adapted(random_config(**LOW_RANK, target_modules=[str(i) for i in range(5)]), net).train()
    model.add_adapter("second", random_config("z", target_modules=["0"]))
    x, calls = torch.randn(5, 24), counted_calls(monkeypatch)
    expected = alone(model, monkeypatch, x)
    calls.clear()
    assert is_equal(step_of(model, x), expected)
    assert sorted(calls) == [2, 3]
    calls.clear()
    monkeypatch.setattr(qaa.nn, "MANY_AMPLITUDES", 4 * 2**5)  # two matrices of two rows at a time, or one of 64 columns
    assert is_equal(step_of(model, x), expected)
    assert sorted(calls) == [1, 1, 1, 2]
    model.base_model.set_adapter(["default", "second"])
    assert is_equal(step_of(model, x), alone(model, monkeypatch, x))


@pytest.mark.parametrize("readout", ["z", STATE, "low rank"])
def test_an_adapted_model_compiles_without_graph_breaks(readout):
    model = adapted(
        random_config(
            **{**({"readout": readout} if readout != "low rank" else LOW_RANK), "target_modules": "all-linear"}
        ),
        nn.Sequential(nn.Linear(24, 9), nn.Linear(9, 4)),
    )
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for x in (torch.randn(3, 24), torch.randn(5, 24)):
        torch.testing.assert_close(compiled(x), model(x), **CLOSE)
    compiled(x).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_generation_in_inference_mode_and_training_afterwards():
    model = adapted(random_config(STATE, train_circuit=False))
    with torch.inference_mode():
        generated = model.generate(tokens(1), max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 10)
    model.train()(tokens(), labels=tokens()).loss.backward()


# ------------------------------------------------------------------------------------------- configuration, presets


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layers": 0}, "expected n_layers to be an integer from 1 to 10000, received 0"),
        ({"n_layers": 2.5}, "expected n_layers to be an integer from 1 to 10000, received 2.5"),
        ({"ansatz": "star"}, "expected ansatz among ring, .*, received 'star'"),
        ({"readout": "x"}, "expected a readout 'z', .*, received 'x'"),
        ({"readout": "state[:0]"}, "expected between 1 and 65536 outputs for readout 'state'.*, received 0"),
        ({"readout": []}, "expected at least one Pauli string in the readout, received none"),
        ({"readout": ["ZZ", "Z"]}, "expected Pauli strings of 2 letters from I, X, Y, Z, received 'Z'"),
        ({"scaling": math.inf}, "expected scaling to be a finite number or None, received inf"),
        ({"adapter_bias": "yes"}, "expected adapter_bias to be True or False, received 'yes'"),
        ({"init_weights": None}, "expected init_weights to be True or False, received None"),
        ({"train_circuit": 1}, "expected train_circuit to be True or False, received 1"),
        ({"init_angles": "none"}, "expected init_angles among uniform, small, zero, received 'none'"),
        ({"center_channels": 1}, "expected center_channels to be True or False, received 1"),
        ({"up_projection": "none"}, "expected up_projection among full, random, circuit, received 'none'"),
        ({"r": 0}, "expected r to be an integer from 1 to 65536, received 0"),
        ({"r": 4.0}, "expected r to be an integer from 1 to 65536, received 4.0"),
        ({"projection_key": 0.5}, "expected projection_key to be an integer of 64 bits, received 0.5"),
        ({"calibration": "never"}, "expected calibration among explicit, first_batch, received 'never'"),
        ({"calibration": "first_batch"}, "expected one of scale_channels, .* with calibration 'first_batch', received"),
        ({"target_modules": "q", "layers_to_transform": 0}, "`layers_to_transform` cannot be used when"),
        ({"task_type": "POETRY"}, "Invalid task type: 'POETRY'"),
    ],
)
def test_bad_fields_are_refused_in_one_sentence(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        QaaConfig(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"target_modules": ["nothing"]}, ValueError, "Target modules {'nothing'} not found in the base model"),
        ({"target_modules": ["embed_tokens"]}, TypeError, "expected a torch.nn.Linear .* received Embedding"),
        (
            {"readout": "state[:33]", "target_modules": ["q_proj"]},
            ValueError,
            "cannot adapt the module model.layers.0.self_attn.q_proj: expected between 1 and 32 outputs",
        ),
        ({"readout": ["ZZ"]}, ValueError, "cannot adapt .*q_proj: expected Pauli strings of 5 letters"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_by_name(config, error, message):
    with pytest.raises(error, match=message):
        get_peft_model(llama(), QaaConfig(**config))


def test_a_layer_above_sixteen_wires_is_refused():
    model = nn.Sequential(nn.Linear(2**16 + 1, 2, device="meta"))
    with pytest.raises(
        ValueError, match="cannot adapt the module 0: expected in_features to be an integer from 1 to 65536"
    ):
        get_peft_model(model, QaaConfig(target_modules=["0"]))


def test_every_field_says_when_it_pays():
    own = set(QaaConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
    assert len(own) == 23
    for name in own:
        assert len(QaaConfig.__dataclass_fields__[name].metadata["help"]) > 40, name


def without_weights(make: Any, config: Any) -> Any:
    with torch.device("meta"):
        model = make(config)
    model.tie_weights()  # transformers 5.0 leaves that out on the meta device, and counts the head twice
    return model


def gpt_neo_1_3b():
    """EleutherAI/gpt-neo-1.3B by its published shape, without weights."""
    config = GPTNeoConfig(
        hidden_size=2048, num_layers=24, num_heads=16, attention_types=[[["global", "local"], 12]], vocab_size=50257
    )
    return without_weights(GPTNeoForCausalLM, config)


def test_the_paper_preset_has_the_papers_share_of_parameters():
    base = gpt_neo_1_3b()
    total = sum(p.numel() for p in base.parameters())
    assert total == 1_315_575_808
    model = get_peft_model(base, QaaConfig.preset("paper"))
    n, d, n_layers, adapted_layers = 11, 2048, 4, 24 * 2  # 2**11 amplitudes; q and v of each of 24 layers
    up, bias, angles = n * d, d, n_layers * n * 3
    assert adapted_layers * (up + bias + angles) == 1_185_984
    assert model.get_nb_trainable_parameters() == (1_185_984, total + 1_185_984)
    assert f"{100 * 1_185_984 / total:.4f}" == "0.0901"
    assert {name.rsplit(".", 1)[1] for name in model.base_model.targeted_module_names} == {"q_proj", "v_proj"}


def smollm2_135m() -> LlamaForCausalLM:
    """HuggingFaceTB/SmolLM2-135M by its published shape, without weights."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    return without_weights(LlamaForCausalLM, LlamaConfig(**shape, **heads))


@pytest.mark.parametrize(
    ("make", "total", "trainable", "limit"),
    [
        (smollm2_135m, 134_515_008, 30 * 2 * (16 + 2 * 10 * 3), 0.005),
        (gpt_neo_1_3b, None, 48 * (16 + 2 * 11 * 3), 0.0005),
    ],
)
def test_the_tiny_preset_has_a_share_of_thousandths_of_a_percent(make, total, trainable, limit):
    base = make()
    before = sum(p.numel() for p in base.parameters())
    assert total in (before, None)
    model = get_peft_model(base, QaaConfig.preset("tiny"))
    layers = layers_of(model)
    statistics = sum(layer.in_features + 16 for layer in layers)  # saved, not trained
    assert model.get_nb_trainable_parameters() == (trainable, before + trainable + statistics)
    assert 100 * trainable / before <= limit


@pytest.mark.parametrize(("make", "trainable"), [(smollm2_135m, 114_720), (gpt_neo_1_3b, 411_840)])
def test_the_compact_preset_has_less_than_the_papers_share_of_parameters(make, trainable):
    base = make()
    before = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, QaaConfig.preset("compact"))
    assert model.get_nb_trainable_parameters()[0] == trainable
    assert 100 * trainable / before <= 0.09
    assert all(layer.supports_lora_conversion() for layer in layers_of(model))


def test_the_default_preset_has_fewer_parameters_than_a_lora_of_its_rank():
    q, v = 4 * (576 + 512) + 4 * 10 * 3, 4 * (192 + 512) + 4 * 10 * 3
    for make, trainable in ((smollm2_135m, 30 * (q + v)), (gpt_neo_1_3b, 48 * (4 * (2048 + 1024) + 4 * 11 * 3))):
        model = get_peft_model(make(), QaaConfig.preset("default"))
        assert model.get_nb_trainable_parameters()[0] == trainable
        lora = get_peft_model(make(), LoraConfig(r=4))
        assert trainable < lora.get_nb_trainable_parameters()[0]


def test_the_default_preset_is_linear_standardised_and_without_a_constant():
    config = QaaConfig.preset("default", n_layers=2, target_modules=["v_proj"])
    assert (config.readout, config.n_layers, config.target_modules) == ("state[:1/2]", 2, {"v_proj"})
    model = adapted(config)
    assert layers_of(model)[0].stages("default") == ("channels", "features")
    assert layers_of(model)[0].supports_lora_conversion()
    angles, mix, up = 2 * 5 * 3, 4 * 16, 4 * 12  # of 24 inputs on five wires
    assert model.get_nb_trainable_parameters()[0] == 2 * (angles + mix + up)
    assert get_peft_model(nn.Sequential(nn.Linear(5, 3)), QaaConfig.preset("default", target_modules=["0"]))
    with pytest.raises(ValueError, match="expected r of at most 2, the number of features, received 4"):
        get_peft_model(nn.Sequential(nn.Linear(4, 3)), QaaConfig.preset("default", target_modules=["0"]))
    with pytest.raises(ValueError, match="expected a preset among paper, default, compact, tiny, received 'papre'"):
        QaaConfig.preset("papre")


def test_parameter_groups():
    model = adapted(random_config("z", modules_to_save=["lm_head"]))
    groups = parameter_groups(model, lr=1e-3, angle_lr=1e-2)
    assert [group["lr"] for group in groups] == [1e-2, 1e-3] and groups[0]["weight_decay"] == 0
    assert {id(p) for p in groups[0]["params"]} == {id(layer.qaa_theta["default"]) for layer in layers_of(model)}
    assert sum(p.numel() for g in groups for p in g["params"]) == model.get_nb_trainable_parameters()[0]
    torch.optim.AdamW(groups, weight_decay=0.1)
    assert len(parameter_groups(adapted(random_config("z", train_circuit=False)), 1e-3, 1e-2)) == 1
    with pytest.raises(ValueError, match="expected a model with QAA adapters, received a LlamaForCausalLM without any"):
        parameter_groups(llama(), 1e-3, 1e-2)
    with pytest.raises(ValueError, match="expected angle_lr to be a positive number, received 0"):
        parameter_groups(model, 1e-3, 0)


def test_the_printed_layer_names_the_method():
    assert repr(layers_of(adapted())[0]).startswith("qaa.QaaLayer(")
    assert peft.get_layer_status(adapted())[0].available_adapters == ["default"]


# ------------------------------------------------------------------------------------- whitening, standardisation


def outlier_data() -> torch.Tensor:
    """Vectors whose third channel is hundreds of times larger, whose fourth has a large mean, whose last is zero."""
    torch.manual_seed(3)
    x = torch.randn(64, 12)
    x[:, 2] *= 400
    x[:, 3] += 30
    x[:, 11] = 0
    return x


def whitened_model(readout: str = "state[:6]", *, base_bias: bool = True, **fields: Any) -> peft.PeftModel:
    torch.manual_seed(4)
    config = QaaConfig(target_modules=["0"], readout=readout, **fields)
    return get_peft_model(nn.Sequential(nn.Linear(12, 5, bias=base_bias)), config)


def run(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch)


@pytest.mark.parametrize("readout", ["state[:6]", "z", "probs[:6]"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_calibrated_channels_and_features_have_unit_size(
    readout: str, has_bias: bool, center: bool, tmp_path: Path
) -> None:
    x = outlier_data()
    fields = {"scale_channels": True, "center_channels": center, "standardize_features": True}
    model = whitened_model(readout, adapter_bias=has_bias, **fields)
    layer = layers_of(model)[0]
    expected = model(x)
    assert torch.equal(expected, layer.base_layer(x))
    trainable = model.get_nb_trainable_parameters()[0]
    assert calibrate(model, (rows for rows in x.split([20, 44])), forward=run) == 1
    assert torch.equal(model(x), expected)  # still an exact no-op
    assert model.get_nb_trainable_parameters()[0] == trainable  # statistics are saved, not trained

    theta, _, bias, whitening, _ = layer._parameters_of("default")
    size = len(layer.qaa_up["default"][0])
    frozen = [t for t in whitening if t is not None]
    assert not any(t.requires_grad for t in frozen)
    assert sum(map(torch.numel, frozen)) == 12 * (1 + center) + size * (1 + has_bias)
    u = x if whitening.center is None else x - whitening.center
    u = u * whitening.channels
    torch.testing.assert_close(u[:, :11].square().mean(0), torch.ones(11))
    assert whitening.channels[11] == 1
    if center:
        torch.testing.assert_close(u.mean(0), torch.zeros(12), rtol=0, atol=2e-5)
    g = layer.qaa_adapter["default"].features(theta, u)
    g = (g if whitening.mean is None else g - whitening.mean) * whitening.gain
    torch.testing.assert_close(g.square().mean(0), torch.ones(size), rtol=1e-3, atol=0)
    if has_bias:
        torch.testing.assert_close(g.mean(0), torch.zeros(size), rtol=0, atol=1e-3)
    else:
        assert whitening.mean is None

    nn.init.normal_(layer.qaa_up["default"])
    if has_bias:
        nn.init.normal_(bias)
    delta = g @ layer.qaa_up["default"].T
    delta = layer.qaa_adapter["default"].scaling * (delta + bias if has_bias else delta)
    torch.testing.assert_close(model(x), expected + delta, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(whitened_model().unload(), tmp_path)
    assert torch.equal(again(x), model(x))
    if readout.startswith("state"):
        torch.testing.assert_close(model.merge_and_unload(safe_merge=True)(x), again(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("center", [True, False])
def test_a_whitened_adapter_merges_unmerges_and_exports(center: bool, tmp_path: Path) -> None:
    x = outlier_data()
    fields = {"scale_channels": True, "center_channels": center, "standardize_features": True, "init_weights": False}
    model = whitened_model(**fields)
    base = model.base_model.model[0].base_layer
    calibrate(model, [x], forward=run)
    before, expected = copy.deepcopy(base.state_dict()), model(x)
    assert (expected - base(x)).abs().max() > 0.5
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(base.state_dict(), before, rtol=1e-5, atol=1e-5)
    assert to_lora(model, tmp_path).lora_bias == center
    with warnings.catch_warnings():
        warnings.simplefilter("error", peft.PeftWarning)
        loaded = PeftModel.from_pretrained(whitened_model().unload(), tmp_path)
    torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-4)
    assert layers_of(model)[0].supports_lora_conversion() != center


def test_standardised_features_need_no_scaling_by_default() -> None:
    for fields, expected in (({}, 17**0.5), ({"standardize_features": True}, 1.0), ({"scaling": 3.0, **WHITENED}, 3.0)):
        assert layers_of(whitened_model("z", **fields))[0].qaa_adapter["default"].scaling == expected


def test_only_a_constant_term_needs_a_bias_to_merge_into() -> None:
    x = outlier_data()
    fields = {"scale_channels": True, "standardize_features": True, "init_weights": False, "base_bias": False}
    model = whitened_model(**fields)
    calibrate(model, [x], forward=run)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="cannot merge the QAA adapter 'default': it has a bias, and the Linear"):
        whitened_model(center_channels=True, **fields).merge_adapter()


def test_statistics_are_those_of_all_vectors_in_float64() -> None:
    """A mean a million times the deviation, over uneven batches: as numpy computes it in two passes."""
    torch.manual_seed(0)
    x = torch.randn(3000, 12).double()
    x[:, 0] = x[:, 0] * 1e-2 + 1e3
    x[:, 1] = 7.3  # constant
    model = whitened_model(scale_channels=True, center_channels=True, standardize_features=True).double()
    calibrate(model, x.split([1, 1100, 1899]), forward=run)
    whitening = layers_of(model)[0]._parameters_of("default")[3]
    np.testing.assert_allclose(whitening.center, x.mean(0), rtol=1e-12, atol=1e-15)
    deviation = x.std(0, correction=0).numpy()
    factors = np.divide(1, deviation, out=np.ones(12), where=np.arange(12) != 1)
    np.testing.assert_allclose(whitening.channels, factors, rtol=1e-5)


def test_features_that_do_not_vary_keep_their_size() -> None:
    x = torch.zeros(8, 12)
    x[:, 0] = torch.arange(1.0, 9)  # always the first amplitude alone, with angles of zero
    model = whitened_model("z", init_angles="zero", standardize_features=True)
    calibrate(model, [x], forward=run)
    layer = layers_of(model)[0]
    assert torch.equal(layer.qaa_gain["default"], torch.ones(4))
    torch.testing.assert_close(layer.qaa_mean["default"], torch.ones(4))
    model = whitened_model("state[:3]", init_angles="zero", standardize_features=True)
    calibrate(model, [x], forward=run)
    rms = x[:, 0].square().mean().sqrt()
    torch.testing.assert_close(layers_of(model)[0].qaa_gain["default"], torch.tensor([1 / rms, 1.0, 1.0]))


# ------------------------------------------------------------------------------------------ random up-projections


@pytest.mark.parametrize("readout", ["z", STATE])
def test_a_random_up_projection_trains_gains_and_angles_alone(readout: str, tmp_path: Path) -> None:
    fields = {"up_projection": "random", "adapter_bias": False, "projection_key": 7}
    assert torch.equal(logits(adapted(QaaConfig(readout=readout, **fields))), logits(llama()))  # g = 0
    model = adapted(random_config(readout, **fields))
    expected, layer = logits(model), layers_of(model)[0]
    assert (expected - logits(llama())).abs().max() > 1e-2
    assert model.get_nb_trainable_parameters()[0] == 4 * (5 + 2 * 5 * 3)  # four layers: K gains, L n 3 angles

    up = layer._parameters_of("default")[1]
    gains = layer.qaa_up["default"]
    columns = up.norm(dim=0) / gains.abs()
    torch.testing.assert_close(columns, torch.full((5,), math.sqrt(24 / 5)))
    x = torch.randn(3, 24)
    plain = layer.qaa_adapter["default"].delta(x, layer.qaa_theta["default"], up, None)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + plain, **CLOSE)

    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert {tuple(t.shape) for t in weights.values()} == {(5,), (2, 5, 3)}  # no signs
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(logits(loaded), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
    model.add_adapter("other", random_config(readout, **{**fields, "projection_key": 8}))
    signs = layer.qaa_signs
    assert not torch.equal(signs["default"], signs["other"])
    q, v = (layers_of(model)[i].qaa_signs["default"] for i in (0, 2))
    assert torch.equal(q, v)  # of the first and the second q_proj
    model.delete_adapter("other")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("readout", ["z", STATE])
def test_a_circuit_as_up_projection_trains_gains_and_two_sets_of_angles(readout: str, tmp_path: Path) -> None:
    fields = {"up_projection": "circuit", "adapter_bias": False}
    assert torch.equal(logits(adapted(QaaConfig(readout=readout, **fields))), logits(llama()))  # g = 0
    model = adapted(random_config(readout, **fields))
    expected, layer = logits(model), layers_of(model)[0]
    assert (expected - logits(llama())).abs().max() > 1e-2
    q, v = 5 + 2 * (5 + 5) * 3, 5 + 2 * (5 + 4) * 3  # K gains, L (n + m) 3 angles; v has 12 outputs
    assert model.get_nb_trainable_parameters()[0] == 2 * (q + v)

    circuit = layer.qaa_up_adapter["default"].circuit
    unitary = oracle.unitary(circuit, layer.qaa_phi["default"].detach().double().numpy())
    rows = torch.from_numpy(unitary.real[:5, :24]).float()
    up = math.sqrt(32 / 5) * rows.T * layer.qaa_up["default"]
    x = torch.randn(3, 24)
    plain = layer.qaa_adapter["default"].delta(x, layer.qaa_theta["default"], up, None)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + plain, **CLOSE)

    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    shapes = 4 * [(5,), (2, 5, 3)] + 2 * [(2, 5, 3), (2, 4, 3)]
    assert sorted(tuple(t.shape) for t in weights.values()) == sorted(shapes)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(logits(loaded), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
    angles, gains = parameter_groups(model, lr=1e-3, angle_lr=1e-2)  # angles of both circuits are angles
    assert {tuple(p.shape) for p in angles["params"]} == {(2, 5, 3), (2, 4, 3)} and len(angles["params"]) == 8
    assert {tuple(p.shape) for p in gains["params"]} == {(5,)}
    frozen = adapted(random_config(readout, train_circuit=False, **fields))
    assert frozen.get_nb_trainable_parameters()[0] == 4 * 5


def test_a_circuit_as_up_projection_needs_an_output_for_every_feature() -> None:
    with pytest.raises(ValueError, match=r"with 12 to 65536 output features .* and 12 features, received 6"):
        get_peft_model(
            nn.Sequential(nn.Linear(16, 6)),
            QaaConfig(target_modules=["0"], readout="state[:12]", up_projection="circuit"),
        )


@pytest.mark.parametrize("readout", ["z", STATE])
def test_a_low_rank_up_projection_trains_two_factors(readout: str, tmp_path: Path) -> None:
    assert torch.equal(logits(adapted(QaaConfig(readout=readout, r=2))), logits(llama()))  # B = 0
    model = adapted(random_config(readout, r=2, adapter_bias=False))
    expected, layer = logits(model), layers_of(model)[0]
    assert (expected - logits(llama())).abs().max() > 1e-2
    assert model.get_nb_trainable_parameters()[0] == 4 * (2 * 5 + 2 * 5 * 3) + 2 * 2 * (24 + 12)  # M, angles, B
    up = layer.qaa_up["default"] @ layer.qaa_mix["default"]
    x = torch.randn(3, 24)
    plain = layer.qaa_adapter["default"].delta(x, layer.qaa_theta["default"], up, None)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + plain, **CLOSE)

    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert {tuple(t.shape) for t in weights.values()} == {(24, 2), (12, 2), (2, 5), (2, 5, 3)}
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(logits(loaded), expected)
    angles, others = parameter_groups(model, lr=1e-3, angle_lr=1e-2)
    assert {tuple(p.shape) for p in angles["params"]} == {(2, 5, 3)} and len(others["params"]) == 8
    with pytest.raises(ValueError, match="expected r of at most 5, the number of features, received 6"):
        adapted(QaaConfig(readout=readout, r=6))


def test_rows_of_a_low_rank_adapter_are_made_anew_when_its_factors_change() -> None:
    model = adapted(random_config(STATE, r=2))
    layer, x = layers_of(model)[0], torch.randn(3, 24)
    with torch.no_grad():
        for name in ("qaa_mix", "qaa_theta", "qaa_mix"):
            getattr(layer, name)["default"].mul_(0.5)
            theta, up, bias, whitening, mix = layer._parameters_of("default")
            expected = layer.qaa_adapter["default"].delta(x, theta, up @ mix, bias, whitening)
            for _ in range(2):  # computed, and remembered
                torch.testing.assert_close(layer(x), layer.base_layer(x) + expected, **CLOSE)


COMPACT = [{"up_projection": "random"}, {"up_projection": "circuit"}, {"r": 2}, {"up_projection": "circuit", "r": 2}]


@pytest.mark.parametrize("fields", COMPACT, ids=str)
@pytest.mark.parametrize("readout", ["z", "state[:3]"])
def test_gradients_of_a_compact_up_projection_are_those_of_its_equation(readout: str, fields: dict[str, Any]) -> None:
    config = QaaConfig(target_modules=["0"], readout=readout, init_weights=False, n_layers=2, **fields, **WHITENED)
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4)).double(), config)
    x = torch.randn(5, 6, dtype=torch.float64)
    calibrate(model, [x], forward=run)
    layer = model.base_model.model[0]
    names = ["theta", "up", "bias"] + ["phi"] * (fields.get("up_projection") == "circuit") + ["mix"] * ("r" in fields)
    names = [f"qaa_{name}.default.value" for name in names]
    inputs = [layer.get_parameter(name).detach().requires_grad_() for name in names]

    def output(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x.requires_grad_(), *inputs), fast_mode=False)


@pytest.mark.parametrize("fields", COMPACT, ids=str)
def test_a_compact_up_projection_merges_exports_compiles_and_learns(fields: dict[str, Any], tmp_path: Path) -> None:
    fields = {"readout": STATE, "up_projection": "full", **fields}
    config = QaaConfig.preset("tiny", init_weights=False, **fields)
    model = adapted(config)
    calibrate(model, [{"input_ids": tokens()}])
    expected = logits(model)
    config = to_lora(model, tmp_path)
    assert config.r == fields.get("r", 5) and not config.lora_bias
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected, rtol=1e-5, atol=1e-5)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, **CLOSE)

    layer, x = layers_of(model)[0], torch.randn(3, 24)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), **CLOSE)

    if fields["up_projection"] == "random":
        half = adapted(QaaConfig.preset("tiny", init_weights=False, **fields), llama().bfloat16())
        assert {layer.qaa_signs["default"].dtype for layer in layers_of(half)} == {torch.int8}
    model = adapted(QaaConfig.preset("tiny", target_modules="all-linear", calibration="first_batch", **fields))
    optimizer = torch.optim.Adam((p for p in model.train().parameters() if p.requires_grad), lr=3e-2)
    start = [layer.qaa_theta["default"].detach().clone() for layer in layers_of(model)]
    losses = losses_of_training(model, optimizer, 40)
    assert losses[-1] < losses[0] - 0.1
    moved = [(layer.qaa_theta["default"] - old).abs().max() for layer, old in zip(layers_of(model), start, strict=True)]
    assert min(moved) > 0.05


WHITENED = {"scale_channels": True, "center_channels": True, "standardize_features": True, "adapter_bias": True}
FIRST_BATCH = {**WHITENED, "calibration": "first_batch"}


def statistics(model: nn.Module, adapter_name: str = "default") -> list[torch.Tensor]:
    """Copies of every statistic of every layer, without the marks."""
    whitenings = [layer._parameters_of(adapter_name)[3] for layer in layers_of(model)]
    return [t.detach().clone() for whitening in whitenings for t in whitening if t is not None]


def is_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def calibrated_by_hand(x: torch.Tensor, readout: str = "state[:6]") -> list[torch.Tensor]:
    model = whitened_model(readout, **WHITENED)
    calibrate(model, [x], forward=run)
    return statistics(model)


@pytest.mark.parametrize("readout", ["state[:6]", "z"])
def test_the_first_training_batch_calibrates_once(readout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = outlier_data()
    model = whitened_model(readout, **FIRST_BATCH).eval()
    layer, neutral = layers_of(model)[0], statistics(model)
    expected = layer.base_layer(x)
    assert torch.equal(model(x), expected)  # evaluation
    with torch.no_grad():
        assert torch.equal(model.train()(x), expected)  # nothing is trained here either
    assert is_equal(statistics(model), neutral) and layer.qaa_calibrated["default"] == 0
    model(x[:0])  # an empty batch
    assert is_equal(statistics(model), neutral) and layer.qaa_calibrated["default"] == 0
    assert torch.equal(model(x[:40]), expected[:40])  # the first of two micro-batches
    measured = statistics(model)
    assert is_equal(measured, calibrated_by_hand(x[:40], readout)) and layer.qaa_calibrated["default"] == 1
    with monkeypatch.context() as patch:  # later steps look at no tensor to know it
        patch.setattr(QaaLayer, "_calibrate_on", lambda *args: pytest.fail("asked again"))
        model(x[40:]).sum().backward()
    assert is_equal(statistics(model), measured)
    assert layer.qaa_up["default"].grad.abs().max() > 0 and not layer.qaa_calibrated["default"].requires_grad


def test_the_first_batch_is_used_as_measured() -> None:
    """The features of the step that measures are the standardised ones: V's gradient is that of a calibrated model."""
    x = outlier_data()
    first, second = whitened_model(**FIRST_BATCH), whitened_model(**WHITENED)
    calibrate(second, [x], forward=run)
    for model in (first, second):
        model.train()(x).square().sum().backward()
    gradients = [[p.grad for p in model.parameters() if p.requires_grad] for model in (first, second)]
    assert is_equal(*gradients)


def test_a_loaded_adapter_is_not_calibrated_again(tmp_path: Path) -> None:
    x = outlier_data()
    model = whitened_model(**FIRST_BATCH).train()
    model.save_pretrained(tmp_path / "fresh")
    model(x[:40])
    measured = statistics(model)
    model.save_pretrained(tmp_path / "measured")
    for low_cpu_mem_usage in (False, True):
        kwargs = {"is_trainable": True, "low_cpu_mem_usage": low_cpu_mem_usage}
        loaded = PeftModel.from_pretrained(whitened_model().unload(), tmp_path / "measured", **kwargs)
        loaded.train()(x[40:])
        assert is_equal(statistics(loaded), measured)
        fresh = PeftModel.from_pretrained(whitened_model().unload(), tmp_path / "fresh", **kwargs)
        fresh.train()(x[40:])
        assert not is_equal(statistics(fresh), measured)
    frozen = PeftModel.from_pretrained(whitened_model().unload(), tmp_path / "fresh")  # only used, never trained
    frozen.train()(x[:40])
    assert layers_of(frozen)[0].qaa_calibrated["default"] == 0
    model.load_state_dict(fresh.state_dict())
    model(x[:40])
    assert is_equal(statistics(model), statistics(fresh))
    by_hand = whitened_model(**FIRST_BATCH)
    calibrate(by_hand, [x], forward=run)
    by_hand.train()(x[:40])
    assert is_equal(statistics(by_hand), calibrated_by_hand(x))


def test_several_adapters_are_calibrated_each_on_its_own_first_batch() -> None:
    x = outlier_data()
    model = whitened_model(**FIRST_BATCH).train()
    model.add_adapter("second", QaaConfig(target_modules=["0"], readout="state[:6]", **FIRST_BATCH))
    model.add_adapter("explicit", QaaConfig(target_modules=["0"], readout="state[:6]", **WHITENED))
    neutral = statistics(model, "explicit")
    model(x[:20])
    first = statistics(model)
    assert is_equal(statistics(model, "second"), neutral)
    model.set_adapter("explicit")
    model(x[20:40])
    assert is_equal(statistics(model, "explicit"), neutral)
    model.set_adapter("second")
    model(x[40:])
    channels = len(first) // 2  # the features of the second have angles of their own
    assert is_equal(statistics(model, "second")[:channels], calibrated_by_hand(x[40:])[:channels])
    assert is_equal(statistics(model), first)
    model.delete_adapter("second")
    model.set_adapter("default")
    model(x[40:])
    assert is_equal(statistics(model), first)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_sees_the_statistics_of_the_first_batch(use_reentrant: bool) -> None:
    """With re-entrant checkpoints the recomputation is the first forward with gradients; V = 0 makes them equal."""
    results = []
    for checkpointing in (False, True):
        model = adapted(QaaConfig(readout=STATE, n_layers=2, **FIRST_BATCH)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(tokens(), labels=tokens()).loss.backward()
        assert all(layer.qaa_calibrated["default"] == 1 for layer in layers_of(model))
        results.append([*statistics(model), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert is_equal(*results)


def test_compiled_models_are_calibrated_outside_of_the_graph() -> None:
    torch._dynamo.reset()  # it gives a function up that it has compiled for eight models
    x = outlier_data()
    model = whitened_model(**FIRST_BATCH)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled.eval()(x), model(x))  # neutral, and not measured
    assert layers_of(model)[0].qaa_calibrated["default"] == 0
    compiled.train()(x[:40])
    for ours, theirs in zip(statistics(model), calibrated_by_hand(x[:40]), strict=True):
        torch.testing.assert_close(ours, theirs)
    measured = statistics(model)
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    whole(x).sum().backward()
    assert is_equal(statistics(model), measured)
    assert torch._dynamo.explain(model)(x).graph_break_count == 0


def train_two_steps(rank: int, folder: Path) -> None:
    """One of two processes, each with its own part of the data. It ends without destructors: torch's Reducer waits in
    its own, holding the interpreter's lock, for a thread of gloo that may want that lock once more."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(whitened_model(**FIRST_BATCH).train())
    for _ in range(2):
        model(outlier_data().split([20, 44])[rank]).square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    torch.save((statistics(model), gradients), folder / f"{rank}.pt")
    os._exit(0)


def test_processes_share_the_statistics_of_all_their_first_batches(tmp_path: Path) -> None:
    spawn = torch.multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=train_two_steps, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    (ours, our_gradients), (theirs, their_gradients) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert is_equal(ours, theirs) and is_equal(our_gradients, their_gradients)
    for together, alone in zip(ours, calibrated_by_hand(outlier_data()), strict=True):
        torch.testing.assert_close(together, alone)


class Once(torch.utils.data.IterableDataset):
    """Rows that can be gone through once."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = iter(rows)

    def __iter__(self) -> Any:
        return self.rows


def test_every_layer_that_no_batch_reaches_is_named() -> None:
    base = nn.ModuleDict({name: nn.Linear(16, 4) for name in "abc"})
    model = adapted(QaaConfig(target_modules=["a", "b", "c"], readout=STATE, scale_channels=True), base)
    with pytest.raises(ValueError, match=r"received none that reach \S+\.b, \S+\.c: name .* in exclude_modules"):
        calibrate(model, [torch.randn(2, 16)], forward=lambda model, x: model.base_model.model["a"](x))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_that_was_compiled_and_run_is_calibrated(in_place: bool) -> None:
    torch._dynamo.reset()
    x = outlier_data()
    models = [whitened_model(scale_channels=True, standardize_features=True).eval() for _ in range(2)]
    compiled = models[0]
    if in_place:
        compiled.base_model.model.compile(backend="eager")
    else:
        compiled = torch.compile(compiled, backend="eager")
    with torch.no_grad():
        compiled(x)
    for model in (compiled, models[1]):
        assert calibrate(model, [x], forward=run) == 1
    assert is_equal(statistics(models[0]), statistics(models[1]))


def test_training_warns_of_one_stage_that_was_never_measured() -> None:
    model = whitened_model(scale_channels=True, standardize_features=True).train()
    layers_of(model)[0].qaa_channels["default"].data.fill_(2.0)
    with pytest.warns(UserWarning, match="statistics that were never measured"):
        model(outlier_data())


def test_calibration_says_what_is_missing() -> None:
    x = outlier_data()
    with pytest.raises(ValueError, match="has scale_channels, center_channels or standardize_features, received one"):
        calibrate(whitened_model(), [x], forward=run)
    model = whitened_model(scale_channels=True, standardize_features=True)
    with pytest.raises(ValueError, match=r"received a list that had none \(left\)"):
        calibrate(model, [])
    channels = layers_of(model)[0].qaa_channels["default"].data
    channels.fill_(3.0)
    loader = torch.utils.data.DataLoader(Once(x), batch_size=8)
    with pytest.raises(ValueError, match=r"received a DataLoader that had none \(left\): .* have to be in a list"):
        calibrate(model, loader, forward=run)
    assert torch.all(channels == 3)  # what was measured of it is forgotten
    channels.fill_(1.0)
    with pytest.raises(ValueError, match="NaN or infinity"):
        calibrate(model, [x * torch.nan], forward=run)
    layer = layers_of(model)[0]
    assert torch.all(layer.qaa_channels["default"] == 1) and torch.all(layer.qaa_gain["default"] == 1)
    model = whitened_model(**FIRST_BATCH).train()
    with pytest.raises(ValueError, match="expected a finite first batch to calibrate the QAA adapter 'default' on"):
        model(x * torch.nan)
    model(x)
    assert is_equal(statistics(model), calibrated_by_hand(x))


@pytest.mark.parametrize("readout", ["z", STATE])
def test_a_whitened_model_compiles_without_graph_breaks(readout: str) -> None:
    fields = {"scale_channels": True, "center_channels": True, "standardize_features": True}
    model, x = whitened_model(readout, adapter_bias=True, init_weights=False, **fields), outlier_data()
    calibrate(model, [x], forward=run)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x), model(x), **CLOSE)
    compiled(x).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------------ what users stumble on


def test_a_second_adapter_of_the_same_name_replaces_the_first() -> None:
    """Nothing of the first is left: here signs of a random V, M, c, and statistics."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 4))
    fields = {"target_modules": ["0"], "readout": STATE, "adapter_bias": True, "scale_channels": True}
    get_peft_model(base, QaaConfig(**fields, up_projection="random", r=2, standardize_features=True))
    with pytest.warns(UserWarning, match="second time"):
        model = get_peft_model(base, QaaConfig(target_modules=["0"], readout=STATE, init_weights=False))
    assert set(get_peft_model_state_dict(model)) == {f"base_model.model.0.qaa_{name}.value" for name in ("theta", "up")}
    layer, x = layers_of(model)[0], torch.randn(3, 16)
    rows = layer.qaa_adapter["default"].down(layer.qaa_theta["default"])
    expected = layer.base_layer(x) + x @ rows.T @ layer.qaa_up["default"].T
    torch.testing.assert_close(layer(x), expected, **CLOSE)


def test_an_adapter_that_is_refused_changes_nothing() -> None:
    model = adapted(random_config(STATE, target_modules=["q_proj"]))
    expected, before = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    for layer in layers_of(model):
        with pytest.raises(ValueError, match="expected r of at most 5"):
            layer.update_layer("default", random_config(STATE, r=6, scale_channels=True))
        with pytest.raises(ValueError, match="expected r of at most 5"):
            layer.update_layer("other", random_config(STATE, r=6, scale_channels=True))
        assert layer._get_available_adapters() == {"default"}
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_model_whose_adapter_is_refused_is_as_it_was() -> None:
    """Layers before the one that is refused are given back, so that the next adapter freezes the model."""
    base = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 3), nn.Linear(3, 2))
    refused = random_config("state[:8]", target_modules=["0", "1", "2"])
    x = torch.randn(5, 16)
    expected = base(x)
    with pytest.raises(ValueError, match="cannot adapt the module 2"):
        get_peft_model(base, refused)
    assert [type(layer) for layer in base] == [nn.Linear] * 3 and torch.equal(base(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(base, random_config("state[:8]", target_modules=["1"]))
    assert {name.split(".")[3] for name, p in model.named_parameters() if p.requires_grad} == {"qaa_theta", "qaa_up"}
    before, expected = dict(model.named_parameters()), model(x)
    for name in ("other", "default"):  # a further adapter, and another one of the same name
        with pytest.raises(ValueError, match="cannot adapt the module 2"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(refused, base, name)
        after = dict(model.named_parameters())
        assert after.keys() == before.keys() and all(after[name] is p for name, p in before.items())
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("first", ["linear", "quadratic"])
def test_a_refused_merge_leaves_every_layer_as_it_was(first: str) -> None:
    configs = {"linear": random_config(STATE), "quadratic": random_config("z")}
    second = next(name for name in configs if name != first)
    model = adapted(configs[first], adapter_name=first)
    model.add_adapter(second, configs[second])
    model.base_model.set_adapter([first, second])
    expected = logits(model)
    for action in (model.merge_adapter, model.merge_and_unload, layers_of(model)[0].merge):
        with pytest.raises(ValueError, match="'quadratic' is quadratic in its layer's input"):
            action()
        assert not any(layer.merged for layer in layers_of(model))
        assert torch.equal(logits(model), expected)


def test_a_constant_is_refused_before_any_layer_has_merged() -> None:
    """Of the two layers the first has a bias and could take c in; the second has none."""
    base = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4, bias=False))
    model = get_peft_model(
        base, QaaConfig(target_modules=["0", "1"], readout=STATE, adapter_bias=True, init_weights=False)
    )
    x = torch.randn(3, 16)
    expected = model(x)
    with pytest.raises(ValueError, match="it has a bias, and the Linear that it adapts has none"):
        model.merge_adapter()
    assert not any(layer.merged for layer in layers_of(model)) and torch.equal(model(x), expected)


def test_training_with_statistics_that_nobody_measured_is_warned_about_once() -> None:
    def step(model: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.train()(input_ids=tokens()).logits.sum().backward()
        return [str(w.message) for w in caught if "never measured" in str(w.message)]

    preset = QaaConfig.preset("compact", readout=STATE)
    model = adapted(preset)
    with torch.no_grad():
        assert not step_quietly(model)
    found = step(model)
    assert len(found) == len(layers_of(model)) and "qaa.peft.calibrate" in found[0] and "first_batch" in found[0]
    assert not step(model)

    calibrated = adapted(preset)
    calibrate(calibrated, [{"input_ids": tokens()}])
    assert not step(calibrated)
    loaded = adapted(preset)
    set_peft_model_state_dict(loaded, get_peft_model_state_dict(calibrated))
    assert not step(loaded)
    assert not step(adapted(QaaConfig.preset("compact", readout=STATE, calibration="first_batch")))
    assert not step(adapted(random_config("z")))


def step_quietly(model: Any) -> list[Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.train()(input_ids=tokens())
    return caught


@pytest.mark.parametrize("config_cls", [QaaConfig, qaa.peft.SoraConfig])
def test_every_container_that_is_accepted_can_be_saved(config_cls: Any, tmp_path: Path) -> None:
    config = config_cls(
        target_modules=frozenset({"q_proj"}), exclude_modules=("v_proj",), layers_to_transform=range(1, 2),
        layers_pattern=("layers",), modules_to_save={"lm_head"},
    )  # fmt: skip
    model = get_peft_model(llama(), config)
    model.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert again.layers_to_transform == [1] and again.modules_to_save == ["lm_head"]
    assert set(again.target_modules) == {"q_proj"} and again.layers_pattern == ["layers"]
    assert sum(isinstance(m, (QaaLayer, qaa.peft.SoraLayer)) for m in model.modules()) == 1
    with pytest.raises(ValueError, match="`layers_to_transform` must also be specified"):
        config_cls(target_modules=["q_proj"], layers_pattern="layers")


def test_numpy_integers_are_integers() -> None:
    config = QaaConfig(
        n_layers=np.int64(2), r=np.int32(3), max_wires=np.int64(4), readout="state[:1/2]", target_modules=["q_proj"]
    )
    assert [type(value) for value in (config.n_layers, config.r, config.max_wires)] == [int, int, int]
    assert qaa.ansatz("ring", np.int64(3), np.int64(2)) == qaa.ansatz("ring", 3, 2)


def test_an_adapter_is_measured_where_it_will_run() -> None:
    """Under another active adapter the layers above the first would see what they never see again."""
    config = random_config(STATE, scale_channels=True)
    model = adapted(random_config("z"))
    model.add_adapter("second", config)
    with pytest.raises(
        ValueError, match=r"'second' to be active .* received a model whose active adapters are default"
    ):
        calibrate(model, [{"input_ids": tokens()}], "second")
    model.set_adapter("second")
    assert calibrate(model, [{"input_ids": tokens()}], "second") == len(layers_of(model))


def test_calibration_leaves_every_module_in_its_mode() -> None:
    model = adapted(random_config(STATE, scale_channels=True)).train()
    model.base_model.model.lm_head.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    calibrate(model, [{"input_ids": tokens()}])
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize("center", [False, True])
def test_a_channel_that_was_nearly_silent_does_not_drown_the_others(center: bool) -> None:
    config = QaaConfig(target_modules=["0"], readout=STATE, scale_channels=True, center_channels=center)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 4)), config)
    x = torch.randn(400, 16)
    x[:, 3] *= 1e-5
    x[:, 4] = 0
    calibrate(model, [x], forward=lambda model, x: model(x))
    factors = layers_of(model)[0].qaa_channels["default"]
    others = factors[torch.arange(16) != 3].median().item()
    assert factors[3].item() == pytest.approx(1000 * others, rel=0.2) and factors[4] == 1


def test_rows_that_are_kept_for_the_next_call_are_nobodys_to_write_to() -> None:
    model = adapted(random_config(STATE))
    layer = layers_of(model)[0]
    adapter, theta = layer.qaa_adapter["default"], layer.qaa_theta["default"]
    with torch.no_grad():
        expected = adapter.down(theta).clone()
        adapter.down(theta).zero_()
        layer.lora_factors("default")[0].zero_()
        assert torch.equal(adapter.down(theta), expected)


def test_modules_are_imported_on_first_use() -> None:
    code = (
        "import sys, qaa; assert 'torch' not in sys.modules; qaa.nn.QuantumLayer(qaa.ansatz('ring', 2)); "
        "qaa.peft.QaaConfig; assert not hasattr(qaa, 'nothing')"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=300)


# ------------------------------------------------------------------------------------------------ shared circuits

SHARED = ["q_proj", "k_proj", "v_proj"]
SHARING = {"target_modules": [*SHARED, "o_proj"], "shared_circuit": SHARED}


def unshared(model, config):
    """The same adapters with a circuit for each layer, of the same angles and statistics."""
    copies = adapted(dataclasses.replace(config, shared_circuit=None))
    for ours, theirs in zip(layers_of(model), layers_of(copies), strict=True):
        for name in theirs.adapter_layer_names:
            if (tensor := theirs._get(name, "default")) is not None:
                tensor.data.copy_(ours._get(name, "default"))
    return copies


@pytest.mark.parametrize("how", ["plain", "checkpoints", "re-entrant checkpoints", "autocast"])
@pytest.mark.parametrize(
    "fields",
    [
        {"readout": "z"},
        {"readout": "probs[:6]", "r": 2},
        {"readout": "z", "scale_channels": True, "center_channels": True, "standardize_features": True},
        {**LOW_RANK, "adapter_bias": None},
    ],
    ids=["z", "low rank", "whitened", "linear"],
)
def test_a_shared_circuit_computes_what_circuits_of_the_same_angles_do(fields, how, monkeypatch):
    config = random_config(**SHARING, **fields)
    model = adapted(config).train()
    if model.base_model.model.model.layers[0].self_attn.q_proj.stages("default"):
        calibrate(model, [{"input_ids": tokens()}])
    copies = unshared(model, config).train()
    for each in (model, copies):
        if "checkpoints" in how:
            each.gradient_checkpointing_enable({"use_reentrant": how != "checkpoints"})
            each.enable_input_require_grads()
        for layer in layers_of(each):
            layer.qaa_pending.clear()
    calls = counted_calls(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss, expected = (each(tokens(), labels=tokens()).loss for each in (model, copies))
        assert torch.equal(loss, expected)
        n_calls = len(calls)
        loss.backward()
        expected.backward()
    if fields["readout"] != STATE:  # in two layers one call for q, k and v, and one for o; or four
        assert n_calls == 2 * (2 + 4) and len(calls) == (2 * n_calls if "checkpoints" in how else n_calls)
    assert not qaa.peft.layer._ready.features
    rounding = {"rtol": 0.05, "atol": 1e-3} if how == "autocast" else CLOSE
    for ours, theirs in zip(groups_of_three(model), groups_of_three(copies), strict=True):
        first, *others = (layer.qaa_theta["default"] for layer in theirs)
        assert "default" not in ours[1].qaa_theta and "default" not in ours[2].qaa_theta
        torch.testing.assert_close(
            ours[0].qaa_theta["default"].grad, first.grad + sum(theta.grad for theta in others), **rounding
        )
        for mine, yours in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.qaa_up["default"].grad, yours.qaa_up["default"].grad, **rounding)
    o_proj = model.base_model.model.model.layers[0].self_attn.o_proj
    assert "default" in o_proj.qaa_theta and not o_proj.qaa_sharing


def groups_of_three(model):
    return [[getattr(layer.self_attn, name) for name in SHARED] for layer in model.base_model.model.model.layers]


def test_other_vectors_have_features_of_their_own_and_nothing_is_kept(monkeypatch):
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.wide = nn.Linear(24, 8), nn.Linear(24, 8), nn.Linear(30, 8)

        def forward(self, x, y):
            return self.q(x) + self.k(y)

    config = random_config(target_modules=["q", "k", "wide"], shared_circuit=["q", "k", "wide"])
    model = adapted(config, Crossed())
    net = model.base_model.model
    assert "default" not in net.k.qaa_theta and "default" in net.wide.qaa_theta  # which has another width
    x, y = torch.randn(5, 24), torch.randn(5, 24)
    theta, *_ = net.q._parameters_of("default")
    expected = net.q.base_layer(x) + net.k.base_layer(y)
    for layer, each in ((net.q, x), (net.k, y)):
        _, up, bias, *_ = layer._parameters_of("default")
        expected = expected + layer.qaa_adapter["default"].delta(each, theta, up, bias)
    calls = counted_calls(monkeypatch)
    torch.testing.assert_close(model(x, y), expected, **CLOSE)
    assert len(calls) == 2
    same = model(x, x)
    assert len(calls) == 3
    for layer in (net.q, net.k):  # by itself, with a graph of its own
        layer(x).sum().backward()
    assert len(calls) == 5
    net.forward = lambda x, y: (net.q(x), x.mul_(2), net.k(x))[-1]  # the same tensor with other numbers
    z = x.clone()
    assert torch.equal(model(z, z), net.k(2 * x)) and not torch.equal(net.k(2 * x), net.k(x))
    del net.forward
    with torch.no_grad():
        assert torch.equal(model(x, x), same)
    with torch.inference_mode():
        assert torch.equal(model(x, x), model(x, x.clone()))
    assert not qaa.peft.layer._ready.features and not qaa.peft.layer._ready.is_open
    with model.disable_adapter():
        assert torch.equal(model(x, y), net.q.base_layer(x) + net.k.base_layer(y))


@pytest.mark.parametrize("readout", ["z", STATE])
def test_a_shared_circuit_is_saved_loaded_copied_and_taken_away(readout, tmp_path):
    config = random_config(readout, **SHARING, scale_channels=True)
    model = adapted(config)
    assert calibrate(model, [{"input_ids": tokens()}]) == 4  # q and o of two layers
    expected = logits(model)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert sum("qaa_theta" in name for name in names) == sum("qaa_channels" in name for name in names) == 4
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(logits(loaded), expected)
        q, k, _ = groups_of_three(loaded)[0]
        q.qaa_theta["default"].data += 0.1
        assert k._parameters_of("default")[0] is q.qaa_theta["default"]
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin), expected) and groups_of_three(twin)[0][1]._owner_of("default") is not None
    torch.testing.assert_close(to_dense(model)(tokens()).logits, expected, **CLOSE)
    if readout == STATE:
        torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(tokens()).logits, expected, **CLOSE)
    model.add_adapter("second", config)  # one of another name, and one of the same name once more
    model.base_model.inject_adapter(model.base_model.model, "default")
    for layer in groups_of_three(model)[0][1:]:
        assert layer._owner_of("default") is layer._owner_of("second") is groups_of_three(model)[0][0]
    assert groups_of_three(model)[0][0].qaa_sharing["default"].count == 3
    if readout == STATE:  # a centre is a constant of each layer that shares it
        centred = adapted(random_config(readout, **SHARING, center_channels=True, adapter_bias=False))
        assert not any(layer.supports_lora_conversion() for layer in layers_of(centred))
    model.delete_adapter("default")
    assert all("default" not in layer.qaa_sharing and "default" not in layer.qaa_up for layer in layers_of(model))
    model.set_adapter("second")
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("part", ["q and k", "q, then k", "crossed", "base model", "between"])
def test_shared_features_stay_within_a_checkpointed_part(part, use_reentrant):
    """Whatever is checkpointed, gradients are those of circuits that are not shared, and nothing is kept."""

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(24, 8), nn.Linear(24, 8), nn.Linear(24, 8)

        def forward(self, x):
            run = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=use_reentrant)
            if part == "q, then k":
                return run(self.q, x) * run(self.k, x) + run(self.v, x)
            if part == "crossed":
                return run(lambda x, y: self.q(x) * self.k(y) + self.v(y), x, x.sin())
            return run(lambda x: self.q(x) * self.k(x) + self.v(x), x)

    config = random_config(target_modules=["q", "k", "v"], shared_circuit=["q", "k", "v"])
    model = adapted(config, Parts()).train()
    x = torch.randn(5, 24, requires_grad=True)

    def step():
        model.zero_grad()
        net = model.get_base_model() if part == "base model" else model
        loss = net(x).square().sum()
        if part == "between":
            with torch.no_grad():
                model.base_model.model.k(x)
            model.get_base_model()(x)
        loss.backward()
        assert not qaa.peft.layer._ready.features
        return [p.grad for p in model.parameters() if p.requires_grad]

    ours = step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QaaLayer, "_features_of_all", lambda *args: None)
        for mine, yours in zip(ours, step(), strict=True):
            torch.testing.assert_close(mine, yours, **CLOSE)


@pytest.mark.parametrize("readout", ["z", "low rank"])
@pytest.mark.parametrize("with_autocast", [False, True])
def test_selective_checkpoints_find_what_they_saved(readout, with_autocast):
    fields = LOW_RANK if readout == "low rank" else {"readout": "z"}
    ops = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = functools.partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, ops)

    class Parts(nn.Sequential):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False, context_fn=contexts)

    model = adapted(random_config(**fields, target_modules=["0", "1"]), Parts(nn.Linear(24, 24), nn.Linear(24, 24)))
    for layer in layers_of(model.train()):
        layer.qaa_pending.clear()
    with torch.autocast("cpu", torch.bfloat16, enabled=with_autocast):
        loss = model(torch.randn(5, 24)).square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_the_first_batch_calibrates_a_shared_circuit_whoever_comes_first():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(24, 8), nn.Linear(24, 8)

        def forward(self, x):
            return self.k(x) + self.q(x)

    config = random_config(
        target_modules=["q", "k"], shared_circuit=["q", "k"], scale_channels=True, calibration="first_batch"
    )
    model, x = adapted(config, Backwards()).train(), torch.randn(50, 24)
    model(x).sum().backward()
    net = model.base_model.model
    torch.testing.assert_close(net.q.qaa_channels["default"], 1 / x.square().mean(0).sqrt())
    assert net.q.qaa_calibrated["default"] == 1 and "default" not in net.k.qaa_calibrated


def test_modules_that_cannot_share_a_circuit_are_refused():
    for names in ("q_proj", ["q_proj"], ["q_proj", 1], 3):
        with pytest.raises(ValueError, match="expected shared_circuit to be a list of at least two names"):
            random_config(shared_circuit=names)
    base = llama()
    expected, names = logits(base), [name for name, _ in base.named_modules()]
    refused = random_config(target_modules=["q_proj", "down_proj"], shared_circuit=["q_proj", "down_proj"])
    with pytest.raises(ValueError, match="expected modules of one parent, one input width and one device among shared"):
        adapted(refused, base)
    assert torch.equal(logits(base), expected) and [name for name, _ in base.named_modules()] == names
    model = adapted(random_config(**SHARING), base)
    expected = logits(model)
    with pytest.raises(ValueError, match="expected modules of one parent, one input width and one device among shared"):
        model.add_adapter("second", refused)
    assert torch.equal(logits(model), expected)
    assert not any("second" in layer.qaa_up for layer in layers_of(model))
    assert {layer._owner_of("default") for layer in groups_of_three(model)[0]} == {groups_of_three(model)[0][0]}


def test_replicas_of_a_model_with_shared_circuits_are_refused():
    model = adapted(random_config(**SHARING))
    replica = groups_of_three(model)[0][1]._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"expected shared_circuit without nn\.DataParallel, received a replica"):
        replica.add_to(torch.zeros(2, 12), "default", torch.randn(2, 24))
