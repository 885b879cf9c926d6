"""The first step's program is made while a run is opened, and made once."""

import contextlib
import threading

import jax
import pytest

from a3_jax.training.setup import compile_in_background
from a3_jax.training.train import train
from tests.prepared_fixtures import make_prepared, rows
from tests.training_fixtures import tiny_run


@pytest.fixture
def compiled():
    """(program, thread) of what is compiled meanwhile."""
    seen = []

    def listen(event, _, fun_name="", **__):
        if event.endswith("backend_compile_duration"):
            seen.append((fun_name, threading.current_thread().name))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_run_compiles_its_first_step_once_and_elsewhere(tmp_path, compiled):
    """The other objective's is compiled where it is first called."""
    data = make_prepared(tmp_path, rows(40, seq_len=24))
    stages = [{"name": "ar", "objective": "ar", "steps": 2}, {"name": "l2r", "steps": 1}]
    config = tiny_run(data, tokenizer="", stages=stages, eval_every=0, batch_size=8)
    train(config, tmp_path / "run")
    assert [thread for name, thread in compiled if name == "jit(step)"] == ["a3 compile", "MainThread"]


def test_what_cannot_be_compiled_fails_where_it_is_called():
    def fail(x):
        raise ValueError("no such step")

    mesh = jax.make_mesh((1,), ("data",))
    with contextlib.ExitStack() as stack:
        step = compile_in_background(jax.jit(fail), (jax.ShapeDtypeStruct((), "float32"),), mesh, stack)
        with pytest.raises(ValueError, match="no such step"):
            step(1.0)
    assert "a3 compile" not in [thread.name for thread in threading.enumerate()]
