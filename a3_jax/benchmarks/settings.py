"""What a benchmark runs on: the flags as one record, and the rows of a batch."""

import dataclasses
import os

import numpy as np

from a3_jax.errors import InputError, nearest
from a3_jax.model.config import ModelConfig
from a3_jax.ordering import ranks
from a3_jax.ordering.curriculum import Order, Stage
from a3_jax.ordering.ranks import TRAINING_ORDERS

DTYPES = ("float32", "bfloat16")
_DESCRIBED = (
    "d_model", "layers", "heads", "kv_heads", "mlp", "vocab", "dtype", "remat", "attention", "order",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """The flags of `a3 bench`.

    Attributes:
      d_model, layers, heads, kv_heads, mlp, vocab: the model's shape.
      lengths: tokens a sequence, one measurement each.
      batch: sequences a step; None: 2 up to 1024 tokens, 1 beyond.
      dtype: of activations, "float32" or "bfloat16"; parameters are float32.
      remat, attention: as in `two_stream.TwoStream`.
      order, group_size: of the ranks, as in a training stage.
      repeats: measurements of each contender.
      threads: CPU cores to use; None: all.
      steps: of training the model that is measured.
      release: directory with the authors' `llama_xlnet.py`.
      config: file of a run.
      overrides: `--config.FIELD=VALUE` for some of its fields.
    """

    d_model: int = 512
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    mlp: int = 1408
    vocab: int = 32000
    lengths: tuple[int, ...] = (1024,)
    batch: int | None = None
    dtype: str = "float32"
    remat: str = "dots"
    attention: str = "auto"
    order: str = "random"
    group_size: int = 4
    repeats: int = 5
    seed: int = 0
    threads: int | None = None
    steps: int = 400
    release: str | None = None
    config: str | None = None
    overrides: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "lengths", tuple(self.lengths))  # a list, where it comes from JSON
        if self.d_model % self.heads:
            raise InputError(f"{self.heads} does not divide d_model={self.d_model}", field="heads")
        for field, names in (("dtype", DTYPES), ("order", TRAINING_ORDERS)):
            value = getattr(self, field)
            if value not in names:
                message = f"must be one of {', '.join(names)}, got {value!r}{nearest(value, names)}"
                raise InputError(message, field=field)
        self.model(max(self.lengths))  # which checks the rest of the shape

    def model(self, length: int, residual: str = "standard") -> ModelConfig:
        """The model with a context of `length` tokens."""
        return ModelConfig(
            vocab_size=self.vocab, d_model=self.d_model, num_layers=self.layers, num_heads=self.heads,
            num_kv_heads=self.kv_heads, head_size=self.d_model // self.heads, mlp_size=self.mlp,
            max_length=length, residual=residual,
        )  # fmt: skip

    def batch_at(self, length: int) -> int:
        """Sequences a step at this length."""
        return self.batch or (2 if length <= 1024 else 1)

    @property
    def tokens_a_group(self) -> int:
        return 1 if self.order == "l2r" else self.group_size

    def describe(self, length: int, batch: int | None = None, **more) -> dict:
        """A row's `setting`: what was run, in numbers."""
        sizes = {"length": length, "batch": batch or self.batch_at(length)}
        fields = {name: getattr(self, name) for name in _DESCRIBED}
        return sizes | more | fields | {"group_size": self.tokens_a_group}


def draw_rows(settings: Settings, length: int, batch: int, objective: str = "any_order") -> dict:
    """Random tokens, one document a row, with ranks as a training stage draws them; in reading order.

    Returns:
      tokens, positions, segment_ids, ranks: int32 [B, T].
    """
    order = Order(settings.order, (settings.tokens_a_group,))
    stage = Stage("bench", steps=1, objective=objective, orders=(order,))
    rng = np.random.default_rng(settings.seed)
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    segment_ids = np.ones((batch, length), np.int32)
    drawn = [
        ranks.draw(stage, positions[row], segment_ids[row], settings.seed, index=row).ranks
        for row in range(batch)
    ]
    tokens = rng.integers(0, settings.vocab, (batch, length), dtype=np.int32)
    return {"tokens": tokens, "positions": positions, "segment_ids": segment_ids, "ranks": np.stack(drawn)}


def sort_rows(rows: dict) -> dict:
    """The rows as the train step takes them: sorted, and `weights` (float32 [B, T]) of one."""
    from a3_jax.ordering.intervals import sort_order, take_rows  # loads JAX: a PyTorch worker stays without

    order = sort_order(rows["ranks"], rows["segment_ids"])
    batch = dict(zip(rows, take_rows(order, *rows.values()), strict=True))
    return batch | {"weights": np.ones(rows["tokens"].shape, np.float32)}


def set_threads(threads: int | None) -> None:
    """Keeps this process, and those it starts, on this many cores; XLA sizes its thread pool by that.

    Before JAX's first array. Where the system has no such call, threads are left as they are.
    """
    if threads is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:threads])


def thread_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
