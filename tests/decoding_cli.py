"""Runs `a3 generate` and `a3 score` as a user does: files, streams, exit status."""

import io
import json
import sys

from a3_jax import cli


def run(capsys, *arguments, stdin=None, monkeypatch=None):
    """(exit status, objects on standard output, lines on standard error)."""
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, [json.loads(line) for line in captured.out.splitlines()], captured.err.splitlines()


def write_lines(path, *items):
    path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_refused(outcome, *parts):
    """Exit status 2, and one last line that holds all of `parts`."""
    status, out, err = outcome
    assert status == 2
    assert not out
    for part in parts:
        assert str(part) in err[-1], err[-1]
