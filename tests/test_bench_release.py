"""`a3 bench release` on a stand-in for the authors' code: equal losses first, then figures."""

import json
import pathlib

import pytest

from a3_jax.cli import main

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.torch, pytest.mark.slow]

STAND_IN = pathlib.Path(__file__).with_name("release_stand_in.py").read_text()
FLAGS = ["--d_model=16", "--layers=2", "--heads=2", "--kv_heads=1", "--mlp=24", "--vocab=40", "--length=24",
         "--repeats=2", "--threads=64"]  # fmt: skip


def run(tmp_path, code, *flags):
    if code is not None:
        (tmp_path / "llama_xlnet.py").write_text(code)
    return main(["bench", "release", f"--release={tmp_path}", *FLAGS, *flags])


def test_equal_losses_then_figures(tmp_path, capsys):
    assert run(tmp_path, STAND_IN, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["metric"]: row for row in result["rows"]}
    assert rows["loss_difference_over_release"]["value"] < 1e-5
    assert rows["grad_norm_difference_over_release"]["value"] < 1e-4
    times = (rows[f"{name}_step_time"]["repeats"] for name in ("release", "a3"))
    assert rows["step_time_speedup"]["repeats"] == [a / b for a, b in zip(*times, strict=True)]
    peaks = (rows[f"{name}_peak"]["repeats"] for name in ("a3", "release"))
    assert rows["peak_memory_over_release"]["repeats"] == [a / b for a, b in zip(*peaks, strict=True)]
    assert rows["step_time_speedup"]["setting"]["batch"] == 2
    assert {"torch", "transformers"} <= set(result["versions"])


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("residual = normed", "residual = x"), ("other < own", "other <= own")],
)
def test_other_losses_end_it(tmp_path, capsys, right, wrong):
    """Another residual, or query rows that see their own group: exit status 1, one line, no figures."""
    code = STAND_IN.replace(right, wrong, 1)
    assert code != STAND_IN
    assert run(tmp_path, code) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("a3: release: length 24: the ")
    assert "of equal weights and ranks differs" in captured.err


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        (None, "no llama_xlnet.py there"),
        ("import no_such_module", "does not import: ModuleNotFoundError"),
        ("x = 1", "has no class LlamaTwoStreamForCausalLM"),
    ],
)
def test_a_clone_that_is_none(tmp_path, capsys, code, complaint):
    assert run(tmp_path, code) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert complaint in captured.err and captured.err.count("\n") == 1
