"""Rows that can't be written cost a warning; torn lines cost themselves."""

import errno
import json

import pytest

from a3_jax.training.run_log import Events, JsonLines, TensorBoard


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_full_disk_is_one_warning(tmp_path, capsys):
    """The rows of that time are missing, those after it are there."""
    sink = JsonLines(tmp_path / "rows.jsonl")
    sink.append({"step": 1})
    file = sink._file

    class Full:
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

        flush = close = write

    sink._file = Full()
    sink.append({"step": 2})
    sink.append({"step": 3})
    warnings = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(warnings) == 1 and "rows.jsonl" in warnings[0] and "No space left" in warnings[0]
    sink._file = file
    sink.append({"step": 4})
    sink.close()
    assert lines(tmp_path / "rows.jsonl") == [{"step": 1}, {"step": 4}]


def test_summaries_that_fail_are_one_warning(tmp_path, capsys):
    class Broken:
        def write_scalars(self, step, scalars):
            raise RuntimeError("disk full\nat a long place")

        def close(self):
            raise RuntimeError("still full")

    board = TensorBoard(tmp_path, writes=False)
    board._writer = Broken()
    board.write(1, {"loss": 1.0})
    board.write(2, {"loss": 1.0})
    board.close()
    assert capsys.readouterr().err.splitlines() == ["warning: no TensorBoard summaries any more: disk full"]


def test_other_processes_write_nothing(tmp_path):
    sink = JsonLines(tmp_path / "rows.jsonl", writes=False)
    sink.append({"step": 1})
    sink.cut_back(0)
    sink.close()
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize(
    "torn", ['{"step": 3, "lo', "[1]", "\xff{", '{"step": "x"}', "[" * 100_000], ids=repr
)
def test_cut_back_drops_later_rows_and_torn_lines(tmp_path, torn):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 5}\n' + torn.encode("latin1"))
    sink = JsonLines(file)
    sink.cut_back(2)
    assert sink.has(2) and not sink.has(5)
    sink.append({"step": 3})
    sink.close()
    assert lines(file) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_events_are_never_cut_and_count_attempts(tmp_path):
    """A torn line stays by itself, and doesn't swallow the next event."""
    file = tmp_path / "events.jsonl"
    first = Events(file)
    first.write("init", pid=1)
    first.close()
    with open(file, "a") as torn:
        torn.write('{"time": 1, "ev')
    second = Events(file)
    assert (first.attempt, second.attempt) == (1, 2)
    second.write("init", pid=2)
    second.close()
    rows = file.read_text().splitlines()
    assert json.loads(rows[0])["attempt"] == 1 and json.loads(rows[2])["attempt"] == 2 and len(rows) == 3
