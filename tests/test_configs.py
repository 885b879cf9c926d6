"""Every config is a run: it parses, its model has the published size, its step has the right shapes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from a3_jax.errors import InputError
from a3_jax.model.two_stream import abstract_params
from a3_jax.training.config import RunConfig, read_run_config
from a3_jax.training.optimizer import learning_rate, make_optimizer
from a3_jax.training.setup import make_model
from a3_jax.training.step import step_kind, step_loss, train_step
from a3_jax.training.train_state import abstract_state
from tests.golden_configs import CONFIGS, GOLDEN, golden_text, load, model_of

by_name = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
PUBLISHED = {  # parameters of the AR models; the query vector comes on top
    "a3_llama32_1b": 1_235_814_400,
    "a3_llama32_3b": 3_212_749_824,
    "a3_llama31_8b": 8_030_261_248,
    "a3_ablation_three_stages": 3_212_749_824,
    "a3_ablation_last_stage": 3_212_749_824,
    "release": 1_235_814_400,
}


@by_name
def test_parses_and_every_stage_is_valid(path):
    run = load(path)
    assert run.total_steps == sum(stage.steps for stage in run.stages) > 0
    rates = [
        learning_rate(
            run.stages, step,
            learning_rate=run.learning_rate, warmup_steps=run.warmup_steps, schedule=run.schedule,
        )
        for step in range(run.total_steps)
    ]  # fmt: skip
    assert (
        0 < min(rates) <= max(rates) <= max([run.learning_rate, *(s.learning_rate or 0 for s in run.stages)])
    )


@by_name
def test_is_a_record(path):
    """Under 80 lines, and it says paper, hardware, hours and the command that runs it."""
    text = path.read_text()
    assert len(text.splitlines()) < 80
    assert all(
        word in text.lower()
        for word in ("paper", "hardware", "hours", f"a3 train --config=configs/{path.name}")
    )


@by_name
def test_resolved_config_reads_back(path):
    run = load(path)
    assert RunConfig.from_config(run.to_dict()) == run


@by_name
def test_parameters_have_the_published_count(path):
    model = model_of(load(path))
    leaves = jax.tree.leaves(abstract_params(model))
    count = sum(math.prod(leaf.shape) for leaf in leaves) - model.d_model
    assert count == PUBLISHED.get(path.stem, count)
    assert path.stem in PUBLISHED or count < 1_000_000


@by_name
def test_step_evaluates_by_shape(path):
    """The step of each objective maps a state to a state of the same shapes, without computing anything."""
    run = load(path)
    model, optimizer = make_model(run, model_of(run)), make_optimizer(run.optimizer, **run.optimizer_options)
    state = abstract_state(model.config, optimizer)
    rows = jax.ShapeDtypeStruct((run.batch_size, run.seq_len), jnp.int32)
    batch = dict.fromkeys(("tokens", "positions", "segment_ids", "ranks"), rows)
    batch["weights"] = jax.ShapeDtypeStruct(rows.shape, jnp.float32)
    for loss in (step_loss(*kind) for kind in {step_kind(stage) for stage in run.stages}):
        new_state, metrics = jax.eval_shape(
            lambda state, batch, rate, loss=loss: train_step(
                model, optimizer, loss, run.microbatches, state, batch, rate
            ),
            state, batch, jax.ShapeDtypeStruct((), jnp.float32),
        )  # fmt: skip
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        assert all(value.shape == () for value in metrics.values())


@by_name
def test_equals_its_golden_text(path):
    """`python -m tests.golden_configs` renews them all; look at the difference before committing it."""
    assert golden_text(path) == (GOLDEN / f"{path.stem}.txt").read_text()


def test_every_golden_text_has_a_config():
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {path.stem for path in CONFIGS}


def test_release_stages_are_the_preset():
    from a3_jax.ordering.curriculum import release_stages

    run = load(next(path for path in CONFIGS if path.stem == "release"))
    own = {"warmup_steps": run.warmup_steps, "schedule": run.schedule}
    assert tuple(dataclasses.replace(stage, **own) for stage in run.stages) == release_stages()
    assert not run.packing


def test_paper_stages_are_the_preset():
    from a3_jax.ordering.curriculum import paper_stages

    run = load(next(path for path in CONFIGS if path.stem == "a3_llama32_1b"))
    assert run.stages == paper_stages()
    assert 1.9e9 < run.total_steps * run.batch_size * run.seq_len < 2.1e9


TINY = str(CONFIGS[-1])


def test_overrides():
    given = ["--config.stages[1].steps=9", "--config.mesh.fsdp=2", "--config.seed", "7"]
    run = RunConfig.from_config(read_run_config(TINY, [*given, "--config.profile_steps=(3,5)"]))
    assert (run.stages[1].steps, run.mesh["fsdp"], run.seed, run.profile_steps) == (9, 2, 7, (3, 5))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.batch_siz=8", "did you mean 'batch_size'?"),
        ("--config.stages[0].step=8", "did you mean 'steps'?"),
        ("--config.stages[9].steps=8", "'9' is no index below"),
        ("--config.seed=abc", "--config.seed=abc"),
        ("--confi.seed=1", "unknown argument"),
        ("extra", "unexpected argument 'extra'"),
    ],
)
def test_bad_overrides_are_one_line(override, message):
    with pytest.raises(InputError) as error:
        read_run_config(TINY, [override])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (\n", "bad.py:1: not Python"),
        ("x = 1\n", "bad.py: has no function get_config()"),
        ("def get_config():\n    return 1\n", "bad.py: get_config() returned no ConfigDict"),
        ("def get_config():\n    raise ValueError('why')\n", "why"),
    ],
)
def test_bad_config_files_are_named(tmp_path, text, message):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(InputError) as error:
        read_run_config(str(tmp_path / "bad.py"), [])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_absent_config_file_is_named():
    with pytest.raises(InputError, match=r"no/such\.py"):
        read_run_config("no/such.py", [])
