"""Instruction examples: read, split once, tokenized with the model's chat template, batched in one order for all."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .config import CompareError, Settings, reason

ROLES = {"user": "human", "assistant": "gpt"}  # of messages, beside "system"
SPEAKERS = {"human": "User", "gpt": "Assistant", "function_call": "Function call", "observation": "Function result"}
ANSWERS = ("gpt", "function_call")  # the turns of a conversation that the model is to produce
WORDNET_FILES = ("data.noun*", "data.verb*", "data.adj*", "data.adv*")
PLAIN_TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"


@dataclass(frozen=True)
class Example:
    """One instruction and its reference answer, as text and as token ids (the answer's end with :func:`turn_end`).

    Examples with the same ``group`` come from one conversation, or have the same answer; None stands alone. ``system``
    is the system turn before the prompt; empty for none.
    """

    prompt: str
    response: str
    prompt_ids: tuple[int, ...] = ()
    response_ids: tuple[int, ...] = ()
    group: str | None = field(default=None, compare=False)
    system: str = ""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Splits:
    """Training, validation (learning rates, best step) and test examples.

    No prompt occurs twice, and no group reaches into two of them.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    def all(self) -> tuple[Example, ...]:
        """All examples: training, then validation, then test."""
        return self.train + self.validation + self.test

    def test_groups(self) -> list[int]:
        """A number for each test example, the same for examples of one group.

        Example:
            >>> test = (Example("a", "b", group="g"), Example("c", "d"), Example("e", "f", group="g"))
            >>> Splits((), (), test).test_groups()
            [0, 1, 0]
        """
        numbers: dict[Any, int] = {}
        keys = [at if example.group is None else example.group for at, example in enumerate(self.test)]
        return [numbers.setdefault(key, len(numbers)) for key in keys]


def read_examples(path: str | Path) -> list[Example]:
    """Examples from a JSON list, a JSON-lines file, or a folder of WordNet's data files (:func:`wordnet_examples`).

    Rows are Alpaca's (``instruction``, optional ``input``, ``output``) or Dolly's (``instruction``, optional
    ``context``, ``response``), or ``prompt`` with ``response`` or ``completion``, all with an optional ``system``, or
    conversations (:func:`message_examples`, :func:`conversation_examples`). Repeated prompts are dropped after their
    first occurrence.

    Raises:
        CompareError: the file or folder cannot be read, is no such JSON or WordNet, or a row lacks a key.
    """
    path = Path(path)
    found = _wordnet(path) if path.is_dir() else _rows(path)
    examples: dict[tuple[str, str], Example] = {}
    for example in found:
        if example.prompt and example.response:
            examples.setdefault((example.system, example.prompt), example)
    if not examples:
        raise CompareError(f"expected at least one example with a prompt and a response in {path}, received none")
    return list(examples.values())


def _rows(path: Path) -> Iterator[Example]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CompareError(f"expected data to be a readable .json or .jsonl file, received {path}: {error}") from None
    lines = text.split("\n")  # not splitlines: JSON leaves U+2028 and its like as they are
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(t) for t in lines if t.strip()]
    except json.JSONDecodeError as error:
        raise CompareError(f"expected JSON or JSON lines in {path}, received: {error}") from None
    for number, row in enumerate(rows, 1):
        for example in _examples(row, number, path):
            try:
                f"{example.system}{example.prompt}{example.response}".encode()
            except UnicodeEncodeError as error:
                raise CompareError(
                    f"expected row {number} of {path} to hold valid Unicode, received: {error}"
                ) from None
            yield example


def _examples(row: Any, number: int, path: Path) -> list[Example]:
    if not isinstance(row, dict):
        raise _refusal(row, number, path)
    turns = row.get("messages", row.get("conversations"))
    if isinstance(turns, list) and any(isinstance(turn, dict) and "role" in turn for turn in turns):
        return _messages(row, [], turns, number, path)
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        return _messages(row, row["prompt"], row["completion"], number, path)
    if "conversations" in row:
        return _conversation(row, number, path)
    return [_example(row, number, path)]


def _example(row: dict[str, Any], number: int, path: Path) -> Example:
    prompt, response = _first_text(row, "instruction", "prompt"), _first_text(row, "output", "response", "completion")
    further = [row.get(key) or "" for key in ("input", "context", "system")]
    if prompt is None or response is None or row.get("history") or not all(isinstance(text, str) for text in further):
        raise _refusal(row, number, path)
    *extra, system = (text.strip() for text in further)
    return Example("\n\n".join(part for part in (prompt, *extra) if part), response, system=system)


def _first_text(row: dict[str, Any], *keys: str) -> str | None:
    return next((row[key].strip() for key in keys if isinstance(row.get(key), str)), None)


def _refusal(row: Any, number: int, path: Path) -> CompareError:
    received = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    return CompareError(
        f"expected row {number} of {path} to have the texts 'instruction' and 'output' (and 'input', 'context' or "
        "'system', but no 'history'), or 'prompt' and 'response' or 'completion', or to be a conversation: 'messages', "
        f"or 'prompt' and 'completion', of 'role' (system, {', '.join(ROLES)}) and text 'content', or 'conversations' "
        f"of 'from' (system, {', '.join(SPEAKERS)}) and text 'value'; received {received}"
    )


def message_examples(turns: Sequence[tuple[str, str]], system: str = "", known: int = 0) -> list[Example]:
    """One example for every turn of the model but those among the ``known`` first ones.

    The prompt is the text of the turn before, or all turns before where there are several, each with its speaker (a key
    of ``SPEAKERS``). The group is the prompt of the first turn, so that conversations that begin alike stay together.

    Example:
        >>> turns = [("human", "Hi"), ("gpt", "Hello."), ("human", "Time?"), ("gpt", "Noon.")]
        >>> [(example.prompt, example.response) for example in message_examples(turns)]
        [('Hi', 'Hello.'), ('User: Hi\\nAssistant: Hello.\\nUser: Time?', 'Noon.')]
    """
    found: list[Example] = []
    for at, (speaker, text) in enumerate(turns):
        if speaker in ANSWERS and at >= known:
            before = [f"{SPEAKERS[who]}: {said}" for who, said in turns[:at]]
            prompt = turns[0][1] if at == 1 and speaker != turns[0][0] else "\n".join(before)
            found.append(Example(prompt, text, group=turns[0][1], system=system))
    return found


def _messages(row: dict[str, Any], known: list[Any], said: list[Any], number: int, path: Path) -> list[Example]:
    messages, system = [*known, *said], row.get("system") or ""
    if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system":
        system, messages, known = messages[0].get("content"), messages[1:], known[1:]
    if not isinstance(system, str) or not all(_is_turn(each, "role", ROLES, "content") for each in messages):
        raise _refusal(row, number, path)
    if row.get("tools") or any(each.get("tool_calls") for each in messages):
        raise CompareError(
            f"expected row {number} of {path} to have messages without tools, received some: 'conversations' of 'from' "
            "and 'value' can have them"
        )
    return message_examples([(ROLES[m["role"]], m["content"].strip()) for m in messages], system.strip(), len(known))


def _is_turn(turn: Any, who: str, speakers: Container[str], text: str) -> bool:
    return isinstance(turn, dict) and turn.get(who) in speakers and isinstance(turn.get(text), str)


def conversation_examples(turns: Sequence[tuple[str, str]], functions: str, system: str = "") -> list[Example]:
    """One example for every turn of the model: the prompt is all that came before, the response is the turn.

    ``turns`` are pairs of speaker (a key of ``SPEAKERS``) and text; ``functions`` describes what can be called, as
    JSON. A call is answered with its JSON, anything else with text: that the model chooses is part of the task. The
    group is the prompt of the first turn, so that conversations that begin alike stay together.

    Example:
        >>> call = '{"name": "time", "arguments": {}}'
        >>> turns = [("human", "Time?"), ("function_call", call), ("observation", "12:30"), ("gpt", "Half past 12.")]
        >>> first, second = conversation_examples(turns, '[{"name": "time"}]')
        >>> print(second.prompt)
        Functions: [{"name": "time"}]
        User: Time?
        Function call: {"name": "time", "arguments": {}}
        Function result: 12:30
        >>> first.response == call, second.response, second.group == first.prompt
        (True, 'Half past 12.', True)
    """
    lines = [f"Functions: {functions}"]
    found: list[Example] = []
    for speaker, text in turns:
        if speaker in ANSWERS:
            prompt = "\n".join(lines)
            found.append(Example(prompt, text, group=found[0].group if found else prompt, system=system))
        lines.append(f"{SPEAKERS[speaker]}: {text}")
    return found


def _conversation(row: dict[str, Any], number: int, path: Path) -> list[Example]:
    turns, functions, system = row["conversations"], row.get("tools") or "[]", row.get("system") or ""
    if isinstance(turns, list) and turns and _is_turn(turns[0], "from", ("system",), "value"):
        system, turns = turns[0]["value"], turns[1:]
    plain = isinstance(turns, list) and all(_is_turn(turn, "from", SPEAKERS, "value") for turn in turns)
    if not plain or not isinstance(functions, str) or not isinstance(system, str):
        raise CompareError(
            f"expected row {number} of {path} to have 'conversations', a list of texts 'value' from "
            f"{', '.join(SPEAKERS)} (the first may be from system), and 'tools', a text, received "
            f"{json.dumps(row, ensure_ascii=False)[:100]}"
        )
    said = [(turn["from"], turn["value"].strip()) for turn in turns]
    return conversation_examples(said, functions.strip(), system.strip())


def wordnet_examples(line: str) -> list[Example]:
    """What a word means where it is used: one example for every sentence that a line of a WordNet data file quotes.

    A line is a synset (wndb(5WN)): its words, pointers to others, and behind ``|`` a definition and quoted sentences.
    The prompt is a sentence and asks for its word, the first of the synset's that stands in it; the response is the
    definition. The group is the synset, so that one that is tested is never trained; a few have the same definition.
    Lines of the licence and synsets without a sentence that holds one of their words have no examples.

    Example:
        >>> line = '02411224 00 s 02 fat 0 thick 2 001 & 02410393 a 0000 | wide from side to side; "a fat rope"; "far"'
        >>> (example,) = wordnet_examples(line)
        >>> print(example.prompt)
        a fat rope
        <BLANKLINE>
        What does "fat" mean here?
        >>> example.response, example.group
        ('wide from side to side', 's02411224')
    """
    head, bar, gloss = line.partition(" | ")
    if not bar or line.startswith(" "):
        return []
    offset, _, part_of_speech, count, *rest = head.split()
    # a word's blanks are underscores; an adjective's place may follow it, as in galore(ip)
    words = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in rest[: 2 * int(count, 16) : 2]]
    definition = gloss.partition('; "')[0].strip().rstrip(";")
    if not definition or definition.startswith('"'):
        return []
    found: list[Example] = []
    for sentence in re.findall(r'"([^"]+)"', gloss):
        word = next((w for w in words if re.search(rf"\b{re.escape(w)}\b", sentence, re.IGNORECASE)), None)
        if word is not None:
            prompt = f'{sentence.strip()}\n\nWhat does "{word}" mean here?'
            found.append(Example(prompt, definition, group=part_of_speech + offset))
    return found


def _wordnet(folder: Path) -> Iterator[Example]:
    paths = [path for pattern in WORDNET_FILES for path in sorted(folder.glob(pattern))]
    if not paths:
        raise CompareError(
            f"expected data to be a .json or .jsonl file, or a folder of WordNet's {', '.join(WORDNET_FILES)}, "
            f"received the folder {folder} without them"
        )
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise CompareError(f"expected a readable WordNet file, received {path}: {error}") from None
        for number, line in enumerate(lines, 1):
            try:
                yield from wordnet_examples(line)
            except ValueError:
                raise CompareError(
                    f"expected line {number} of {path} to be a synset of WordNet, received {line[:60]!r}"
                ) from None


def tokenized(example: Example, tokenizer: Any) -> Example:
    """The example with token ids: the prompt through the chat template, the response with :func:`turn_end`."""
    if tokenizer.chat_template:
        system = [{"role": "system", "content": example.system}] if example.system else []
        messages = [*system, {"role": "user", "content": example.prompt}]
        text = _rendered(tokenizer, messages, add_generation_prompt=True)
        prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        before = f"{example.system}\n\n" if example.system else ""
        prompt_ids = tokenizer(before + PLAIN_TEMPLATE.format(prompt=example.prompt))["input_ids"]
    response_ids = tokenizer(example.response, add_special_tokens=False)["input_ids"]
    return replace(example, prompt_ids=tuple(prompt_ids), response_ids=(*response_ids, turn_end(tokenizer)))


def turn_end(tokenizer: Any) -> int:
    """The token that ends an answer: the first added one that the chat template writes behind an answer.

    It is the end-of-text token where there is no template, or where the template writes none.
    """
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]
        behind = _rendered(tokenizer, turns).rpartition("Answer")[2]
        added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        added[tokenizer.eos_token] = tokenizer.eos_token_id
        found = [(behind.index(text), -len(text), number) for text, number in added.items() if text in behind]
        if found:
            return int(min(found)[2])
    return int(tokenizer.eos_token_id)


def _rendered(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template may raise, or fail in any way that a program can
        roles = ", ".join(message["role"] for message in messages)
        raise CompareError(
            f"expected the chat template of {tokenizer.name_or_path} to take turns of {roles}, received {reason(error)}"
        ) from None


def split(examples: Sequence[Example], tokenizer: Any, chosen: Settings) -> Splits:
    """Shuffles once, keeps examples of at most ``max_tokens``, and deals out test, validation and training examples.

    ``split_seed`` alone decides how: every method and every seed sees the same examples. What is shuffled and dealt are
    groups: a conversation of which a split takes only some examples loses the others.

    Raises:
        CompareError: fewer examples fit than the three splits need.
    """
    sizes = (chosen.test_examples, chosen.validation_examples, chosen.train_examples)
    groups: dict[Any, list[Example]] = {}
    for number, example in enumerate(examples):
        groups.setdefault(number if example.group is None else example.group, []).append(example)
    shuffled = list(groups.values())
    random.Random(chosen.split_seed).shuffle(shuffled)
    waiting = iter(shuffled)
    dealt: list[tuple[Example, ...]] = []
    for size in sizes:
        kept: list[Example] = []
        while len(kept) < size:
            group = next(waiting, None)
            if group is None:
                received = sum(map(len, dealt)) + len(kept)
                raise CompareError(
                    f"expected at least {sum(sizes)} examples of at most {chosen.max_tokens} tokens "
                    f"({sizes[2]} training + {sizes[1]} validation + {sizes[0]} test), "
                    f"received {received} of {len(examples)}"
                )
            kept += [e for e in (tokenized(e, tokenizer) for e in group) if len(e) <= chosen.max_tokens]
        dealt.append(tuple(kept[:size]))
    return Splits(train=dealt[2], validation=dealt[1], test=dealt[0])


def training_order(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """``steps`` batches of example indices: epochs in random order, examples of similar length together.

    Within a window of eight batches the examples are sorted by length (less padding), then the batches are shuffled.
    The order depends on the seed alone, so that all methods see the same batches in the same order.

    Example:
        >>> training_order([3, 1, 2, 4], batch_size=2, steps=3, seed=0)
        [[1, 2], [0, 3], [1, 2]]
    """
    generator = random.Random(seed)
    batch_size = min(batch_size, len(lengths))
    batches: list[list[int]] = []
    while len(batches) < steps:
        epoch = list(range(len(lengths)))
        generator.shuffle(epoch)
        epoch = epoch[: len(epoch) - len(epoch) % batch_size]
        for start in range(0, len(epoch), 8 * batch_size):
            window = sorted(epoch[start : start + 8 * batch_size], key=lambda index: lengths[index])
            grouped = [window[at : at + batch_size] for at in range(0, len(window), batch_size)]
            generator.shuffle(grouped)
            batches += grouped
    return batches[:steps]


def save_splits(splits: Splits, path: Path) -> None:
    """Writes the tokenized splits as JSON for the training processes."""
    from .sources import write_json

    plain = {
        name: [[e.prompt, e.response, e.prompt_ids, e.response_ids] for e in getattr(splits, name)]
        for name in ("train", "validation", "test")
    }
    write_json(path, plain)


def load_splits(path: Path) -> Splits:
    """Reads what :func:`save_splits` wrote."""
    plain = json.loads(path.read_text(encoding="utf-8"))
    return Splits(*(
        tuple(Example(p, r, tuple(pi), tuple(ri)) for p, r, pi, ri in plain[name])
        for name in ("train", "validation", "test")
    ))  # fmt: skip
