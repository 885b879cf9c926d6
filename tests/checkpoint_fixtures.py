"""A run's checkpoints that are small enough to be damaged a hundred times."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from a3_jax.checkpoints.a3_format import Meta
from a3_jax.checkpoints.manifest import Manifest, list_files, read_checksums, read_manifest, write_manifest
from a3_jax.checkpoints.step_writer import StepWriter
from a3_jax.model.config import ModelConfig
from a3_jax.tokenizer import bytes_tokenizer
from tests import tiny

CONFIG = ModelConfig(
    vocab_size=23, d_model=32, num_layers=1, num_heads=4, num_kv_heads=2, head_size=8, mlp_size=48,
    max_length=16, tie_embeddings=True,
)  # fmt: skip
META = Meta(CONFIG, stage="l2r", context="flat")


@functools.cache
def params(step=0):
    return tiny.params(CONFIG, seed=step)


def train_state(step):
    """Moments, a counter on the device, a NumPy scalar, a plain number."""
    moments = np.random.default_rng(step).normal(size=(64, 32))
    return {"mu": jnp.asarray(moments, jnp.bfloat16), "step": jnp.int32(step), "seen": np.int64(step), "n": 5}


def save(writer, step):
    return writer.save(step, params(step), train_state(step), META, bytes_tokenizer())


def write_run(directory, steps=(1, 2), **options):
    with StepWriter(directory, **options) as writer:
        for step in steps:
            assert save(writer, step)
    return directory


def restore_newest(writer, **options):
    """The step that was restored, after comparing every value with what was saved; None if there is none."""
    found = writer.restore_newest(params(0), train_state(0), **options)
    if found is None:
        return None
    step, *trees = found
    assert_same(trees, [params(step), train_state(step)])
    return step


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def reseal(directory):
    """A manifest for files that were changed, so that what is in them is looked at."""
    files = read_checksums(directory, list_files(directory))
    write_manifest(directory, Manifest(files, read_manifest(directory).leaves))
