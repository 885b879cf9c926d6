"""The seqio end of the stream: packed rows in, sorted batches out, prepared ahead of the reader."""

import atexit
from collections.abc import Generator
from typing import Any, ClassVar

import numpy as np

from a3_jax.data.batches import Batch, BatchPlan, arrange, examples
from a3_jax.data.tensorflow_host import seqio, tf
from a3_jax.ordering.curriculum import total_steps

_PARALLEL_STEPS = 2  # NumPy's sorts leave Python's lock, so two steps at once overlap
_PREFETCH = 4  # batches

_Spec = seqio.FeatureConverter.FeatureSpec
_ROWS = {name: _Spec(tf.int32, rank=2, sequence_dim=1) for name in ("tokens", "positions", "segment_ids")}


class OrderFeatureConverter(seqio.FeatureConverter):
    """Draws each example's order and sorts its row by it, with one NumPy function (`batches.arrange`).

    Unlike seqio's own converters it takes whole batches of rows that are packed already: the examples
    of one step, with their running numbers.
    """

    TASK_FEATURES: ClassVar = {"number": _Spec(tf.int64), **_ROWS}
    MODEL_FEATURES: ClassVar = {
        **_ROWS,
        "ranks": _Spec(tf.int32, rank=2, sequence_dim=1),
        "weights": _Spec(tf.float32, rank=2, sequence_dim=1),
    }
    PACKING_FEATURE_DTYPES: ClassVar = {}

    def __init__(self, plan: BatchPlan):
        super().__init__(pack=False, apply_length_check=False)  # `_convert_features` fixes the shapes
        self.plan = plan
        if plan.table.has_roles:
            self.TASK_FEATURES = {**self.TASK_FEATURES, "roles": _Spec(tf.uint8, rank=2, sequence_dim=1)}

    def _convert_features(self, ds, task_feature_lengths):
        lengths = self.get_model_feature_lengths(task_feature_lengths)
        shapes = {name: (task_feature_lengths["number"], length) for name, length in lengths.items()}

        @tf.autograph.experimental.do_not_convert
        def convert(example):
            inputs = [example[name] for name in self.TASK_FEATURES]
            return _numpy(lambda *rows: arrange(self.plan, *rows), inputs, self.MODEL_FEATURES, shapes)

        return ds.map(convert, num_parallel_calls=_PARALLEL_STEPS, deterministic=True)

    def get_model_feature_lengths(self, task_feature_lengths):
        return dict.fromkeys(self.MODEL_FEATURES, task_feature_lengths["tokens"])


def stream(plan: BatchPlan, first_step: int = 0) -> Generator[Batch, None, None]:
    """Yields the batches of a plan (`batches.batch`) from a step to the end of its curriculum.

    Args:
      first_step: counted from 0 over all stages.
    """
    running: list[Any] = [dataset(plan, first_step).as_numpy_iterator()]

    def stop():
        running.clear()

    # TensorFlow's threads call our NumPy functions ahead of the reader: they have to be stopped while
    # Python still runs, or the process never ends.
    atexit.register(stop)
    try:
        while running:
            batch = next(running[0], None)
            if batch is None:
                return
            yield batch
    finally:
        stop()
        atexit.unregister(stop)


def dataset(plan: BatchPlan, first_step: int) -> tf.data.Dataset:
    """Returns the pipeline of `stream`: steps -> packed rows -> sorted batches."""
    share, seq_len = plan.batch_size // plan.num_hosts, plan.table.seq_len
    converter = OrderFeatureConverter(plan)
    features = converter.TASK_FEATURES

    @tf.autograph.experimental.do_not_convert
    def read(step):
        return _numpy(lambda number: examples(plan, int(number)), [step], features, shapes)

    shapes = {name: (share,) if name == "number" else (share, seq_len) for name in features}
    steps = tf.data.Dataset.range(first_step, total_steps(plan.stages))
    rows = steps.map(read, num_parallel_calls=_PARALLEL_STEPS, deterministic=True)
    lengths = {name: share if name == "number" else seq_len for name in features}
    options = tf.data.Options()
    options.autotune.enabled = False  # nothing is left to it, and its thread may hold up the end by a minute
    return converter(rows, lengths).prefetch(_PREFETCH).with_options(options)


def _numpy(function, inputs, features, shapes) -> dict[str, tf.Tensor]:
    """`function` (arrays in, arrays by name out) as a TensorFlow operation with known shapes."""

    def flat(*arrays):
        result = function(*arrays)
        return [np.ascontiguousarray(result[name]) for name in features]

    outputs = tf.numpy_function(flat, inputs, [spec.dtype for spec in features.values()])
    for name, output in zip(features, outputs):
        output.set_shape(shapes[name])
    return dict(zip(features, outputs))
