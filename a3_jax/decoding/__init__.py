"""From a checkpoint and blanks to text, and to exact log-probabilities.

`generate` fills blanks in any order, `score` gives the log-probability of any tokens given any
others; both take the `Checkpoint` of `a3_jax.open_checkpoint`. Behind them:

    options, requests   what the user asks for, checked before the model runs
    batching            requests of one shape are run together, so that a new length compiles nothing
    generation          lines to results, whole or as a stream
    filling             requests to final states: plans, programs, first states
    loop, state         offer candidates -> forward -> judge -> accept, in one `while_loop`
    strategies          which blanks are offered, and which of them are committed
    speculative         a strategy more: drafts in parallel, the law of one token at a time
    forwards            what a step computes: over the cache, without it, or left to right
    judge, sampling     logits -> token, its own log-probability, how good a candidate it is
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
