"""`gs://` wherever a file is named: configs, results, runs, what is decoded; and one place that opens."""

import ast
import builtins
import json
import pathlib
import shutil

import jax
import pytest

from a3_jax import paths
from a3_jax.cli import main
from a3_jax.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED, InputError, RunError
from a3_jax.evaluation import task_run
from a3_jax.evaluation.lm_eval_run import harness_files
from a3_jax.evaluation.results import RecordFile
from a3_jax.evaluation.runner import evaluate
from a3_jax.training import train as training
from a3_jax.training.config import read_run_config
from tests.eval_fixtures import UniformModel, write_fixtures
from tests.fake_bucket import make_bucket
from tests.prepared_fixtures import make_prepared, rows
from tests.training_fixtures import tiny_run

PACKAGE = pathlib.Path(paths.__file__).parent
CONFIG = """
import ml_collections
def get_config(learning_rate="1"):
    return ml_collections.ConfigDict({"learning_rate": float(learning_rate), "seed": 7})
"""


class Refused(Exception):
    """As the clients of buckets have errors of their own kinds."""


def refuse(*_, **__):
    raise Refused("403: no access\nand a long story")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    return make_bucket(tmp_path, monkeypatch)


def test_a_config(bucket):
    (bucket / "run.py").write_text(CONFIG)
    assert read_run_config("gs://bucket/run.py", ["--config.seed=8"]).seed == 8
    assert read_run_config("gs://bucket/run.py:0.5", []).learning_rate == 0.5
    (bucket / "run.py").write_text("def (")
    with pytest.raises(InputError) as error:
        read_run_config("gs://bucket/run.py", [])
    assert str(error.value) == "gs://bucket/run.py:1: not Python: invalid syntax"
    with pytest.raises(InputError, match=r"gs://bucket/absent.py: no such file"):
        read_run_config("gs://bucket/absent.py", [])


def test_results(bucket, tmp_path, monkeypatch):
    """From data in a bucket into it, stopped after a chunk: the files are those of a local directory."""
    monkeypatch.setattr(task_run, "_CHUNK", {})
    monkeypatch.setattr(task_run, "_FILLED_CHUNK", 1)
    write_fixtures(bucket / "data")
    chunks = iter([True])
    with pytest.raises(RunError) as stopped:
        evaluate(
            UniformModel(), ["piqa"], "gs://bucket/data", results="gs://bucket/results",
            stop=lambda: next(chunks, None) is None,
        )  # fmt: skip
    assert stopped.value.status == EXIT_PREEMPTED
    (begun,) = (bucket / "results").glob("*.records.jsonl")
    before = begun.read_text()
    assert before.count("\n") == 1
    (result,) = evaluate(UniformModel(), ["piqa"], "gs://bucket/data", results="gs://bucket/results")
    (local,) = evaluate(UniformModel(), ["piqa"], bucket / "data", results=tmp_path / "local")
    assert result.figures == local.figures and result.identity == local.identity
    assert begun.read_text().startswith(before)
    places = (bucket / "results", tmp_path / "local")
    here, there = ({path.name for path in place.iterdir()} for place in places)
    assert here == there and len(here) == 2


def test_tables_of_results(bucket, capsys):
    write_fixtures(bucket / "data")
    evaluate(UniformModel(), ["piqa"], bucket / "data", results="gs://bucket/results/mine")
    assert main(["reproduce", "table1", "--results=gs://bucket/results", "--json"]) == 0
    tables = json.loads(capsys.readouterr().out)["tables"]
    cells = next(row["cells"] for row in tables[0]["rows"] if row["row"] == "mine")
    assert [cell["task"] for cell in cells if cell["ours"]] == ["piqa"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's directory."""
    place = tmp_path_factory.mktemp("trained")
    data = make_prepared(place / "data", rows(9, seq_len=24))
    stages = [{"name": "l2r", "steps": 2}]
    training.train(tiny_run(data, tokenizer="", stages=stages), place / "run", devices=jax.devices()[:1])
    return place / "run"


def test_a_run_is_watched(bucket, trained, capsys):
    shutil.copytree(trained, bucket / "run")
    assert main(["status", "gs://bucket/run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["state"], report["step"], report["checkpoint"]) == ("finished", 2, 2)
    assert main(["goodput", "gs://bucket/run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2
    (bucket / "run" / "checkpoints" / "2" / "meta" / "a3.json").write_text("{}")
    assert main(["status", "gs://bucket/run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["checkpoint"], report["damaged_checkpoints"]) == (None, ["2"])


def test_what_is_decoded(bucket, trained, tmp_path, monkeypatch, capsys):
    (bucket / "in.jsonl").write_text(json.dumps({"text": "Ada saw [[3]]."}))
    monkeypatch.chdir(tmp_path)
    status = main(["generate", str(trained), "gs://bucket/in.jsonl", "gs://bucket/deep/out.jsonl"])
    assert status == 0, capsys.readouterr().err
    assert json.loads((bucket / "deep" / "out.jsonl").read_text())
    assert not (tmp_path / "gs:").exists()


def test_a_bucket_that_refuses_is_one_line(bucket, monkeypatch, capsys):
    (bucket / "run.py").write_text(CONFIG)
    with RecordFile("gs://bucket/results/x.records.jsonl") as records:
        records.append([{"id": "a", "row": 1, "sample": 0}])
        monkeypatch.setattr(type(paths.as_path("gs://bucket")), "read_bytes", refuse)
        monkeypatch.setattr(type(paths.as_path("gs://bucket")), "write_bytes", refuse)
        with pytest.raises(InputError, match=r"gs://bucket/results/x.records.jsonl: 403: no access$"):
            records.append([{"id": "b", "row": 2, "sample": 0}])
    assert main(["train", "--config=gs://bucket/run.py", "--workdir=gs://bucket/run"]) == EXIT_BAD_INPUT
    assert capsys.readouterr().err == "a3: gs://bucket/run.py: 403: no access\n"
    with pytest.raises(InputError, match=r"gs://bucket/new.json: 403: no access$"):
        paths.write_json("gs://bucket/new.json", {})


def test_what_opens_files_by_itself_gets_no_bucket(bucket):
    with pytest.raises(InputError, match="gs://bucket/data: must be on this machine: lm-evaluation-harness"):
        harness_files("lm_eval:piqa", "gs://bucket/data")


ITS_OWN = "files that it makes itself, in a temporary directory"
SYSTEM = "files of the operating system"
LOCAL = "of this machine: locks and links that buckets don't have; a bucket's path goes another way"
LAUNCH = "of the machine that launches: logs of its children, files beside its command"
OPENERS = {
    "checkpoints/check.py": SYSTEM, "checkpoints/directories.py": LOCAL,
    "cli.py": SYSTEM, "data/prepare_state.py": LOCAL, "data/shards.py": ITS_OWN,
    "data/tensorflow_host.py": SYSTEM, "decoding/command.py": "pipes and devices",
    "evaluation/lm_eval_run.py": ITS_OWN, "evaluation/tasks/sandbox_child.py": SYSTEM,
    "pods/local.py": LAUNCH, "pods/xpk.py": "the package's own schema",
    "pods/run_records.py": LAUNCH, "pods/spec.py": LAUNCH,
    "runtime/lease.py": LOCAL, "runtime/tpu_hosts.py": SYSTEM, "runtime/watchdog.py": LOCAL,
    "runtime/versions.py": "the package's own code", "training/run_log.py": SYSTEM,
}  # fmt: skip


def opens(tree) -> bool:
    """Whether code opens files by other means than `paths`: builtin `open`, `os.open`, `pathlib`."""
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {call.id for call in calls if isinstance(call, ast.Name)}
    dotted = {f"{call.value.id}.{call.attr}" for call in calls
              if isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name)}  # fmt: skip
    return bool(names & {"open", "Path"} or dotted & {"os.open", "io.open", "pathlib.Path", "builtins.open"})


def test_paths_alone_opens_files_that_users_name():
    """The others ask it, but for those with a reason; a reason that nothing needs any more goes."""
    found = {
        str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "paths.py" and opens(ast.parse(path.read_text()))
    }  # fmt: skip
    assert sorted(found - set(OPENERS)) == [], "use a3_jax.paths, or give a reason here"
    assert sorted(set(OPENERS) - found) == []
    assert all(opens(ast.parse(code)) for code in ("open(x)", "os.open(x, 0)", "pathlib.Path(x)", "Path(x)"))
    assert not opens(ast.parse("as_path(x).open()")) and callable(builtins.open)
