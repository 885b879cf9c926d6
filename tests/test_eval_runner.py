"""`evaluate`: right answers are 100, stops and kills change no number, other settings are other files."""

import dataclasses
import json
import socket

import pytest

from a3_jax.errors import EXIT_FAILED, EXIT_PREEMPTED, InputError, RunError
from a3_jax.evaluation import task_run
from a3_jax.evaluation.runner import evaluate
from a3_jax.evaluation.tasks.profiles import profile_named
from tests.eval_fixtures import (
    CHOICES,
    FILLS,
    SHARES_OF_FIRST,
    ConstantModel,
    OracleModel,
    UniformModel,
    read_examples,
    write_fixtures,
)

HEADLINES = {"triviaqa": ["exact_match"], "rocstories": ["rouge1", "rouge2", "rougeL"]}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refused(*_):
        raise AssertionError("an evaluation reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refused)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    write_fixtures(place)
    return place


@pytest.fixture
def small_chunks(monkeypatch):
    """An example at a time."""
    monkeypatch.setattr(task_run, "_CHUNK", {})
    monkeypatch.setattr(task_run, "_FILLED_CHUNK", 1)


def test_right_answers_are_100(data, tmp_path):
    tasks = [*CHOICES, *FILLS]
    for result in evaluate(OracleModel.of(tasks, data), tasks, data, results=tmp_path):
        for metric in HEADLINES.get(result.task, ["accuracy"]):
            assert result.figures[metric].value == pytest.approx(100), (result.task, metric)
        assert result.figures[metric].standard_error == pytest.approx(0)
        assert result.examples and not result.skipped and result.profile == "a3_best_guess"


def test_a_constant_model_takes_the_first_choice(data, tmp_path):
    for result in evaluate(ConstantModel(), CHOICES, data, results=tmp_path):
        assert result.figures["accuracy_sum"].value == pytest.approx(100 * SHARES_OF_FIRST[result.task])


def stopped_after(chunks):
    """A `stop` that says yes once so many chunks have begun."""
    asked = iter(range(chunks))
    return lambda: next(asked, None) is None


def figures(results):
    return [(result.task, result.examples, result.figures, result.identity) for result in results]


def records(directory):
    """By file, without the time that each took."""
    return {
        path.name: [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()]
        for path in sorted(directory.glob("*.records.jsonl"))
    }


@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_a_run_that_was_told_to_stop_goes_on(data, tmp_path, small_chunks, chunks):
    model, tasks = UniformModel(), ["piqa", "rocstories"]
    whole = evaluate(model, tasks, data, results=tmp_path / "whole")
    with pytest.raises(RunError, match="the same command goes on") as caught:
        evaluate(model, tasks, data, results=tmp_path / "stopped", stop=stopped_after(chunks))
    assert caught.value.status == EXIT_PREEMPTED
    assert not list((tmp_path / "stopped").glob("piqa*[0-9a-f].json"))
    before = sum(map(len, records(tmp_path / "stopped").values()))
    assert before == chunks
    again = UniformModel()
    assert figures(evaluate(again, tasks, data, results=tmp_path / "stopped")) == figures(whole)
    assert records(tmp_path / "stopped") == records(tmp_path / "whole")
    assert again.seen["score"] == 2 * (whole[0].examples - chunks), "what was done is not done again"


def test_a_run_that_was_killed_at_any_byte_goes_on(data, tmp_path, small_chunks):
    model = UniformModel()
    whole = evaluate(model, ["piqa"], data, results=tmp_path)
    (file,) = tmp_path.glob("*.records.jsonl")
    (result,) = tmp_path.glob("*[0-9a-f].json")
    lines, expected = file.read_bytes(), records(tmp_path)
    for size in (0, 5, lines.index(b"\n"), lines.index(b"\n") + 1, lines.index(b"\n") + 9, len(lines)):
        result.unlink()
        file.write_bytes(lines[:size])
        assert figures(evaluate(model, ["piqa"], data, results=tmp_path)) == figures(whole)
        assert records(tmp_path) == expected


def test_the_same_again_asks_nothing(data, tmp_path):
    model = UniformModel()
    first = evaluate(model, ["piqa"], data, results=tmp_path)
    asked = dict(model.seen)
    assert figures(evaluate(model, ["piqa"], data, results=tmp_path)) == figures(first)
    assert model.seen == asked


def test_what_changes_figures_changes_the_file(data, tmp_path):
    """And the size of batches does not."""
    kwargs = {"tasks": ["piqa"], "data_dir": data, "results": tmp_path}
    first = evaluate(UniformModel(), **kwargs)[0].identity
    assert evaluate(UniformModel(), **kwargs, batch_size=2)[0].identity == first
    others = [
        {"seed": 1},
        {"limit": 1},
        {"profile": "diffullama_script"},
        {"switches": {"rule.piqa": "per_token"}},
    ]
    identities = [evaluate(UniformModel(), **kwargs | other)[0].identity for other in others]
    identities.append(evaluate(UniformModel(max_length=1000), **kwargs)[0].identity)
    assert len({first, *identities}) == len(identities) + 1
    assert len(list(tmp_path.glob("*[0-9a-f].json"))) == len(identities) + 1


def test_too_long_examples_are_counted(data, tmp_path):
    """Left out, but for programs, where they count as wrong."""
    lengths = sorted(example.length for example in read_examples("piqa", data))
    result = evaluate(UniformModel(max_length=lengths[-1] - 1), ["piqa"], data, results=tmp_path)[0]
    left_out = lengths.count(lengths[-1])
    assert result.skipped == {"too_long": left_out} and result.examples == len(lengths) - left_out
    with pytest.raises(InputError, match="every example of piqa is longer than the 3 tokens"):
        evaluate(UniformModel(max_length=3), ["piqa"], data, results=tmp_path)


def test_a_model_without_numbers_ends_the_run(data, tmp_path):
    class Broken(UniformModel):
        def score(self, targets):
            return [float("nan")] * len(targets)

    with pytest.raises(RunError, match="the model's score of row 3 is no number") as caught:
        evaluate(Broken(), ["piqa"], data, results=tmp_path)
    assert caught.value.status == EXIT_FAILED
    assert not list(tmp_path.glob("*[0-9a-f].json"))


def test_a_result_tells_every_setting(data, tmp_path):
    (result,) = evaluate(
        ConstantModel(), ["triviaqa"], data, results=tmp_path, seed=3, switches={"triviaqa_norm": "triviaqa"}
    )
    (file,) = tmp_path.glob("*[0-9a-f].json")
    told = json.loads(file.read_text())
    switches = {field.name for field in dataclasses.fields(profile_named("a3_best_guess"))}
    assert switches - {"pile"} <= told["settings"]["profile"].keys()
    assert told["settings"]["profile"]["triviaqa_norm"] == "triviaqa"
    assert told["settings"]["model"] == ConstantModel().describe()
    assert told["overrides"] == {"switches": {"triviaqa_norm": "triviaqa"}}
    assert told["seed"] == 3 and told["versions"]["jax"] and told["split"] == "validation"
    assert all(len(digest) == 64 for digest in told["data"].values()) and told["data"]
    lines = (tmp_path / told["records"]).read_text().splitlines()
    assert len(lines) == told["examples"] == result.examples
