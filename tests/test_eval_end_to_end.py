"""The whole way to a table on a small model: train, evaluate on invented rows, and read the paper's table."""

import json
import shutil

import pytest

from a3_jax.cli import main
from a3_jax.errors import EXIT_OK
from a3_jax.evaluation.recipes import PAPER_TABLES
from tests.eval_fixtures import write_fixtures
from tests.training_fixtures import LINES

TABLE1 = PAPER_TABLES["table1"]
TASKS = list(dict.fromkeys(task.name for task, _, _ in TABLE1.columns))
CONFIG = """
from a3_jax.quickstart.config import SMOKE_STEPS, text_run

def get_config():  # the model that `a3 quickstart --smoke --text` makes, in longer rows and fewer stages
    config = text_run({text!r}, SMOKE_STEPS)
    config.stages = config.stages[1], config.stages[4]
    config.seq_len, config.batch_size, config.holdout, config.eval_batches = 256, 8, 1, 1
    return config
"""


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == EXIT_OK


def evaluate(place, *options):
    tasks = ",".join(TASKS)
    run(
        "eval",
        place / "run",
        f"--tasks={tasks}",
        f"--data_dir={place}/data",
        f"--results={place}/results/small",
        *options,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A directory of results: the model as rows of one's own, any order and left to right, and as A3-1B."""
    place = tmp_path_factory.mktemp("tables")
    (place / "text.txt").write_text("\n\n".join(" ".join(LINES[n:] + LINES[:n]) for n in range(len(LINES))))
    (place / "config.py").write_text(CONFIG.format(text=str(place / "text.txt")))
    write_fixtures(place / "data")
    run("train", f"--config={place}/config.py", f"--workdir={place}/run")
    for model in ("a3", "ar"):
        evaluate(place, f"--model={model}")
    shutil.copytree(place / "results/small", place / "results/a3-1b")
    return place / "results"


def table(results, capsys, *arguments):
    capsys.readouterr()
    run("reproduce", "table1", f"--results={results}", *arguments)
    return capsys.readouterr().out


@pytest.mark.slow
def test_every_cell_of_the_row_is_a_figure_of_the_files(results, capsys):
    found = json.loads(table(results, capsys, "--json"))["tables"][0]
    rows = {row["model"]: row for row in found["rows"]}
    assert list(rows)[-2:] == ["small (a3)", "small (ar)"]
    files = [json.loads(path.read_text()) for path in (results / "small").glob("*.json")]
    for kind in ("a3", "ar"):
        of_kind = {each["task"]: each for each in files if each["settings"]["profile"]["model"] == kind}
        assert set(of_kind) == set(TASKS)
        for cell in rows[f"small ({kind})"]["cells"]:
            figure = of_kind[cell["task"]]["figures"][cell["metric"]]
            assert {name: cell["ours"][name] for name in figure} == figure
            assert 0 <= figure["value"] <= 100 and cell["ours"]["changes"] == []
            assert cell["published"] is None
    assert rows["small (a3)"]["cells"] != rows["small (ar)"]["cells"]


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
    assert "a3-1b: 6 results of another kind of model are left out." in text


@pytest.mark.slow
def test_the_same_commands_again_run_nothing(results, capsys):
    """Results are found again by their identity: the files stay as they are."""
    before = {path: path.stat().st_mtime_ns for path in (results / "small").iterdir()}
    evaluate(results.parent)
    assert {path: path.stat().st_mtime_ns for path in (results / "small").iterdir()} == before
