"""The torch modules against the oracle and against their own documentation."""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import oracle
import qaa
from qaa.nn import Adapter, DenseSquare, QAALinear, QuantumLayer, Square, Whitening, random_signs
from qaa.noise import NoiseModel

FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}


def layer_and_input(readout="z", d=12, out=5, dtype=torch.float32, **kwargs):
    """A QAALinear with parameters that are all different from zero."""
    torch.manual_seed(0)
    layer = QAALinear(nn.Linear(d, out, dtype=dtype), n_layers=2, readout=readout, **kwargs)
    for parameter in (layer.up, layer.bias):
        if parameter is not None:
            nn.init.normal_(parameter)
    return layer, torch.randn(3, 4, d, dtype=dtype)


def oracle_features(layer, x):
    adapter = layer.adapter
    theta = layer.theta.detach().double().numpy()
    rows = x.detach().double().reshape(-1, x.shape[-1]).numpy()
    features = oracle.features(adapter.circuit, theta, rows, adapter.readout, normalize=not adapter.is_linear)
    return torch.from_numpy(np.ascontiguousarray(features.real)).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("readout", ["z", "probs", "probs[:3]", "state", "state[:3]", ["ZIII", "XYZI", "IIIX"]])
@pytest.mark.parametrize("normalize", [True, False])
def test_quantum_layer_computes_the_features_of_the_oracle(readout, normalize):
    torch.manual_seed(0)
    layer = QuantumLayer(qaa.ansatz("strongly_entangling", 4, 2), readout, normalize=normalize).double()
    x = torch.randn(2, 3, 13, dtype=torch.float64)
    expected = oracle.features(
        layer.circuit, layer.theta.detach().numpy(), x.reshape(6, 13).numpy(), layer.readout, normalize=normalize
    )
    np.testing.assert_allclose(layer(x).detach().reshape(6, -1).numpy(), expected, rtol=1e-10, atol=1e-12)


def test_quantum_layer_starts_with_uniform_angles_and_passes_gradients():
    torch.manual_seed(0)
    layer = QuantumLayer(qaa.ansatz("ring", 6, 60))
    angles = layer.theta.detach()
    assert angles.min() < -3 and angles.max() > 3 and angles.abs().max() <= math.pi
    assert abs(angles.std().item() - math.pi / math.sqrt(3)) < 0.1
    x = torch.randn(2, 60, requires_grad=True)
    layer(x).square().sum().backward()
    assert layer.theta.grad.abs().max() > 0 and x.grad.abs().max() > 0


def test_quantum_layer_defines_the_features_of_a_zero_row_as_zero():
    layer = QuantumLayer(qaa.ansatz("ring", 3))
    x = torch.tensor([[0.0] * 8, [1.0] * 8], requires_grad=True)
    features = layer(x)
    features.sum().backward()
    assert torch.equal(features[0], torch.zeros(3)) and torch.equal(x.grad[0], torch.zeros(8))
    assert features[1].abs().max() > 0


def test_quantum_layer_travels_through_state_dicts_and_pickle():
    layer = QuantumLayer(qaa.ansatz("brick", 3, 2), "probs[:5]")
    x = torch.randn(4, 7)
    other = QuantumLayer(qaa.ansatz("brick", 3, 2), "probs[:5]")
    other.load_state_dict(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (other, copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), layer(x))
    assert "n_wires=3" in repr(layer) and "probs[:5]" in repr(layer)


def test_quantum_layer_refuses_bad_arguments():
    with pytest.raises(TypeError, match=r"expected circuit to be a qaa\.Circuit, received str"):
        QuantumLayer("ring")
    with pytest.raises(ValueError, match="expected Pauli strings of 3 letters"):
        QuantumLayer(qaa.ansatz("ring", 3), ["ZZ"])
    with pytest.raises(ValueError, match="9"):
        QuantumLayer(qaa.ansatz("ring", 3))(torch.ones(2, 9))


SQUARES = [(16, 4, 1), (9, 4, 2), (2, 1, 1), (7, 1, 3), (32, 5, 3), (40, 3, 1)]  # width, wires, layers


def square_and_input(d=16, wires=4, layers=1, out=3):
    torch.manual_seed(0)
    model = Square(d, out, wires, layers, hidden_features=5).double()
    return model, torch.randn(2, 3, d, dtype=torch.float64)


@pytest.mark.parametrize(("d", "wires", "layers"), SQUARES)
def test_square_computes_its_equation(d, wires, layers):
    model, x = square_and_input(d, wires, layers)
    assert (model.bottleneck is None) == (d == 2**wires)
    embedded = x if model.bottleneck is None else x @ model.bottleneck.weight.T + model.bottleneck.bias
    rows = embedded.detach().reshape(6, -1).numpy()
    theta = model.circuit.theta.detach().numpy()
    circuit = qaa.ansatz("ring", wires, layers)
    readouts = [qaa.Readout.parse(name, wires) for name in ("probs", "z")]
    expected = np.concatenate([oracle.features(circuit, theta, rows, readout) for readout in readouts], axis=1)
    np.testing.assert_allclose(model.features(x).detach().reshape(6, -1).numpy(), expected, rtol=0, atol=1e-12)
    first, _, last = model.head
    hidden = np.tanh(expected @ first.weight.detach().numpy().T + first.bias.detach().numpy())
    result = hidden @ last.weight.detach().numpy().T + last.bias.detach().numpy()
    np.testing.assert_allclose(model(x).detach().reshape(6, -1).numpy(), result, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("d", "wires", "layers"), SQUARES)
def test_squares_classical_form_is_exact(d, wires, layers):
    model, x = square_and_input(d, wires, layers)
    theta = model.circuit.theta.detach().numpy()
    matrix = model.to_matrix()
    np.testing.assert_allclose(
        matrix.detach().numpy(), oracle.unitary(qaa.ansatz("ring", wires, layers), theta), rtol=0, atol=1e-12
    )
    x[0, 0] = 0.0
    if model.bottleneck is not None:
        nn.init.zeros_(model.bottleneck.bias)  # a zero row then embeds as zero
    dense = model.to_classical()
    torch.testing.assert_close(dense(x), model(x), rtol=0, atol=1e-12)
    assert torch.equal(model.features(x)[0, 0], torch.zeros(2**wires + wires, dtype=torch.float64))
    assert {name for name, _ in dense.named_parameters()} == {
        name for name, _ in model.named_parameters() if name != "circuit.theta"
    } | {"mix.weight"}
    before = dense(x).detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert torch.equal(dense(x), before) and not torch.equal(model(x), before)


def test_squares_gradients_are_those_of_its_classical_form():
    model, x = square_and_input(9, 4, 2)
    dense = model.to_classical()
    x, twin = x.requires_grad_(), x.detach().clone().requires_grad_()
    model(x).square().sum().backward()
    dense(twin).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=0, atol=1e-12)
    # the angles see the dense gradient through the matrix
    unitary = model.to_matrix()
    through = torch.cat([unitary.real, unitary.imag])
    (grad_theta,) = torch.autograd.grad(through, model.circuit.theta, dense.mix.weight.grad)
    torch.testing.assert_close(grad_theta, model.circuit.theta.grad, rtol=0, atol=1e-12)
    for name, parameter in dense.named_parameters():
        if name != "mix.weight":
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=0, atol=1e-12)


def test_square_passes_gradcheck():
    model, x = square_and_input(5, 2, 2)
    names, parameters = zip(*((n, p.detach().requires_grad_()) for n, p in model.named_parameters()), strict=True)

    def output(x, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x[0].requires_grad_(), *parameters), fast_mode=False)


def test_square_travels_and_compiles():
    model, x = square_and_input(9)
    other, _ = square_and_input(9)
    assert not any("signs" in name for name in model.state_dict())
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model), torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)):
        torch.testing.assert_close(twin(x), model(x), rtol=0, atol=1e-12)
    dense = model.to_classical()
    fresh = DenseSquare(Square(9, 3, 4, hidden_features=5).double())
    fresh.load_state_dict(dense.state_dict())
    assert torch.equal(fresh(x), dense(x))


def test_squares_angles_learn_what_a_frozen_circuit_cannot():
    """Labels from one circuit's <Z>, a head that is only a readout of it: trained angles find them."""
    teacher, x = square_and_input()
    torch.manual_seed(3)
    x = torch.randn(256, 16, dtype=torch.float64)
    target = teacher.features(x)[:, 16:17].detach() * 4
    losses = {}
    for train_angles in (True, False):
        torch.manual_seed(1)
        student = Square(16, 1).double()
        student.circuit.theta.requires_grad_(train_angles)
        optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=0.02)
        for _ in range(300):
            loss = (student(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[train_angles] = loss.item()
    assert losses[True] < 0.5 * losses[False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "expected in_features to be an integer from 1 to 2147483647, received 0"),
        ((16, 1.0), r"expected out_features to be an integer from 1 to 2147483647, received 1\.0"),
        ((16, 1, 17), "expected n_wires to be an integer from 1 to 16, received 17"),
        ((16, 1, 4, 0), "expected n_layers to be an integer from 1 to 10000, received 0"),
        ((16, 1, 4, 1, True), "expected hidden_features to be an integer from 1 to 2147483647, received True"),
    ],
)
def test_square_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Square(*arguments)
    for width in (15, 17):
        with pytest.raises(ValueError, match=f"expected x with a last dimension of 16, received {width}"):
            Square(16, 1)(torch.ones(2, width))


@pytest.mark.parametrize("readout", ["z", "probs[:6]", ["ZIII", "XYZI"], "state", "state[:3]"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_qaa_linear_computes_its_equation(readout, has_bias):
    layer, x = layer_and_input(readout, adapter_bias=has_bias, scaling=0.7)
    expected = oracle_features(layer, x).float() @ layer.up.T
    expected = expected + layer.bias if has_bias else expected
    torch.testing.assert_close(layer(x), layer.base(x) + 0.7 * expected, **FLOAT32)


@pytest.mark.parametrize("readout", ["z", "state[:4]"])
def test_fresh_qaa_linear_returns_what_the_base_returns_and_freezes_it(readout):
    base = nn.Linear(12, 5)
    layer, x = QAALinear(base, readout=readout), torch.randn(3, 12)
    assert torch.equal(layer(x), base(x))
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trained == {"theta", "up", "bias"} - ({"bias"} if readout != "z" else set())


def test_defaults_follow_the_readout():
    assert Adapter.create(48).scaling == math.sqrt(2**6 + 1)
    assert Adapter.create(48, readout="probs[:4]").scaling == math.sqrt(2**6 + 1)
    assert Adapter.create(48, readout="state[:4]").scaling == 1
    assert QAALinear(nn.Linear(8, 2)).bias is not None
    assert QAALinear(nn.Linear(8, 2), readout="state").bias is None
    assert QAALinear(nn.Linear(8, 2), readout="probs").bias is None


@pytest.mark.parametrize(
    ("width", "wires"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (2048, 11), (2049, 12), (65536, 16)]
)
def test_number_of_wires(width, wires):
    assert Adapter.create(width).circuit.n_wires == wires


@pytest.mark.parametrize("readout", ["z", "probs[:3]", "state[:3]"])
def test_qaa_linear_gradients_are_those_of_its_equation(readout):
    layer, x = layer_and_input(readout, d=6, out=3, dtype=torch.float64, adapter_bias=True)
    parameters = (layer.theta, layer.up, layer.bias)
    inputs = (x[0].requires_grad_(), *(p.detach().requires_grad_() for p in parameters))

    def output(x, theta, up, bias):
        return torch.func.functional_call(layer, {"theta": theta, "up": up, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(output, inputs, fast_mode=False)


@pytest.mark.parametrize("readout", ["z", "state[:4]"])
def test_qaa_linear_learns_its_angles_and_its_up_projection(readout):
    teacher, x = layer_and_input(readout, d=8, out=4)
    torch.manual_seed(1)
    student = QAALinear(copy.deepcopy(teacher.base), n_layers=2, readout=readout)
    start = student.theta.detach().clone()
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=0.03)
    x = torch.randn(64, 8)
    target = teacher(x).detach()
    losses = []
    for _ in range(150):
        loss = (student(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert (student.theta - start).abs().max() > 0.05


@pytest.mark.parametrize("readout", ["z", "state[:4]"])
def test_half_precision_base_keeps_its_dtype_and_the_adapter_computes_in_float32(readout):
    layer, x = layer_and_input(readout)
    expected = layer(x)
    half = copy.deepcopy(layer)
    half.base = half.base.to(torch.bfloat16)
    result = half(x.to(torch.bfloat16))
    assert result.dtype == torch.bfloat16 and half.up.dtype == torch.float32
    assert (result.float() - expected).abs().max() < 0.02 * expected.abs().max()
    torch.manual_seed(0)
    fresh = QAALinear(nn.Linear(12, 5, dtype=torch.bfloat16), readout=readout)
    assert fresh.theta.dtype == fresh.up.dtype == torch.float32


@pytest.mark.parametrize("readout", ["z", "state[:4]"])
def test_qaa_linear_compiles_without_graph_breaks(readout):
    layer, x = layer_and_input(readout)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (x, x[:2, :3]):
        torch.testing.assert_close(compiled(batch), layer(batch), **FLOAT32)
    compiled(x).sum().backward()
    assert layer.theta.grad.abs().max() > 0


def test_known_rows_follow_the_angles():
    """Rows are remembered where no gradient is needed; they must never be those of other angles."""
    layer, x = layer_and_input("state[:3]")

    def expected():
        return layer.base(x) + oracle_features(layer, x).float() @ layer.up.T

    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected(), **FLOAT32)
        first = layer.adapter._down(layer.theta, None)
        assert layer.adapter._down(layer.theta, None) is first is not layer.adapter.down(layer.theta)
        layer.theta.data[0, 0, 0] += 1.0  # what autograd's version counter does not see
        assert layer.adapter._down(layer.theta, None) is not first
        torch.testing.assert_close(layer(x), expected(), **FLOAT32)
    with torch.inference_mode():
        layer.theta.add_(0.5)
        torch.testing.assert_close(layer(x), expected(), **FLOAT32)
    layer.theta.requires_grad_(False)
    (layer(x).square()).sum().backward()  # rows from inference mode are usable in training
    assert layer.up.grad.abs().max() > 0


def test_a_gpu_makes_rows_anew_instead_of_asking_whether_it_knows_them(monkeypatch):
    """The answer would be a synchronisation."""
    adapter, calls = Adapter.create(12, n_layers=2, readout="state[:3]"), []
    on_gpu = SimpleNamespace(is_cuda=True, requires_grad=False)
    monkeypatch.setattr(Adapter, "_rows", lambda *args: calls.append(args[1:]))
    monkeypatch.setattr(torch, "equal", None)
    for _ in range(2):
        adapter.down(on_gpu)
        adapter._down(on_gpu, on_gpu, on_gpu, on_gpu, torch.bfloat16)
    assert calls == [(on_gpu, *[None] * 4), (*[on_gpu] * 4, torch.bfloat16)] * 2


def test_known_rows_are_those_of_their_factors_and_dtype():
    adapter, whitening, theta, _, _, x = whitened_adapter("state[:3]", ("channels",))
    plain = adapter.down(theta)
    with torch.no_grad():
        assert torch.equal(adapter.features(theta, x, whitening), x @ (plain * whitening.channels).T)
        whitening.channels.data.mul_(2)
        assert torch.equal(adapter.features(theta, x, whitening), x @ (plain * whitening.channels).T)
        with torch.autocast("cpu", torch.bfloat16):
            assert adapter.features(theta, x.float(), whitening).dtype == torch.bfloat16
        assert torch.equal(adapter.features(theta, x), x @ plain.T)
        square = Adapter.create(8, readout="state[:8]")  # where a gain may be taken for a factor of the channels
        theta, mix, factors = torch.rand(square.circuit.parameter_shape), torch.rand(2, 8), torch.rand(8)
        of_channels, of_gain = square._down(theta, mix, None, factors), square._down(theta, mix, factors)
        assert torch.equal(of_gain, square._down(theta, mix * factors)) and not torch.equal(of_channels, of_gain)


@pytest.mark.parametrize("readout", ["z", "probs[:4]", "state[:4]"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_makes_no_difference_between_an_input_and_its_cast(readout, dtype, monkeypatch):
    """What autocast would cast back is not cast; values and gradients are the same to the bit."""
    layer, x = layer_and_input(readout)
    results, casts = [], qaa.ops._is_cast_back
    for is_cast_back in (casts, lambda *_: False):
        monkeypatch.setattr(qaa.ops, "_is_cast_back", is_cast_back)
        leaf = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype):
            assert casts(leaf, layer.up.dtype)
            value = layer(leaf)
        grad = torch.linspace(-1, 1, value.numel()).reshape(value.shape).to(dtype)
        trained = [layer.theta, layer.up, *([] if layer.bias is None else [layer.bias])]
        results.append((value, *torch.autograd.grad(value, (leaf, *trained), grad)))
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)


def test_an_adapter_in_float64_is_that_under_autocast_as_well():
    layer, x = layer_and_input("state[:4]", dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        inputs = x.bfloat16()
        result = layer.adapter.features(layer.theta, inputs.double())
        assert not qaa.ops._is_cast_back(inputs, layer.up.dtype)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, oracle_features(layer, inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"base": nn.Conv1d(3, 4, 1)}, r"expected base to be a torch\.nn\.Linear, received Conv1d"),
        ({"n_layers": 0}, "expected n_layers to be an integer from 1 to 10000, received 0"),
        ({"ansatz": "rings"}, "expected an ansatz among ring, .*, received 'rings'"),
        ({"readout": "y"}, "expected a readout 'z', .*, received 'y'"),
        ({"readout": "state[:17]"}, "expected between 1 and 16 outputs for readout 'state' on 4 wires, received 17"),
        ({"scaling": math.nan}, "expected scaling to be a finite number or None, received nan"),
        ({"init_angles": "big"}, "expected init_angles among uniform, small, zero, received 'big'"),
    ],
)
def test_qaa_linear_refuses_bad_arguments(kwargs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        QAALinear(**{"base": nn.Linear(12, 5), **kwargs})


def test_a_layer_that_is_too_wide_is_refused():
    with pytest.raises(ValueError, match="expected in_features to be an integer from 1 to 65536, received 65537"):
        QAALinear(nn.Linear(65537, 1, device="meta"))


def test_quadratic_adapters_have_no_rows():
    with pytest.raises(ValueError, match="expected the readout 'state', which is linear in x, received"):
        Adapter.create(8).down(torch.zeros(1, 3, 3))


@pytest.mark.parametrize(("width", "max_wires", "blocks", "wires"), [
    (12, 2, 3, 2), (13, 3, 2, 3), (9, 3, 2, 3), (24, 4, 2, 4), (5, 1, 3, 1), (6, 3, 1, 3), (3, 16, 1, 2),
])  # fmt: skip
@pytest.mark.parametrize("readout", ["z", "probs[:1/2]", "state[:1/2]"])
def test_a_wide_input_goes_through_its_circuit_in_blocks(readout, width, max_wires, blocks, wires):
    generator = torch.Generator().manual_seed(width)
    adapter = Adapter.create(width, n_layers=2, readout=readout, max_wires=max_wires)
    assert (adapter.blocks, adapter.circuit.n_wires) == (blocks, wires)
    count = wires if readout == "z" else 2**wires // 2
    assert adapter.n_features == blocks * count
    theta = torch.randn(adapter.circuit.parameter_shape, dtype=torch.float64, generator=generator)
    x = torch.randn(2, 3, width, dtype=torch.float64, generator=generator)
    at = math.ceil(width / blocks)
    pieces = [x[..., start : start + at].reshape(6, -1).numpy() for start in range(0, width, at)]
    is_linear = readout.startswith("state")
    found = [oracle.features(adapter.circuit, theta.numpy(), u, readout, normalize=not is_linear) for u in pieces]
    expected = torch.from_numpy(np.concatenate(found, axis=1).real.copy()).reshape(2, 3, -1)
    torch.testing.assert_close(adapter.features(theta, x), expected, rtol=1e-10, atol=1e-12)
    mix = torch.randn(2, adapter.n_features, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(adapter.features(theta, x, mix=mix), expected @ mix.T, rtol=1e-10, atol=1e-12)
    channels = torch.rand(width, dtype=torch.float64, generator=generator) + 0.5
    whitening = Whitening(channels=channels)
    expected = adapter.features(theta, x * channels, mix=mix)
    torch.testing.assert_close(adapter.features(theta, x, whitening, mix), expected, rtol=1e-10, atol=1e-12)
    for tensor in (theta, x, mix):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda theta, x, mix: adapter.features(theta, x, whitening, mix), (theta, x, mix))
    assert adapter.features(theta, x[:, :0]).shape == (2, 0, adapter.n_features)


@pytest.mark.parametrize("name", ["ring", "basic_entangler", "strongly_entangling", "brick"])
@pytest.mark.parametrize(("width", "max_wires"), [(13, None), (8, None), (13, 3), (3, None), (1, None)])
def test_a_vector_sets_the_angles_that_it_meets(name, width, max_wires):
    """Against the oracle, vector by vector, with the formula of the docstring in plain loops."""
    generator = torch.Generator().manual_seed(width)
    adapter = Adapter.create(width, 2, name, max_wires=max_wires, reupload=True)
    n, shape = adapter.circuit.n_wires, adapter.circuit.parameter_shape
    assert adapter.parameter_shape == (2, *shape)
    theta = torch.randn(adapter.parameter_shape, dtype=torch.float64, generator=generator)
    x = torch.randn(2, 3, width, dtype=torch.float64, generator=generator)
    at = math.ceil(width / adapter.blocks)
    expected = []
    for vector in x.reshape(6, width).numpy():
        parts = []
        for start in range(0, width, at):
            u = np.concatenate([vector[start : start + at], np.zeros(at)])[:at]
            z = [math.sqrt(n) * sum(u[i] for i in range(at) if i % n == w) / np.linalg.norm(u) for w in range(n)]
            angles = theta[0].numpy().copy()
            for w in range(n):
                angles[:, w] += theta[1, :, w].numpy() * z[w]
            parts.append(oracle.features(adapter.circuit, angles, u[None], "z")[0])
        expected.append(np.concatenate(parts))
    expected = torch.from_numpy(np.stack(expected)).reshape(2, 3, -1)
    torch.testing.assert_close(adapter.features(theta, x), expected, rtol=1e-10, atol=1e-12)
    theta.requires_grad_()
    x.requires_grad_()
    assert torch.autograd.gradcheck(adapter.features, (theta, x))
    assert not adapter.features(theta, torch.zeros(2, width, dtype=torch.float64)).any()
    still = theta.detach().clone()
    still[1] = 0
    plain = Adapter.create(width, 2, name, max_wires=max_wires)
    torch.testing.assert_close(adapter.features(still, x), plain.features(still[0], x), rtol=1e-10, atol=1e-12)


def test_angles_that_vectors_set_are_of_unit_size_and_belong_to_observables():
    adapter = Adapter.create(768, reupload=True)
    theta = torch.stack([torch.zeros(adapter.circuit.parameter_shape), torch.ones(adapter.circuit.parameter_shape)])
    angles = adapter._angles(theta, torch.randn(4096, 768, generator=torch.Generator().manual_seed(0)))
    assert (angles.std(0) - 1).abs().max() < 0.05 and angles.mean(0).abs().max() < 0.05
    half = torch.randn(3, 768, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert adapter._angles(theta, half).dtype == torch.float32
    assert adapter.features(theta, half).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"expected Pauli strings or 'probs' with reupload, received 'state\[:4\]'"):
        Adapter.create(8, readout="state[:4]", reupload=True)
    with pytest.raises(ValueError, match="expected reupload to be True or False, received 1"):
        Adapter.create(8, reupload=1)
    with pytest.raises(ValueError, match=r"expected theta of shape \(2, 1, 3, 3\), received \(3, 2, 1, 3, 3\)"):
        Adapter.create(8, reupload=True).features(torch.zeros(3, 2, 1, 3, 3), torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"expected theta of shape \(2, 3, 3\), received \(2, 2, 3, 3\)"):
        Adapter.create(8, 2).features(torch.zeros(2, 2, 3, 3), torch.randn(2, 8))
    with pytest.raises(ValueError, match="expected one circuit for all vectors with noise, received an adapter with"):
        adapter.with_noise(NoiseModel(depolarizing=0.1), 3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3)], ids=str)
def test_angles_do_not_depend_on_the_size_of_a_vector(dtype, tolerance):
    adapter = Adapter.create(768, 2, reupload=True)
    theta = torch.randn(adapter.parameter_shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = torch.randn(4, 768, generator=torch.Generator().manual_seed(1))
    exact = adapter.features(theta.double(), x.double())
    for size in (1.0, 1e19, 1e30, 1e-22, 1e-30):
        leaf = (x * size).requires_grad_()
        found = adapter.features(theta, leaf)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance)
        (grad,) = torch.autograd.grad(found.sum(), leaf)
        reference = x.double().requires_grad_()
        (expected,) = torch.autograd.grad(adapter.features(theta.double(), reference).sum(), reference)
        if 1e-20 < size < 1e20:  # where the gradient is a float32
            torch.testing.assert_close(grad.double() * size, expected, rtol=1e-3, atol=tolerance)
    loud = torch.full((1, 768), 1000.0).half()
    loud[0, 3] = 60000
    torch.testing.assert_close(
        adapter.features(theta, loud).double(), adapter.features(theta.double(), loud.double()), rtol=0, atol=5e-3
    )


def test_blocks_are_of_qaa_linear_and_have_limits():
    base = nn.Linear(70_000, 2, device="meta")
    layer = QAALinear(base, max_wires=10)
    assert layer.adapter.blocks == 69 and layer.up.shape == (2, 690)
    assert layer(torch.empty(3, 70_000, device="meta")).shape == (3, 2)
    with pytest.raises(ValueError, match="expected max_wires to be an integer from 1 to 16, received 17"):
        Adapter.create(8, max_wires=17)
    with pytest.raises(ValueError, match="expected at most 256 features for 16 blocks of 2 wires, received 272"):
        Adapter.create(64, max_wires=2, readout=["ZI"] * 17)


@pytest.mark.parametrize(
    ("readout", "name"),
    [("z", "theta"), ("z", "mix"), ("z", "up"), ("state[:3]", "theta"), ("state[:3]", "mix"), ("state[:3]", "bias")],
)
def test_an_adapter_is_on_meta_or_it_is_not(readout: str, name: str) -> None:
    """Torch's own product of a tensor on the CPU and one on meta is memory that nobody has written to."""
    adapter = Adapter.create(8, readout=readout)
    parts = {
        "theta": torch.ones(adapter.parameter_shape),
        "up": torch.ones(5, 2),
        "bias": torch.ones(5),
        "mix": torch.ones(2, 3),
    }
    base, x = torch.zeros(2, 5), torch.ones(2, 8)
    assert adapter.add_to(base, x, **parts).is_cpu
    parts[name] = parts[name].to("meta")
    with torch.no_grad(), pytest.raises(ValueError, match=r"expected .* on one device, received .*meta"):
        adapter.add_to(base, x, **parts)
    if name == "theta":
        sentence = "expected theta and x on one device, received meta and cpu"
        with torch.no_grad(), pytest.raises(ValueError, match=sentence):
            adapter.features(parts["theta"], x)


def test_an_adapter_writes_over_its_layers_output_unless_a_hook_may_have_kept_it() -> None:
    layer, x = QAALinear(nn.Linear(12, 5)), torch.randn(3, 12)
    with torch.no_grad():
        layer.up.normal_()
    outputs: list[torch.Tensor] = []
    handle = layer.base.register_forward_hook(lambda module, args, output: outputs.append(output))
    hooked = layer(x)
    assert torch.equal(outputs[0], layer.base(x)) and not torch.equal(outputs[0], hooked)
    handle.remove()
    assert torch.equal(layer(x), hooked)

    ones: list[torch.Tensor] = []
    layer.base.forward = lambda x: ones[-1]  # type: ignore[method-assign]
    ones.append(torch.ones(3, 5))
    layer(x)
    assert torch.equal(ones[0], torch.ones(3, 5))
    del layer.base.forward
    assert torch.equal(layer(x), hooked)

    class Keeps(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept = super().forward(x)
            return self.kept

    layer.base = Keeps(12, 5)
    layer(x)
    assert torch.equal(layer.base.kept, nn.functional.linear(x, layer.base.weight, layer.base.bias))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(6, 12), (2, 3, 12)])
def test_an_adapted_layer_with_and_without_hooks_has_the_same_gradients(shape: tuple[int, ...], bias: bool) -> None:
    layer = QAALinear(nn.Linear(12, 5, bias=bias))
    with torch.no_grad():
        layer.up.normal_()

    def gradients() -> list[torch.Tensor]:
        x = torch.linspace(-1, 1, 72).reshape(shape).requires_grad_()
        return list(torch.autograd.grad(nn.functional.relu(layer(x)).sum(), (x, layer.theta, layer.up)))

    expected = gradients()
    base = layer.base
    register = nn.modules.module
    for hook in (
        lambda: base.register_full_backward_pre_hook(lambda module, grad: None),
        lambda: base.register_full_backward_hook(lambda module, grad_in, grad_out: None),
        lambda: base.register_forward_hook(lambda module, args, output: None),
        lambda: register.register_module_full_backward_hook(lambda module, grad_in, grad_out: None),
        lambda: register.register_module_full_backward_pre_hook(lambda module, grad: None),
        lambda: register.register_module_forward_hook(lambda module, args, output: None),
    ):
        handle = hook()
        try:
            for ours, theirs in zip(gradients(), expected, strict=True):
                torch.testing.assert_close(ours, theirs)
        finally:
            handle.remove()


def test_an_adapted_layer_can_be_traced() -> None:
    layer, x = QAALinear(nn.Linear(12, 5)), torch.randn(3, 12)
    with torch.no_grad():
        layer.up.normal_()
    traced = torch.jit.trace(layer, x, check_trace=False)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(traced(x), layer(x))
    torch.jit.save(traced, io.BytesIO())  # nothing in it is a Python function


# ------------------------------------------------------------------------------------------------------- whitening

FIELDS = Whitening._fields
STEPS = [(), ("channels",), ("center",), ("gain",), ("channels", "gain"), ("channels", "center", "gain"), FIELDS]


def whitened_adapter(readout, steps, d=6, out=3):
    """An adapter of float64 parameters, statistics for the steps, and an input."""
    torch.manual_seed(0)
    adapter = Adapter.create(d, n_layers=2, readout=readout, scaling=0.7)
    sizes = {"channels": d, "center": d, "mean": adapter.n_features, "gain": adapter.n_features}
    whitening = Whitening(**{name: torch.rand(sizes[name], dtype=torch.float64) + 0.5 for name in steps})
    theta = torch.randn(adapter.circuit.parameter_shape, dtype=torch.float64)
    up, bias = torch.randn(out, adapter.n_features, dtype=torch.float64), torch.randn(out, dtype=torch.float64)
    return adapter, whitening, theta, up, bias, torch.randn(4, d, dtype=torch.float64)


def literal_delta(adapter, whitening, theta, up, bias, x):
    """``s (V (f((x - mu) s) - m) r + c)``, step by step, with the oracle's features."""
    steps = whitening._asdict()
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    value = {name: (one if name in ("channels", "gain") else zero) if t is None else t for name, t in steps.items()}
    u = (x - value["center"]) * value["channels"]
    features = oracle.features(
        adapter.circuit, theta.numpy(), u.numpy(), adapter.readout, normalize=not adapter.is_linear
    )
    g = (torch.from_numpy(np.ascontiguousarray(features.real)) - value["mean"]) * value["gain"]
    constant = zero if bias is None else bias
    return adapter.scaling * (g @ up.T + constant)


@pytest.mark.parametrize("readout", ["z", "probs[:4]", "state[:3]"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("steps", STEPS)
def test_a_whitened_adapter_computes_its_equation(readout, has_bias, steps):
    adapter, whitening, theta, up, bias, x = whitened_adapter(readout, steps)
    bias = bias if has_bias else None
    expected = literal_delta(adapter, whitening, theta, up, bias, x)
    base = torch.randn(4, 3, dtype=torch.float64)
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(adapter.delta(x, theta, up, bias, whitening), expected, **close)
    torch.testing.assert_close(adapter.add_to(base, x, theta, up, bias, whitening), base + expected, **close)
    if adapter.is_linear:
        down, scaled_up, constant = adapter.low_rank(theta, up, bias, whitening)
        assert (constant is None) == (not has_bias and not {"center", "mean"} & set(steps))
        result = x @ down.T @ scaled_up.T
        torch.testing.assert_close(result if constant is None else result + constant, expected, **close)


@pytest.mark.parametrize("readout", ["z", "probs[:3]", "state[:3]"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients_of_a_whitened_adapter_are_those_of_its_equation(readout, has_bias):
    adapter, whitening, *parameters, bias, x = whitened_adapter(readout, FIELDS)
    base = torch.randn(4, 3, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (base, x, *parameters, *([bias] if has_bias else []))]

    def output(base, x, theta, up, bias=None):
        return adapter.add_to(base, x, theta, up, bias, whitening)

    assert torch.autograd.gradcheck(output, tuple(inputs), fast_mode=False)


def test_whitening_leaves_a_fresh_adapter_without_effect_and_keeps_the_known_rows(monkeypatch):
    adapter, whitening, theta, up, bias, x = whitened_adapter("state[:3]", FIELDS)
    base = torch.randn(4, 3, dtype=torch.float64)
    rows, calls = Adapter._rows, []
    monkeypatch.setattr(Adapter, "_rows", lambda *args: calls.append(None) or rows(*args))
    for _ in range(3):
        assert torch.equal(adapter.add_to(base, x, theta, up.zero_(), bias.zero_(), whitening), base)
    assert len(calls) == 1


# ------------------------------------------------------------------------------------------- random up-projections


def test_random_signs_are_the_bits_of_the_key_and_the_shape():
    for out, k, key in ((192, 16, 0), (7, 3, -5)):
        text = f"qaa up-projection {key} {out} {k}".encode()
        bits = "".join(f"{byte:08b}" for byte in hashlib.shake_256(text).digest(out * k))
        expected = [[1 if bits[i * k + j] == "1" else -1 for j in range(k)] for i in range(out)]
        assert random_signs(out, k, key).tolist() == expected


def test_random_signs_are_nearly_orthogonal_and_differ_between_keys():
    signs = [random_signs(576, 16, key).double() for key in range(20)]
    for drawn in signs:
        gram = drawn.T @ drawn / 576
        assert (gram - torch.eye(16)).abs().max() < 5 * 576**-0.5
    assert torch.stack(signs).mean().abs() < 5 * (20 * 576 * 16) ** -0.5
    assert all((a * b).mean().abs() < 5 * (576 * 16) ** -0.5 for a, b in itertools.combinations(signs, 2))


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("readout", ["state[:10]", "z"])
@pytest.mark.parametrize("r", [None, 3])
def test_room_for_whole_vectors_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, r: int | None, readout: str, whitened: bool
) -> None:
    """On a GPU matrices in half precision have zeros behind the features; here as if this were one."""
    adapter = Adapter.create(in_features=48, n_layers=2, readout=readout)
    k, generator = adapter.n_features, torch.Generator().manual_seed(3)
    shapes = [(7, 2, 20), (7, 2, 48), adapter.circuit.parameter_shape, (20, r or k)] + ([(r, k)] if r else [])
    whitening = Whitening(channels=torch.rand(48) + 0.5, gain=torch.rand(k) + 0.5) if whitened else Whitening()

    def run() -> list[torch.Tensor]:
        generator.manual_seed(3)
        leaves = [torch.randn(shape, generator=generator) for shape in shapes]
        leaves[:2] = [leaf.bfloat16() for leaf in leaves[:2]]
        base, x, theta, up, *mix = [leaf.requires_grad_() for leaf in leaves]
        with torch.autocast("cpu", torch.bfloat16):
            out = adapter.add_to(base * 1, x, theta, up, None, whitening, *mix, in_place=True)
        assert out.dtype == torch.bfloat16
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    expected = run()
    monkeypatch.setattr(qaa.ops, "_room", lambda count, dtype, device: -(-count // 8) * 8)
    for ours, theirs in zip(run(), expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())
