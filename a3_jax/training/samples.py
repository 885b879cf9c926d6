"""Infillings to read while a model is being trained."""

from collections.abc import Callable
from typing import Any

import numpy as np

from a3_jax.training.run_log import JsonLines

SAMPLES = 4
MAX_TOKENS = 64
_LOOKED_AT = 64  # rows


def blanked(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the beginning of a text, and a blank in its middle.

    Returns:
      tokens [n] int32, n at most `MAX_TOKENS`, 0 at the blank; blank [n] bool, about a sixth of them.
    """
    tokens = tokens[:MAX_TOKENS].astype(np.int32)
    count = max(1, len(tokens) // 6)
    first = (len(tokens) - count) // 2
    blank = np.zeros(len(tokens), bool)
    blank[first : first + count] = True
    return np.where(blank, 0, tokens), blank


def make_sampler(
    table, config, tokenizer, log: JsonLines, note: Callable[[str], None], seed: int
) -> Callable:
    """Returns a function (steps done, params) that fills the same blanks each time and writes them down.

    Args:
      table: rows, as `data.table.Table`; the first document of each of the first rows is used.
      config: the model's.
      tokenizer: makes the text.
      log: gets {"step", "text", "filled", "truth"} per sample.
      note: shows the user the first sample.
      seed: the sampling's.
    """
    rows = table.take(np.arange(min(table.num_rows, _LOOKED_AT)))
    documents = [tokens[segments == 1] for tokens, segments in zip(rows["tokens"], rows["segment_ids"])]
    documents = [document for document in documents if len(document) > 1][:SAMPLES]

    def sample(step: int, params: Any) -> None:
        from a3_jax.decoding.batched_decode import DecodeRequest, decoding_params, fill
        from a3_jax.decoding.options import BlankRequest, GenerateOptions

        options = GenerateOptions(strategy="dynamic", context="flat", seed=seed)
        requests = [
            BlankRequest(number, *blanked(document), ranks=None)
            for number, document in enumerate(documents, start=1)
        ]
        tasks = [DecodeRequest(request, 0, "flat", options) for request in requests]
        filled = fill(decoding_params(params, config, options), config, tasks, options)
        for document, request, arrays in zip(documents, requests, filled, strict=True):
            row = _readable(document, request.blank, arrays["tokens"], tokenizer)
            log.append({"step": step, **row})
            if document is documents[0]:
                note(f"sample: {row['text']}")

    return sample


def _readable(document, blank, filled, tokenizer) -> dict[str, str]:
    """Returns the text with the filled part in brackets, that part, and the true one."""
    first, last = int(blank.argmax()), len(blank) - int(blank[::-1].argmax())
    filled = filled[: len(blank)]
    before, middle = (
        tokenizer.decode(filled[:first]),
        tokenizer.completion(filled[:first], filled[first:last]),
    )
    after = tokenizer.completion(filled[:last], filled[last:])
    return {
        "text": f"{before} [{middle.strip()}] {after.lstrip(' ')}".strip(),
        "filled": middle,
        "truth": tokenizer.completion(document[:first], document[first:last]),
    }
