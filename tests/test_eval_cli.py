"""`a3 eval`: bad input is one line and exit status 2, before anything is written; the list of tasks."""

import json
import signal
import time

import pytest

from a3_jax.cli import main
from a3_jax.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_PREEMPTED
from a3_jax.evaluation.tasks.catalogue import TASKS
from tests.eval_fixtures import write_fixtures
from tests.tiny_hf import write_tiny_llama


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("eval")
    write_fixtures(directory / "data")
    write_tiny_llama(directory / "model")
    return directory


def run(place, capsys, *arguments, data="data"):
    capsys.readouterr()
    where = f"--data_dir={place / data}", f"--results={place / 'results'}"
    status = main(["eval", str(place / "model"), *where, *arguments])
    out, err = capsys.readouterr()
    return status, out, err.splitlines()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks=hellaswagg"], "did you mean 'hellaswag'?"),
        (["--tasks=piqa", "--profile=a3_best_gues"], "did you mean 'a3_best_guess'?"),
        (["--tasks=piqa", "--scorer=chian"], "did you mean 'chain'?"),
        (["--tasks=piqa", "--scorer=mc_order:draw=3"], "did you mean 'draws'?"),
        (["--tasks=piqa", "--model=masked_diffusion"], "has no mask token"),
        (["--tasks=piqa", "--set=rule.piqa=per_tokn"], "per_tokn"),
        (["--tasks=piqa", "--set=ruel.piqa=sum"], "did you mean 'rule'?"),
        (["--tasks=piqa", "--limit=0"], "limit"),
        (["--tasks=piqa", "--seed=-1"], "seed"),
        (["--tasks="], "--tasks is missing"),
        (["--tasks=humaneval_infilling"], "allow_code_execution"),
        (["--tasks=pile"], "--evaluator: pile needs one"),
        (["--tasks=rocstories", "--strategy=dynamc"], "did you mean 'dynamic'?"),
    ],
)
def test_bad_input_is_one_line(place, capsys, arguments, said):
    status, out, err = run(place, capsys, *arguments)
    assert (status, out, len(err)) == (EXIT_BAD_INPUT, "", 1), err
    assert err[0].startswith("a3: ") and said in err[0]
    assert not (place / "results").exists()


def test_a_missing_file_says_what_it_is_and_where_people_get_it(place, capsys):
    status, out, err = run(place, capsys, "--tasks=piqa", data="nowhere")
    assert (status, out, len(err)) == (EXIT_BAD_INPUT, "", 1)
    for part in ("piqa", "goal", "sol1", "baber/piqa"):
        assert part in err[0]


def test_a_bad_row_says_its_number(place, tmp_path, capsys):
    rows = [{"goal": "g", "sol1": "a", "sol2": "b"}, {"goal": "g", "sol1": "", "sol2": "b"}]
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "piqa" / "valid-labels.lst").write_text("0\n1\n")
    status, out, err = run(place, capsys, "--tasks=piqa", data=tmp_path)
    assert (status, out, len(err)) == (EXIT_BAD_INPUT, "", 1)
    assert "valid.jsonl:2" in err[0] and "sol1" in err[0]


def test_the_list(place, capsys):
    capsys.readouterr()
    assert main(["eval", "--list", f"--data_dir={place / 'data'}", "--json"]) == EXIT_OK
    told = {task["task"]: task for task in json.loads(capsys.readouterr().out)}
    assert told.keys() == TASKS.keys()
    assert told["piqa"]["found"] and all(str(place) in path for path in told["piqa"]["found"])
    assert main(["eval", "--list"]) == EXIT_OK
    out = capsys.readouterr().out
    assert all(name in out for name in TASKS) and "baber/piqa" in out


def test_a_figure_of_a_real_checkpoint_and_sigterm(place, tmp_path, capsys, monkeypatch):
    """Told to stop in the second chunk it ends that one, leaves with 75, and goes on with the third."""
    from a3_jax.evaluation import task_run
    from a3_jax.evaluation.models import any_order

    monkeypatch.setattr(task_run, "_CHUNK", {})
    monkeypatch.setattr(task_run, "_FILLED_CHUNK", 1)
    results = f"--results={tmp_path}"
    score, calls = any_order.AnyOrder.score, iter(range(9))

    def told_to_stop(self, targets):
        if next(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.2)  # for the thread that listens
        return score(self, targets)

    with monkeypatch.context() as patched:
        patched.setattr(any_order.AnyOrder, "score", told_to_stop)
        status, _, err = run(place, capsys, "--tasks=piqa", "--set=bos.piqa=first", results)
    assert status == EXIT_PREEMPTED and "the same command goes on" in err[-1]
    (file,) = tmp_path.glob("*.records.jsonl")
    assert len(file.read_text().splitlines()) == 2
    status, out, _ = run(place, capsys, "--tasks=piqa", "--set=bos.piqa=first", results, "--json")
    (result,) = json.loads(out)
    assert status == EXIT_OK and result["examples"] == len(file.read_text().splitlines())
    assert result["checkpoint"]["path"] == str(place / "model") and result["checkpoint"]["fingerprint"]
