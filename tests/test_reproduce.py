"""`a3 reproduce`: the paper's figures, ours in the right cells, and commands that exist for the rest."""

import json
import pathlib
import re
import shlex

import pytest

from a3_jax.cli import _parse, main
from a3_jax.errors import EXIT_BAD_INPUT, EXIT_OK, InputError
from a3_jax.evaluation.paper_tables import PAPER_TABLES, ROWS, published, published_figures, sources, statuses
from a3_jax.evaluation.reproduce import compare
from a3_jax.evaluation.results import Result
from a3_jax.evaluation.tasks.catalogue import TASKS

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
TABLE1 = PAPER_TABLES["table1"]


def write_result(directory, task, figures, *, model="a3", identity="0123456789", **changes):
    """A result file; figures: {metric: (value, standard error)}."""
    fields = {
        "task": task,
        "kind": "choice",
        "profile": "a3_best_guess",
        "split": "validation",
        "examples": 100,
        "skipped": {},
        "figures": {
            name: {"value": value, "standard_error": error, "count": 100}
            for name, (value, error) in figures.items()
        },
        "settings": {"profile": {"model": model}, "model": {}, "evaluator": None},
        "overrides": {},
        "limit": None,
        "samples": 1,
        "seed": 0,
        "checkpoint": {"path": "runs/x", "fingerprint": "f"},
        "evaluator": None,
        "data": {},
        "versions": {},
        "seconds": 1.0,
        "notes": [],
        "identity": identity * 6 + "0123",
        "records": "",
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{task.replace(':', '-')}-{identity}.json"
    path.write_text(json.dumps(Result(**fields | changes).to_dict()))


def cell(comparison, label, paper_metric):
    row = next(row for row in comparison.rows if row.label == label)
    return next(cell for cell in row.cells if cell.paper_metric == paper_metric)


def test_every_figure_has_source_and_status_and_stands_once():
    figures = published_figures()
    assert len(figures) == len({(each.table, each.model, each.metric) for each in figures}) == 202
    assert {each.source for each in figures} == set(sources())
    assert {each.status for each in figures} == set(statuses())
    for table, count in (("table1", 56), ("table2", 18), ("table3", 16)):
        assert len(published(PAPER_TABLES[table].key)) == count


def test_rows_marked_as_copied_equal_their_origin():
    """Plaid and DiffuLlama: all 16 figures."""
    names = {"Plaid-1B": "Plaid-1B", "DiffuLlama-7B": "DiffuLLaMA-7B"}
    origin, copied = published("diffullama_table1"), published(TABLE1.key)
    marked = {key for key, each in copied.items() if each.status == "copied"}
    assert marked == {key for key in copied if key[0] in names} and len(marked) == 16
    assert all(origin[names[model], metric].value == copied[model, metric].value for model, metric in marked)


def test_suspect_figures_equal_those_of_another_row():
    figures = published(TABLE1.key)
    suspect = {key for key, each in figures.items() if each.status == "suspect"}
    assert suspect == {("Dream-7B", f"rocstories_rouge{n}") for n in ("1", "2", "L")}
    assert all(
        figures["Llama-3.1-8B", metric].value == figures[key].value for key in suspect for metric in key[1:]
    )


@pytest.mark.parametrize("table", PAPER_TABLES.values(), ids=lambda table: table.name)
def test_rows_and_columns_are_all_the_published_figures(table):
    cells = {(label, name) for _, label in table.rows for _, _, name in table.columns}
    assert cells == set(published(table.key))
    assert [name for name, _ in table.rows if name not in ROWS] == []


def test_cells_hold_both_figures_and_their_distance(tmp_path):
    write_result(tmp_path / "a3-1b", "piqa", {"accuracy": (66.7, 0.5), "accuracy_sum": (1.0, 0.5)})
    write_result(
        tmp_path / "a3-1b", "rocstories", {"rouge1": (11.0, 0.4), "rouge2": (1.7, 0.0), "rougeL": (9.1, None)}
    )
    found = compare(TABLE1, tmp_path)
    piqa = cell(found, "A3-1B", "piqa_acc")
    assert (piqa.published.value, piqa.ours.value) == (64.7, 66.7)
    assert piqa.standard_errors == pytest.approx(4.0)
    assert cell(found, "A3-1B", "rocstories_rouge1").standard_errors == pytest.approx(-2.0)
    for unknown in ("rocstories_rouge2", "rocstories_rougeL"):
        assert cell(found, "A3-1B", unknown).ours and cell(found, "A3-1B", unknown).standard_errors is None
    row = next(row for row in found.rows if row.name == "a3-1b")
    assert [task.name for task in row.missing] == ["triviaqa", "hellaswag", "winogrande", "siqa"]
    assert all(cell.ours is None for row in found.rows if row.name != "a3-1b" for cell in row.cells)


def test_perplexities_by_order_and_length(tmp_path):
    write_result(
        tmp_path / "a3-8b", "pile", {"ppl_entropy_512": (15.3, 0.5), "ppl_full_entropy_512": (1.0, 1.0)}
    )
    found = compare(PAPER_TABLES["table2"], tmp_path)
    assert cell(found, "A3-8B", "ppl_entropy_512").standard_errors == pytest.approx(2.0)
    assert cell(found, "A3-8B", "ppl_entropy_1024").ours is None


def test_only_the_profile_asked_for_counts_and_the_others_are_told(tmp_path):
    figures = {"accuracy": (50.0, 1.0)}
    write_result(tmp_path / "a3-3b", "siqa", figures, profile="diffullama_script")
    found = compare(TABLE1, tmp_path)
    assert cell(found, "A3-3B", "siqa_acc").ours is None
    assert any("--profile=diffullama_script" in note for note in found.notes)
    assert cell(compare(TABLE1, tmp_path, "diffullama_script"), "A3-3B", "siqa_acc").ours.value == 50.0


def test_the_profile_as_it_is_goes_before_changed_and_shorter_runs(tmp_path):
    directory = tmp_path / "a3-3b"
    write_result(directory, "siqa", {"accuracy": (1.0, 1.0)}, identity="a" * 10, limit=500, examples=500)
    assert cell(compare(TABLE1, tmp_path), "A3-3B", "siqa_acc").changes == ("--limit=500",)
    write_result(directory, "siqa", {"accuracy": (2.0, 1.0)}, identity="b" * 10)
    write_result(
        directory, "siqa", {"accuracy": (3.0, 1.0)}, identity="c" * 10, overrides={"scorer": "one_shot"}
    )
    found = cell(compare(TABLE1, tmp_path), "A3-3B", "siqa_acc")
    assert (found.ours.value, found.changes) == (2.0, ())


def test_another_kind_of_model_and_several_checkpoints_are_told(tmp_path):
    directory, figures = tmp_path / "a3-3b", {"accuracy": (50.0, 1.0)}
    write_result(directory, "siqa", figures, model="ar")
    found = compare(TABLE1, tmp_path)
    assert cell(found, "A3-3B", "siqa_acc").ours is None
    assert any("a3-3b: 1 results of another kind of model" in note for note in found.notes)
    write_result(directory, "siqa", figures, identity="a" * 10)
    write_result(directory, "piqa", figures, checkpoint={"path": "runs/y", "fingerprint": "g"})
    assert any("mixes results of 2 checkpoints" in note for note in compare(TABLE1, tmp_path).notes)


def test_other_directories_are_rows_of_ones_own(tmp_path):
    write_result(tmp_path / "a3-1B", "siqa", {"accuracy": (50.0, 1.0)})
    write_result(tmp_path / "both", "siqa", {"accuracy": (40.0, 1.0)})
    write_result(tmp_path / "both", "piqa", {"accuracy": (60.0, 1.0)}, model="ar")
    write_result(tmp_path / "code", "humaneval_infilling", {"pass@1": (60.0, 1.0)})
    write_result(tmp_path, "siqa", {"accuracy": (10.0, 1.0)})
    write_result(tmp_path / "harness", "lm_eval:piqa", {"acc": (0.5, 0.1)}, settings={"profile": None})
    found = compare(TABLE1, tmp_path)
    assert [row.label for row in found.rows[len(TABLE1.rows) :]] == ["a3-1B", "both (a3)", "both (ar)"]
    assert cell(found, "both (ar)", "siqa_acc").ours is None
    assert cell(found, "both (ar)", "piqa_acc").published is None
    assert any("did you mean 'a3-1b'" in note for note in found.notes)
    assert any("1 results in" in note for note in found.notes)


def commands_of(table):
    return [command for row in compare(table, "results").rows for command in row.commands]


@pytest.mark.parametrize("table", PAPER_TABLES.values(), ids=lambda table: table.name)
def test_commands_are_commands(table):
    """They parse, their configs and tasks exist, and they evaluate what they have made."""
    seen = set()
    for command in commands_of(table):
        words = shlex.split(command)
        assert words[0] == "a3"
        parsed = _parse(words[1:])
        seen.add(words[1])
        for word in words:
            if word.startswith("--config="):
                path = CONFIGS.parent / word.removeprefix("--config=")
                assert "hours       not measured" in path.read_text().lower()
                told = (
                    ROWS[parsed.workdir.removeprefix("runs/")].needs[-1].removesuffix("; hours not measured")
                )
                assert told in path.read_text()
        if words[1] == "eval":
            assert parsed.results == f"results/{parsed.results.split('/')[1]}"
            assert ROWS[parsed.results.split("/")[1]].checkpoint == parsed.checkpoint
            assert set(parsed.tasks.split(",")) == {task.name for task, _, _ in table.columns} <= set(TASKS)
            assert bool(parsed.evaluator) == ("pile" in parsed.tasks)
    assert seen == {"convert", "data", "train", "eval"}


def test_a_trained_row_has_a_config_of_its_own():
    trained = [row for row in ROWS.values() if row.commands]
    configs = {re.search(r"configs/\w+\.py", " ".join(row.commands))[0] for row in trained}
    assert len(configs) == len(trained) == 5


def test_a_row_that_is_there_needs_nothing_and_plaid_is_cited(tmp_path):
    for task, metric, _ in TABLE1.columns:
        names = [name for other, name, _ in TABLE1.columns if other is task]
        write_result(tmp_path / "a3-8b", task.name, dict.fromkeys(names, (50.0, 1.0)))
        assert metric in names
    rows = {row.name: row for row in compare(TABLE1, tmp_path).rows}
    assert rows["a3-8b"].commands == rows["a3-8b"].needs == rows["plaid-1b"].commands == ()
    assert rows["a3-1b"].commands


def test_terminal_markdown_and_json(tmp_path, capsys):
    write_result(tmp_path / "a3-1b", "piqa", {"accuracy": (66.7, 0.5)}, limit=7, skipped={"too long": 3})
    assert main(["reproduce", "table1", f"--results={tmp_path}"]) == EXIT_OK
    text = capsys.readouterr().out
    for part in (
        "66.7±0.5~",
        "+4.0 SE",
        "39.3*",
        "11.7?",
        "cited",
        "not run",
        "--limit=7",
        "A3-1B: ours is runs/x (f); examples: piqa 100 (3 skipped)",
        "lighteval/siqa",
    ):
        assert part in text, part
    assert main(["reproduce", "table1", f"--results={tmp_path}", "--markdown"]) == EXIT_OK
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1 and len(lines) == 9
    assert r"64.7<br>66.7±0.5\~<br>+4.0 SE" in next(line for line in lines if line.startswith("| A3-1B"))

    assert main(["reproduce", "all", f"--results={tmp_path}", "--json"]) == EXIT_OK
    tables = json.loads(capsys.readouterr().out)["tables"]
    assert [table["table"] for table in tables] == list(PAPER_TABLES)
    row = next(row for row in tables[0]["rows"] if row["row"] == "a3-1b")
    by_name = {cell["paper_metric"]: cell for cell in row["cells"]}
    assert by_name["piqa_acc"]["ours"]["changes"] == ["--limit=7"]
    assert by_name["piqa_acc"]["ours"]["profile"] == "a3_best_guess"
    assert by_name["siqa_acc"]["ours"] is None
    assert "--tasks=siqa " in by_name["siqa_acc"]["commands"][-1]
    assert any("lighteval/siqa" in text for text in by_name["siqa_acc"]["needs"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tabel1"], "TABLE: no table 'tabel1'; did you mean 'table1'?"),
        (["table1", "--profile=a3_best_gues"], "did you mean 'a3_best_guess'?"),
        (["x"], "known are table1, table2, table3, all"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    assert main(["reproduce", *arguments, f"--results={tmp_path}"]) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_damaged_and_foreign_files_are_named(tmp_path):
    write_result(tmp_path / "a3-1b", "piqa", {"accuracy": (66.7, 0.5)}, schema=99)
    with pytest.raises(InputError, match=r"a3-1b/piqa-0123456789\.json: schema"):
        compare(TABLE1, tmp_path)
    with pytest.raises(InputError, match="is a file"):
        compare(TABLE1, next((tmp_path / "a3-1b").iterdir()))


def test_a_directory_that_is_absent_is_one_without_results(tmp_path):
    found = compare(TABLE1, tmp_path / "absent")
    assert all(cell.ours is None for row in found.rows for cell in row.cells)
    assert any("No results in" in note for note in found.notes)
