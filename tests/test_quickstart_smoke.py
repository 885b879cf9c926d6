"""`a3 quickstart --smoke`: the whole path in a few steps, with everything that it promises to leave."""

import json
import os
import subprocess
import sys

import pytest

from a3_jax.checkpoints.a3_format import is_a3
from a3_jax.cli import main
from a3_jax.errors import EXIT_BAD_INPUT, EXIT_OK

LOSSES = ["any_order_before", "any_order_after", "ar_before", "ar_after"]


def run(cache, *arguments):
    """The figures, as the last lines of standard output of a process of its own, on the one real device."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    environment |= {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "a3_jax.cli", "quickstart", "--smoke", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == EXIT_OK, done.stderr
    assert "TPU" not in done.stderr, "a machine without TPU hears nothing of TPUs"
    return json.loads(done.stdout[done.stdout.rindex("\n{\n") :])


@pytest.mark.slow
def test_smoke_leaves_figures_pictures_and_checkpoints_and_goes_on_when_run_again(tmp_path):
    cache, tmp_path = tmp_path / "programs", tmp_path / "run"
    figures = run(cache, f"--workdir={tmp_path}")
    assert figures == json.loads((tmp_path / "quickstart.json").read_text())
    assert list(figures) == ["loss", "exact_match", "blanks", "seconds"]
    assert list(figures["loss"]) == LOSSES
    assert all(loss > 0 for loss in figures["loss"].values())
    assert figures["blanks"] > 0
    for kind in ("left", "right"):
        assert set(figures["exact_match"][kind]) == {"a3", "ar"}
        assert all(0 <= share <= 1 for share in figures["exact_match"][kind].values())
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.html").read_text().count("<dt>truth</dt>") == 10
    assert (tmp_path / "source" / "model.safetensors").exists()
    assert b"query_embed" not in (tmp_path / "source" / "model.safetensors").read_bytes()
    assert is_a3(tmp_path / "converted")

    steps = (tmp_path / "a3" / "metrics.jsonl").read_text()
    again = run(cache, f"--workdir={tmp_path}")
    assert again | {"seconds": None} == figures | {"seconds": None}
    assert (tmp_path / "a3" / "metrics.jsonl").read_text() == steps


@pytest.mark.slow
def test_smoke_on_own_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"This is paragraph {n} of a text which a user has, so to say." for n in range(200))
    )
    figures = run(tmp_path / "programs", f"--workdir={tmp_path / 'run'}", f"--text={text}")
    assert figures["exact_match"] is None
    assert all(loss > 0 for loss in figures["loss"].values())
    assert "<dt>truth</dt>" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe text"])
def test_bad_text_is_one_line_and_leaves_nothing(tmp_path, capsys, content):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    status = main(["quickstart", "--smoke", f"--workdir={tmp_path / 'run'}", f"--text={text}"])
    assert status == EXIT_BAD_INPUT
    assert "text.txt" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()
