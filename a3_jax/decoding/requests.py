"""Input lines, read and validated before the model runs.

Every complaint is an `InputError` that names the file, the line, the field and the offending value.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from a3_jax.borders import BlankText, encode_blanks
from a3_jax.checks import check_seed, whole_number
from a3_jax.decoding.options import BlankRequest, GenerateOptions, ScoreOptions
from a3_jax.errors import InputError, nearest
from a3_jax.ordering.ranks import context_first, order_ranks
from a3_jax.paths import decode_text, read_text

SCORE_FIELDS = (
    "text", "tokens", "ranks", "order", "group_size", "seed", "context", "scored", "absent", "positions"
)  # fmt: skip
GENERATE_FIELDS = ("text", "tokens", "ranks")
SAMPLED_ORDERS = ("random", "block")  # a function of a seed
_INT32 = 2**31


@dataclasses.dataclass(frozen=True)
class Line:
    """One JSON object and where it was: `number` counts from 1, `file` is None for Python callers."""

    item: Any
    number: int
    file: str | None = None


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
    """What to score: T tokens in the input's order.

    Attributes:
      tokens, positions: [T] int32; position in the document.
      present, scored: [T] bool; what is not present has no row, and is not scored.
      ranks: number of an order, from 0 -> [T] int32, lower ranks come earlier; read where present. Made
        when asked for: the orders of all lines together may not fit the memory.
      from_text: whether the output repeats the tokens.
    """

    tokens: np.ndarray
    positions: np.ndarray
    present: np.ndarray
    scored: np.ndarray
    ranks: Callable[[int], np.ndarray]
    from_text: bool


def read_lines(path, bad: list[InputError]) -> list[Line]:
    """Reads the JSON values of a JSONL file, or of standard input for `-`; empty lines are passed over.

    Complaints of lines that are not JSON are added to `bad`.
    """
    if path == "-":
        file = "<stdin>"
        text = decode_text(sys.stdin.buffer.read(), file)
    else:
        file, text = str(path), read_text(path)
    lines = enumerate(text.split("\n"), start=1)  # not splitlines: U+2028 may stand inside a JSON string
    values = []
    for number, line in lines:
        if not line.strip():
            continue
        try:
            values.append(Line(_parsed(line, file, number), number, file))
        except InputError as error:
            bad.append(error)
    return values


def item_lines(items) -> list[Line]:
    """Returns Python dicts as lines, numbered from 1."""
    return [Line(item, number) for number, item in enumerate(items, start=1)]


def _parsed(text, file, number):
    def not_a_number(name):
        raise ValueError(f"{name} is no JSON number")

    try:
        return json.loads(text.removeprefix("\ufeff"), parse_constant=not_a_number)
    except RecursionError as error:
        raise InputError("not JSON: nested too deeply", file=file, line=number) from error
    except ValueError as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise InputError(f"not JSON: {reason}: {_shown(text)}", file=file, line=number) from error


def score_requests(lines, checkpoint, options: ScoreOptions) -> list[ScoreRequest]:
    """Validates the lines of `score`; arrays are [T]. Raises `InputError` for the first bad one."""
    context = options.context or default_context(checkpoint)
    return [_located(line, _score_request, checkpoint, options, context) for line in lines]


def blank_requests(lines, checkpoint, options: GenerateOptions) -> list[BlankRequest]:
    """Validates the lines of `generate`; arrays are [T]. Raises `InputError` for the first bad one."""
    return [_located(line, _blank_request, checkpoint, options) for line in lines]


def default_context(checkpoint) -> str:
    """Returns how given tokens are ranked by default: as in the stage the checkpoint was trained with."""
    return getattr(checkpoint.meta, "context", None) or "flat"


def _located(line: Line, make, *arguments):
    """Returns `make(line, ...)`; its complaints name the line's file and number."""
    try:
        return make(line, *arguments)
    except InputError as error:
        raise InputError(error.message, file=line.file, line=line.number, field=error.field) from error


def _score_request(line, checkpoint, options, context) -> ScoreRequest:
    item = _object(line.item, SCORE_FIELDS)
    tokens, source, _ = _tokens(item, checkpoint, options, are_blanks_read=False)
    tokens, length = _token_ids(tokens, source, checkpoint.config.vocab_size), len(tokens)
    positions = _positions(item, length, checkpoint.config, options.model == "ar")
    front = 1 if source == "text" and _has_bos(checkpoint.tokenizer, options.bos) else 0
    given = np.arange(length) < front + _context(item, length - front)
    present, scored = _present_and_scored(item, length)
    scored &= ~given
    order, ranks = _order(item, options.orders), _ranks(item, length, present)
    if options.model == "ar":
        ranks = positions
        scored &= positions != positions[present].min()  # nothing is left of the first token
    if ranks is None:
        ranks_of = functools.partial(_ordered, order, positions, present, given, context)
    else:
        ranks_of = functools.partial(_one_order, ranks)
    return ScoreRequest(
        np.asarray(tokens, np.int32), positions, present, scored, ranks_of, from_text=source == "text"
    )


def _blank_request(line, checkpoint, options) -> BlankRequest:
    item = _object(line.item, GENERATE_FIELDS)
    tokens, source, text = _tokens(item, checkpoint, options, are_blanks_read=not options.no_blanks)
    blank = np.array([token is None for token in tokens])
    if options.model == "ar" and blank[0]:
        raise InputError(
            "starts with a blank: model 'ar' needs a token to its left, such as BOS", field=source
        )
    filled_up = [0 if token is None else token for token in tokens]
    ids = np.asarray(_token_ids(filled_up, source, checkpoint.config.vocab_size), np.int32)
    return BlankRequest(line.number, ids, blank, _ranks(item, len(ids), blank), text)


def _object(item, fields) -> dict:
    """Returns the item, checked to be an object of known fields with either text or tokens."""
    if not isinstance(item, dict):
        raise InputError(f"expected a JSON object, got {_shown(item)}")
    for field in item:
        if field not in fields:
            raise InputError(f"unknown field{nearest(field, fields)}", field=field)
    if ("text" in item) == ("tokens" in item):
        both = "both 'text' and 'tokens' are" if "text" in item else "neither 'text' nor 'tokens' is"
        raise InputError(f"{both} given, one is needed", field="tokens")
    return item


def _tokens(item, checkpoint, options, are_blanks_read: bool) -> tuple[list, str, BlankText | None]:
    """Returns the item's tokens, the field they come from, and that field's text if it is one."""
    field, text = "text" if "text" in item else "tokens", None
    if field == "tokens":
        tokens = _list(item, "tokens")
    elif not isinstance(item["text"], str):
        raise InputError(f"expected a string, got {_shown(item['text'])}", field="text")
    elif checkpoint.tokenizer is None:
        raise InputError("the checkpoint has no tokenizer: give 'tokens' instead", field="text")
    else:
        try:
            text = encode_blanks(checkpoint.tokenizer, item["text"], options.bos, are_blanks_read)
        except InputError as error:
            raise InputError(error.message, field=error.field or "text") from error
        tokens = text.tokens
    if not tokens:
        raise InputError("is empty", field=field)
    checkpoint.config.check_length(len(tokens), field, options.model == "ar")
    return tokens, field, text


def _has_bos(tokenizer, bos) -> bool:
    return bos == "yes" or (bos == "auto" and tokenizer.adds_bos)


def _list(item, field, length=None) -> list:
    values = item[field]
    if isinstance(values, (tuple, np.ndarray)):  # from Python callers
        values = np.asarray(values).tolist() if isinstance(values, np.ndarray) else list(values)
    if not isinstance(values, list):
        raise InputError(f"expected a list, got {_shown(values)}", field=field)
    if length is not None and len(values) != length:
        raise InputError(f"{len(values)} values for {length} tokens: {_shown(values)}", field=field)
    return values


def _integers(values, field, low=-_INT32, high=_INT32 - 1) -> list[int]:
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise InputError(f"value {index} is {_shown(value)}, expected an integer", field=field)
        if not low <= value <= high:
            raise InputError(f"value {index} is {_shown(value)}, expected {low} to {high}", field=field)
    return values


def _token_ids(tokens, field, vocab_size) -> list[int]:
    for index, token in enumerate(tokens):
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
            raise InputError(f"value {index} is {_shown(token)}, expected a token id", field=field)
        if not 0 <= token < vocab_size:
            message = f"token id {_shown(token)} (value {index}) is outside the vocabulary of {vocab_size}"
            raise InputError(message, field=field)
    return tokens


def _positions(item, length, config, left_to_right) -> np.ndarray:
    """Reads positions, [T] int32: as given, or 0..T-1."""
    if "positions" not in item:
        return np.arange(length, dtype=np.int32)
    context = config.context_length(left_to_right)
    values = _integers(_list(item, "positions", length), "positions", 0, context - 1)
    positions = np.asarray(values, np.int32)
    taken, counts = np.unique(positions, return_counts=True)
    if counts.max() > 1:
        raise InputError(f"position {taken[counts.argmax()]} is given more than once", field="positions")
    return positions


def _context(item, length) -> int:
    """Returns how many tokens, after BOS, are given."""
    context = item.get("context", 0)
    whole_number("context", context, 0)
    if context > length:
        raise InputError(f"{context} given tokens of {length}", field="context")
    return context


def _present_and_scored(item, length) -> tuple[np.ndarray, np.ndarray]:
    """Reads which tokens have a row, and which of those are scored, [T] bool each; by default all."""
    present, scored = ~_flags(item, "absent", length, False), _flags(item, "scored", length, True)
    if not present.any():
        raise InputError("every token is absent", field="absent")
    both = np.flatnonzero(scored & ~present)
    if "scored" in item and both.size:
        raise InputError(f"value {both[0]} is 1, and so is that of 'scored'", field="absent")
    return present, scored & present


def _flags(item, field, length, default: bool) -> np.ndarray:
    """Reads [T] bool from a list of 0 and 1; the default everywhere if the item has none."""
    if field not in item:
        return np.full(length, default)
    values = _list(item, field, length)
    for index, value in enumerate(values):
        if not isinstance(value, int) or value not in (0, 1):
            raise InputError(f"value {index} is {_shown(value)}, expected 0 or 1", field=field)
    return np.asarray(values, bool)


def _ranks(item, length, read) -> np.ndarray | None:
    """Reads ranks, [T] int32, where `read` [T]; 0 elsewhere; None if the item has none."""
    if "ranks" not in item:
        return None
    values = _list(item, "ranks", length)
    values = [value if is_read else 0 for value, is_read in zip(values, read, strict=True)]
    return np.asarray(_integers(values, "ranks"), np.int32)


def _order(item, orders) -> tuple[str, int, int]:
    """Reads (order, group_size, seed) of a scored line, by default as in `generate`; several are random."""
    defaults = GenerateOptions()
    order = item.get("order", defaults.order if orders == 1 else "random")
    group_size, seed = item.get("group_size", defaults.group_size), item.get("seed", defaults.seed)
    whole_number("group_size", group_size, 1)
    check_seed(seed)
    order_ranks(order, 1, 1, np.random.default_rng(0))  # complains about an unknown order
    if orders > 1 and "ranks" in item:
        raise InputError(f"fix one order, where {orders} are to be sampled (--orders)", field="ranks")
    if orders > 1 and order not in SAMPLED_ORDERS:
        known = ", ".join(SAMPLED_ORDERS)
        raise InputError(
            f"{order!r} is one order, {orders} are to be sampled (--orders): {known}", field="order"
        )
    return order, group_size, seed


def _one_order(ranks, number) -> np.ndarray:
    """Returns the ranks themselves, [T] int32, which are order 0."""
    del number
    return ranks


def _ordered(order, positions, present, given, context, number) -> np.ndarray:
    """Ranks the given tokens first, then the rest in the wanted order, counted in reading order: [T] int32.

    Args:
      order: (name, group size, seed).
      positions, present, given: [T]; what is not present takes no part, its rank is 0.
      context: how the given tokens are ranked.
      number: which of the orders that the seed gives; 0 is the one of the seed by itself.
    """
    name, group_size, seed = order
    rng = np.random.default_rng([seed, number] if number else seed)
    reading = np.argsort(positions, kind="stable")
    reading = reading[present[reading]]
    rest = ~given[reading]
    count = int(rest.sum())
    ranks = np.zeros(len(reading), np.int32)
    ranks[rest] = order_ranks(name, count, min(group_size, max(count, 1)), rng)
    result = np.zeros(len(positions), np.int32)
    result[reading] = context_first(ranks, ~rest, context)
    return result


def _shown(value) -> str:
    """Returns a value for a message: short, on one line."""
    text = (
        value
        if isinstance(value, str) and value[:1] in "{["
        else json.dumps(value, ensure_ascii=False, default=repr)
    )
    return text if len(text) <= 60 else f"{text[:57]}..."
