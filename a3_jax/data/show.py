"""`a3 data show`: rows of prepared data as the model sees them, their groups and intervals as a picture."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from a3_jax.checks import check_seed, one_of, whole_number
from a3_jax.config_file import read_config
from a3_jax.data.prepared_manifest import SPLITS, TRAIN
from a3_jax.errors import EXIT_OK, InputError

_BOTH, _OWN_GROUP, _UNSEEN = "█", "▒", "·"
_LEGEND = (
    f"{_BOTH} seen by both streams   {_OWN_GROUP} by the content stream alone (its own group)"
    f"   {_UNSEEN} not seen   * given"
)


def run_show(args) -> int:
    """Runs `a3 data show`; returns the exit status."""
    _check(args)
    stage = find_stage(args.stage, args.config, args.config_flags, args.run_defaults)
    from a3_jax.data.prepared import find_prepared, prepared_tokenizer

    found = find_prepared(args.directory)
    if not found:
        raise InputError("is no directory, or does not exist", file=args.directory)
    tokenizer = prepared_tokenizer(found[0])
    rows = example_rows(found, stage, args, tokenizer.bos_id)
    if args.json:
        for row in rows:
            print(json.dumps({name: array.tolist() for name, array in row.items()}))
        return EXIT_OK
    print(f"stage {stage.name}\n{_LEGEND}")
    for number, row in enumerate(rows):
        print("\n".join(["", *picture(row, tokenizer, args.tokens, args.step * args.n + number)]))
    return EXIT_OK


def find_stage(
    name: str, config: str | None, overrides: list[str], run_defaults: Callable[[], Mapping[str, Any]]
):
    """Finds a stage by name, in a config file or else among the presets.

    Args:
      name: the stage's.
      config: file of a run; None for the presets.
      overrides: `--config.FIELD=VALUE` arguments.
      run_defaults: returns the fields of a run's config that have defaults.
    """
    from a3_jax.ordering.curriculum import PRESETS, stages_from_config

    if config is None:
        if overrides:
            raise InputError(f"unknown argument {overrides[0]!r}", file="data show")
        stages = [stage for preset in PRESETS.values() for stage in preset()]
    else:
        stages = stages_from_config(read_config(config, overrides, run_defaults()).stages)
    named = {stage.name: stage for stage in stages}
    one_of("--stage", name, named)
    return named[name]


def example_rows(found, stage, args, bos_id) -> list[dict[str, np.ndarray]]:
    """Returns the examples of one step of `args.n`, sorted as in training, with their intervals.

    Returns:
      For each: tokens, positions, segment_ids, ranks, start, content_limit, query_limit: [T] int32;
      weights: [T] float32.
    """
    from a3_jax.data.batches import BatchPlan, batch
    from a3_jax.data.prepared import open_tables
    from a3_jax.ordering.intervals import bounds

    train, heldout = open_tables(found, found[0].manifest.seq_len)
    table = train if args.split == TRAIN else heldout
    if table is None:
        raise InputError("holds no held-out rows", file=args.directory, field="--split")
    endless = dataclasses.replace(stage, steps=args.step + 1)
    rows = batch(BatchPlan(table, (endless,), args.seed, args.n, bos_id=bos_id), args.step)
    rows |= bounds(rows["ranks"], rows["ranks"], rows["segment_ids"])._asdict()
    return [{name: array[index] for name, array in rows.items()} for index in range(args.n)]


def picture(row: dict[str, np.ndarray], tokenizer, most: int, number: int) -> list[str]:
    """Draws the beginning of a row's first document, in lines of text.

    Args:
      row: one of `example_rows`.
      most: how many of the document's tokens to show.
      number: the example's.
    """
    length = int(np.count_nonzero(row["segment_ids"] == 1))
    shown = np.flatnonzero((row["segment_ids"] == 1) & _among_first(row["positions"], length, most))
    of = {name: array[shown] for name, array in row.items()}
    pieces = [_readable(tokenizer, token) for token in of["tokens"]]
    reading = np.argsort(of["positions"])
    text = " ".join(f"{pieces[i]}/{of['ranks'][i]}" for i in reading)
    documents = int(row["segment_ids"].max(initial=0))
    padding = int(np.count_nonzero(row["segment_ids"] == 0))
    lines = [
        f"example {number}: document 1 of {documents}, {len(shown)} of its {length} tokens;"
        f" {padding} of {len(row['tokens'])} columns without a token",
        f"  token/rank: {text}",
        f"  {'rank':>5} {'place':>5}   {'token':<14} {'keys':<{len(shown)}}  content        query",
    ]
    for i, piece in enumerate(pieces):
        start, content, query = (int(of[name][i]) for name in ("start", "content_limit", "query_limit"))
        keys = "".join(_mark(key, start, content, query) for key in shown)
        given = " " if of["weights"][i] else "*"
        lines.append(
            f"  {of['ranks'][i]:>5} {of['positions'][i]:>5} {given} {piece:<14.14} {keys}"
            f"  {f'[{start}, {content})':<14} [{start}, {query})"
        )
    return lines


def _among_first(positions, length, most):
    """Marks a document's first tokens; positions may have gaps."""
    return positions < most if length > most else positions >= 0


def _mark(key, start, content, query) -> str:
    if start <= key < query:
        return _BOTH
    return _OWN_GROUP if start <= key < content else _UNSEEN


def _readable(tokenizer, token) -> str:
    """Returns a token as one line of text, or its number if it decodes to nothing."""
    piece = repr(tokenizer.decode([int(token)]))[1:-1]
    return piece.replace(" ", "␣") or f"<{int(token)}>"


def _check(args) -> None:
    for name, least in (("n", 1), ("tokens", 1), ("step", 0)):
        whole_number(f"--{name}", getattr(args, name), least)
    check_seed(args.seed)
    one_of("--split", args.split, SPLITS)
