"""Any-order, any-subset autoregressive language models (A3, arXiv 2601.13228) in JAX.

    import a3_jax
    a3_jax.convert("Llama-3.2-1B", "llama-a3")              # a pretrained left-to-right model in
    a3_jax.train(config, workdir="runs/a3-1b")              # adapt it by the curriculum
    checkpoint = a3_jax.open_checkpoint("runs/a3-1b")
    a3_jax.generate(checkpoint, [{"text": "The [[3]] sat on [[8]]."}])
    a3_jax.score(checkpoint, [{"text": "The cat sat.", "order": "random"}])

Names load on first use, so that importing the package costs nothing.

Axis letters, in names such as `logits_BTV`, are those of `jax.nn`: B batch, T rows (queries), S keys,
N heads, K key/value heads, G = N / K, H head size, D model width, F mlp width, V vocabulary, L layers; and
R rows (of both streams, or of a block), Q candidates, h = H / 2.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "convert": "a3_jax.checkpoints.conversion",
    "open_checkpoint": "a3_jax.checkpoints.loading",
    "train": "a3_jax.training.train",
    "generate": "a3_jax.decoding.generation",
    "generate_stream": "a3_jax.decoding.generation",
    "score": "a3_jax.decoding.scoring",
    "evaluate": "a3_jax.evaluation.runner",
    "InputError": "a3_jax.errors",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'a3_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return __all__
