"""The A3 directory and the checkpoints of a run: saved in the background, whole, kept by a limit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from a3_jax.checkpoints import step_writer
from a3_jax.checkpoints.a3_format import (
    Meta,
    latest_step,
    list_steps,
    load_checkpoint_tokenizer,
    load_meta,
    load_params,
    save_checkpoint,
)
from a3_jax.checkpoints.loading import open_checkpoint
from a3_jax.checkpoints.step_writer import StepWriter
from a3_jax.errors import InputError
from a3_jax.model.sharding import make_mesh
from a3_jax.model.two_stream import param_shardings
from a3_jax.tokenizer import bytes_tokenizer
from tests import tiny

META = Meta(tiny.CONFIG, stage="random4", context="flat", run_config={"seed": 1})


def train_state(params):
    """Optimiser state, a counter on a device, a plain number, a NumPy scalar."""
    state = optax.adamw(1e-3).init(params)
    return {"opt": state, "step": jnp.int32(7), "rolled_back": 2, "seen": np.int64(9)}


def abstract(tree):
    return jax.tree.map(
        lambda x: (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x
        ),
        tree,
    )


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture
def writer(tmp_path):
    with StepWriter(tmp_path / "checkpoints", keep=2) as writer:
        yield writer


def test_save_and_load(tmp_path):
    tokenizer = bytes_tokenizer()
    save_checkpoint(tmp_path / "a3", tiny.params(), META, tokenizer)
    assert load_meta(tmp_path / "a3") == META
    assert_same(load_params(tmp_path / "a3"), tiny.params())
    assert load_checkpoint_tokenizer(tmp_path / "a3").fingerprint == tokenizer.fingerprint
    narrowed = load_params(tmp_path / "a3", dtype="bfloat16")
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(narrowed))


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("a3", tiny.params(), META)
    assert_same(open_checkpoint("a3").params, tiny.params())
    with StepWriter("run/checkpoints", keep=1) as writer:
        writer.save(1, tiny.params(), {"x": 1}, META)
    assert latest_step("run/checkpoints") == 1


def test_a_step_is_a_checkpoint(tmp_path, writer):
    """Each step opens by itself, by the run's directory and by its `checkpoints`."""
    writer.save(3, tiny.params(), train_state(tiny.params()), META, bytes_tokenizer())
    writer.wait()
    for path in (tmp_path / "checkpoints" / "3", tmp_path / "checkpoints", tmp_path):
        checkpoint = open_checkpoint(path)
        assert_same(checkpoint.params, tiny.params())
        assert (checkpoint.meta.step, checkpoint.meta.stage) == (3, "random4")
        assert checkpoint.tokenizer.vocab_size == 258


def test_restore(writer):
    params, state = tiny.params(), train_state(tiny.params())
    writer.save(1, params, state, META)
    writer.wait()
    assert_same(writer.restore(1, abstract(params), abstract(state)), (params, state))
    with pytest.raises(InputError, match="no checkpoint"):
        writer.restore(2, abstract(params), abstract(state))


def test_restore_on_another_mesh(writer):
    """Saved from one layout, restored to the shardings that the abstract arrays carry."""
    first = param_shardings(make_mesh({"fsdp": 8}), tiny.CONFIG)
    second = param_shardings(make_mesh({"data": 4, "fsdp": 2}), tiny.CONFIG)
    params = jax.device_put(tiny.params(), first)
    writer.save(1, params, {"moments": params}, META)
    writer.wait()
    wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, second)
    restored, state = writer.restore(1, wanted, {"moments": wanted})
    assert jax.tree.all(jax.tree.map(lambda x, sharding: x.sharding == sharding, restored, second))
    assert_same(restored, params)
    assert_same(state["moments"], params)


def test_restore_of_another_tree(writer):
    writer.save(1, tiny.params(), {"count": jnp.zeros(3)}, META)
    writer.wait()
    for other in (
        {"count": jnp.zeros(4)},
        {"counts": jnp.zeros(3)},
        {"count": jnp.zeros(3), "more": jnp.zeros(1)},
    ):
        with pytest.raises(InputError, match=r"count|more"):
            writer.restore(1, abstract(tiny.params()), abstract(other))


def test_arrays_may_be_reused_after_save(writer):
    """`save` has copied what it needs when it returns: the step may donate its buffers."""
    params = jax.tree.map(jnp.copy, tiny.params())
    writer.save(1, params, {"x": 1}, META)
    jax.tree.map(lambda x: x.delete(), params)
    writer.wait()
    assert_same(load_params(writer.directory / "1"), tiny.params())


def test_keeps_the_newest_steps(writer):
    for step in (1, 2, 3, 4):
        assert writer.save(step, tiny.params(), {"step": step}, META)
    writer.wait()
    assert list_steps(writer.directory) == [3, 4]
    assert writer.save(4, tiny.params(), {"step": 0}, META) is False  # there already


def test_leftovers_never_count(tmp_path):
    """Empty directories, interrupted writers and foreign names: neither the latest step nor in the way."""
    place = tmp_path / "checkpoints"
    with StepWriter(place, keep=3) as writer:
        writer.save(2, tiny.params(), {"x": 1}, META)
    for name in ("5", "9.orbax-checkpoint-tmp", "notes"):
        (place / name).mkdir()
    (place / "7" / "params").mkdir(parents=True)
    (place / "8").write_text("")
    assert latest_step(place) == 2
    with StepWriter(place, keep=3) as writer:
        assert writer.latest_step() == 2
        for step in (3, 5, 7, 9):  # those that were in the way can be saved
            assert writer.save(step, tiny.params(), {"x": 1}, META)
    assert list_steps(place) == [5, 7, 9]
    assert latest_step(tmp_path / "absent") is None


class FailingHandler(ocp.StandardCheckpointHandler):
    """Writes arrays, then fails in the background, as a full disk does."""

    async def async_save(self, directory, *args, **kwargs):
        class Failure:
            def result(self, timeout=None):
                raise OSError("no space left on device")

        return [*(await super().async_save(directory, *args, **kwargs)), Failure()]


@pytest.fixture
def failing_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(step_writer.ocp, "StandardCheckpointHandler", FailingHandler)
    writer = StepWriter(tmp_path / "checkpoints", keep=2)
    monkeypatch.undo()
    yield writer
    writer._checkpointer.close()


@pytest.mark.parametrize("notice", ["wait", "next save"])
def test_failed_save_surfaces(failing_writer, notice):
    """`save` returns before the disk is found full; the next call tells, and the step doesn't exist."""
    failing_writer.save(1, tiny.params(), {"x": 1}, META)
    with pytest.raises(Exception, match="no space left"):
        failing_writer.wait() if notice == "wait" else failing_writer.save(2, tiny.params(), {"x": 1}, META)
    assert failing_writer.latest_step() is None


def test_the_same_step_can_be_saved_after_a_failure(tmp_path, failing_writer):
    failing_writer.save(1, tiny.params(), {"x": 1}, META)
    with pytest.raises(Exception, match="no space left"):
        failing_writer.wait()
    with StepWriter(tmp_path / "checkpoints") as writer:
        assert writer.save(1, tiny.params(), {"x": 1}, META)
    assert latest_step(tmp_path / "checkpoints") == 1


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(InputError, match="is a file"):
        StepWriter(tmp_path / "checkpoints")
