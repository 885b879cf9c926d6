"""A model and sorted rows small enough to compile in seconds."""

import jax
import numpy as np

from a3_jax.model.config import ModelConfig
from a3_jax.model.sharding import make_mesh
from a3_jax.model.two_stream import TwoStream
from a3_jax.ordering.intervals import sort_order, take_rows
from a3_jax.training.optimizer import make_optimizer
from a3_jax.training.train_state import init_state

TINY = ModelConfig(
    vocab_size=50,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    mlp_size=64,
    max_length=16,
)


def one_device():
    return make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])


def sorted_rows(seed, batch, length, vocab_size=TINY.vocab_size, group_size=1, padding=()):
    """Random documents in random groups, sorted. `padding`: how many rows at the end of each are padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, (batch, length)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    ranks = np.stack([rng.permutation(length) // group_size for _ in range(batch)]).astype(np.int32)
    segment_ids = np.ones((batch, length), np.int32)
    for row, count in enumerate(padding):
        segment_ids[row, length - count :] = 0
    order = sort_order(ranks, segment_ids)
    names = ("tokens", "positions", "segment_ids", "ranks")
    rows = dict(zip(names, take_rows(order, tokens, positions, segment_ids, ranks), strict=True))
    return rows | {"weights": (rows["segment_ids"] != 0).astype(np.float32)}


def tiny_state(mesh, seed=0, **optimizer):
    adamw = make_optimizer(**optimizer)
    return TwoStream(TINY), adamw, init_state(TINY, adamw, mesh, seed=seed)


LINES = [
    f"{name} saw {count} {thing}."
    for name in ("Ada", "Bob", "Cyd")
    for count in range(3)
    for thing in ("cats", "kites")
]


def tiny_run(data, **changes):
    """A config of two stages on a text file, byte by byte, as a plain dictionary."""
    return {
        "seed": 3,
        "model": {"d_model": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_size": 16,
                  "mlp_size": 48},
        "data": data,
        "tokenizer": "bytes",
        "holdout": 3,
        "seq_len": 24,
        "batch_size": 4,
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "eval_batches": 1,
        "stages": [
            {"name": "l2r", "steps": 4},
            {"name": "random", "steps": 2, "orders": [{"order": "random", "group_sizes": [2]}],
             "reset_optimizer": True},
        ],
    } | changes  # fmt: skip
