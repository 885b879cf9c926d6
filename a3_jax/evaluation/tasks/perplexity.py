"""How likely a left-to-right evaluator holds what a model wrote: after prompts of The Pile, or from nothing.

    BOS | prompt            | what the model wrote
        | `ppl_full` takes the loss of both, `ppl` of what was written alone, given the prompt

Perplexities are per token of the evaluator, so models with other tokenizers compare: their texts are
decoded and encoded again, and the border is where the prompt's characters end.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from a3_jax.borders import completion, predicted_tokens
from a3_jax.decoding.options import whole_number
from a3_jax.errors import InputError
from a3_jax.evaluation.models.interface import ScoreTarget, TextBlank
from a3_jax.evaluation.tasks.catalogue import Task
from a3_jax.evaluation.tasks.files import TaskFiles, read_rows
from a3_jax.evaluation.tasks.metrics import (
    Figure,
    bits_per_byte,
    distinct_n,
    mean_figure,
    perplexity,
    unigram_entropy,
)
from a3_jax.evaluation.tasks.profiles import A3, AR, PileSettings, Profile
from a3_jax.evaluation.tasks.prompts import pile_prompts, unconditional_blanks

# What Table 2 calls its orders, in the samplers of masked-diffusion models.
_LLADA = {"random": "random", "confidence": "low_confidence", "entropy": "entropy"}
_DREAM = {"random": "origin", "confidence": "maskgit_plus", "entropy": "entropy"}
_FILTERS = ("temperature", "top_p", "top_k")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A column of the table: texts of one length, written in one order.

    Attributes:
      order: its name in figures; "l2r" for left-to-right models, "own" where the caller says how to write.
      length: tokens of a whole text, prompt included.
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
      variant: how.
      row: the document that its prompt begins, from 1; without a prompt the number of the text.
      blank: what is asked of the model.
    """

    variant: Variant
    row: int
    blank: TextBlank

    @property
    def key(self) -> tuple[str, int, int]:
        return f"{self.variant.name}/{self.row}", self.row, 0


def variants_of(profile: Profile, family: str | None, generate: dict[str, Any]) -> list[Variant]:
    """The columns that a profile asks of a model.

    Args:
      family: of the checkpoint; decides the samplers of masked-diffusion models.
      generate: options of the caller. With any beside temperature and filters, they say the order too.
    """
    pile = profile.pile
    _check(pile)
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
    return [
        Variant(name, length, _with_steps(way, length, pile))
        for length in pile.lengths
        for name, way in ways.items()
    ]


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
    """The texts to write, by variant.

    Args:
      tokenizer, evaluator: tokenizers of the model and of the evaluator.
      samples: texts a variant; None: as many as the profile says.

    Raises:
      InputError: too few documents, or a length that leaves nothing to write.
    """
    settings = profile.pile if samples is None else dataclasses.replace(profile.pile, samples=samples)
    _check(settings)
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


def write_and_judge(chunk: Sequence[Writing], model, evaluator) -> list[dict[str, Any]]:
    """Records of texts of one variant.

    Args:
      model: an `EvaluatedModel` with its options set.
      evaluator: one that gives exact left-to-right log-probabilities.

    Returns:
      One dict a text: "id", "row", "sample", "variant", "prompt" and "text" (what was written), "tokens" (the
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
        behind = loss[max(reading.border - reading.first, 0) :]
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
                "nats": float(behind.sum()),
                "nats_full": float(loss.sum()),
                "scored": len(behind),
                "scored_full": len(loss),
                "bytes": len(reading.text.encode("utf-8", "replace")),
                "cut": reading.cut,
                "entropy": unigram_entropy(tokens),
            }
        )
    return records


def is_retokenised(model, evaluator) -> bool:
    """Whether texts have to be decoded for the evaluator."""
    return not model.tokenizer.encodes_like(evaluator.tokenizer)


def summarise_texts(records: Sequence[dict[str, Any]], variants: Sequence[Variant]) -> dict[str, Figure]:
    """Figures by metric and variant, such as `ppl_random_512`: the perplexities of what was written first.

    `ppl_*` are of the corpus, exp(all nats / all tokens), with the standard error of that ratio;
    `ppl_*_mean` means of the texts' own. Texts without a token to score (`scored` 0) are left out.

    Raises:
      InputError: a variant without such a text.
    """
    first, rest = {}, {}
    for variant in variants:
        own = [record for record in records if record["variant"] == variant.name and record["scored"]]
        if not own:
            raise InputError(
                f"no text of {variant.name} has a token that the evaluator can score", field="tasks"
            )
        nats, counts = _columns(own, "nats", "scored")
        first[f"ppl_{variant.name}"] = corpus_figure(nats, counts)
        rest |= {
            f"{name}_{variant.name}": figure for name, figure in _other_figures(own, nats, counts).items()
        }
    return first | rest


def corpus_figure(nats: Sequence[float], counts: Sequence[int]) -> Figure:
    """exp(all nats / all tokens) of [n] texts, with the standard error of a ratio of sums (delta method)."""
    value = perplexity(nats, counts)["corpus"]
    if len(nats) < 2:
        return Figure(value, None, len(nats))
    losses, tokens = np.asarray(nats, np.float64), np.asarray(counts, np.float64)
    residuals = losses - losses.sum() / tokens.sum() * tokens
    spread = math.sqrt(len(nats) / (len(nats) - 1) * float((residuals**2).sum())) / tokens.sum()
    return Figure(value, float(value * spread), len(nats))


def _other_figures(own, nats, counts) -> dict[str, Figure]:
    full, full_counts = _columns(own, "nats_full", "scored_full")
    sequences, sizes = [record["tokens"] for record in own], [record["bytes"] for record in own]
    figures = {
        "ppl_mean": mean_figure(np.exp(np.divide(nats, counts)).tolist(), 1.0),
        "ppl_full": corpus_figure(full, full_counts),
        "ppl_full_mean": mean_figure(np.exp(np.divide(full, full_counts)).tolist(), 1.0),
        "unigram_entropy": mean_figure([record["entropy"] for record in own], 1.0),
        "distinct_1": Figure(distinct_n(sequences, 1), None, len(own)),
        "distinct_2": Figure(distinct_n(sequences, 2), None, len(own)),
    }
    if sum(sizes):
        figures["bits_per_byte"] = Figure(bits_per_byte(nats, sizes), None, len(own))
    return figures


def _columns(records, *names) -> list[list]:
    return [[record[name] for record in records] for name in names]


def _check(pile: PileSettings) -> None:
    for name, values in (
        ("samples", [pile.samples]), ("prompt", [pile.prompt]), ("min_tokens", [pile.min_tokens]),
        ("step_size", [pile.step_size]), ("lengths", pile.lengths),
    ):  # fmt: skip
        for value in values:
            whole_number(f"pile.{name}", value, 1)
    for order in pile.orders:
        if order not in _DREAM:
            raise InputError(f"must be among {', '.join(_DREAM)}, got {order!r}", field="pile.orders")


def _with_steps(way: dict[str, Any], length: int, pile: PileSettings) -> dict[str, Any]:
    """Masked-diffusion samplers are told how many forwards, not how many tokens each commits."""
    if "sampler" not in way or "steps" in way:
        return way
    return {**way, "steps": "length" if pile.step_size == 1 else -(-length // pile.step_size)}


@dataclasses.dataclass(frozen=True, eq=False)
class _Reading:
    """A text as the evaluator reads it.

    Attributes:
      tokens: [T] int32, its BOS (or EOS, where it has no BOS) first.
      first: index of the first token that is scored.
      border: index of the first token that holds a character of what was written.
      prompt, text: the two parts.
      cut: tokens that its context had no room for.
    """

    tokens: np.ndarray
    first: int
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
        border = max(border + len(before), 1)  # nothing scores a text's very first token
        return cls(kept, 1, border, prompt, text, len(whole) - len(kept))


def _losses(readings: Sequence[_Reading], evaluator) -> list[np.ndarray]:
    """[T - first] float64 nats of each; empty where a text has no token to score."""
    targets = {
        index: ScoreTarget(one.tokens, one.first, len(one.tokens))
        for index, one in enumerate(readings)
        if len(one.tokens) > one.first
    }
    scored = dict(zip(targets, evaluator.token_logprobs(list(targets.values())), strict=True))
    nothing = np.zeros(0, np.float64)
    return [
        -scored[index].astype(np.float64) if index in scored else nothing for index in range(len(readings))
    ]
