"""`a3 score` from the outside: input, output, options, bad input."""

import numpy as np
import pytest

from a3_jax.checkpoints.loading import open_checkpoint
from tests import oracles
from tests.decoding_cli import assert_refused, read_lines, run, write_lines
from tests.tiny_hf import write_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    write_tiny_llama(directory, query_embed=True)
    return directory


@pytest.fixture(scope="module")
def checkpoint(model):
    return open_checkpoint(model)


def dense(checkpoint, tokens, ranks, positions=None):
    return oracles.any_order_logprobs(checkpoint.params, checkpoint.config, tokens, ranks, positions)


def values(result):
    return np.array([np.nan if value is None else value for value in result["logprobs"]])


def test_orders_context_and_masks(model, checkpoint, tmp_path, capsys):
    """Each line against the dense model under the ranks that the line means."""
    tokens = [72, 105, 33, 9, 200, 41, 7]
    positions = [5, 3, 4, 9, 0, 30, 31]
    cases = [
        ({"ranks": [2, 0, 1, 1, 0, 2, 5]}, [2, 0, 1, 1, 0, 2, 5], [1] * 7),
        ({"ranks": [2, 0, 1, 1, 0, 2, 5], "context": 2}, [2, 0, 1, 1, 0, 2, 5], [0, 0, 1, 1, 1, 1, 1]),
        ({"order": "l2r", "group_size": 2}, [0, 0, 1, 1, 2, 2, 3], [1] * 7),
        ({}, [0, 0, 0, 0, 1, 1, 1], [1] * 7),
        ({"group_size": 1, "context": 3}, [0, 0, 0, 1, 2, 3, 4], [0, 0, 0, 1, 1, 1, 1]),
        ({"group_size": 3, "context": 3, "scored": [1, 0] * 3 + [1]}, [0, 0, 0, 1, 1, 1, 2],
         [0, 0, 0, 0, 1, 0, 1]),
        ({"group_size": 1, "positions": positions}, [3, 1, 2, 4, 0, 5, 6], [1] * 7),
    ]  # fmt: skip
    source = write_lines(tmp_path / "in.jsonl", *({"tokens": tokens, **fields} for fields, _, _ in cases))
    assert run(capsys, "score", model, source, tmp_path / "out.jsonl")[:2] == (0, [])
    for (fields, ranks, scored), result in zip(cases, read_lines(tmp_path / "out.jsonl"), strict=True):
        expected = np.where(scored, dense(checkpoint, tokens, ranks, fields.get("positions")), np.nan)
        np.testing.assert_allclose(values(result), expected, atol=1e-4, err_msg=str(fields))
        assert result["logprob"] == pytest.approx(np.nansum(expected), abs=1e-3)
        assert set(result) == {"logprobs", "logprob"}


def test_context_in_reading_order(model, checkpoint, tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", {"tokens": [1, 2, 3, 4, 5, 6], "context": 3, "group_size": 2})
    _, (result,), _ = run(capsys, "score", model, source, "-", "--context=l2r")
    expected = dense(checkpoint, [1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 3, 4])
    np.testing.assert_allclose(values(result)[3:], expected[3:], atol=1e-4)


def test_text_and_streams(model, checkpoint, capsys, monkeypatch):
    """Standard input to standard output; text carries its tokens, BOS first where asked for, never scored."""
    line = '{"text": "héllo", "order": "l2r", "group_size": 1, "context": 2}\n\n'
    ids = list("héllo".encode())
    for bos, front in (("auto", []), ("yes", [256])):
        arguments = ("score", model, "-", "-", f"--bos={bos}")
        status, (result,), _ = run(capsys, *arguments, stdin=line, monkeypatch=monkeypatch)
        given = len(front) + 2
        expected = dense(checkpoint, front + ids, [0] * given + list(range(1, 5)))
        assert status == 0
        assert result["tokens"] == front + ids
        np.testing.assert_allclose(values(result)[given:], expected[given:], atol=1e-4)
        assert result["logprobs"][:given] == [None] * given


def test_random_order_is_a_function_of_the_lines_seed(model, tmp_path, capsys):
    line = {"tokens": list(range(10)), "order": "random", "group_size": 1}
    source = write_lines(tmp_path / "in.jsonl", line, {**line, "seed": 0}, {**line, "seed": 1})
    _, (default, zero, one), _ = run(capsys, "score", model, source, "-")
    assert default == zero
    assert zero["logprob"] != one["logprob"]


def test_left_to_right_model(model, checkpoint, tmp_path, capsys):
    """Needs no ranks; the first token is not scored; reading order is that of the positions."""
    tokens = [72, 105, 33, 9, 200]
    source = write_lines(
        tmp_path / "in.jsonl", {"tokens": tokens}, {"tokens": tokens[::-1], "positions": [4, 3, 2, 1, 0]}
    )
    _, (forward, backward), _ = run(capsys, "score", model, source, "-", "--model=ar", "--dtype=float32")
    expected = oracles.left_logprobs(checkpoint.params, checkpoint.config, tokens)
    np.testing.assert_allclose(values(forward), expected, atol=1e-4)
    np.testing.assert_allclose(values(backward)[::-1], expected, atol=1e-4)


def test_several_orders(model, tmp_path, capsys):
    """Text also carries its tokens; the first order is the plain run's; standard input is a file like any."""
    lines = [{"text": "abcdef", "group_size": 1, "seed": 2}, {"tokens": [1, 2, 3], "absent": [0, 1, 0]}]
    source = write_lines(tmp_path / "in.jsonl", *lines)
    status, (text, tokens), _ = run(capsys, "score", model, source, "-", "--orders=3")
    fields = ["logprobs", "logprob", "log_mean_exp", "order_gap", "orders"]
    assert status == 0
    assert (list(text), list(tokens)) == (["tokens", *fields], fields)
    assert text["tokens"] == list(b"abcdef")
    assert [len(line["orders"]) for line in (text, tokens)] == [3, 3]
    assert tokens["logprobs"][1] is None
    source = write_lines(tmp_path / "plain.jsonl", {**lines[0], "order": "random"})
    _, (plain,), _ = run(capsys, "score", model, source, "-")
    assert text["orders"][0] == pytest.approx(plain["logprob"], abs=1e-5)


def test_bfloat16_is_close(model, checkpoint, tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", {"tokens": [1, 2, 3, 4], "ranks": [0, 1, 2, 3]})
    _, (result,), _ = run(capsys, "score", model, source, "-", "--dtype=bfloat16")
    expected = dense(checkpoint, [1, 2, 3, 4], [0, 1, 2, 3])
    error = np.abs(values(result) - expected).max()
    assert 1e-5 < error < 0.3, error


BAD_LINES = [
    ('{"tokens": [1, 2]', ["not JSON", '{"tokens": [1, 2]']),
    ('{"tokens": [1, NaN]}', ["not JSON", "NaN"]),
    ("[1, 2]", ["JSON object", "[1, 2]"]),
    ({}, ["tokens", "neither"]),
    ({"tokens": [1], "text": "a"}, ["tokens", "both"]),
    ({"tokens": [1, 2], "rank": [0, 1]}, ["rank", "did you mean 'ranks'"]),
    ({"tokens": "ab"}, ["tokens", "a list", '"ab"']),
    ({"tokens": []}, ["tokens", "empty"]),
    ({"tokens": [1, 260]}, ["tokens", "260", "vocabulary"]),
    ({"tokens": [1, -1]}, ["tokens", "-1", "vocabulary"]),
    ({"tokens": [1, True]}, ["tokens", "true"]),
    ({"tokens": [1, 2.0]}, ["tokens", "2.0"]),
    ({"tokens": [1, None]}, ["tokens", "null"]),
    ({"tokens": [1] * 257}, ["tokens", "257", "256"]),
    ({"text": "a" * 300}, ["text", "300", "256"]),
    ({"text": 5}, ["text", "string", "5"]),
    ({"text": ""}, ["text", "empty"]),
    ({"tokens": [1, 2], "ranks": [0]}, ["ranks", "[0]", "2 tokens"]),
    ({"tokens": [1, 2], "ranks": [0, 1.5]}, ["ranks", "1.5"]),
    ({"tokens": [1, 2], "ranks": [0, True]}, ["ranks", "true"]),
    ({"tokens": [1, 2], "ranks": [0, 2**40]}, ["ranks", str(2**40)]),
    ({"tokens": [1, 2], "ranks": None}, ["ranks", "null"]),
    ({"tokens": [1, 2], "positions": [0, 1, 2]}, ["positions", "3 values"]),
    ({"tokens": [1, 2], "positions": [0, -1]}, ["positions", "-1"]),
    ({"tokens": [1, 2], "positions": [0, 256]}, ["positions", "256"]),
    ({"tokens": [1, 2], "positions": [3, 3]}, ["positions", "3", "more than once"]),
    ({"tokens": [1, 2], "scored": [1]}, ["scored", "[1]"]),
    ({"tokens": [1, 2], "scored": [1, 2]}, ["scored", "2"]),
    ({"tokens": [1, 2], "absent": [1]}, ["absent", "[1]", "2 tokens"]),
    ({"tokens": [1, 2], "absent": [0, 2]}, ["absent", "2"]),
    ({"tokens": [1, 2], "absent": [1, 1]}, ["absent", "every token"]),
    ({"tokens": [1, 2], "absent": [0, 1], "scored": [1, 1]}, ["absent", "value 1", "scored"]),
    ({"tokens": [1, 2], "absent": [0, 1], "ranks": [None, 0]}, ["ranks", "null"]),
    ({"tokens": [1, 2], "absend": [0, 1]}, ["absend", "did you mean 'absent'"]),
    ({"tokens": [1, 2], "context": 3}, ["context", "3"]),
    ({"tokens": [1, 2], "context": -1}, ["context", "-1"]),
    ({"tokens": [1, 2], "context": True}, ["context", "True"]),
    ({"tokens": [1, 2], "order": "randon"}, ["order", "randon", "did you mean 'random'"]),
    ({"tokens": [1, 2], "group_size": 0}, ["group_size", "0"]),
    ({"tokens": [1, 2], "group_size": "4"}, ["group_size", "'4'"]),
    ({"tokens": [1, 2], "order": "random", "seed": -1}, ["seed", "-1"]),
]  # fmt: skip


@pytest.mark.parametrize(("line", "parts"), BAD_LINES, ids=lambda value: str(value)[:40])
def test_bad_lines(model, tmp_path, capsys, line, parts):
    """The second line is bad: nothing is scored, nothing is written, one line says where and what."""
    source = write_lines(tmp_path / "in.jsonl", {"tokens": [1, 2]}, line)
    outcome = run(capsys, "score", model, source, tmp_path / "out.jsonl")
    assert_refused(outcome, f"{source}:2:", *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ({"tokens": [1, 2], "ranks": [0, 1]}, ["ranks", "one order", "--orders"]),
        ({"tokens": [1, 2], "order": "l2r"}, ["order", "'l2r'", "random, block"]),
        ({"tokens": [1, 2], "order": "spread"}, ["order", "'spread'", "random, block"]),
    ],
    ids=str,
)
def test_lines_of_one_order(model, tmp_path, capsys, line, parts):
    source = write_lines(tmp_path / "in.jsonl", {"tokens": [1, 2]}, line)
    assert_refused(run(capsys, "score", model, source, "-", "--orders=2"), f"{source}:2:", *parts)
    assert run(capsys, "score", model, source, "-", "--orders=1")[0] == 0


@pytest.mark.parametrize("output", ["-", "out.jsonl"])
def test_bad_lines_may_be_skipped(model, tmp_path, capsys, output):
    """The good lines in order; a line on standard error for each bad one, as in the file, and a count."""
    good = [{"tokens": [1, 2, 3]}, {"tokens": [4, 5]}]
    lines = [good[0], "nope", {"tokens": [1], "rank": [0]}, good[1], {"tokens": [1, 300]}, ""]
    source = write_lines(tmp_path / "in.jsonl", *lines)
    output = output if output == "-" else tmp_path / output
    assert_refused(run(capsys, "score", model, source, output), f"{source}:2:", "not JSON", "nope")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    status, results, err = run(capsys, "score", model, source, output, "--skip_bad")
    results = results if output == "-" else read_lines(output)
    alone = write_lines(tmp_path / "good.jsonl", *good)
    assert (status, results) == (0, run(capsys, "score", model, alone, "-")[1])
    expected = [(2, "not JSON"), (3, "did you mean 'ranks'"), (5, "300")]
    assert len(err) == 4
    for (number, part), told in zip(expected, err, strict=False):
        assert f"{source}:{number}:" in told
        assert part in told
    assert "2 lines, 3 bad lines skipped" in err[-1]


def test_nothing_but_bad_lines(model, tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", "nope", {"tokens": []})
    status, _, err = run(capsys, "score", model, source, tmp_path / "out.jsonl", "--skip_bad")
    assert (status, read_lines(tmp_path / "out.jsonl")) == (0, [])
    assert "0 lines, 2 bad lines skipped" in err[-1]


def test_text_needs_a_tokenizer(tmp_path, capsys):
    write_tiny_llama(tmp_path / "model", tokenizer=None, query_embed=True)
    source = write_lines(tmp_path / "in.jsonl", {"text": "abc"})
    outcome = run(capsys, "score", tmp_path / "model", source, "-")
    assert_refused(outcome, f"{source}:1:", "text", "no tokenizer")


def test_bad_options_and_paths(model, tmp_path, capsys):
    source = write_lines(tmp_path / "in.jsonl", {"tokens": [1, 2]})
    assert_refused(
        run(capsys, "score", model, source, "-", "--context=flatt"), "--context", "did you mean 'flat'"
    )
    assert_refused(run(capsys, "score", model, source, "-", "--dtype=fp16"), "--dtype", "fp16")
    assert_refused(run(capsys, "score", model, source, "-", "--modle=ar"), "--modle", "--model")
    assert_refused(run(capsys, "score", model, source, "-", "--orders=0"), "--orders", "at least 1", "0")
    assert_refused(run(capsys, "score", model, source, "-", "--orders=many"), "--orders", "many")
    assert_refused(run(capsys, "score", model, source, "-", "--orders=2", "--model=ar"), "--orders", "'ar'")
    assert_refused(
        run(capsys, "score", model, tmp_path / "absent.jsonl", "-"), "absent.jsonl", "no such file"
    )
    assert_refused(run(capsys, "score", model, source, tmp_path), tmp_path, "directory")
    assert_refused(run(capsys, "score", tmp_path, source, "-"), tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    assert_refused(run(capsys, "score", model, tmp_path / "latin.jsonl", "-"), "latin.jsonl", "UTF-8")
