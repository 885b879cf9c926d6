"""`a3 generate` from the outside: input, output, options, bad input."""

import pytest

from a3_jax.decoding import generate
from tests.decoding_cli import assert_refused, read_lines, run, write_lines
from tests.tiny_checkpoint import tiny_checkpoint, with_bytes
from tests.tiny_hf import write_tiny_llama

FIELDS = ["text", "tokens", "logprob", "logprobs", "commit_rank", "forwards", "exact"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    write_tiny_llama(directory, query_embed=True)
    return directory


def test_text_with_blanks(model, tmp_path, capsys, monkeypatch):
    """Blanks are filled, the rest stays; two samples an input, one after the other; `-` is a stream."""
    lines = '{"text": "ab[[3]]cd[[2]]"}\n{"tokens": [97, null, 99], "ranks": [null, 5, null]}\n'
    arguments = ("generate", model, "-", "-", "--temperature=1", "--num_samples=2", "--group_size=2")
    status, results, _ = run(capsys, *arguments, stdin=lines, monkeypatch=monkeypatch)
    assert status == 0
    assert [result["sample"] for result in results] == [0, 1, 0, 1]
    for result in results[:2]:
        assert list(result) == [*FIELDS, "sample"]
        assert result["tokens"][:2] + result["tokens"][5:7] == [97, 98, 99, 100]
        assert result["text"].startswith("ab")
        assert result["commit_rank"] == [0, 0, 1, 1, 2, 0, 0, 2, 3]
        assert [value is None for value in result["logprobs"]] == [True, True] + [False] * 3 + [True] * 2 + [
            False
        ] * 2
        assert result["logprob"] == pytest.approx(
            sum(value for value in result["logprobs"] if value is not None)
        )
        assert result["forwards"] == 3
    assert results[0]["tokens"] != results[1]["tokens"]
    assert results[2]["commit_rank"] == [0, 1, 0]
    source = tmp_path / "in.jsonl"
    source.write_text(lines)
    assert run(capsys, "generate", model, source, tmp_path / "out.jsonl", *arguments[4:])[:2] == (0, [])
    assert read_lines(tmp_path / "out.jsonl") == results


def test_left_to_right_model_and_nothing_to_fill(model, tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", {"text": "ab[[2]]c[[1]]"}, {"text": "abc"})
    status, (filled, whole), _ = run(capsys, "generate", model, source, "-", "--model=ar")
    assert status == 0
    assert list(filled) == FIELDS
    assert (filled["commit_rank"], filled["forwards"], filled["exact"]) == ([0, 0, 1, 2, 0, 3], 3, True)
    assert (whole["text"], whole["logprob"], whole["forwards"]) == ("abc", 0.0, 0)


def test_without_a_tokenizer_text_is_null(tmp_path, capsys):
    write_tiny_llama(tmp_path / "model", tokenizer=None, query_embed=True)
    source = write_lines(tmp_path / "in.jsonl", {"tokens": [5, None, 7]})
    _, (result,), _ = run(capsys, "generate", tmp_path / "model", source, "-", "--strategy=dynamic")
    assert result["text"] is None
    assert result["tokens"][::2] == [5, 7]
    outcome = run(capsys, "generate", tmp_path / "model", source, "-", "--stop_at_eos")
    assert_refused(outcome, "stop_at_eos", "EOS")


BAD_LINES = [
    ({"text": "a [[x]] b"}, ["text", "[[x]]"]),
    ({"text": "a [[0]] b"}, ["text", "[[0]]"]),
    ({"text": "a [[ b"}, ["text", "[[ b"]),
    ({"text": "a [[300]] b"}, ["text", "256"]),
    ({"text": "a", "order": "l2r"}, ["order", "unknown field"]),
    ({"tokens": [1, None], "rank": [0, 1]}, ["rank", "did you mean 'ranks'"]),
    ({"tokens": [1, None], "ranks": [0, None]}, ["ranks", "null"]),
    ({"tokens": [1, None], "ranks": [0]}, ["ranks", "[0]"]),
    ({"tokens": [1, None, False]}, ["tokens", "false"]),
    ({"tokens": [260, None]}, ["tokens", "260"]),
]


@pytest.mark.parametrize(("line", "parts"), BAD_LINES, ids=lambda value: str(value)[:40])
def test_bad_lines(model, tmp_path, capsys, line, parts):
    source = write_lines(tmp_path / "in.jsonl", {"text": "a[[1]]"}, line)
    outcome = run(capsys, "generate", model, source, tmp_path / "out.jsonl")
    assert_refused(outcome, f"{source}:2:", *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--strategy=groupwize"], ["--strategy", "groupwize", "did you mean 'groupwise'"]),
        (["--order=spiral"], ["--order", "spiral"]),
        (["--criterion=entropi"], ["--criterion", "did you mean 'entropy'"]),
        (["--commit=flat", "--context=l2r"], ["--context", "flat"]),
        (["--model=ar", "--strategy=dynamic"], ["--strategy", "ar"]),
        (["--temperature=-1"], ["--temperature", "-1"]),
        (["--temperature=nan"], ["--temperature", "nan"]),
        (["--top_p=0"], ["--top_p", "0"]),
        (["--group_size=0"], ["--group_size", "0"]),
        (["--num_samples=0"], ["--num_samples", "0"]),
        (["--seed=-1"], ["--seed", "-1"]),
        (["--step_size=x"], ["--step_size", "x"]),
        (["--tempurature=1"], ["--tempurature", "--temperature"]),
    ],
    ids=str,
)
def test_bad_options(model, tmp_path, capsys, flags, parts):
    source = write_lines(tmp_path / "in.jsonl", {"text": "a[[1]]"})
    assert_refused(run(capsys, "generate", model, source, "-", *flags), *parts)


def test_left_to_right_needs_a_first_token(model, tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", {"text": "[[2]]a"})
    assert_refused(run(capsys, "generate", model, source, "-", "--model=ar"), f"{source}:1:", "text", "blank")
    status, (result,), _ = run(capsys, "generate", model, source, "-", "--model=ar", "--bos=yes")
    assert (status, result["tokens"][0]) == (0, 256)


def test_context_follows_the_checkpoint():
    """What the last stage was trained with, unless told; flat commits have one group whatever it was."""
    item = {"tokens": [3, None, 5]}
    trained = tiny_checkpoint(context="l2r")
    assert generate(trained, [item])[0]["commit_rank"] == [0, 2, 1]
    assert generate(trained, [item], context="flat")[0]["commit_rank"] == [0, 1, 0]
    assert generate(trained, [item], commit="flat")[0]["commit_rank"] == [0, 1, 0]


def test_what_stands_behind_a_final_eos_is_dropped(monkeypatch):
    """A token that the model gives on its own stands in for EOS."""
    checkpoint = with_bytes()
    free = generate(checkpoint, [{"text": "ab[[6]]"}], group_size=2)[0]
    monkeypatch.setattr(checkpoint.tokenizer, "eos_id", free["tokens"][4])
    cut = generate(checkpoint, [{"text": "ab[[6]]"}], group_size=2, stop_at_eos=True)[0]
    length = free["tokens"].index(free["tokens"][4], 2) + 1
    assert cut["tokens"] == free["tokens"][:length]
    assert cut["logprobs"] == free["logprobs"][:length]
    assert cut["exact"] is True
    assert cut["forwards"] < free["forwards"]
    enclosed = {"text": "ab[[6]]c"}
    whole = [generate(checkpoint, [enclosed], group_size=2, stop_at_eos=stop)[0] for stop in (False, True)]
    assert whole[0] == whole[1], "before a given token EOS is a token like any other"


def test_an_eos_drawn_given_what_it_drops_is_not_exact(monkeypatch):
    checkpoint = with_bytes()
    backwards = {"text": "ab[[2]]", "ranks": [0, 0, 1, 0]}
    free = generate(checkpoint, [backwards])[0]
    monkeypatch.setattr(checkpoint.tokenizer, "eos_id", free["tokens"][2])
    cut = generate(checkpoint, [backwards], stop_at_eos=True)[0]
    assert cut["tokens"] == free["tokens"][:3]
    assert (free["exact"], cut["exact"]) == (True, False)


def test_weights_that_give_no_number_fail_the_run(tmp_path, capsys, monkeypatch):
    """Exit status 1, no output: NaN is no JSON."""
    broken = tiny_checkpoint()
    broken.params = broken.params | {"final_norm": broken.params["final_norm"] * float("nan")}
    monkeypatch.setattr("a3_jax.checkpoints.conversion.open_checkpoint", lambda path: broken)
    source = write_lines(tmp_path / "in.jsonl", {"tokens": [1, 2]})
    status, out, err = run(capsys, "score", "model", source, tmp_path / "out.jsonl")
    assert (status, out) == (1, [])
    assert f"{source}:1" in err[-1]
    assert not (tmp_path / "out.jsonl").exists()
