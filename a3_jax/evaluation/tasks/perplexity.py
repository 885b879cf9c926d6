"""Perplexity, under a left-to-right evaluator, of what a model writes: after Pile prompts, or from nothing.

    BOS | prompt            | what the model wrote
        | `ppl_full` takes the loss of both, `ppl` of what was written alone, given the prompt

Perplexities are per token of the evaluator, so models with different tokenizers compare: their texts are
decoded and encoded again, and the border is where the prompt's characters end.
"""

import dataclasses
import heapq
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from a3_jax.borders import completion, predicted_tokens, whole_text
from a3_jax.errors import InputError
from a3_jax.evaluation.models import A3, AR
from a3_jax.evaluation.models.interface import NO_TOKENS, ScoreTarget, TextBlank
from a3_jax.evaluation.tasks.catalogue import Task
from a3_jax.evaluation.tasks.examples import derived_seed
from a3_jax.evaluation.tasks.files import DataRow, TaskFiles, read_rows
from a3_jax.evaluation.tasks.metrics import (
    Figure,
    bits_per_byte,
    distinct_n,
    mean_figure,
    perplexity,
    unigram_entropy,
)
from a3_jax.evaluation.tasks.profiles import PileSettings, Profile
from a3_jax.tokenizer import Tokenizer

_CHARACTERS_A_TOKEN = 32  # documents are cut well after the tokens that count: books are long
# The samplers of masked-diffusion models for the orders of Table 2.
_LLADA = {"random": "random", "confidence": "low_confidence", "entropy": "entropy"}
_DREAM = {"random": "origin", "confidence": "maskgit_plus", "entropy": "entropy"}
_FILTERS = ("temperature", "top_p", "top_k")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A column of the table: texts of one length, written in one order.

    Attributes:
      order: its name in figures; "l2r" for left-to-right models, "own" for the caller's own options.
      length: number of tokens of a whole text, prompt included.
      generate: decoding options.
    """

    order: str
    length: int
    generate: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.order}_{self.length}"


@dataclasses.dataclass(frozen=True, eq=False)
class Writing:
    """One text to write.

    Attributes:
      variant: how it is written.
      row: the number of the document whose beginning is the prompt, from 1; without a prompt of the text.
      blank: the request to the model.
    """

    variant: Variant
    row: int
    blank: TextBlank

    @property
    def key(self) -> tuple[str, int, int]:
        return f"{self.variant.name}/{self.row}", self.row, 0


@dataclasses.dataclass(frozen=True, eq=False)
class PromptExample:
    """The beginning of a document.

    Attributes:
      row: the document's number in its files, from 1.
      text: the prompt, without a last character that the evaluator's tokens hold only in part.
      tokens: [P] int32 of the evaluated model, BOS first where its tokenizer adds one.
      seed: seed of what continues it.
    """

    row: int
    text: str
    tokens: np.ndarray
    seed: int

    def blank(self, length: int) -> TextBlank:
        """Returns the rest of a text of `length` tokens, this prompt included, as a blank."""
        if length <= len(self.tokens):
            message = f"{length} tokens are no more than the prompt of row {self.row}, {len(self.tokens)}"
            raise InputError(message, field="pile.lengths")
        return TextBlank(self.tokens, NO_TOKENS, length - len(self.tokens), self.seed)


def pile_prompts(
    rows: Iterable[DataRow], tokenizer: Tokenizer, evaluator: Tokenizer, settings: PileSettings, seed: int = 0
) -> list[PromptExample]:
    """Returns the first `settings.prompt` evaluator tokens of documents that are long enough, drawn by seed.

    Every document gets a number from (seed, row); of those with at least `settings.min_tokens` evaluator
    tokens, the `settings.samples` with the smallest numbers are taken, in the order of the file: the choice
    does not depend on the evaluated model. Only documents whose number could still be chosen are encoded.
    """
    kept: list[tuple[int, int, str]] = []  # a heap: (-draw, -row, prompt)
    for number, row in enumerate(rows, start=1):
        draw = derived_seed(seed, number)
        if len(kept) == settings.samples and -draw <= kept[0][0]:
            continue
        text = row.values["text"][: settings.min_tokens * _CHARACTERS_A_TOKEN]
        ((tokens, offsets),) = evaluator.encode_with_offsets([text])
        if len(tokens) >= settings.min_tokens:
            entry = (-draw, -number, whole_text(text, offsets, settings.prompt))
            (heapq.heappushpop if len(kept) == settings.samples else heapq.heappush)(kept, entry)
    if len(kept) < settings.samples:
        wanted = f"{settings.samples} documents of {settings.min_tokens} tokens"
        message = f"{wanted} are wanted, {len(kept)} are there"
        raise InputError(message, field="pile.samples")
    chosen = sorted((-number, text) for _, number, text in kept)
    return [
        PromptExample(number, text, np.asarray(tokenizer.encode(text), np.int32), derived_seed(seed, number))
        for number, text in chosen
    ]


def unconditional_blanks(tokenizer: Tokenizer, length: int, samples: int, seed: int = 0) -> list[TextBlank]:
    """Returns blanks of whole texts of `length` tokens that begin with BOS, or EOS where there is no BOS."""
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if first is None:
        raise InputError("the tokenizer has neither BOS nor EOS, and a text must begin with one")
    if length < 2 or samples < 1:
        raise InputError(f"{samples} texts of {length} tokens, BOS included, hold nothing to write")
    prefix = np.asarray([first], np.int32)
    return [TextBlank(prefix, NO_TOKENS, length - 1, derived_seed(seed, number)) for number in range(samples)]


def variants_of(profile: Profile, family: str | None, generate: dict[str, Any]) -> list[Variant]:
    """Returns the columns that a profile asks of a model.

    Args:
      family: the checkpoint's family; decides the samplers of masked-diffusion models.
      generate: the caller's options. Any beside temperature and filters replaces the orders too.
    """
    pile = profile.pile
    base = {"temperature": pile.temperature, "top_p": pile.top_p}
    if any(name not in _FILTERS for name in generate):
        ways = {"own": base | generate}
    elif profile.model == AR:
        ways = {"l2r": base | generate}
    elif profile.model == A3:
        dynamic = {"strategy": "dynamic", "step_size": pile.step_size}
        ways = {order: {**dynamic, "criterion": order, **base, **generate} for order in pile.orders}
    else:
        samplers = _LLADA if family == "llada" else _DREAM
        ways = {order: {"sampler": samplers[order], **base, **generate} for order in pile.orders}
    found = []
    for length in pile.lengths:
        for name, way in ways.items():
            if "sampler" in way and "steps" not in way:  # forwards, which decide how many each commits
                way = {**way, "steps": "length" if pile.step_size == 1 else -(-length // pile.step_size)}
            found.append(Variant(name, length, way))
    return found


def writings(
    task: Task,
    files: TaskFiles,
    profile: Profile,
    variants,
    tokenizer,
    evaluator,
    seed: int,
    samples: int | None,
) -> list[list[Writing]]:
    """Returns the texts to write, by variant.

    Args:
      tokenizer, evaluator: tokenizers of the model and of the evaluator.
      samples: texts per variant; None: as many as the profile says.
    """
    settings = profile.pile if samples is None else dataclasses.replace(profile.pile, samples=samples)
    if not task.files:
        blanks = {
            length: unconditional_blanks(tokenizer, length, settings.samples, seed)
            for length in settings.lengths
        }
        return [
            [Writing(variant, row, blank) for row, blank in enumerate(blanks[variant.length], start=1)]
            for variant in variants
        ]
    prompts = pile_prompts(read_rows(task, files), tokenizer, evaluator, settings, seed)
    return [[Writing(variant, one.row, one.blank(variant.length)) for one in prompts] for variant in variants]


def write_and_score(chunk: Sequence[Writing], model, evaluator) -> list[dict[str, Any]]:
    """Lets a model write texts of one variant, and an evaluator score them.

    Args:
      model: an `EvaluatedModel` with its options set.
      evaluator: one that gives exact left-to-right log-probabilities.

    Returns:
      One record per text: "id", "row", "sample", "variant", "prompt", "text" (as written), "tokens" (the
      model's own), "nats" and "nats_full" (losses under the evaluator, of what was written and of all),
      "scored" and "scored_full" (its tokens), "bytes" (of the text), "cut" (tokens beyond its context),
      "entropy" (of the model's tokens, nats).
    """
    written = model.fill([one.blank for one in chunk])
    readings = [
        _Reading.of(one.blank.prefix, tokens, model, evaluator)
        for one, tokens in zip(chunk, written, strict=True)
    ]
    losses = _losses(readings, evaluator)
    records = []
    for one, tokens, reading, loss in zip(chunk, written, readings, losses, strict=True):
        written_loss = loss[reading.border - 1 :]
        name, row, sample = one.key
        records.append(
            {
                "id": name,
                "row": row,
                "sample": sample,
                "variant": one.variant.name,
                "prompt": reading.prompt,
                "text": reading.text,
                "tokens": [int(token) for token in tokens],
                "nats": float(written_loss.sum()),
                "nats_full": float(loss.sum()),
                "scored": len(written_loss),
                "scored_full": len(loss),
                "bytes": len(reading.text.encode("utf-8", "replace")),
                "cut": reading.cut,
                "entropy": unigram_entropy(tokens),
            }
        )
    return records


def is_retokenised(model, evaluator) -> bool:
    """Tells whether texts must be decoded and encoded again for the evaluator."""
    return not model.tokenizer.encodes_like(evaluator.tokenizer)


def summarise_texts(records: Sequence[dict[str, Any]], variants: Sequence[Variant]) -> dict[str, Figure]:
    """Returns figures by metric and variant, such as `ppl_random_512`; the perplexities come first.

    `ppl_*` are over the corpus, exp(all nats / all tokens), with the standard error of that ratio;
    `ppl_mean_*` are means over texts. Texts without a token to score (`scored` 0) are left out.
    """
    first, rest = {}, {}
    for variant in variants:
        own = [record for record in records if record["variant"] == variant.name and record["scored"]]
        if not own:
            message = f"no text of {variant.name} has a token that the evaluator can score"
            raise InputError(message, field="tasks")
        nats, counts, full, full_counts, sequences, sizes, entropies = (
            [record[name] for record in own]
            for name in ("nats", "scored", "nats_full", "scored_full", "tokens", "bytes", "entropy")
        )
        first[f"ppl_{variant.name}"] = corpus_figure(nats, counts)
        others = {
            "ppl_mean": mean_figure(np.exp(np.divide(nats, counts)).tolist(), 1.0),
            "ppl_full": corpus_figure(full, full_counts),
            "ppl_full_mean": mean_figure(np.exp(np.divide(full, full_counts)).tolist(), 1.0),
            "unigram_entropy": mean_figure(entropies, 1.0),
            "distinct_1": Figure(distinct_n(sequences, 1), None, len(own)),
            "distinct_2": Figure(distinct_n(sequences, 2), None, len(own)),
        }
        if sum(sizes):
            others["bits_per_byte"] = Figure(bits_per_byte(nats, sizes), None, len(own))
        rest |= {f"{name}_{variant.name}": figure for name, figure in others.items()}
    return first | rest


def corpus_figure(nats: Sequence[float], counts: Sequence[int]) -> Figure:
    """Returns exp(all nats / all tokens) of [n] texts; standard error of a ratio of sums (delta method)."""
    value = perplexity(nats, counts)["corpus"]
    if len(nats) < 2:
        return Figure(value, None, len(nats))
    losses, tokens = np.asarray(nats, np.float64), np.asarray(counts, np.float64)
    residuals = losses - losses.sum() / tokens.sum() * tokens
    spread = math.sqrt(len(nats) / (len(nats) - 1) * float((residuals**2).sum())) / tokens.sum()
    return Figure(value, float(value * spread), len(nats))


@dataclasses.dataclass(frozen=True, eq=False)
class _Reading:
    """A text as the evaluator reads it.

    Attributes:
      tokens: [T] int32, its BOS (or EOS, where it has no BOS) first.
      border: index of the first token that holds a character of what was written.
      prompt, text: the two parts.
      cut: number of tokens beyond the evaluator's context.
    """

    tokens: np.ndarray
    border: int
    prompt: str
    text: str
    cut: int

    @classmethod
    def of(cls, prefix, written, model, evaluator) -> "_Reading":
        own, theirs = model.tokenizer, evaluator.tokenizer
        specials = {own.bos_id, own.eos_id} - {None}
        given = [int(token) for token in prefix]
        prompt = own.decode(given)
        text = completion(own, given, written)
        if is_retokenised(model, evaluator):
            ((tokens, offsets),) = theirs.encode_with_offsets([prompt + text])
            border = int(np.argmax([*predicted_tokens(offsets, [(prompt, False), (text, True)]), True]))
        else:
            front = given[1:] if given and given[0] in specials else given
            tokens, border = [*front, *(int(token) for token in written)], len(front)
        start = theirs.bos_id if theirs.bos_id is not None else theirs.eos_id
        before = [] if start is None else [start]
        whole = np.asarray([*before, *tokens], np.int32)
        kept = whole[: getattr(evaluator, "scored_length", evaluator.max_length)]
        border = max(border + len(before), 1)  # the very first token is never scored
        return cls(kept, border, prompt, text, len(whole) - len(kept))


def _losses(readings: Sequence[_Reading], evaluator) -> list[np.ndarray]:
    """Returns [T - 1] float64 nats of each text, its first token left out; empty where nothing is left."""
    targets = {
        index: ScoreTarget(one.tokens, 1, len(one.tokens))
        for index, one in enumerate(readings)
        if len(one.tokens) > 1
    }
    scored = dict(zip(targets, evaluator.token_logprobs(list(targets.values())), strict=True))
    return [-np.asarray(scored.get(index, ()), np.float64) for index in range(len(readings))]
