"""SoRA: its layer, its proximal step against the definition, its schedule, and pruning to a plain LoRA."""

from __future__ import annotations

import copy
import math

import accelerate
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import qaa.peft
from qaa.peft import (
    SoraCallback,
    SoraConfig,
    SoraLayer,
    soft_threshold,
    sora_l1,
    sora_proximal_step,
    sora_sparsity,
    to_lora,
)
from qaa.peft.sora import threshold_at

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 60}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=24, n_layer=2, n_head=4, n_positions=32)).eval()


def tokens(batch=3, length=7):
    return torch.arange(batch * length).reshape(batch, length) * 13 % 60


def adapted(model=None, **kwargs):
    model = llama() if model is None else model
    torch.manual_seed(1)
    return get_peft_model(model, SoraConfig(**{"init_weights": False, "r": 6, **kwargs})).eval()


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, SoraLayer)]


def zero_gates(model, pattern):
    """Sets the gates of the i-th layer to zero where ``pattern[i]`` is 0."""
    with torch.no_grad():
        for layer, row in zip(layers_of(model), pattern, strict=True):
            layer.sora_gate["default"].mul_(torch.tensor(row, dtype=torch.float32))


# ------------------------------------------------------------------------------------------------ the layer


def test_importing_registers_a_real_peft_type():
    assert PeftType("SORA") is PeftType.SORA and PeftType.SORA in list(PeftType)
    qaa.peft.register("sora", SoraConfig, qaa.peft.SoraModel)
    assert list(PeftType).count(PeftType.SORA) == 1


def test_the_layer_computes_the_published_equation():
    model = adapted(sora_alpha=3.0)
    layer, x = layers_of(model)[0], torch.randn(2, 5, 24)
    down, up, gate = (getattr(layer, name)["default"] for name in ("sora_A", "sora_B", "sora_gate"))
    expected = layer.base_layer(x) + ((x @ down.T) * gate) @ up.T * (3.0 / 6)
    torch.testing.assert_close(layer(x), expected, **CLOSE)


def test_the_published_initialisation_is_an_exact_no_op():
    model = adapted(init_weights=True, r=64, target_modules="all-linear")
    assert torch.equal(logits(model), logits(llama()))
    layer = layers_of(model)[0]
    assert not layer.sora_B["default"].any()
    bound = 1 / math.sqrt(24)  # kaiming_uniform with a = sqrt(5), as LoRA's A
    assert 0.9 * bound < layer.sora_A["default"].abs().max() <= bound
    gates = torch.cat([layer.sora_gate["default"] for layer in layers_of(model)])
    assert abs(gates.mean()) < 0.15 and abs(gates.std() - 1) < 0.15


def test_gradients_reach_every_parameter_of_the_adapter_alone():
    model = adapted().train()
    model(tokens(), labels=tokens()).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".sora_" in name), name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name


def test_dropout_acts_on_the_input_in_training_alone():
    model = adapted(sora_dropout=0.5)
    layer, x = layers_of(model)[0], torch.randn(4, 24)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unmerge(make, safe_merge):
    model = adapted(make())
    expected = logits(model)
    assert (expected - logits(make())).abs().max() > 0.01
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    torch.testing.assert_close(logits(model.merge_and_unload(safe_merge=safe_merge)), expected, **CLOSE)


def test_save_load_switch_and_delete(tmp_path):
    model = adapted()
    model.add_adapter("second", SoraConfig(init_weights=False, r=2))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "second", low_cpu_mem_usage=True)
    model.set_adapter("second")
    assert torch.equal(logits(loaded), logits(model))
    assert (logits(model) - expected).abs().max() > 1e-3
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))


def test_an_adapter_of_another_rank_is_refused(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    other = adapted(r=4)
    with pytest.raises(
        RuntimeError, match=r"expected SoRA weights for a layer of 24 inputs .*\(6, 24\) instead of \(4, 24\)"
    ):
        other.load_state_dict(model.state_dict())


# ------------------------------------------------------------------------------------------------- proximal step


@pytest.mark.parametrize("xi", [0.0, 1e-3, 0.4])
def test_the_soft_threshold_minimises_the_proximal_objective(xi):
    """prox(v) = argmin_g (g - v)^2 / 2 + xi |g|, found here on a grid."""
    grid = np.linspace(-3, 3, 60_001)
    for v in (-2.0, -0.4, -0.0004, 0.0, 0.3, 1.7):
        best = grid[np.argmin((grid - v) ** 2 / 2 + xi * np.abs(grid))]
        assert soft_threshold(torch.tensor(v, dtype=torch.float64), xi).item() == pytest.approx(best, abs=2e-4)


def test_the_repository_operator_repeats_the_published_statements():
    gates = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 0.05
    xi = 0.02
    p = gates.clone()  # TsinghuaC3I/SoRA, src/sparse_optimizer.py
    p[p > xi] -= xi
    p[p < -xi] += xi
    p[abs(p) < xi] = 0.0
    assert torch.equal(soft_threshold(gates, xi, "repository"), p)
    between = (gates.abs() > xi) & (gates.abs() < 2 * xi)
    assert between.sum() > 100 and not p[between].any() and soft_threshold(gates, xi)[between].all()


def test_the_proximal_step_changes_the_gates_of_the_active_adapter():
    model = adapted()
    model.add_adapter("second", SoraConfig(r=3))
    layer = layers_of(model)[0]
    before = {name: gate.detach().clone() for name, gate in layer.sora_gate.items()}
    others = [layer.sora_A["default"].detach().clone(), layer.sora_B["default"].detach().clone()]
    sora_proximal_step(model, 0.5)
    assert torch.equal(layer.sora_gate["default"], soft_threshold(before["default"], 0.5))
    assert torch.equal(layer.sora_gate["second"], before["second"])
    assert torch.equal(layer.sora_A["default"], others[0]) and torch.equal(layer.sora_B["default"], others[1])
    sora_proximal_step(model, 0.5, operator="repository", adapter_name="second")
    assert torch.equal(layer.sora_gate["second"], soft_threshold(before["second"], 0.5, "repository"))
    gates = torch.cat([layer.sora_gate["default"] for layer in layers_of(model)])
    assert 0 < sora_sparsity(model) == (gates == 0).float().mean().item() < 1
    assert sora_l1(model).item() == pytest.approx(gates.abs().mean().item())
    sora_l1(model).backward()
    assert torch.equal(layer.sora_gate["default"].grad, layer.sora_gate["default"].detach().sign() / gates.numel())


def test_the_proximal_step_refuses_models_and_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="expected a model with an active SoRA adapter, received a LlamaForCausalLM"):
        sora_proximal_step(llama(), 0.1)
    with pytest.raises(ValueError, match="expected a model with a SoRA adapter named 'other'"):
        sora_proximal_step(adapted(), 0.1, adapter_name="other")
    with pytest.raises(ValueError, match="expected a threshold xi of at least 0, received -1"):
        sora_proximal_step(adapted(), -1)
    with pytest.raises(ValueError, match="expected an operator among soft, repository, received 'hard'"):
        sora_proximal_step(adapted(), 0.1, operator="hard")


def test_proximal_gradient_descent_finds_a_sparse_target():
    """Of eight ranks the target needs two; the proximal step finds that out."""
    torch.manual_seed(0)
    base = nn.Linear(16, 12)
    x = torch.randn(256, 16)
    target = base(x).detach() + x @ torch.randn(16, 2) @ torch.randn(2, 12)
    losses = {}
    for xi in (0.0, 1e-2):
        torch.manual_seed(2)
        model = get_peft_model(nn.Sequential(base), SoraConfig(target_modules=["0"], r=8))
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(600):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if xi:
                sora_proximal_step(model, xi)
        losses[xi] = loss.item(), sora_sparsity(model)
        model.unload()
    assert losses[0.0][1] == 0 and losses[1e-2][1] == 6 / 8
    assert losses[1e-2][0] < 1e-3 * (target - base(x)).square().mean().item()


# ----------------------------------------------------------------------------------------------------- schedules


def test_schedules_are_those_of_the_authors():
    """numpy.linspace in three scales, as SparseAdamW._build_lambda_list."""
    start, stop, count = 0.01, 2.0, 10
    expected = {
        "linear": np.linspace(start, stop, count),
        "log_linear": np.log(np.linspace(np.exp(start), np.exp(stop), count)),
        "exp_linear": np.exp(np.linspace(np.log(start), np.log(stop), count)),
    }
    for schedule, values in expected.items():
        ours = [threshold_at(i / (count - 1), start, stop, schedule) for i in range(count)]
        np.testing.assert_allclose(ours, values, rtol=1e-12)
        callback = SoraCallback(start, max_xi=stop, schedule=schedule, rounds=count)
        steps = [callback.threshold(step, 1000) for step in range(1000)]
        assert len(set(steps)) == count and steps == sorted(steps)
        np.testing.assert_allclose(sorted(set(steps)), values, rtol=1e-12)


def test_a_constant_threshold_may_start_late():
    callback = SoraCallback(0.1, dense_share=0.5)
    assert [callback.threshold(step, 11) for step in range(11)] == [0.0] * 5 + [0.1] * 6
    assert SoraCallback(0.1).threshold(0, 1) == 0.1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"schedule": "cosine"},
            "expected a schedule among constant, linear, log_linear, exp_linear, received 'cosine'",
        ),
        ({"schedule": "linear"}, "expected max_xi with every schedule but 'constant', received max_xi=None"),
        ({"max_xi": 1.0}, "expected max_xi with every schedule but 'constant', received max_xi=1.0"),
        ({"xi": 0.0, "max_xi": 1.0, "schedule": "exp_linear"}, "expected a threshold xi of at least 0 .*received 0.0"),
        (
            {"xi": 1.0, "max_xi": 0.5, "schedule": "linear"},
            "expected max_xi to be a number of at least xi=1.0, received 0.5",
        ),
        ({"dense_share": 1.0}, "expected dense_share from 0 to below 1, received 1.0"),
        ({"rounds": 1}, "expected rounds to be an integer of at least 2 or None, received 1"),
        ({"operator": "hard"}, "expected an operator among soft, repository, received 'hard'"),
        ({"l1": -1.0}, "expected l1 to be a number of at least 0, received -1.0"),
    ],
)
def test_the_callback_refuses_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SoraCallback(**kwargs)


def train(model, callback, tmp_path, steps=12, **kwargs):
    data = [{"input_ids": row, "labels": row} for row in tokens(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=steps, **kwargs,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    return trainer


def test_the_callback_makes_a_trainer_sparsify(tmp_path):
    dense, sparse = adapted(), adapted()
    train(dense, SoraCallback(xi=0.0), tmp_path)
    trainer = train(sparse, SoraCallback(xi=1e-3, max_xi=0.2, schedule="linear"), tmp_path)
    assert sora_sparsity(dense) == 0
    assert 0.5 < sora_sparsity(sparse) < 1
    assert trainer.state.log_history[-2]["sora_sparsity"] == sora_sparsity(sparse)


def test_the_callback_steps_once_for_each_optimizer_step(tmp_path):
    class Counting(SoraCallback):
        seen = ()

        def threshold(self, step, max_steps):
            self.seen = (*self.seen, (step, max_steps))
            return super().threshold(step, max_steps)

    callback = Counting(xi=1e-3)
    train(adapted(), callback, tmp_path, steps=3, gradient_accumulation_steps=2)
    assert callback.seen == ((0, 3), (1, 3), (2, 3))


def test_the_l1_option_adds_the_subgradient_of_the_authors_loss_term(tmp_path):
    """With SGD and no threshold the gates must move as if ``l1 * sora_l1(model)`` were part of the loss."""
    l1, lr = 10.0, 1e-2
    ours, plain = adapted(), adapted()
    train(ours, SoraCallback(xi=0.0, l1=l1), tmp_path, steps=1, optim="sgd", max_grad_norm=0, seed=3)
    train(plain, SoraCallback(xi=0.0), tmp_path, steps=1, optim="sgd", max_grad_norm=0, seed=3)
    start = adapted()
    total = sum(layer.sora_gate["default"].numel() for layer in layers_of(start))
    for a, b, s in zip(layers_of(ours), layers_of(plain), layers_of(start), strict=True):
        shift = a.sora_gate["default"] - b.sora_gate["default"]
        torch.testing.assert_close(shift, -lr * l1 / total * s.sora_gate["default"].sign(), rtol=1e-3, atol=1e-7)
        assert torch.equal(a.sora_A["default"], b.sora_A["default"])


def test_the_callback_refuses_a_model_without_sora(tmp_path):
    with pytest.raises(ValueError, match="expected a model with an active SoRA adapter, received a"):
        train(get_peft_model(llama(), LoraConfig()), SoraCallback(), tmp_path, steps=1)


# ---------------------------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize(
    "pattern",
    [
        [[1, 1, 1, 1, 1, 1]] * 4,
        [[1, 0, 1, 0, 1, 1], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 1]],
        [[1, 0, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]],
    ],
    ids=["dense", "uneven", "whole layers"],
)
def test_pruning_to_a_lora_keeps_the_outputs(tmp_path, pattern):
    model = adapted(sora_alpha=5.0)
    zero_gates(model, pattern)
    config = to_lora(model, tmp_path)
    ranks = [sum(row) for row in pattern if any(row)]
    weights = load_file(tmp_path / "adapter_model.safetensors")
    # every server scales by alpha / r of the whole adapter; behind its own ranks a layer has zeros
    downs = [w for key, w in weights.items() if "lora_A" in key]
    assert {w.shape[0] for w in downs} == {config.r} == {config.lora_alpha} == {max(ranks)}
    assert sorted(int(w.any(1).sum()) for w in downs) == sorted(ranks)
    assert not config.rank_pattern and not config.alpha_pattern
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert sum(hasattr(module, "lora_A") for module in loaded.modules()) == len(ranks)


def test_offloaded_adapters_are_refused_unless_accelerate_loads_them_whole(tmp_path):
    model = adapted()
    expected = logits(model)
    parts, whole = (
        accelerate.disk_offload(copy.deepcopy(model), tmp_path / str(len(names)), execution_device="cpu", **names)
        for names in ({}, {"preload_module_classes": ["SoraLayer"]})
    )
    with pytest.raises(RuntimeError, match="expected the SoRA adapter 'default' to be loaded"):
        logits(parts)
    torch.testing.assert_close(logits(whole), expected, rtol=1e-5, atol=1e-5)


def test_a_step_that_sixteen_bits_round_to_none_is_refused():
    model = adapted()
    for layer in (module for module in model.modules() if isinstance(module, SoraLayer)):
        gate = layer.sora_gate["default"]
        gate.data = torch.ones_like(gate, dtype=torch.bfloat16)
    first = next(module for module in model.modules() if isinstance(module, SoraLayer)).sora_gate["default"]
    first.data.fill_(0.01)
    with pytest.raises(ValueError, match="expected gates of float32, received bfloat16 in"):
        sora_proximal_step(model, 1e-3)
    assert bool((first == torch.tensor(0.01, dtype=torch.bfloat16)).all())  # nothing has changed
    sora_proximal_step(model, 0.25)
    sora_proximal_step(model, 0.75)
    assert sora_sparsity(model) == 1


def test_pruning_selects_exactly_the_layers_that_are_left(tmp_path):
    """``lin`` is pruned away and ``block.lin`` is not: a list of endings could not tell them apart."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 6)
            self.block = nn.Module()
            self.block.lin = nn.Linear(6, 6)
            self.outer = nn.Module()
            self.outer.block = nn.Module()
            self.outer.block.lin = nn.Linear(6, 6)

        def forward(self, x):
            return self.outer.block.lin(self.block.lin(self.lin(x)))

    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 6)
    weights = net.state_dict()
    model = get_peft_model(net, SoraConfig(target_modules=["lin"], r=3, init_weights=False)).eval()
    zero_gates(model, [[0, 0, 0], [1, 0, 1], [0, 0, 0]])
    expected = model(x).detach()
    config = to_lora(model, tmp_path)
    assert config.target_modules == r"block\.lin"
    fresh = Net()
    fresh.load_state_dict({key.replace(".base_layer", ""): w for key, w in weights.items() if "sora" not in key})
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-5)


def test_pruning_refuses_an_adapter_without_any_rank_left(tmp_path):
    model = adapted()
    sora_proximal_step(model, 100.0)
    with pytest.raises(
        ValueError, match="expected an adapter with a gate that is not zero, received 'default' without"
    ):
        to_lora(model, tmp_path)


# ----------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "expected r to be an integer from 1 to 65536, received 0"),
        ({"r": 2.0}, "expected r to be an integer from 1 to 65536, received 2.0"),
        ({"sora_alpha": 0}, "expected sora_alpha to be a positive number, received 0"),
        ({"sora_dropout": 1.0}, "expected sora_dropout from 0 to below 1, received 1.0"),
        ({"init_weights": "yes"}, "expected init_weights to be True or False, received 'yes'"),
        ({"target_modules": "q", "layers_pattern": "h"}, "`layers_pattern` cannot be used when `target_modules` is"),
    ],
)
def test_bad_fields_are_refused_in_one_sentence(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        SoraConfig(**fields)
    assert "\n" not in str(error.value)


def test_layer_index_zero_selects_one_layer():
    model = adapted(target_modules=["v_proj"], layers_to_transform=0)
    assert [name for name, module in model.named_modules() if isinstance(module, SoraLayer)] == [
        "base_model.model.model.layers.0.self_attn.v_proj"
    ]
