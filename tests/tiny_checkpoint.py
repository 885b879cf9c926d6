"""The tiny model of `tests.tiny` as an opened checkpoint, without a file."""

import types

from a3_jax.tokenizer import bytes_tokenizer
from tests import tiny


def tiny_checkpoint(config=tiny.CONFIG, context=None, tokenizer=None):
    meta = types.SimpleNamespace(context=context)
    return _TinyCheckpoint(params=tiny.params(config), config=config, tokenizer=tokenizer, meta=meta)


class _TinyCheckpoint(types.SimpleNamespace):
    """Its fields can be changed, and a tokenizer's `eos_id` with it."""

    @property
    def eos_ids(self):
        return () if self.tokenizer is None else self.tokenizer.eos_ids


def with_bytes():
    """A checkpoint that reads and writes text, a byte a token."""
    config = tiny.ModelConfig(**{**tiny.CONFIG.to_dict(), "vocab_size": 260})
    return tiny_checkpoint(config, tokenizer=bytes_tokenizer())


def blanks(rng, length, share=0.6, vocab_size=tiny.CONFIG.vocab_size):
    """[length] tokens, about `share` of them None, the first never."""
    tokens = rng.integers(0, vocab_size, length).tolist()
    return [None if i and rng.random() < share else token for i, token in enumerate(tokens)]
