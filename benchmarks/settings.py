"""The flags of `a3 bench` as one record, and the batches they describe."""

import dataclasses
import os

import numpy as np

from a3_jax.checks import check_seed, one_of
from a3_jax.errors import InputError
from a3_jax.model.config import ModelConfig
from a3_jax.ordering import ranks
from a3_jax.ordering.curriculum import Order, Stage
from a3_jax.ordering.ranks import TRAINING_ORDERS

MODEL = ("d_model", "layers", "heads", "kv_heads", "mlp", "vocab")


def _flag(default, about: str, kind: type = int):
    return dataclasses.field(default=default, metadata={"about": about, "kind": kind})


@dataclasses.dataclass(frozen=True)
class Settings:
    """A benchmark's name, the flags, each with its help, and those of `--config.FIELD` as `overrides`."""

    name: str = ""
    d_model: int = _flag(512, "width of the model")
    layers: int = _flag(6, "blocks of the model")
    heads: int = _flag(8, "query heads")
    kv_heads: int = _flag(4, "key and value heads")
    mlp: int = _flag(1408, "width of the MLP")
    vocab: int = _flag(32000, "vocabulary size")
    lengths: tuple[int, ...] = _flag((1024,), "tokens per sequence, one or more")
    batch: int | None = _flag(None, "sequences per step; if absent, 2 up to 1024 tokens, 1 beyond")
    dtype: str = _flag("float32", "dtype of activations: float32 or bfloat16", str)
    remat: str = _flag("dots", "what the backward pass computes again: none, dots, block, offload", str)
    attention: str = _flag("auto", "implementation: auto, splash, chunked, dense", str)
    order: str = _flag("random", "order of the groups: l2r, contiguous, random, spread", str)
    group_size: int = _flag(4, "tokens per group")
    repeats: int = _flag(5, "measurements of each contender")
    seed: int = _flag(0, "seed of weights, tokens and ranks")
    threads: int | None = _flag(None, "CPU cores to use; if absent, all")
    steps: int = _flag(400, "training steps of the model that is measured")
    release: str | None = _flag(None, "clone of the authors' repository, with llama_xlnet.py", str)
    config: str | None = _flag(None, "file of a run; --config.FIELD=VALUE sets a field of it", str)
    overrides: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "lengths", tuple(self.lengths))  # a list from argparse or JSON
        if self.d_model % self.heads:
            raise InputError(f"{self.heads} does not divide d_model={self.d_model}", field="heads")
        one_of("dtype", self.dtype, ("float32", "bfloat16"))
        one_of("order", self.order, TRAINING_ORDERS)
        check_seed(self.seed)
        self.model(max(self.lengths))  # checks the rest of the shape

    def model(self, length: int, residual: str = "standard") -> ModelConfig:
        """Returns the model with a context of `length` tokens."""
        return ModelConfig(vocab_size=self.vocab, d_model=self.d_model, num_layers=self.layers,
                           num_heads=self.heads, num_kv_heads=self.kv_heads, mlp_size=self.mlp,
                           head_size=self.d_model // self.heads, max_length=length,
                           residual=residual)  # fmt: skip

    def batch_at(self, length: int) -> int:
        """Returns the number of sequences per step at this length."""
        return self.batch or (2 if length <= 1024 else 1)

    @property
    def tokens_per_group(self) -> int:
        return 1 if self.order == "l2r" else self.group_size

    def describe(self, length: int, batch: int | None = None, **more) -> dict:
        """Returns a row's `setting`: what was run, as plain values."""
        fields = {name: getattr(self, name) for name in (*MODEL, "dtype", "remat", "attention", "order")}
        sizes = {"length": length, "batch": batch or self.batch_at(length)}
        return sizes | more | fields | {"group_size": self.tokens_per_group}


def draw_rows(settings: Settings, length: int, batch: int, objective: str = "any_order") -> dict:
    """Draws tokens, positions, segment_ids and ranks, int32 [B, T] each, in reading order.

    The tokens are random, one document per row; the ranks are those of a training stage.
    """
    order = Order(settings.order, (settings.tokens_per_group,))
    stage = Stage("bench", steps=1, objective=objective, orders=(order,))
    tokens = np.random.default_rng(settings.seed).integers(0, settings.vocab, (batch, length), np.int32)
    positions, ones = np.tile(np.arange(length, dtype=np.int32), (batch, 1)), np.ones_like(tokens)
    drawn = [ranks.draw(stage, positions[n], ones[n], settings.seed, index=n).ranks for n in range(batch)]
    return {"tokens": tokens, "positions": positions, "segment_ids": ones, "ranks": np.stack(drawn)}


def sort_rows(rows: dict) -> dict:
    """Sorts rows as the train step takes them; without `weights`, float32 [B, T], these are one."""
    from a3_jax.ordering.intervals import sort_order, take_rows  # loads JAX, unlike PyTorch's side

    rows = {**rows, "weights": rows.get("weights", np.ones(rows["tokens"].shape, np.float32))}
    order = sort_order(rows["ranks"], rows["segment_ids"])
    return dict(zip(rows, take_rows(order, *rows.values()), strict=True))


def set_threads(threads: int | None) -> None:
    """Keeps this process and its children on so many cores, if the system can; before JAX's first array."""
    if threads is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def thread_count() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
