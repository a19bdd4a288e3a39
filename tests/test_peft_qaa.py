"""QAA as a PEFT method: what PEFT and transformers do with a method of their own, they must do with this one."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
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
from safetensors.torch import load_file
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
)

import oracle
import qaa.peft
from qaa.peft import QaaConfig, QaaLayer, calibrate, parameter_groups, to_lora

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
    losses = []
    for _ in range(40):
        loss = model(tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
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
    expected = layer.base_layer(x) + layer.delta("default", x) + layer.delta("second", x)
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(layer(x), expected, **CLOSE)


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
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` with beam search"):
        model.eval().generate(tokens(), adapter_names=["default"] * 3, num_beams=2, max_new_tokens=1)


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


def test_auto_peft_model_finds_the_base_model(tmp_path):
    llama().model.save_pretrained(tmp_path / "base")
    model = adapted(random_config(), AutoModel.from_pretrained(tmp_path / "base").eval())
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).last_hidden_state, model(tokens()).last_hidden_state)


def test_auto_classes_and_transformers_load_the_folder(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    llama().save_pretrained(base)
    model = adapted(random_config(STATE, task_type="CAUSAL_LM"), AutoModelForCausalLM.from_pretrained(base).eval())
    expected = logits(model)
    model.save_pretrained(folder)
    for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        torch.testing.assert_close(logits(auto.from_pretrained(folder).eval()), expected, **CLOSE)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    plain.load_adapter(str(folder), adapter_name="one")
    torch.testing.assert_close(logits(plain), expected, **CLOSE)
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


def test_the_exported_folder_needs_no_qaa(tmp_path):
    model = adapted(random_config(STATE))
    llama().save_pretrained(tmp_path / "base")
    to_lora(model, tmp_path / "lora")
    torch.save(logits(model), tmp_path / "expected.pt")
    code = f"""
import sys, torch, transformers, peft
base = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = peft.PeftModel.from_pretrained(base, {str(tmp_path / "lora")!r}).eval()
with torch.no_grad():
    logits = model(torch.arange(21).reshape(3, 7) * 13 % 60).logits
assert "qaa" not in sys.modules
torch.testing.assert_close(logits, torch.load({str(tmp_path / "expected.pt")!r}), rtol=1e-5, atol=1e-5)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


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
def test_bfloat16_base(readout, autocast_adapter_dtype):
    expected = logits(adapted(random_config(readout)))
    model = adapted(random_config(readout), llama().bfloat16(), autocast_adapter_dtype=autocast_adapter_dtype)
    dtypes = {p.dtype for name, p in model.named_parameters() if "qaa_" in name}
    assert dtypes == {torch.float32 if autocast_adapter_dtype else torch.bfloat16}
    result = logits(model)
    assert result.dtype == torch.bfloat16
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


@pytest.mark.parametrize("readout", ["z", STATE])
def test_an_adapted_model_compiles_without_graph_breaks(readout):
    model = adapted(
        random_config(readout, target_modules="all-linear"), nn.Sequential(nn.Linear(24, 9), nn.Linear(9, 4))
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
        ({"n_layers": 0}, "expected n_layers from 1 to 10000, received 0"),
        ({"n_layers": 2.5}, "expected n_layers from 1 to 10000, received 2.5"),
        ({"ansatz": "star"}, "expected an ansatz among ring, .*, received 'star'"),
        ({"readout": "x"}, "expected a readout 'z', .*, received 'x'"),
        ({"readout": "state[:0]"}, "expected between 1 and 65536 outputs for readout 'state'.*, received 0"),
        ({"readout": []}, "expected at least one Pauli string in the readout, received none"),
        ({"readout": ["ZZ", "Z"]}, "expected Pauli strings of 2 letters from I, X, Y, Z, received 'Z'"),
        ({"scaling": math.inf}, "expected scaling to be a finite number or None, received inf"),
        ({"adapter_bias": "yes"}, "expected adapter_bias to be True or False, received 'yes'"),
        ({"init_weights": None}, "expected init_weights to be True or False, received None"),
        ({"train_circuit": 1}, "expected train_circuit to be True or False, received 1"),
        ({"init_angles": "none"}, "expected init_angles among uniform, small, zero, received 'none'"),
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
    with pytest.raises(ValueError, match="cannot adapt the module 0: expected a layer with 1 to 65536 input features"):
        get_peft_model(model, QaaConfig(target_modules=["0"]))


def test_every_field_says_when_it_pays():
    own = set(QaaConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
    assert len(own) == 14
    for name in own:
        assert len(QaaConfig.__dataclass_fields__[name].metadata["help"]) > 40, name


def gpt_neo_1_3b():
    """EleutherAI/gpt-neo-1.3B by its published shape, without weights."""
    config = GPTNeoConfig(
        hidden_size=2048, num_layers=24, num_heads=16, attention_types=[[["global", "local"], 12]], vocab_size=50257
    )
    with torch.device("meta"):
        return GPTNeoForCausalLM(config)


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


def test_the_best_preset_reads_sixteen_amplitudes():
    config = QaaConfig.preset("best", n_layers=2, target_modules=["v_proj"])
    assert (config.readout, config.n_layers, config.target_modules) == ("state[:16]", 2, {"v_proj"})
    model = adapted(config)
    angles, up = 2 * 5 * 3, 16 * 12
    assert model.get_nb_trainable_parameters()[0] == 2 * (angles + up)
    with pytest.raises(ValueError, match="expected a preset among paper, best, received 'papre'"):
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
    with pytest.raises(ValueError, match="expected angle_lr to be positive, received 0"):
        parameter_groups(model, 1e-3, 0)


def test_the_printed_layer_names_the_method():
    assert repr(layers_of(adapted())[0]).startswith("qaa.QaaLayer(")
    assert peft.get_layer_status(adapted())[0].available_adapters == ["default"]


# ------------------------------------------------------------------------------------------------- channel factors


def outlier_model() -> tuple[nn.Module, torch.Tensor]:
    """A layer whose third input channel is hundreds of times larger than the others, and whose last one is zero."""
    torch.manual_seed(3)
    x = torch.randn(64, 12)
    x[:, 2] *= 400
    x[:, 11] = 0
    return nn.Sequential(nn.Linear(12, 5)), x


@pytest.mark.parametrize("readout", ["state[:6]", "z"])
def test_calibrated_channels_reach_the_features_with_unit_size(readout: str, tmp_path: Path) -> None:
    model, x = outlier_model()
    expected = model(x)
    config = QaaConfig(target_modules=["0"], readout=readout, scale_channels=True)
    model = peft.get_peft_model(model, config)
    trainable = model.get_nb_trainable_parameters()[0]
    assert calibrate(model, [x[:32], x[32:]], forward=lambda model, batch: model(batch)) == 1
    layer = model.base_model.model[0]
    channels = layer.qaa_channels["default"]
    torch.testing.assert_close((x * channels)[:, :11].square().mean(0), torch.ones(11))
    assert channels[11] == 1 and not channels.requires_grad
    assert model.get_nb_trainable_parameters()[0] == trainable  # the factors are saved, not trained
    assert torch.equal(model(x), expected)  # still an exact no-op

    nn.init.normal_(layer.qaa_up["default"])
    with_factors = layer.qaa_adapter["default"].delta(x * channels, *layer._parameters_of("default")[:3])
    torch.testing.assert_close(model(x), expected + with_factors)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(outlier_model()[0], tmp_path)
    torch.testing.assert_close(again(x), model(x))
    if readout.startswith("state"):
        torch.testing.assert_close(model.merge_and_unload()(x), again(x), rtol=1e-4, atol=1e-4)


def test_calibration_says_what_is_missing() -> None:
    model, x = outlier_model()
    plain = peft.get_peft_model(model, QaaConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="scale_channels"):
        calibrate(plain, [x], forward=lambda model, batch: model(batch))
    scaled = peft.get_peft_model(outlier_model()[0], QaaConfig(target_modules=["0"], scale_channels=True))
    with pytest.raises(ValueError, match="received none"):
        calibrate(scaled, [])
    before = scaled.base_model.model[0].qaa_channels["default"].clone()
    with pytest.raises(ValueError, match="NaN or infinity"):
        calibrate(scaled, [x * torch.nan], forward=lambda model, batch: model(batch))
    assert torch.equal(scaled.base_model.model[0].qaa_channels["default"], before)
