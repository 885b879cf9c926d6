"""What is counted: answers normalised and compared, ROUGE, pass@k, perplexity, diversity.

Figures are in points (x100) where a published table has them so, per example they lie in [0, 1]. Means
come with their standard errors.
"""

import collections
import dataclasses
import functools
import math
import re
import string
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
      standard_error: of the mean, from the examples' sample deviation; None below two examples.
      count: examples.
    """

    value: float
    standard_error: float | None
    count: int


def mean_figure(values: Sequence[float], scale: float = 100.0) -> Figure:
    """The mean of [n] values times `scale`, with its standard error.

    For values 0 and 1 that is sqrt(p (1 - p) / (n - 1)).

    Raises:
      InputError: no values.
    """
    if not len(values):
        raise InputError("no example is left to take a mean of")
    numbers = np.asarray(values, np.float64) * scale
    error = float(numbers.std(ddof=1) / math.sqrt(len(numbers))) if len(numbers) > 1 else None
    return Figure(float(numbers.mean()), error, len(numbers))


def best_choices(scores: Sequence[float], tokens, characters, sizes) -> dict[str, int]:
    """Which choice each rule takes: the largest, ties to the lowest index.

    Args:
      scores: [C] log-probabilities of the choices in nats, sums over their tokens.
      tokens, characters, sizes: [C] how long each choice is, in tokens, characters and UTF-8 bytes.

    Raises:
      ValueError: a score that is no number; argmax would take it for the best.
    """
    values = np.asarray(scores, np.float64)
    if np.isnan(values).any():
        raise ValueError(f"the scores of a row hold NaN: {list(scores)}")
    divisors = {"sum": 1, "per_token": tokens, "per_character": characters, "per_byte": sizes}
    return {rule: int(np.argmax(values / np.asarray(by))) for rule, by in divisors.items()}


def squad_normalised(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces (the SQuAD script).

    Punctuation goes without leaving a space: "rock-n-roll" becomes "rocknroll".
    """
    bare = "".join(letter for letter in text.lower() if letter not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def triviaqa_normalised(text: str) -> str:
    """As TriviaQA's own `normalized_aliases`: punctuation and underscores become spaces.

    Curly single quotes and the acute accent count as punctuation there.
    """
    marks = _PUNCTUATION | {"\u2018", "\u2019", "\u00b4"}
    bare = "".join(" " if letter in marks else letter for letter in text.lower())
    return " ".join(_ARTICLES.sub(" ", bare).split())


def harness_normalised(text: str) -> str:
    """Lower case, no ASCII punctuation: what the harness ignores; no outer space."""
    return "".join(letter for letter in text.lower() if letter not in _PUNCTUATION).strip()


NORMS = {"squad": squad_normalised, "triviaqa": triviaqa_normalised, "lm_eval": harness_normalised}


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the words of two normalised texts, counted with repeats; with an empty one, whether both are."""
    ours, theirs = prediction.split(), reference.split()
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs))


def triviaqa_figures(
    prediction: str, aliases: Sequence[str], normalized_aliases: Sequence[str], norm: str = "squad"
) -> dict[str, float]:
    """Containment, strict exact match and F1 of an answer, each in [0, 1].

    Args:
      prediction: as decoded.
      aliases: as they stand in the data; F1 is against these, normalised like the prediction.
      normalized_aliases: by the data set's authors. An alias without a letter left would be in every
        prediction: it is left out.
      norm: of the prediction, a name of `NORMS`.
    """
    normalise = NORMS[norm]
    answer = normalise(prediction.strip())
    known = [alias for alias in normalized_aliases if alias.strip()]
    raw = [text for text in map(normalise, aliases) if text]
    return {
        "containment": float(any(alias in answer for alias in known)),
        "strict_exact_match": float(answer in known or answer in raw),
        "f1": max((token_f1(answer, text) for text in raw), default=0.0),
    }


def last_word_is(prediction: str, word: str) -> float:
    """LAMBADA: 1 if the prediction without outer space is the word exactly."""
    return float(prediction.strip() == word.strip())


def gsm8k_figures(prediction: str, answer: str) -> dict[str, float]:
    """GSM8K: whether the number of a solution is the one of the reference, found in three ways.

    accuracy: the text behind the last `####`, without commas, as in the fine-tuning format;
    strict_match: the first number behind `#### `; flexible_match: the last number anywhere (both harness).
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
    """Chance that one of k draws from the samples is correct: 1 - C(n - c, k) / C(n, k).

    Raises:
      ValueError: k above the number of samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"{correct} of {samples} correct, k={k}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """ROUGE-1, ROUGE-2, ROUGE-L F-measures in [0, 1], without stemming, by Google's rouge-score.

    Raises:
      InputError: rouge-score is not installed.
    """
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
    """Perplexities of n texts.

    Args:
      losses: [n] negative log-likelihood of each in nats, summed over its tokens.
      counts: [n] tokens of each.

    Returns:
      corpus: exp(all nats / all tokens); mean: of the texts' own perplexities, which outliers rule.
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
    """All nats of [n] texts in bits, over all their [n] UTF-8 bytes."""
    return float(np.sum(losses, dtype=np.float64) / np.sum(sizes) / math.log(2))


def unigram_entropy(tokens: Sequence[int]) -> float:
    """Entropy in nats of a text's own token frequencies; low where it repeats itself (ReMDM)."""
    counts = np.unique(np.asarray(tokens), return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum()) + 0.0


def distinct_n(sequences: Sequence[Sequence[int]], n: int = 2) -> float:
    """Different n-grams over all n-grams of some sequences together; 0 where none is long enough."""
    grams = [
        tuple(sequence[start : start + n]) for sequence in sequences for start in range(len(sequence) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0
