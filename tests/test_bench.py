"""`a3 bench`: the JSON that others read, ratios between neighbours, no TensorFlow, peaks after a reset."""

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys

import numpy as np
import pytest

from a3_jax import bench_command
from a3_jax.cli import main
from benchmarks import step_costs
from benchmarks.command import BENCHMARKS
from benchmarks.fresh_process import fresh_process
from benchmarks.measurement import MeasurementError, alternate
from benchmarks.settings import Settings, draw_rows, sort_rows
from benchmarks.train_steps import train_step

ATTENTION = ["--d_model=16", "--heads=2", "--kv_heads=1"]
MODEL = [*ATTENTION, "--layers=2", "--mlp=24", "--vocab=40"]
TINY = Settings(
    d_model=16, layers=2, heads=2, kv_heads=1, mlp=24, vocab=40, lengths=(16, 32), batch=1, repeats=2
)


def bench(capsys, *arguments):
    assert main(["bench", *arguments, "--json", "--repeats=3"]) == 0
    return json.loads(capsys.readouterr().out)


def rows_of(result):
    """By metric and length; an exponent has two lengths."""
    return {
        (row["metric"], row["setting"]["length"], *filter(None, [row["setting"].get("from_length")])): row
        for row in result["rows"]
    }


def check_schema(result, name):
    assert set(result) == {"bench", "rows", "versions"}
    assert result["bench"] == name
    assert {"python", "jax", "jaxlib", "numpy", "device", "cpu_count", "threads"} <= set(result["versions"])
    for row in result["rows"]:
        assert set(row) == {"metric", "value", "unit", "setting", "repeats"}
        assert row["value"] == statistics.median(row["repeats"])
        assert all(np.isfinite(row["repeats"]))
        tells_better = "_over_" in row["metric"] or row["metric"].endswith("_speedup")
        assert (row["unit"] == "ratio") == tells_better, row["metric"]


def test_attention(capsys):
    result = bench(capsys, "attention", *ATTENTION, "--lengths", "16", "24")
    check_schema(result, "attention")
    rows = rows_of(result)
    for length in (16, 24):
        for direction in ("forward", "forward_backward"):
            times = [rows[f"{name}_{direction}_time", length]["repeats"] for name in ("chunked", "dense")]
            ratios = rows[f"chunked_{direction}_time_over_dense", length]["repeats"]
            assert ratios == [a / b for a, b in zip(*times, strict=True)]
            assert len(ratios) == 3
            assert rows[f"dense_{direction}_temporary", length]["value"] > 0
        assert rows["dense_forward_time", length]["setting"]["rows"] == 2 * length


def test_train_without_tensorflow_and_torch():
    """In a process where none of them can be imported: all rows but those of transformers, and a note."""
    code = f"""
import sys
for name in ("tensorflow", "seqio", "torch", "transformers"):
    sys.modules[name] = None
from a3_jax.cli import main
sys.exit(main(["bench", "train", "--json", "--length=16", "--repeats=2", *{MODEL!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no transformers step: torch is not installed" in done.stderr
    result = json.loads(done.stdout)
    check_schema(result, "train")
    rows = rows_of(result)
    assert not [metric for metric, _ in rows if "transformers" in metric]
    measured, formula = rows["two_stream_step_time_over_ar", 16], rows["two_stream_flops_over_ar", 16]
    both = (rows[f"{name}_step_time", 16]["repeats"] for name in ("two_stream", "ar"))
    assert measured["repeats"] == [a / b for a, b in zip(*both, strict=True)]
    assert rows["measured_over_formula", 16]["value"] == pytest.approx(measured["value"] / formula["value"])
    seconds = rows["two_stream_step_time", 16]["repeats"]
    assert rows["two_stream_tokens_per_second", 16]["repeats"] == [16 / second for second in seconds]


def test_scaling(capsys):
    result = bench(capsys, "scaling", *MODEL, "--lengths", "16", "64")
    check_schema(result, "scaling")
    rows = rows_of(result)
    times = [rows["step_time", length]["repeats"] for length in (16, 64)]
    slopes = [np.log(long / short) / np.log(4) for short, long in zip(*times, strict=True)]
    np.testing.assert_allclose(rows["time_exponent", 64, 16]["repeats"], slopes, rtol=1e-6)
    assert 1.0 < rows["flops_exponent", 64, 16]["value"] < 2.0
    assert rows["step_temporary", 64]["value"] > rows["step_temporary", 16]["value"]


def test_eval(capsys):
    result = bench(capsys, "eval", *MODEL[:-1], "--vocab=300", "--lengths", "16", "24", "--batch=3")
    check_schema(result, "eval")
    rows = rows_of(result)
    for length in (16, 24):
        ours, engine = (rows[f"{name}_rate", length]["repeats"] for name in ("eval", "engine"))
        assert rows["eval_rate_over_engine", length]["repeats"] == [
            a / b for a, b in zip(ours, engine, strict=True)
        ]
        assert rows["eval_rate_over_whole_rows", length]["value"] > 0
        assert rows["eval_rate", length]["setting"]["choices"] == 4


def test_memory_rows(monkeypatch):
    """Equal tokens at each length; ratios to the shorter length and to the AR step; the warm-up left out."""
    asked = []

    @contextlib.contextmanager
    def fresh_process(name, maker, settings, length, batch, objective):
        asked.append((name, length, batch, objective))
        size = length * (3.0 if name == "two_stream" else 2.0)
        peaks = iter([99.0 * size, size, 2 * size])
        yield lambda: {"peak": next(peaks), "process_peak": 9.0, "seconds": 1.0}

    monkeypatch.setattr(step_costs, "fresh_process", fresh_process)
    rows = {
        (row.metric, row.setting["length"]): row
        for row in step_costs.measure(dataclasses.replace(TINY, name="memory"))
    }
    assert sorted(asked) == [
        ("ar", 16, 2, "ar"), ("ar", 32, 1, "ar"),
        ("two_stream", 16, 2, "any_order"), ("two_stream", 32, 1, "any_order"),
    ]  # fmt: skip
    assert rows["two_stream_peak", 16].repeats == [48.0, 96.0]
    assert rows["ar_process_peak", 16].repeats == [9.0, 9.0]
    assert rows["two_stream_peak_over_ar", 32].repeats == [1.5, 1.5]
    assert rows["two_stream_peak_over_shorter", 32].repeats == [2.0, 2.0]
    assert rows["two_stream_peak_over_shorter", 32].setting["against_length"] == 16
    assert ("two_stream_peak_over_shorter", 16) not in rows


def test_fresh_process(tmp_path, monkeypatch):
    """A real step in a process of its own, from any directory; one that can't run is one line."""
    (tmp_path / "benchmarks").mkdir()  # another package of the same name
    monkeypatch.chdir(tmp_path)
    with fresh_process("ar", train_step, settings=TINY, length=16, batch=1, objective="ar") as call:
        results = [call(), call()]
    for result in results:
        assert 50e6 < result["peak"] <= result["process_peak"]
        assert 0 < result["seconds"] < 60
    wrong = {"settings": TINY, "length": 16, "batch": 1, "objective": "nothing"}
    with (
        fresh_process("nothing at 16", train_step, **wrong) as call,
        pytest.raises(MeasurementError, match=r"nothing at 16: exit status 1 .*nothing"),
    ):
        call()


def bytes_writer():
    """Calls that take 400 MB at first, later 100, and print something."""
    calls = []

    def call():
        calls.append(len(b"x" * (100_000_000 if calls else 400_000_000)))
        print(calls)

    return call


def test_peaks_leave_the_warm_up_out():
    """Only the process's peak remembers the first call; what calls print is not taken for a result."""
    with fresh_process("stub", bytes_writer, warm_ups=1) as call:
        results = [call(), call()]
    peaks = [result["peak"] for result in results]
    assert results[-1]["process_peak"] - max(peaks) > 250e6
    assert max(peaks) - min(peaks) < 50e6


def test_contenders_take_turns():
    calls = []
    seconds = alternate(
        {name: lambda name=name: calls.append(name) for name in "ab"}, repeats=3, label="", warm_ups=1
    )
    assert calls == list("abababab")
    assert [len(seconds[name]) for name in "ab"] == [3, 3]


def test_batches_follow_the_rule_of_training():
    """Groups of four in random order, sorted; tokens stay with their positions; AR is left to right."""
    rows = draw_rows(TINY, 32, 3)
    batch = sort_rows(rows)
    assert [batch[name].dtype.name for name in rows] == ["int32"] * 4
    assert batch["weights"].dtype == np.float32 and batch["weights"].shape == (3, 32)
    for row in range(3):
        assert (np.diff(batch["ranks"][row]) >= 0).all()
        assert (np.bincount(rows["ranks"][row]) == 4).all()
        assert (batch["positions"][row] != np.arange(32)).any()
        assert (batch["tokens"][row] == rows["tokens"][row][batch["positions"][row]]).all()
    assert (rows["ranks"][0] != rows["ranks"][1]).any()
    assert (draw_rows(TINY, 32, 1, "ar")["ranks"][0] == np.arange(32)).all()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["trian"], "did you mean 'train'?"),
        (["train", "--layer=3"], "did you mean '--layers'?"),
        (["train", "--release=x"], "--release: a3 bench train does not read it"),
        (["attention", "--remat=dots"], "--remat: a3 bench attention does not read it"),
        (["train", "--layers=0"], "--layers: must be at least 1, got 0"),
        (["train", "--heads=3"], "heads: 3 does not divide d_model=512"),
        (["train", "--kv_heads=3"], "3 does not divide num_heads=8"),
        (["train", "--remat=dot"], "did you mean 'dots'?"),
        (["train", "--attention=flash"], "attention: must be one of auto"),
        (["train", "--dtype=float16"], "did you mean 'bfloat16'?"),
        (["train", "--order=block"], "order: must be one of l2r, contiguous, random, spread"),
        (["train", "--seed=-1"], "seed: must be from 0"),
        (["scaling", "--lengths", "64"], "at least two lengths"),
        (["memory", "--lengths", "48", "64"], "48 does not divide the longest, 64"),
        (["release"], "--release: give a directory"),
        (["launch"], "--config: is needed"),
        (["train", "--config.remat=dots"], "bench: unknown argument '--config.remat=dots'"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, complaint):
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert complaint in captured.err and captured.err.count("\n") == 1


def test_table(capsys):
    """For people: each metric with its three figures, what all rows share once, progress elsewhere."""
    assert main(["bench", "attention", *ATTENTION, "--lengths", "16", "24", "--repeats=1"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("chunked_forward_time_over_dense") == 2
    assert "group_size 4" in captured.out and "minimum" in captured.out
    assert "length 24: 1 of 1: chunked_forward" in captured.err


@pytest.mark.parametrize("arguments", [["train", "--length=16"], ["--help"], [], ["no", "such", "--flag"]])
def test_an_installed_package_says_where_they_are(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.setattr(bench_command, "ROOT", str(tmp_path))
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "bench: the benchmarks are in the source tree" in captured.err


def test_help_names_them_all(monkeypatch, tmp_path):
    """From any directory, without loading what a benchmark needs."""
    monkeypatch.chdir(tmp_path)
    code = """
import sys
from a3_jax.cli import main
try:
    main(["bench", "--help"])
except SystemExit as ended:
    assert not ended.code
bad = {"jax", "flax", "tensorflow", "seqio", "torch", "tokenizers"} & set(sys.modules)
assert not bad, bad
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    for name in BENCHMARKS:
        assert f"\n  {name} " in done.stdout


def test_modules_load_without_tensorflow_and_seqio():
    modules = {benchmark.module for name, benchmark in BENCHMARKS.items() if name != "data"}
    code = f"""
import importlib, sys
sys.modules["tensorflow"] = sys.modules["seqio"] = None
for module in {modules}:
    importlib.import_module(f"benchmarks.{{module}}")
"""
    subprocess.run([sys.executable, "-c", code], cwd=bench_command.ROOT, timeout=120, check=True)
