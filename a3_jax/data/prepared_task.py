"""A prepared directory as a seqio Task, for pipelines that are made of those."""

import numpy as np

from a3_jax.data.manifest import SPLITS
from a3_jax.data.permutation import permute
from a3_jax.data.prepared import Prepared
from a3_jax.data.shards import ShardTable
from a3_jax.data.tasks import digest_of
from a3_jax.data.tensorflow_host import seqio, tf


def register_prepared(prepared: Prepared) -> str:
    """Registers a seqio Task over the rows of a prepared directory.

    Its examples have "tokens", "positions" and "segment_ids" ([T] int32 each). With a seed they come in the
    order of that seed's first epoch in training (`shuffle=False`: seqio would shuffle them once more),
    without one as they are stored. From any step on, and at rates, the stream of `batches` draws them.

    Returns:
      The task's name, a function of the directory and its manifest.
    """
    manifest = prepared.manifest
    task = "a3_rows_" + digest_of(str(prepared.directory), str(manifest.to_dict()["crc32"]))
    if task in seqio.TaskRegistry.names():
        return task
    splits = [split for split in SPLITS if manifest.splits.get(split)]
    tables = {split: ShardTable(prepared.directory, manifest, split) for split in splits}
    names = ("tokens", "positions", "segment_ids")

    def dataset(split, shuffle_files=False, seed=None):
        del shuffle_files
        table = tables[split]

        def read(place):
            row = [place] if seed is None else permute([place], table.num_rows, int(seed), [0])
            rows = table.take(np.asarray(row))
            return [rows[name][0] for name in names]

        @tf.autograph.experimental.do_not_convert
        def example(place):
            arrays = tf.numpy_function(read, [place], [tf.int32] * len(names))
            return {name: tf.ensure_shape(array, [table.seq_len]) for name, array in zip(names, arrays)}

        return tf.data.Dataset.range(table.num_rows).map(example)

    counts = {split: table.num_rows for split, table in tables.items()}
    ids = seqio.PassThroughVocabulary(manifest.vocab_size)
    feature = seqio.Feature(ids, add_eos=False, dtype=tf.int32)
    seqio.TaskRegistry.add(
        task,
        source=seqio.FunctionDataSource(dataset, splits=splits, num_input_examples=counts),  # pyright: ignore[reportArgumentType]
        preprocessors=[],
        output_features=dict.fromkeys(names, feature),
    )
    return task
