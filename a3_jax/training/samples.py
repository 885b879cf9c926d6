"""Infillings to read while a model is being trained."""

from collections.abc import Callable
from typing import Any

import numpy as np

from a3_jax.training.metrics import JsonLines

SAMPLES = 4
MAX_TOKENS = 64
_LOOKED_AT = 64  # rows


def blanked(tokens: np.ndarray) -> list[int | None]:
    """A text of up to `MAX_TOKENS` tokens with about a sixth blanked in its middle (`None`)."""
    items: list[int | None] = [int(token) for token in tokens[:MAX_TOKENS]]
    count = max(1, len(items) // 6)
    first = (len(items) - count) // 2
    items[first : first + count] = [None] * count
    return items


def make_sampler(
    table, config, tokenizer, log: JsonLines, note: Callable[[str], None], seed: int
) -> Callable:
    """A function (steps done, params) that fills the same blanks each time and writes them down.

    Args:
      table: rows, as `data.table.Table`; the first document of the first rows is used.
      config: of the model.
      tokenizer: makes the text.
      log: gets {"step", "text", "filled", "truth"} a sample.
      note: shows a line, the first sample, to whoever watches.
      seed: of the sampling.
    """
    rows = table.take(np.arange(min(table.num_rows, _LOOKED_AT)))
    documents = [tokens[segments == 1] for tokens, segments in zip(rows["tokens"], rows["segment_ids"])]
    documents = [document for document in documents if len(document) > 1][:SAMPLES]

    def sample(step: int, params: Any) -> None:
        from a3_jax.checkpoints.a3_format import Meta
        from a3_jax.checkpoints.conversion import Checkpoint
        from a3_jax.decoding.generation import generate

        checkpoint = Checkpoint(params, config, tokenizer, Meta(config))
        items = [{"tokens": blanked(document)} for document in documents]
        results = generate(checkpoint, items, strategy="dynamic", context="flat", seed=seed)
        for document, item, result in zip(documents, items, results, strict=True):
            row = _readable(document, item["tokens"], result["tokens"], tokenizer)
            log.append({"step": step, **row})
            if document is documents[0]:
                note(f"sample: {row['text']}")

    return sample


def _readable(document, blanks, filled, tokenizer) -> dict[str, str]:
    """The text with what was filled in brackets, the filled part and the true one."""
    places = [index for index, token in enumerate(blanks) if token is None]
    first, last = places[0], places[-1] + 1
    middle = tokenizer.decode(filled[first:last])
    before, after = tokenizer.decode(filled[:first]), tokenizer.decode(filled[last:])
    return {
        "text": f"{before} [{middle.strip()}] {after}".strip(),
        "filled": middle,
        "truth": tokenizer.decode([int(token) for token in document[first:last]]),
    }
