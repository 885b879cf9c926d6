"""The whole way to a table on a tiny model: convert, train, evaluate on invented rows, `a3 reproduce`."""

import json
import shutil
import socket

import pytest

from a3_jax.cli import main
from a3_jax.errors import EXIT_OK
from a3_jax.evaluation.paper_tables import PAPER_TABLES
from tests.eval_fixtures import write_fixtures
from tests.tiny_hf import write_tiny_llama
from tests.training_fixtures import LINES

TABLE1 = PAPER_TABLES["table1"]
TASKS = list(dict.fromkeys(task.name for task, _, _ in TABLE1.columns))
AR_TASKS = ["piqa", "rocstories"]
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({{
        "init_from": {init_from!r}, "data": {data!r}, "holdout": 0, "seq_len": 64, "batch_size": 8,
        "stages": [{{"name": "random", "steps": 2, "orders": [{{"order": "random"}}]}}],
        "learning_rate": 1e-3, "warmup_steps": 0,
    }})
"""


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == EXIT_OK


def evaluate(place, checkpoint, row, tasks, *options):
    where = f"--data_dir={place}/data", f"--results={place}/results/{row}"
    run("eval", place / checkpoint, f"--tasks={','.join(tasks)}", *where, *options)


@pytest.fixture(scope="module")
def no_network():
    def refused(*_):
        raise AssertionError("an evaluation reached for the network")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(socket.socket, "connect", refused)
        yield


@pytest.fixture(scope="module")
def results(tmp_path_factory, no_network):
    """A directory of results: a model of one's own, the same as A3-1B, and its source for Llama-3.1-8B."""
    place = tmp_path_factory.mktemp("tables")
    write_fixtures(place / "data")
    (place / "text.txt").write_text("\n\n".join(" ".join(LINES[n:] + LINES[:n]) for n in range(len(LINES))))
    converted, data = str(place / "converted"), str(place / "text.txt")
    (place / "config.py").write_text(CONFIG.format(init_from=converted, data=data))
    write_tiny_llama(place / "source")
    run("convert", place / "source", converted, "--no-check")
    run("train", f"--config={place}/config.py", f"--workdir={place}/run")
    evaluate(place, "run", "small", TASKS)
    evaluate(place, "source", "llama-3.1-8b", AR_TASKS, "--model=ar")
    shutil.copytree(place / "results/small", place / "results/a3-1b")
    return place / "results"


def table(results, capsys, *arguments):
    capsys.readouterr()
    run("reproduce", "table1", f"--results={results}", *arguments)
    return capsys.readouterr().out


@pytest.mark.slow
def test_every_cell_of_the_row_is_a_figure_of_the_files(results, capsys):
    found = json.loads(table(results, capsys, "--json"))["tables"][0]
    rows = {row["row"]: row for row in found["rows"]}
    assert list(rows)[len(TABLE1.rows) :] == ["small"]
    for name, tasks in (("small", TASKS), ("llama-3.1-8b", AR_TASKS)):
        files = [json.loads(path.read_text()) for path in (results / name).glob("*.json")]
        assert sorted(file["task"] for file in files) == sorted(tasks)
        figures = {file["task"]: file["figures"] for file in files}
        for cell in rows[name]["cells"]:
            if cell["task"] in tasks:
                figure = figures[cell["task"]][cell["metric"]]
                assert {key: cell["ours"][key] for key in figure} == figure
                assert 0 <= figure["value"] <= 100 and cell["ours"]["changes"] == []
            else:
                assert cell["ours"] is None and cell["commands"]
    assert all(cell["published"] is None for cell in rows["small"]["cells"])


@pytest.mark.slow
def test_a_row_of_the_paper_shows_both_figures_and_their_distance(results, capsys):
    found = json.loads(table(results, capsys, "--json"))["tables"][0]
    row = next(row for row in found["rows"] if row["row"] == "a3-1b")
    assert all(cell["ours"] for cell in row["cells"]) and not row["commands"]
    for cell in row["cells"]:
        error = cell["ours"]["standard_error"]
        away = (cell["ours"]["value"] - cell["published"]["value"]) / error if error else None
        assert cell["standard_errors"] == (away if away is None else pytest.approx(away))
    assert any(cell["standard_errors"] is not None for cell in row["cells"])
    text = table(results, capsys)
    assert "A3-1B, not run" not in text and "A3-3B, not run" in text
    assert "Llama-3.1-8B, not run: triviaqa, hellaswag, winogrande, siqa\n" in text


@pytest.mark.slow
def test_the_same_commands_again_run_nothing(results, capsys):
    """Results are found again by their identity: the files stay as they are."""
    before = {path: path.stat().st_mtime_ns for path in (results / "small").iterdir()}
    evaluate(results.parent, "run", "small", TASKS)
    assert {path: path.stat().st_mtime_ns for path in (results / "small").iterdir()} == before
