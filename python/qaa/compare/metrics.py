"""Text metrics as local ``evaluate.Metric`` classes, which need no hub, and the noise of a test split."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import regex

from .config import CompareError, reason

_PAIR = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})

_WITHOUT_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(rf"[{_WITHOUT_SPACES}]\p{{M}}*|(?:(?![{_WITHOUT_SPACES}])[\p{{L}}\p{{M}}\p{{N}}])+")

#: What ROUGE counts, for the report.
ROUGE_WORDS = "words of letters and digits, ASCII words stemmed; single characters in scripts without spaces"


def words(text: str) -> list[str]:
    """Lower-case words of any script; in scripts that put no spaces between words, every character is one.

    Example:
        >>> words("The cat's 2 mats, “Привет” 你好2024")
        ['the', 'cat', 's', '2', 'mats', 'привет', '你', '好', '2024']
    """
    found: list[str] = _WORD.findall(text.lower())
    return found


def bleu_tokenizer(texts: Sequence[str]) -> str:
    """sacrebleu's tokenizer for the script of most letters in ``texts``: ``13a``, ``zh`` or ``char``.

    ``13a`` splits at spaces and punctuation; ``zh`` splits Chinese characters as well; ``char`` is for other scripts
    without spaces between words, Japanese among them.

    Example:
        >>> [bleu_tokenizer([text]) for text in ("The cat, 猫", "Привет, мир", "你好吗?", "こんにちは世界")]
        ['13a', '13a', 'zh', 'char']
    """
    text = "".join(texts)
    letters, without = len(regex.findall(r"\p{L}", text)), len(regex.findall(rf"[{_WITHOUT_SPACES}]", text))
    if 2 * without <= letters:
        return "13a"
    return "zh" if 10 * len(regex.findall(r"\p{Han}", text)) > 9 * without else "char"


def _info(description: str, citation: str) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(description=description, citation=citation, inputs_description="texts", features=_PAIR)


class Bleu(evaluate.Metric):  # type: ignore[misc]
    """Corpus BLEU of sacrebleu (exponential smoothing; the tokenizer for the references' script), 0 to 100.

    Example:
        >>> round(Bleu().compute(predictions=["a b c d e"], references=["a b c d e"])["bleu"])
        100
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info("Corpus BLEU, 0 to 100.", "Post 2018, A Call for Clarity in Reporting BLEU Scores")

    def _compute(self, predictions: Sequence[str], references: Sequence[str], **_: Any) -> dict[str, Any]:
        from sacrebleu.metrics.bleu import BLEU

        metric = BLEU(tokenize=bleu_tokenizer(references))
        score = metric.corpus_score(list(predictions), [list(references)]).score
        return {"bleu": float(score), "bleu_signature": str(metric.get_signature())}


class Rouge(evaluate.Metric):  # type: ignore[misc]
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L (rouge-score) over stems of :func:`words`, 0 to 1.

    Example:
        >>> Rouge().compute(predictions=["the cat sat"], references=["the cat ran"])["rouge2"]
        0.5
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info("ROUGE-1, ROUGE-2 and ROUGE-L, mean F1.", "Lin 2004, ROUGE")

    def _compute(self, predictions: Sequence[str], references: Sequence[str], **_: Any) -> dict[str, Any]:
        from nltk.stem.porter import PorterStemmer
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import Tokenizer

        class Words(Tokenizer):  # type: ignore[misc]
            """rouge-score's own for ASCII, which drops all other letters."""

            stemmer = PorterStemmer()

            def tokenize(self, text: str) -> list[str]:
                return [self.stemmer.stem(w) if len(w) > 3 and w.isascii() else w for w in words(text)]

        kinds = ["rouge1", "rouge2", "rougeL"]
        scorer = RougeScorer(kinds, tokenizer=Words())
        scores = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
        found = {kind: float(np.mean([score[kind].fmeasure for score in scores])) for kind in kinds}
        return {**found, "rouge_words": ROUGE_WORDS}


class BertScore(evaluate.Metric):  # type: ignore[misc]
    """Mean BERTScore F1 of an encoder in a local folder, without idf weights and without baseline rescaling.

    ``name`` is the encoder's hub name, which decides on its layer (:func:`encoder_layer`). An empty text has no tokens
    to compare and counts as 0.
    """

    def __init__(self, encoder: str | Path, device: str = "cpu", name: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.encoder, self.device, self.layer = str(encoder), device, encoder_layer(encoder, name)

    def _info(self) -> evaluate.MetricInfo:
        return _info("BERTScore F1.", "Zhang et al. 2020, BERTScore")

    def _compute(self, predictions: Sequence[str], references: Sequence[str], **_: Any) -> dict[str, Any]:
        scorer = _scorer(self.encoder, self.layer, self.device)
        kept = [(text, reference) for text, reference in zip(predictions, references, strict=True) if text.strip()]
        if not kept:
            return {"bertscore": 0.0, "bertscore_layer": self.layer}
        _, _, f1 = scorer.score([text for text, _ in kept], [reference for _, reference in kept], batch_size=32)
        return {"bertscore": float(f1.sum()) / len(predictions), "bertscore_layer": self.layer}


def encoder_layer(encoder: str | Path, name: str) -> int:
    """The layer that bert_score's authors chose for the encoder of this hub name; the last one for other encoders."""
    from bert_score.utils import model2layers
    from transformers import AutoConfig

    last = int(AutoConfig.from_pretrained(encoder).num_hidden_layers)
    # the table has old names, without an owner: roberta-large for FacebookAI/roberta-large
    chosen = int(model2layers.get(name, model2layers.get(name.rpartition("/")[2], last)))
    return chosen if chosen <= last else last


def check_encoder(encoder: str | Path, name: str = "") -> None:
    """Scores one text, so that an unusable encoder is found before anything is trained.

    Raises:
        CompareError: BERTScore cannot use what is in the folder ``encoder``.
    """
    try:
        BertScore(encoder, name=name).compute(predictions=["one"], references=["one"])
    except Exception as error:  # transformers raises many kinds
        raise CompareError(
            f"expected the encoder to be a folder with a model that BERTScore can use, received {encoder}: "
            f"{reason(error)}"
        ) from None


@lru_cache(maxsize=2)
def _scorer(encoder: str, layer: int, device: str) -> Any:
    from bert_score import BERTScorer
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(encoder)
    scorer = BERTScorer(model_type=encoder, num_layers=layer, device=device, idf=False)
    # a tokenizer saved without its limit reports a number that the Rust tokenizer cannot hold
    scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, config.max_position_embeddings)
    return scorer


def text_scores(
    answers: Sequence[str], references: Sequence[str], encoder: str | Path, device: str, name: str = ""
) -> dict[str, Any]:
    """BLEU, ROUGE-1, ROUGE-2, ROUGE-L and BERTScore of ``answers`` against one reference each."""
    scores: dict[str, Any] = {}
    for metric in (Bleu(), Rouge(), BertScore(encoder, device, name)):
        scores.update(metric.compute(predictions=list(answers), references=list(references)) or {})
    return scores


def paired_interval(
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    tokens: Sequence[int],
    groups: Sequence[int] | None = None,
    resamples: int = 10_000,
) -> tuple[float, float, float]:
    """Loss of ``first`` minus loss of ``second``, with a 95 % interval over seeds and groups of test examples.

    ``first`` and ``second`` hold for each seed the summed losses of every example, shape (seeds, examples); one seed
    stands for all of a row without randomness. ``tokens`` are the answers' lengths, shape (examples,). Examples with
    the same number in ``groups``, shape (examples,), such as turns of one conversation, are alike and count as one
    draw; by default each is a group of its own. Each resample draws seeds and then groups, both with replacement, and
    subtracts the rows under the same seeds and the same groups (percentile bootstrap over both factors; Owen 2007, The
    pigeonhole bootstrap). The deviations of the seeds from their mean are first stretched by ``sqrt(S / (S - 1))``,
    because resampled means of S seeds vary too little by that factor. With one seed the interval covers the choice of
    examples only.

    Raises:
        ValueError: the rows have different numbers of seeds (above one) or of examples.

    Example:
        >>> paired_interval([[2.0, 4.0]], [[1.0, 3.0]], [1, 1])
        (1.0, 1.0, 1.0)
        >>> mean, low, high = paired_interval([[2.0, 2.0], [0.0, 0.0]], [[0.0, 0.0]], [1, 1])
        >>> mean, round(low, 3), round(high, 3)
        (1.0, -0.414, 2.414)
        >>> paired_interval([[0.0, 2.0]], [[0.0, 0.0]], [1, 1], groups=[7, 7])  # one group: nothing to draw from
        (1.0, 1.0, 1.0)
    """
    difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)  # (seeds, examples)
    names = np.arange(difference.shape[1]) if groups is None else np.asarray(groups)
    member = (np.unique(names)[:, None] == names).astype(float)  # (groups, examples)
    difference, weight = difference @ member.T, member @ np.asarray(tokens, dtype=float)
    seeds, n_groups = difference.shape
    centre = difference.mean(axis=0)
    stretched = centre + (difference - centre) * (seeds / (seeds - 1)) ** 0.5 if seeds > 1 else difference
    generator = np.random.default_rng(0)
    drawn_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    drawn = generator.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=resamples)
    means = ((drawn_seeds @ stretched) * drawn).sum(axis=1) / (drawn @ weight)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(centre.sum() / weight.sum()), float(low), float(high)
