"""One run with all that watches it: utilisation, a profile of chosen steps, compiled programs kept."""

import gzip
import json
import subprocess
import sys

import jax
import pytest

from a3_jax.errors import InputError
from a3_jax.model.config import ModelConfig
from a3_jax.model.flops import train_step_flops
from a3_jax.progress import ProgressLine
from a3_jax.runtime.compile_cache import compilation_cache, default_directory
from a3_jax.training.config import RunConfig, check_unchanged
from a3_jax.training.run_log import Profiler, progress_text
from tests.training_fixtures import LINES, tiny_run

PEAK = 1e12
# A process of its own: JAX's profiler may crash one that has loaded PyTorch or a TPU's compiler too.
PROGRAM = """
import sys
import jax
from a3_jax.training import setup
from a3_jax.training.train import train
from tests.training_fixtures import tiny_run

directory, peak = sys.argv[1], float(sys.argv[2])
setup.peak_flops = lambda devices: peak * len(devices)
config = tiny_run(directory + "/text.txt", profile_steps=(2, 3), compilation_cache=directory + "/compiled")
train(config, directory + "/run", devices=jax.devices()[:1])
assert jax.config.values["jax_compilation_cache_dir"] is None, "settings are given back"
"""


def cache_directory():
    return jax.config.values["jax_compilation_cache_dir"]


@pytest.fixture(scope="module", autouse=True)
def no_directory_from_outside():
    before = cache_directory()
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The directory of a run of six steps, and the programs that a second process would find."""
    directory = tmp_path_factory.mktemp("watched")
    (directory / "text.txt").write_text("\n\n".join(LINES))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory), str(PEAK)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


def test_utilisation_is_model_flops_over_the_peak(watched):
    config = json.loads((watched / "run/checkpoints/6/meta/a3.json").read_text())["model"]
    step = train_step_flops(ModelConfig.from_dict(config), 24)
    rows = [json.loads(line) for line in (watched / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * step.total / 24 / PEAK)


def test_the_chosen_steps_are_in_the_profile(watched):
    (trace,) = (watched / "run/profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "train"]
    assert steps == ["2", "3"]


def test_the_compiled_step_is_kept(watched):
    assert any(path.name.startswith("jit_step") for path in (watched / "compiled").iterdir())


def test_a_program_is_taken_from_the_cache(tmp_path):
    """The same program again, as a function that this process has not seen yet."""
    hits = []

    def count(event, **kwargs):
        hits.append(event) if event.endswith("/cache_hits") else None

    jax.monitoring.register_event_listener(count)
    for expected in (0, 1):
        with compilation_cache(str(tmp_path / "new"), "cpu"):
            jax.jit(lambda x: x * 2 + 41)(1.0)
        assert (len(hits) > 0) == expected
    jax.monitoring.unregister_event_listener(count)


@pytest.mark.parametrize(
    ("directory", "platform", "expected"),
    [
        ("", "tpu", "{home}/a3_jax/xla"),
        ("", "cpu", None),
        ("off", "tpu", None),
        ("{home}/b", "cpu", "{home}/b"),
    ],
)
def test_where_programs_are_kept(tmp_path, monkeypatch, directory, platform, expected):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with compilation_cache(directory.format(home=tmp_path), platform):
        assert cache_directory() == (expected and expected.format(home=tmp_path))
    assert cache_directory() is None


@pytest.mark.parametrize(
    ("directory", "platform", "expected"),
    [("", "cpu", "launch"), ("{home}/own", "cpu", "own"), ("off", "cpu", None), ("{home}/own", "tpu", "own")],
)
def test_where_a_launch_keeps_programs_of_cpus(tmp_path, monkeypatch, directory, platform, expected):
    """For as long as it lasts, unless the config says otherwise."""
    monkeypatch.setenv("A3_COMPILATION_CACHE", str(tmp_path / "launch"))
    with compilation_cache(directory.format(home=tmp_path), platform):
        assert cache_directory() == (expected and str(tmp_path / expected))


def test_several_processes_on_cpus_keep_no_programs(tmp_path, monkeypatch):
    """Only process 0 would find them, and gloo gives up on processes that compile for longer than 30 s."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for platform, expected in (("cpu", None), ("tpu", str(tmp_path))):
        with compilation_cache(str(tmp_path), platform):
            assert cache_directory() == expected


def test_the_default_place_is_the_users_cache_directory(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/ada")
    assert default_directory() == "/home/ada/.cache/a3_jax/xla"


def test_a_directory_set_before_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    try:
        with compilation_cache(str(tmp_path / "other"), "tpu"):
            assert cache_directory() == str(tmp_path / "own")
        assert cache_directory() == str(tmp_path / "own")
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
    assert not (tmp_path / "other").exists()


def test_a_place_that_cannot_be_written_is_one_warning(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with compilation_cache(str(tmp_path / "file" / "cache"), "tpu"):
        assert cache_directory() is None
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: compiled programs are not kept: ") and "file/cache" in warning


def test_the_progress_line_shows_utilisation_only_if_it_is_known(capsys):
    row = {"step": 1, "stage": "l2r", "loss": 1.0, "learning_rate": 0.1, "tokens_per_second": 10.0}
    progress = ProgressLine(2)
    for step, fields in ((1, {"mfu": 0.412}), (2, {})):
        progress.update(step, progress_text(row | fields), due=True)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "step 1/2  l2r  loss 1.0000  rate 1.00e-01  10 tokens/s  mfu 41 %"
    assert "mfu" not in second and second.startswith("step 2/2") and second.endswith("  0:00:00 left")


def test_a_profile_that_a_failure_cuts_short_is_written(tmp_path, monkeypatch):
    calls, notes = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: calls.append(directory))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    profiler = Profiler(tmp_path, (4, 9), notes.append)
    for step in (3, 5, 6):  # the run goes on within the range
        profiler.start_before(step)
        assert not profiler.ends_with(step)
    assert calls == [str(tmp_path)]
    profiler.close()
    assert calls == [str(tmp_path), "stop"] and notes == [f"profile: {tmp_path}"]
    profiler.close()
    assert len(notes) == 1 and len(calls) == 2


@pytest.mark.parametrize(
    "steps", [(1,), (3, 2), (0, 2), (5, 7), (1, 2, 3), (1.0, 2.0), ("1", "2"), (True, 2), 3, "1,2"]
)
def test_bad_profile_steps_are_refused(steps):
    with pytest.raises(InputError, match="profile_steps: must be") as error:
        RunConfig.from_config(tiny_run("", profile_steps=steps))
    assert "\n" not in str(error.value)


def test_a_run_may_go_on_computed_in_another_way_but_not_as_another_run():
    saved = RunConfig.from_config(tiny_run("")).to_dict()
    free = {"remat": "dots", "attention": "dense", "profile_steps": (1, 2), "compilation_cache": "off"}
    check_unchanged(saved, RunConfig.from_config(tiny_run("", **free)), "config.json")
    for name, value in (("optimizer", "adafactor"), ("moment_dtype", "bfloat16")):
        with pytest.raises(InputError, match=f"{name}: '.*' -> '{value}'"):
            check_unchanged(saved, RunConfig.from_config(tiny_run("", **{name: value})), "config.json")


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("attention", "spash", "splash"),
        ("optimizer", "adamv", "adamw"),
        ("moment_dtype", "bfloat", "bfloat16"),
    ],
)
def test_unknown_choices_name_the_nearest(field, value, hint):
    with pytest.raises(InputError, match=f"{field}: must be one of .*did you mean '{hint}'"):
        RunConfig.from_config(tiny_run("", **{field: value}))
