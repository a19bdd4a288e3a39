"""Adapters from strangers: whatever their files hold, they load or are refused, and nothing else happens."""

from __future__ import annotations

import json
import pickle
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch
from safetensors.torch import load_file, save_file

from qaa.peft import QaaConfig, SoraConfig

WIDTH = 64


def model() -> Any:
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU())


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder with a good adapter."""
    config = QaaConfig(target_modules=["0"], readout="state[:8]", n_layers=1)
    peft.get_peft_model(model(), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def load(adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(model(), str(adapter))


HUGE = 10**12
#: fields of a hostile configuration, and the sentence that refuses it
HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"n_layers": HUGE}, "expected n_layers to be an integer from 1 to 10000"),
    ({"n_layers": -1}, "expected n_layers to be an integer from 1 to 10000"),
    ({"n_layers": 1.5}, "expected n_layers to be an integer from 1 to 10000"),
    ({"n_layers": "4"}, "expected n_layers to be an integer from 1 to 10000"),
    ({"n_layers": [4]}, "expected n_layers to be an integer from 1 to 10000"),
    ({"readout": f"state[:{HUGE}]"}, "expected a readout"),
    ({"readout": "state[:65]"}, "expected between 1 and 64 outputs"),
    ({"readout": "probs[:65536]"}, "expected between 1 and 64 outputs"),
    ({"readout": "__import__('os').system('true')"}, "expected a readout"),
    ({"readout": ["Z" * 17]}, "expected Pauli strings of 1 to 16 letters"),
    ({"readout": ["Z" * 10**6]}, "expected Pauli strings of 1 to 16 letters"),
    ({"readout": ["ZZZZZZ"] * 10**5}, "expected at most 256 features for 6 wires, received 100000"),
    ({"readout": ["ZZ"]}, "expected Pauli strings of 6 letters"),
    ({"readout": {"z": 1}}, "expected "),
    ({"readout": None}, "expected a readout"),
    ({"ansatz": "../../ring"}, "expected ansatz among ring"),
    ({"ansatz": ["ring"]}, "expected ansatz among ring"),
    ({"scaling": 1e400}, "expected scaling to be a finite number"),
    ({"scaling": "1"}, "expected scaling to be a finite number"),
    ({"scaling": 10**400}, "expected scaling to be a finite number"),
    ({"r": 10**9}, "expected r to be an integer from 1 to 65536"),
    ({"r": 17, "readout": "state[:16]"}, "expected r of at most 16"),
    ({"projection_key": 10**30}, "expected projection_key to be an integer of 64 bits"),
    ({"init_angles": {}}, "expected init_angles among"),
    ({"up_projection": 3}, "expected up_projection among"),
    ({"calibration": "always"}, "expected calibration among"),
    ({"train_circuit": "yes"}, "expected train_circuit to be True or False"),
    ({"adapter_bias": 1}, "expected adapter_bias to be True or False"),
    ({"target_modules": [3]}, "expected target_modules to be a list of names"),
    ({"target_modules": {"0": 1}}, "expected target_modules to be a list of names"),
    ({"modules_to_save": "0"}, "expected modules_to_save to be a list of names"),
    ({"layers_to_transform": [-1]}, "expected layers_to_transform to be integers of at least 0"),
    ({"layers_to_transform": "0"}, "expected layers_to_transform to be integers of at least 0"),
    ({"target_modules": ["../../0"]}, "not found in the base model"),
    ({"readout": "z"}, "size mismatch"),  # another shape than the weights'
    ({"peft_type": "SORA", "r": HUGE}, "expected r to be an integer from 1 to 65536"),
    ({"peft_type": "SORA", "r": 65536}, "expected r of at most 64"),
    ({"peft_type": "SORA", "r": 8, "sora_alpha": 1e400}, "expected sora_alpha to be a positive number"),
    ({"peft_type": "SORA", "r": 8, "sora_dropout": True}, "expected sora_dropout from 0 to below 1"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("fields", "sentence"), HOSTILE, ids=[str(fields)[:50] for fields, _ in HOSTILE])
def test_a_hostile_configuration_is_refused_before_memory_is_taken(
    adapter: Path, fields: dict[str, Any], sentence: str
) -> None:
    change(adapter, **fields)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        load(adapter)
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # kilobytes


@pytest.mark.filterwarnings("ignore")
def test_unknown_fields_and_names_that_look_like_paths_do_nothing(adapter: Path, tmp_path: Path) -> None:
    change(adapter, command="true", auto_mapping={"base_model_class": "os", "parent_library": "os"}, revision="../..")
    weights = load_file(adapter / "adapter_model.safetensors")
    expected = load(adapter).base_model.model[0].qaa_up["default"]
    save_file({**weights, "base_model.model.../../up": torch.ones(3)}, adapter / "adapter_model.safetensors")
    before = sorted(tmp_path.rglob("*"))
    assert torch.equal(load(adapter).base_model.model[0].qaa_up["default"], expected)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_damaged_weights_are_refused(adapter: Path, cut: int) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(Exception, match=r"(?i)header|deserializ|incomplete|invalid"):
        load(adapter)


class Payload:
    """What a pickle runs when it is loaded carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore")
def test_a_pickle_instead_of_safetensors_is_not_run(adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    touched = tmp_path / "touched"
    torch.save(Payload(touched), adapter / "adapter_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        load(adapter)
    assert not touched.exists()


def test_the_comparison_takes_models_with_safetensors_only(tmp_path: Path) -> None:
    from qaa.compare.config import CompareError
    from qaa.compare.sources import Source, plain_model

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "touched")))
    with pytest.raises(CompareError, match=r"to hold \.safetensors, received a folder without any"):
        plain_model(Source("m", str(tmp_path), "local"), tmp_path)


# ---------------------------------------------------------------------------------------------------- fuzzing

CORPUS = sorted((Path(__file__).parent / "adapters").glob("*.json"))
texts = st.text("abz019[]:./ _", max_size=12) | st.sampled_from(["z", "ring", "state[:8]"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
own_fields = sorted(
    name
    for config in (QaaConfig, SoraConfig)
    for name in set(config.__dataclass_fields__) - set(peft.PeftConfig.__dataclass_fields__)
)


def read_config(text: bytes, folder: Path) -> None:
    """Loads a configuration and makes its adapter on a small layer; refusals are sentences of known kinds."""
    (folder / "adapter_config.json").write_bytes(text)
    began = time.process_time()
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        if config.target_modules is not None and not isinstance(config.target_modules, str):
            peft.get_peft_model(model(), config)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:  # the last three are PEFT's
        assert len(str(error)) < 2000
    assert time.process_time() - began < 20


@pytest.mark.filterwarnings("ignore")
def test_the_corpus_of_configurations_loads_or_is_refused(tmp_path: Path) -> None:
    assert len(CORPUS) >= 10
    for path in CORPUS:
        read_config(path.read_bytes(), tmp_path)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    fields=st.dictionaries(st.sampled_from(own_fields), json_values, max_size=3),
    kind=st.sampled_from(["QAA", "SORA"]),
    noise=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=2),
)
def test_any_configuration_loads_or_is_refused(
    tmp_path: Path, fields: dict[str, Any], kind: str, noise: list[tuple[int, int]]
) -> None:
    text = bytearray(json.dumps({"peft_type": kind, "target_modules": ["0"], **fields}).encode())
    for at, byte in noise:
        text[at % len(text)] = byte
    read_config(bytes(text), tmp_path)
