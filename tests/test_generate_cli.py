"""`a3 generate` from the outside: input, output, options, bad input."""

import json

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
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
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
    ({"tokens": [1, None, 2], "ranks": [0, 1, 0, 0]}, ["ranks", "4 values for 3 tokens"]),
    ({"tokens": [None] * 257}, ["tokens", "257", "256"]),
    ({"text": "[[9999999999]]"}, ["text", "[[9999999999]]"]),
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
        (["--strategy=speculativ"], ["--strategy", "did you mean 'speculative'"]),
        (["--order=sprad"], ["--order", "did you mean 'spread'"]),
        (["--block_order=block"], ["--block_order", "'block'"]),
        (["--criterion=margins"], ["--criterion", "did you mean 'margin'"]),
        (["--commit=flat", "--strategy=speculative"], ["--commit", "'speculative'"]),
        (
            ["--threshold=0.9", "--entropy_bound=1", "--strategy=dynamic"],
            ["--threshold", "contradicts entropy_bound"],
        ),
        (["--threshold=0.9"], ["--threshold", "'groupwise'"]),
        (["--threshold=0.9", "--strategy=speculative"], ["--threshold", "'speculative'"]),
        (["--threshold=1.1", "--strategy=dynamic"], ["--threshold", "1.1"]),
        (["--entropy_bound=nan", "--strategy=dynamic"], ["--entropy_bound", "nan"]),
        (["--factor=1", "--step_size=2", "--strategy=dynamic"], ["--step_size", "factor"]),
        (["--window=0"], ["--window", "at least 1", "0"]),
        (["--window=3"], ["--window", "'groupwise' does not read it"]),
        (["--min_gap=2"], ["--min_gap", "'groupwise'"]),
        (["--model=ar", "--strategy=speculative"], ["--strategy", "'ar'"]),
        (["--stream", "--num_samples=2"], ["--num_samples", "one sample"]),
        (["--stream", "--rerank"], ["--rerank", "one sample"]),
        (["--orders=2"], ["--orders"]),
    ],
    ids=str,
)
def test_bad_options(model, tmp_path, capsys, flags, parts):
    source = write_lines(tmp_path / "in.jsonl", {"text": "a[[1]]"})
    outcome = run(capsys, "generate", model, source, "-", *flags)
    assert_refused(outcome, *parts)
    assert len(outcome[2]) == 1, "nothing but the complaint"


@pytest.mark.parametrize("flags", [[], ["--stream"]], ids=str)
def test_bad_lines_may_be_skipped(model, tmp_path, capsys, flags):
    """The good lines are filled as they are at their places in the file."""
    good = [{"text": "ab[[2]]"}, {"tokens": [4, None, 5]}]
    bad = ["{", {"text": "a[[1]]", "rank": [0]}, {"tokens": [None, 260]}]
    source = write_lines(tmp_path / "in.jsonl", bad[0], good[0], bad[1], good[1], bad[2])
    arguments = ("generate", model, source, tmp_path / "out.jsonl", "--temperature=1", *flags)
    assert_refused(run(capsys, *arguments), f"{source}:1:", "not JSON")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    status, out, err = run(capsys, *arguments, "--skip_bad")
    assert (status, out, len(err)) == (0, [], 4)
    for number, part, told in zip((1, 3, 5), ("not JSON", "did you mean 'ranks'", "260"), err, strict=False):
        assert f"{source}:{number}:" in told
        assert part in told
    assert "3 bad lines skipped" in err[-1]
    results = [line for line in read_lines(tmp_path / "out.jsonl") if "text" in line]
    full = write_lines(tmp_path / "full.jsonl", good[0], good[0], good[0], good[1])
    filled = run(capsys, "generate", model, full, "-", "--temperature=1")[1]
    assert [line["tokens"] for line in results] == [filled[1]["tokens"], filled[3]["tokens"]]


@pytest.mark.parametrize("flags", [[], ["--stream"], ["--rerank", "--num_samples=2"]], ids=str)
def test_nothing_but_bad_lines(model, tmp_path, capsys, flags):
    source = write_lines(tmp_path / "in.jsonl", "nope", {"text": 5}, "")
    outcome = run(capsys, "generate", model, source, "-", *flags, "--skip_bad")
    assert outcome[:2] == (0, [])
    assert "0 lines, 2 bad lines skipped" in outcome[2][-1]


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (["--order=l2r", "--group_size=2"], [[2, 3], [4, 5], [6, 8]]),
        (["--order=block", "--block_size=4", "--group_size=2"], [[2, 3, 4, 5], [6, 8]]),
        (["--order=block", "--block_size=3", "--strategy=dynamic"], [[2, 3, 4], [5, 6, 8]]),
        (["--order=spread", "--strategy=speculative", "--window=2"], None),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value[0], str) else "",
)
def test_a_stream_tells_what_the_result_holds(model, tmp_path, capsys, flags, steps):
    """Events before each result, whose union is the result; the same tokens without a stream."""
    source = write_lines(tmp_path / "in.jsonl", {"text": "ab[[5]]c[[1]]"}, {"text": "abc"})
    arguments = ("generate", model, source, "-", "--temperature=1", "--seed=3", *flags)
    status, (*events, result, nothing), _ = run(capsys, *arguments, "--stream")
    assert status == 0
    assert steps is None or [event["columns"] for event in events] == steps
    told = dict.fromkeys(("tokens", "logprobs", "commit_rank"))
    assert all(list(event) == ["columns", *told] for event in events)
    columns = joined(events, "columns")
    assert sorted(columns) == [2, 3, 4, 5, 6, 8]
    for name in told:
        assert joined(events, name) == [result[name][column] for column in columns], name
    assert nothing["tokens"] == list(b"abc")
    whole = run(capsys, *arguments)[1]
    assert [line["tokens"] for line in whole] == [result["tokens"], nothing["tokens"]]
    assert whole[0]["logprob"] == pytest.approx(result["logprob"], abs=1e-4)
    assert whole[0]["commit_rank"] == result["commit_rank"]
    arguments = (*arguments[:3], tmp_path / "out.jsonl", *arguments[4:], "--stream")
    assert run(capsys, *arguments)[:2] == (0, [])
    assert read_lines(tmp_path / "out.jsonl") == [*events, result, nothing]


def joined(events, name):
    return [value for event in events for value in event[name]]


@pytest.mark.parametrize("context", ["flat", "l2r"])
def test_rerank_keeps_the_likeliest_sample(model, tmp_path, capsys, context):
    """Its joint is the largest of the four that `score` gives with ranks from left to right."""
    items = [{"text": "ab[[4]]c[[2]]"}, {"tokens": [1, None, None, 3]}]
    source = write_lines(tmp_path / "in.jsonl", *items)
    arguments = (model, source, "-", "--num_samples=4", "--temperature=1", f"--context={context}")
    _, samples, _ = run(capsys, "generate", *arguments)
    _, kept, _ = run(capsys, "generate", *arguments, "--rerank")
    assert len(kept) == 2
    for number, best in enumerate(kept):
        four = samples[4 * number : 4 * number + 4]
        scored = [[int(value is not None) for value in line["logprobs"]] for line in four]
        ranks = left_to_right(scored[0], context)
        lines = [
            {"tokens": line["tokens"], "ranks": ranks, "scored": blank}
            for line, blank in zip(four, scored, strict=True)
        ]
        file = write_lines(tmp_path / "filled.jsonl", *lines)
        joints = [line["logprob"] for line in run(capsys, "score", model, file, "-")[1]]
        assert len(set(joints)) == 4
        sample = joints.index(max(joints))
        assert best == four[sample] | {"joint": best["joint"]}
        assert best["sample"] == sample
        assert best["joint"] == pytest.approx(joints[sample], abs=1e-4)


def left_to_right(blank, context):
    """Ranks of given tokens first, as one group or one by one, then the blanks one by one."""
    given = blank.count(0)
    ranks, next_given, next_blank = [], 0, given if context == "l2r" else 1
    for is_blank in blank:
        ranks.append(next_blank if is_blank else next_given)
        next_blank += is_blank
        next_given += not is_blank and context == "l2r"
    return ranks


def test_acceptance_is_that_of_speculative(model, tmp_path, capsys):
    """The share of drafts that passed; none are made where one token is all there is to fill."""
    source = write_lines(tmp_path / "in.jsonl", {"text": "ab[[9]]"}, {"text": "ab[[1]]c"})
    flags = ("--strategy=speculative", "--window=3")
    _, (many, one), _ = run(capsys, "generate", model, source, "-", *flags)
    assert list(many) == [*FIELDS, "acceptance"]
    assert 0 <= many["acceptance"] <= 1
    assert one["acceptance"] is None
    passed = 9 - many["forwards"]  # each forward adds a token of its own to the drafts that passed
    assert (many["acceptance"] > 0) == (passed > 0)


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
    monkeypatch.setattr("a3_jax.checkpoints.loading.open_checkpoint", lambda path, **_: broken)
    source = write_lines(tmp_path / "in.jsonl", {"tokens": [1, 2]})
    status, out, err = run(capsys, "score", "model", source, tmp_path / "out.jsonl")
    assert (status, out) == (1, [])
    assert f"{source}:1" in err[-1]
    assert not (tmp_path / "out.jsonl").exists()


def test_a_mesh_changes_nothing(model, tmp_path, capsys):
    """The command on eight devices: examples over data and fsdp, heads over tensor."""
    source = write_lines(tmp_path / "in.jsonl", {"text": "ab[[3]]cd[[2]]"}, {"text": "[[4]]x"})
    for command, flags in (("generate", ["--strategy=speculative"]), ("score", [])):
        lines = source
        if command == "score":
            lines = write_lines(tmp_path / "score.jsonl", {"text": "abcd"}, {"text": "x y z"})
        alone = run(capsys, command, model, lines, "-", *flags)
        status, sharded, _ = run(capsys, command, model, lines, "-", *flags, "--mesh=data=2,fsdp=2,tensor=2")
        assert status == alone[0] == 0
        for result, expected in zip(sharded, alone[1], strict=True):
            assert result["tokens"] == expected["tokens"]
            assert result["logprob"] == pytest.approx(expected["logprob"], abs=1e-4)


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        ("fsdp", ["--mesh", "'fsdp'"]),
        ("fsdp=x", ["'fsdp=x'"]),
        ("rows=2", ["rows"]),
        ("fsdp=3", ["8 devices"]),
    ],
)
def test_a_mesh_that_is_none(model, tmp_path, capsys, mesh, parts):
    source = write_lines(tmp_path / "in.jsonl", {"text": "ab[[3]]"})
    assert_refused(run(capsys, "generate", model, source, "-", f"--mesh={mesh}"), *parts)
