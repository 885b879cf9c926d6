"""Metrics: answers normalised and compared, ROUGE, pass@k, perplexity, diversity.

Figures are in points (x100) where a published table has them so; per example they are in [0, 1]. Means come
with their standard errors.
"""

import collections
import dataclasses
import functools
import math
import re
import string
import unicodedata
from collections.abc import Sequence

import numpy as np

from a3_jax.errors import InputError

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)
_MARKED_ANSWER = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


@dataclasses.dataclass(frozen=True)
class Figure:
    """A mean over examples.

    Attributes:
      value: the mean.
      standard_error: its standard error, from the examples' sample deviation; None below two examples.
      count: number of examples.
    """

    value: float
    standard_error: float | None
    count: int


def mean_figure(values: Sequence[float], scale: float = 100.0) -> Figure:
    """Returns the mean of [n] values times `scale`, with its standard error.

    For values 0 and 1 the error is sqrt(p (1 - p) / (n - 1)).
    """
    if not len(values):
        raise InputError("no example is left to take a mean of")
    numbers = np.asarray(values, np.float64) * scale
    error = float(numbers.std(ddof=1) / math.sqrt(len(numbers))) if len(numbers) > 1 else None
    return Figure(float(numbers.mean()), error, len(numbers))


def best_choices(scores: Sequence[float], tokens, characters, sizes) -> dict[str, int]:
    """Returns the index of the choice that each rule takes: the largest, ties to the lowest index.

    Args:
      scores: [C] log-probabilities of the choices in nats, sums over their tokens.
      tokens, characters, sizes: [C] length of each choice in tokens, characters and UTF-8 bytes.

    Raises:
      ValueError: a score is NaN, which argmax would take for the best.
    """
    values = np.asarray(scores, np.float64)
    if np.isnan(values).any():
        raise ValueError(f"the scores of a row hold NaN: {list(scores)}")
    divisors = {"sum": 1, "per_token": tokens, "per_character": characters, "per_byte": sizes}
    return {rule: int(np.argmax(values / np.asarray(by))) for rule, by in divisors.items()}


def squad_normalised(text: str) -> str:
    """Normalises as the SQuAD script: lower case, no ASCII punctuation, no articles, single spaces.

    Punctuation leaves no space: "rock-n-roll" becomes "rocknroll".
    """
    bare = "".join(letter for letter in text.lower() if letter not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def triviaqa_normalised(text: str) -> str:
    """Normalises as TriviaQA's own `normalized_aliases`: punctuation and underscores become spaces.

    Curly single quotes and the acute accent count as punctuation there.
    """
    marks = _PUNCTUATION | {"\u2018", "\u2019", "\u00b4"}
    bare = "".join(" " if letter in marks else letter for letter in text.lower())
    return " ".join(_ARTICLES.sub(" ", bare).split())


NORMS = {"squad": squad_normalised, "triviaqa": triviaqa_normalised}


def token_f1(prediction: str, reference: str) -> float:
    """Returns F1 of the words of two normalised texts, repeats counted; if one is empty, 1 if both are."""
    ours, theirs = prediction.split(), reference.split()
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs))


def triviaqa_figures(
    prediction: str, aliases: Sequence[str], normalized_aliases: Sequence[str], norm: str = "squad"
) -> dict[str, float]:
    """Returns containment, strict exact match and F1 of an answer, each in [0, 1].

    Args:
      prediction: as decoded.
      aliases: as in the data; F1 is against these, normalised like the prediction.
      normalized_aliases: normalised by the data set's authors. An alias without a letter left would be in
        every prediction: it is left out.
      norm: how the prediction is normalised, a name of `NORMS`.
    """
    normalise = NORMS[norm]
    answer = normalise(_composed(prediction.strip()))
    known = [" ".join(_composed(alias).split()) for alias in normalized_aliases if alias.strip()]
    raw = [text for text in map(normalise, map(_composed, aliases)) if text]
    return {
        "containment": float(any(alias in answer for alias in known)),
        "strict_exact_match": float(answer in known or answer in raw),
        "f1": max((token_f1(answer, text) for text in raw), default=0.0),
    }


def last_word_is(prediction: str, word: str) -> float:
    """Returns 1 if the prediction without outer space is exactly the word (LAMBADA)."""
    return float(_composed(prediction.strip()) == _composed(word.strip()))


def _composed(text: str) -> str:
    """Returns a text with each letter and its accents as one character: Qwen's tokenizer writes no other."""
    return unicodedata.normalize("NFC", text)


def gsm8k_figures(prediction: str, answer: str) -> dict[str, float]:
    """Compares the number of a GSM8K solution with the reference's, found in three ways, each 0 or 1.

    accuracy: the text after the last `####`, without commas, as in the fine-tuning format;
    strict_match: the first number after `#### `; flexible_match: the last number anywhere (both harness).
    """
    gold = _plain_number(answer.rsplit("####", 1)[-1])
    marked, numbers = _MARKED_ANSWER.search(prediction), _NUMBER.findall(prediction)
    after_mark = _plain_number(prediction.rsplit("####", 1)[1]) if "####" in prediction else None
    return {
        "accuracy": float(after_mark == gold),
        "strict_match": float(marked is not None and _plain_number(marked[1]) == gold),
        "flexible_match": float(bool(numbers) and _plain_number(numbers[-1]) == gold),
    }


def _plain_number(text: str) -> str:
    return text.replace(",", "").replace("$", "").strip().removesuffix(".")


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Returns the chance that one of k draws from the samples is correct: 1 - C(n - c, k) / C(n, k)."""
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"{correct} of {samples} correct, k={k}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """Returns ROUGE-1, ROUGE-2, ROUGE-L F-measures in [0, 1], without stemming, by Google's rouge-score."""
    scores = _rouge_scorer().score(reference, prediction)
    return {name: float(scores[name].fmeasure) for name in ROUGE_TYPES}


@functools.cache
def _rouge_scorer():
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise InputError("ROUGE needs the package rouge-score: pip install 'a3_jax[eval]'") from error
    return RougeScorer(list(ROUGE_TYPES), use_stemmer=False)


def perplexity(losses: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
    """Returns perplexities of n texts: "corpus", exp(all nats / all tokens), and the "mean" over texts.

    Outliers dominate the mean.

    Args:
      losses: [n] negative log-likelihood of each text in nats, summed over its tokens.
      counts: [n] number of tokens of each.
    """
    nats, tokens = np.asarray(losses, np.float64), np.asarray(counts, np.float64)
    if not len(nats) or (tokens <= 0).any():
        raise InputError("perplexity needs texts of at least one scored token")
    with np.errstate(over="ignore"):
        return {
            "corpus": float(np.exp(nats.sum() / tokens.sum())),
            "mean": float(np.exp(nats / tokens).mean()),
        }


def bits_per_byte(losses: Sequence[float], sizes: Sequence[int]) -> float:
    """Returns all nats of [n] texts in bits, divided by all their UTF-8 bytes, [n] sizes."""
    return float(np.sum(losses, dtype=np.float64) / np.sum(sizes) / math.log(2))


def unigram_entropy(tokens: Sequence[int]) -> float:
    """Returns the entropy in nats of a text's own token frequencies; low where it repeats itself (ReMDM)."""
    counts = np.unique(np.asarray(tokens), return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum()) + 0.0


def distinct_n(sequences: Sequence[Sequence[int]], n: int = 2) -> float:
    """Returns distinct n-grams over all n-grams of some sequences; 0 where none is long enough."""
    grams = [
        tuple(sequence[start : start + n]) for sequence in sequences for start in range(len(sequence) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0
