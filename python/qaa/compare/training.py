"""How every method is trained and judged: one protocol, one process per run, results in files.

A *tuning* job tries learning rates and chooses one by validation loss. A *training* job trains with it, keeps the step
with the lowest validation loss, measures the test loss and writes greedy answers.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import CompareError, Settings

EVALUATION_BATCH = 16
GENERATION_BATCH = 64
WARMUP_SHARE = 0.06
CLIP_NORM = 1.0
CALIBRATION_BATCHES = 4  # of the training data, before the first step, for adapters that scale their channels


@dataclass(frozen=True)
class Job:
    """All that a run needs, as plain data: it travels to another process."""

    settings: Settings
    model: str
    device: str
    splits: str
    hidden: str | None  # file of HiddenStates, None if the lower layers are computed each time
    first: int
    targets: tuple[str, ...]


# ------------------------------------------------------------------------------------------------- processes


def run_in_process(function: Callable[..., Any], *arguments: Any, log: Path) -> Any:
    """Calls ``function(*arguments)`` in a process of its own, whose peak memory is its own; returns its value.

    Raises:
        CompareError: the function raised one.
        RuntimeError: it failed otherwise; the traceback is in ``log``.
    """
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["qaa.compare.training", "peft", "transformers.trainer"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, log, function, arguments))
    process.start()
    sender.close()
    try:
        kind, value = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{function.__name__} was ended with exit code {process.exitcode}") from None
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()
        receiver.close()
    if kind == "refused":
        raise CompareError(value)
    if kind == "failed":
        raise RuntimeError(f"{value} (the full story is in {log})")
    return value


def _child(sender: Any, log: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        sender.send(("done", function(*arguments)))
    except CompareError as error:
        sender.send(("refused", str(error)))
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException as error:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(traceback.format_exc(), encoding="utf-8")
        sender.send(("failed", f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def choose_device(name: str) -> str:
    """``"auto"`` is CUDA if there is one; raises ``CompareError`` for a device that torch cannot use."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CompareError(f"expected a device that torch can use, received {name!r}: {reason}") from None
    return name


def trains_in_bfloat16(device: str) -> bool:
    """Whether forward passes in training run in bfloat16 (autocast); losses and answers are always of float32."""
    import torch

    return device.startswith("cuda") and torch.cuda.is_bf16_supported()


def peak_memory(device: str) -> int:
    """The largest memory use so far in bytes: of the process, or of its allocations on the GPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _quiet() -> None:
    import warnings

    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", module=r"(peft|transformers|torch|accelerate)\.")


# ---------------------------------------------------------------------------------------------------- inputs


class Inputs:
    """Splits, hidden states and batches of a job."""

    def __init__(self, job: Job, tokenizer: Any, with_hidden: bool) -> None:
        from .data import load_splits
        from .models import HiddenStates

        self.job, self.tokenizer = job, tokenizer
        self.splits = load_splits(Path(job.splits))
        everything = self.splits.all()
        self.hidden = (
            HiddenStates(Path(job.hidden), [len(e) for e in everything]) if job.hidden and with_hidden else None
        )
        train, validation = len(self.splits.train), len(self.splits.validation)
        self.train = range(train)
        self.validation = range(train, train + validation)
        self.test = range(train + validation, len(everything))
        self.everything = everything

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The padded batch of these examples (indices into all splits)."""
        from .models import padded_batch

        hidden = [self.hidden[index] for index in indices] if self.hidden is not None else None
        return padded_batch([self.everything[index] for index in indices], self.tokenizer.pad_token_id, hidden)

    def losses(self, model: Any, indices: Sequence[int]) -> tuple[list[float], list[int]]:
        """Per example (in the order of ``indices``) the summed loss and the number of answer tokens."""
        from .models import example_losses

        order = sorted(indices, key=lambda index: len(self.everything[index]))
        groups = [order[at : at + EVALUATION_BATCH] for at in range(0, len(order), EVALUATION_BATCH)]
        sums, counts = example_losses(model, [self.batch(group) for group in groups])
        place = {index: at for at, index in enumerate(order)}
        return [sums[place[i]] for i in indices], [counts[place[i]] for i in indices]


def cache_hidden_states(job: Job, path: Path) -> tuple[float, float]:
    """Stores what enters the first adapted layer for every example; returns (seconds, largest loss difference).

    The second figure compares the untouched model's validation losses with and without the stored states.
    """
    from dataclasses import replace

    from .models import HiddenStates, load_model, load_tokenizer, lower_layers_skipped

    _quiet()
    started = time.perf_counter()
    tokenizer = load_tokenizer(job.model)
    model = load_model(job.model, job.device)
    plain = Inputs(replace(job, hidden=None), tokenizer, with_hidden=False)
    scratch = path.with_suffix(".part.npy")
    HiddenStates.write(scratch, model, plain.everything, job.first, tokenizer.pad_token_id)
    seconds = time.perf_counter() - started
    os.replace(scratch, path)
    stored = Inputs(replace(job, hidden=str(path)), tokenizer, with_hidden=True)
    probe = list(plain.validation)[:EVALUATION_BATCH]
    expected, counts = plain.losses(model, probe)
    with lower_layers_skipped(model, job.first):
        received, _ = stored.losses(model, probe)
    worst = max(abs(a - b) / n for a, b, n in zip(expected, received, counts, strict=True))
    return seconds, worst


# -------------------------------------------------------------------------------------------------- training


def _start(job: Job, name: str, seed: int) -> tuple[Any, Any, Inputs, list[Any], Any]:
    """A freshly loaded model with the row's parameters: (row, model, inputs, callbacks, base model)."""
    import transformers

    from .methods import Scope, build, row
    from .models import decoder_layers, load_model, load_tokenizer

    chosen = row(job.settings, name)
    tokenizer = load_tokenizer(job.model)
    base = load_model(job.model, job.device)
    inputs = Inputs(job, tokenizer, with_hidden=chosen.method.top_layers_only)
    transformers.set_seed(seed)
    scope = Scope(job.first, len(decoder_layers(base)), job.targets)
    model, callbacks = build(chosen, base, tokenizer, scope)
    return chosen, model, inputs, callbacks, base


def _skipping(job: Job, inputs: Inputs, base: Any) -> Any:
    from .models import lower_layers_skipped

    return lower_layers_skipped(base, job.first if inputs.hidden is not None else 0)


@dataclass
class Curves:
    """What a training run leaves: one entry per step, and one (step, validation loss) per evaluation.

    ``validation_seconds`` are the seconds of training before each evaluation, without the evaluations themselves.
    """

    train_loss: list[float | None]
    gradient_norm: list[float | None]
    validation: list[tuple[int, float | None]]
    validation_seconds: list[float]
    seconds: float = 0.0
    answer_tokens: int = 0
    tokens: int = 0


def train(
    job: Job,
    method: Any,
    model: Any,
    inputs: Inputs,
    callbacks: Sequence[Any],
    *,
    rate: float,
    steps: int,
    seed: int,
    evaluations: int,
    title: str,
    keep_best: Path | None = None,
) -> Curves:
    """Trains with the Hugging Face ``Trainer``: AdamW, linear warm-up and decay, gradient norm clipped to 1.

    The warm-up starts at rate 0, which the first step has; the decay would reach 0 two steps after the last.
    With ``keep_best`` the trainable parameters of the step with the lowest validation loss are written there and
    loaded at the end.
    """
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    from torch.utils.data import SequentialSampler
    from tqdm.auto import tqdm

    from .data import training_order
    from .methods import calibrate, optimizer_groups, trainable_state
    from .models import IGNORED, answer_losses, mean_loss

    order = training_order([len(e) for e in inputs.splits.train], job.settings.batch_size, steps, seed)
    calibrate(model, (inputs.batch(batch) for batch in order[:CALIBRATION_BATCHES]))
    curves = Curves([], [], [], [])
    device_kind, in_bfloat16 = job.device.partition(":")[0], trains_in_bfloat16(job.device)
    evaluation_steps = {max(1, round(steps * (i + 1) / evaluations)) for i in range(evaluations)}
    pauses = 0.0
    training_began: float | None = None
    best = math.inf

    def evaluate(step: int) -> None:
        nonlocal pauses, best
        began = time.perf_counter()
        loss = mean_loss(*inputs.losses(model, inputs.validation))
        curves.validation.append((step, _finite(loss)))
        curves.validation_seconds.append(0.0 if training_began is None else began - training_began - pauses)
        if keep_best is not None and loss < best:
            best = loss
            state = {name: p.detach().cpu().contiguous() for name, p in trainable_state(model).items()}
            save_file(state, keep_best)
        pauses += time.perf_counter() - began

    class Recorder(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                curves.train_loss.append(_finite(logs["loss"]))
                curves.gradient_norm.append(_finite(logs.get("grad_norm", math.nan)))
                bar.set_postfix_str(f"loss {logs['loss']:.3f}")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            bar.update(1)
            if state.global_step in evaluation_steps:
                evaluate(state.global_step)

    class AnswerTrainer(transformers.Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            curves.answer_tokens += int((inputs["labels"][:, 1:] != IGNORED).sum())
            curves.tokens += int(inputs["attention_mask"].sum())
            with torch.autocast(device_kind, torch.bfloat16, enabled=in_bfloat16):
                return answer_losses(model, inputs)[0].mean()

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(order)  # the order is the protocol's, not the Trainer's

    arguments = transformers.TrainingArguments(
        output_dir=str(Path(job.splits).parent / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=1,  # one item of the data set is one whole batch
        learning_rate=rate,
        lr_scheduler_type="linear",
        max_grad_norm=CLIP_NORM,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        use_cpu=job.device == "cpu",
        bf16=False,  # accelerate would leave the model's forward under autocast, in evaluations as well
        dataloader_pin_memory=False,
        seed=seed,
    )
    optimizer = torch.optim.AdamW(optimizer_groups(method, model, rate), lr=rate, weight_decay=0.0)
    warmup = max(1, round(WARMUP_SHARE * steps))
    scheduler: Any = transformers.get_linear_schedule_with_warmup(optimizer, warmup, steps + 1)  # type: ignore[no-untyped-call]
    trainer = AnswerTrainer(
        model=model,
        args=arguments,
        train_dataset=order,
        data_collator=lambda items: inputs.batch(items[0]),
        callbacks=[Recorder(), *callbacks],
        optimizers=(optimizer, scheduler),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if keep_best is not None:
        evaluate(0)
        pauses = 0.0
    with tqdm(total=steps, desc=title, unit="step", file=sys.stderr, dynamic_ncols=True) as bar:
        training_began = time.perf_counter()
        trainer.train()
        curves.seconds = time.perf_counter() - training_began - pauses
    if keep_best is not None:
        chosen = load_file(keep_best, device=str(model.device))
        with torch.no_grad():
            for name, parameter in trainable_state(model).items():
                parameter.copy_(chosen[name])
        keep_best.unlink()
    return curves


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# ------------------------------------------------------------------------------------------------------ jobs


Scores = tuple[Sequence[float], Sequence[int]]  # per validation example: summed loss, number of answer tokens


def choose_rate(
    grid: Sequence[float], score: Callable[[float], Scores | None], extensions: int, *, short: bool = True
) -> tuple[float, list[tuple[float, float | None]], bool]:
    """The chosen rate, all (rate, loss), and whether the rate of lowest loss still lies at the grid's edge.

    Chosen is the smallest rate whose loss is within one standard error of the lowest, the error being that of the
    paired difference over examples: short trials flatter large rates, and a difference inside the noise should not
    decide for one. Where trials are as long as the runs themselves (``short=False``) it is the rate of lowest loss.
    While that rate is at an edge, up to ``extensions`` further rates beyond the edge are tried, at the grid's own
    ratio. A score of None stands for a run that diverged.

    Example:
        >>> choose_rate([1.0, 2.0, 4.0], lambda rate: ([(rate - 7) ** 2] * 3, [1] * 3), extensions=2)
        (8.0, [(1.0, 36.0), (2.0, 25.0), (4.0, 9.0), (8.0, 1.0), (16.0, 81.0)], False)
    """
    from .models import mean_loss

    found = {rate: score(rate) for rate in grid}

    def loss(rate: float) -> float:
        scores = found[rate]
        return math.inf if scores is None else mean_loss(*scores)

    for _ in range(extensions):
        rates = sorted(found)
        if len(rates) < 2:
            break
        best = min(rates, key=loss)
        if best == rates[0]:
            beyond = rates[0] * rates[0] / rates[1]
        elif best == rates[-1]:
            beyond = rates[-1] * rates[-1] / rates[-2]
        else:
            break
        found[beyond] = score(beyond)
    rates = sorted(found)
    best = min(rates, key=loss)
    chosen = next(rate for rate in rates if rate == best or (short and _within_noise(found[rate], found[best])))
    tried = [(rate, _finite(loss(rate))) for rate in rates]
    return chosen, tried, len(rates) > 1 and best in (rates[0], rates[-1])


def _within_noise(scores: Scores | None, best: Scores | None) -> bool:
    """Whether the loss exceeds the best by at most one standard error of their paired difference."""
    if scores is None or best is None:
        return False
    differences = [a - b for a, b in zip(scores[0], best[0], strict=True)]
    count, total = len(differences), sum(differences)
    if count < 2:
        return False
    variance = sum((d - total / count) ** 2 for d in differences) / (count - 1)
    return total <= math.sqrt(count * variance)


def tune(job: Job, name: str, seed: int) -> dict[str, Any]:
    """Chooses the learning rate of a row on the validation split, with ``tuning_steps`` of the same schedule."""
    from .methods import row

    _quiet()
    chosen = job.settings
    trained = row(chosen, name)

    def score(rate: float) -> Scores | None:
        _, model, inputs, callbacks, base = _start(job, name, seed)
        with _skipping(job, inputs, base):
            train(
                job, trained.method, model, inputs, callbacks, rate=rate, steps=chosen.tuning_steps, seed=seed,
                evaluations=0, title=f"{trained.label}: learning rate {rate:.2g}",
            )  # fmt: skip
            sums, counts = inputs.losses(model, inputs.validation)
        return (sums, counts) if math.isfinite(sum(sums)) else None

    began = time.perf_counter()
    rate, tried, at_edge = choose_rate(
        trained.method.learning_rates, score, chosen.grid_extensions, short=chosen.tuning_steps < chosen.steps
    )
    if all(value is None for _, value in tried):
        raise RuntimeError(f"every learning rate of {name} diverged: {[r for r, _ in tried]}")
    return {
        "rate": rate,
        "grid": tried,
        "at_edge": at_edge,
        "steps": chosen.tuning_steps,
        "seconds": time.perf_counter() - began,
    }


def run(job: Job, name: str, seed: int, rate: float, folder: str) -> dict[str, Any]:
    """Trains one row with one seed, and returns its curves, losses, answers and costs; saves the adapter."""
    from .methods import parameter_counts
    from .models import mean_loss

    _quiet()
    target = Path(folder)
    shutil.rmtree(target, ignore_errors=True)  # what an earlier row of this name left would be counted
    target.mkdir(parents=True, exist_ok=True)
    row, model, inputs, callbacks, base = _start(job, name, seed)
    trainable, total = parameter_counts(model)
    with _skipping(job, inputs, base):
        curves = train(
            job, row.method, model, inputs, callbacks, rate=rate, steps=job.settings.steps, seed=seed,
            evaluations=job.settings.evaluations, title=f"{row.label}: seed {seed}",
            keep_best=target / "best.part",
        )  # fmt: skip
        peak = peak_memory(job.device)
        model.eval()
        best_step, best = min(((s, v) for s, v in curves.validation if v is not None), key=lambda pair: pair[1])
        test_sums, test_counts = inputs.losses(model, inputs.test)
    adapter_bytes = save_adapter(model, target)
    result = {
        "name": name,
        "seed": seed,
        "learning_rate": rate,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "train_loss": curves.train_loss,
        "gradient_norm": curves.gradient_norm,
        "validation": curves.validation,
        "validation_seconds": curves.validation_seconds,
        "best_step": best_step,
        "best_validation_loss": best,
        "final_validation_loss": curves.validation[-1][1],
        "test_loss": mean_loss(test_sums, test_counts),
        "test_sums": test_sums,
        "test_counts": test_counts,
        **_answers(job, model, inputs),
        "train_seconds": curves.seconds,
        "train_tokens": curves.tokens,
        "train_answer_tokens": curves.answer_tokens,
        "peak_memory_bytes": peak,
        "adapter_bytes": adapter_bytes,
        "stored_states": inputs.hidden is not None,
    }
    if row.method.name == "sora":
        from qaa.peft import sora_sparsity

        result["sparsity"] = sora_sparsity(model)
    return result


def _answers(job: Job, model: Any, inputs: Inputs) -> dict[str, Any]:
    """Greedy answers to the test prompts and the time they took; nothing where none are asked for."""
    from .models import generate_answers

    if not job.settings.generate:
        return {}
    began = time.perf_counter()
    limit = job.settings.max_new_tokens
    answers = generate_answers(model, inputs.tokenizer, inputs.splits.test, limit, GENERATION_BATCH)
    return {"answers": answers, "generate_seconds": time.perf_counter() - began}


def run_untouched(job: Job) -> dict[str, Any]:
    """The reference row: the model as it came."""
    from .config import UNTOUCHED
    from .methods import parameter_counts
    from .models import load_model, load_tokenizer, mean_loss

    _quiet()
    tokenizer = load_tokenizer(job.model)
    model = load_model(job.model, job.device)
    inputs = Inputs(job, tokenizer, with_hidden=True)
    with _skipping(job, inputs, model):
        validation = mean_loss(*inputs.losses(model, inputs.validation))
        test_sums, test_counts = inputs.losses(model, inputs.test)
    return {
        "name": UNTOUCHED,
        "seed": 0,
        "trainable_parameters": 0,
        "total_parameters": parameter_counts(model)[1],
        "validation": [(0, validation)],
        "validation_seconds": [0.0],
        "best_validation_loss": validation,
        "final_validation_loss": validation,
        "test_loss": mean_loss(test_sums, test_counts),
        "test_sums": test_sums,
        "test_counts": test_counts,
        **_answers(job, model, inputs),
        "train_seconds": 0.0,
        "peak_memory_bytes": peak_memory(job.device),
        "adapter_bytes": 0,
    }


def save_adapter(model: Any, folder: Path) -> int:
    """Saves what was trained as safetensors in ``folder``; returns the bytes of the weights.

    A PEFT model is saved in PEFT's format, another one as ``trained_weights.safetensors``.
    """
    from peft import PeftModel
    from safetensors.torch import save_file

    from .methods import saved_state

    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder))
    else:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in saved_state(model).items()}
        save_file(state, folder / "trained_weights.safetensors", metadata={"format": "pt"})
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
