"""From a checkpoint and blanks to text, and to exact log-probabilities.

`generate` fills blanks in any order, `score` gives the log-probability of any tokens given any
others; both take the `Checkpoint` of `a3_jax.open_checkpoint`. Behind them:

    options, requests   what the user asks for, checked before the model runs
    batching            requests of one shape are run together, so that a new length compiles nothing
    generation          lines to results, whole or as a stream
    batched_decode      requests to final states: planned ranks, specs of programs, first states
    loop, decode_state  offer candidates -> forward -> sample -> accept, in one `while_loop`
    strategies          which blanks are offered, and which of them are committed
    speculative         one more strategy: drafts in parallel, samples as if one token at a time
    forwards            what a step computes: over the cache, without it, or left to right
    sampling            logits -> token, its own log-probability, its score as a candidate
    scoring             one forward for any subset given any other
"""

import importlib

_HOMES = {
    "generate": "a3_jax.decoding.generation",
    "generate_stream": "a3_jax.decoding.generation",
    "score": "a3_jax.decoding.scoring",
}

__all__ = [*_HOMES]


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'a3_jax.decoding' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
