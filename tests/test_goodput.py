"""`a3 goodput`: hand-made histories whose shares are known."""

import json
import subprocess
import sys

import pytest

from a3_jax.cli import main
from a3_jax.pods.goodput import account
from a3_jax.pods.run_records import append_event, read_events


class History:
    """Events on a clock that is moved by hand."""

    def __init__(self, now=1000.0):
        self.now, self.attempt, self.events = now, 0, []

    def add(self, event, seconds=0.0, pause=0.0, **fields):
        """An event after `pause` seconds of nothing and `seconds` of its own."""
        self.now += pause + seconds
        fields = {"time": self.now, "event": event, "attempt": self.attempt, "seconds": seconds, **fields}
        self.events.append(fields)
        return self

    def begin(self, first_step, down=0.0, seconds=5.0):
        self.attempt += 1
        return self.add("init", seconds, down, first_step=first_step, total_steps=100)

    def steps(self, first, last, seconds=2.0, data_seconds=0.5, **fields):
        for step in range(first, last + 1):
            self.add("step", seconds, step=step, data_seconds=data_seconds, tokens=64, **fields)
        return self


def spent(history) -> dict[str, float]:
    """The seconds of each category that has any, after checking that they add up."""
    report = account(history.events)
    assert sum(report["seconds"].values()) == pytest.approx(report["wall_seconds"])
    assert report["goodput"] == pytest.approx(report["seconds"]["step"] / report["wall_seconds"])
    return {name: round(seconds, 6) for name, seconds in report["seconds"].items() if round(seconds, 6)}


def test_one_attempt():
    history = History().begin(0).add("restore", 3, step=0).add("compile", 10, what="step")
    history.steps(1, 4).add("evaluate", 6, step=4).add("sample", 1, step=4).add("save", 0.25, step=4)
    history.add("saved", 0, pause=2.75, step=4, bytes=9)
    history.events[-1]["seconds"] = 3  # in the background: it is nobody's time
    history.add("finish", pause=1, step=4)
    assert spent(history) == {
        "step": 6, "data_wait": 2, "init": 5, "restore": 3, "compile": 10, "evaluate": 6, "sample": 1,
        "save": 0.25, "other": 3.75,
    }  # fmt: skip
    report = account(history.events)
    assert report["wall_seconds"] == 37 and report["goodput"] == pytest.approx(6 / 37)
    assert (report["attempts"], report["restarts"], report["steps"]) == (1, 0, 4)


def test_steps_done_again_are_lost_and_the_time_between_is_down():
    """Steps 3 and 4 of the first attempt were after its last checkpoint."""
    history = History().begin(0).steps(1, 4)
    history.events.append({"time": history.now + 1, "event": "restart", "exit_status": -9, "process": 1})
    history.begin(2, down=7).add("restore", 1, step=2).steps(3, 5)
    assert spent(history) == {
        "step": 5 * 1.5, "data_wait": 5 * 0.5, "redone": 4, "init": 10, "restore": 1, "down": 7
    }  # fmt: skip
    report = account(history.events)
    assert (report["attempts"], report["restarts"], report["steps"]) == (2, 1, 5)


def test_what_will_have_to_be_done_again_is_lost_at_once():
    """The second attempt has not come as far as the first yet."""
    history = History().begin(0).steps(1, 4).begin(2).steps(3, 3)
    assert spent(history)["redone"] == 4
    assert account(history.events)["steps"] == 3


def test_an_older_checkpoint_than_expected():
    """The newest one was damaged: what counts is the step that was restored."""
    history = (
        History().begin(0).steps(1, 4).begin(3).add("damaged", step=3, problem="").add("restore", 1, step=2)
    )
    assert spent(history)["redone"] == 4


def test_a_beginning_from_nothing():
    history = History().begin(0).steps(1, 4).begin(0)
    assert spent(history) == {"redone": 8, "init": 10}


def test_rolled_back_steps_are_lost_though_they_are_never_done_again():
    """Steps 3 to 6 are lost; 3 and 4 were done again, and count."""
    history = History().begin(0).steps(1, 6)
    history.add("rollback", from_step=6, to_step=2, skipped_steps=4).add("restore", 1, step=2).steps(3, 4)
    assert spent(history) == {"step": 6, "data_wait": 2, "redone": 8, "init": 5, "restore": 1}
    assert account(history.events)["steps"] == 4


def test_steps_without_an_update():
    """They count as skipped, whatever becomes of them."""
    history = History().begin(0).steps(1, 2).steps(3, 3, skipped=True).steps(4, 4)
    history.begin(2).steps(3, 3, skipped=True).steps(4, 4)
    assert spent(history) == {"step": 4.5, "data_wait": 1.5, "skipped": 4, "redone": 2, "init": 10}
    assert account(history.events)["steps"] == 3


def test_attempts_that_end_before_they_begin():
    """The supervisor's last word counts: nothing ran till then."""
    history = History().begin(0).steps(1, 2)
    history.events.append({"time": history.now + 30, "event": "restart", "exit_status": 75, "process": 0})
    assert spent(history) == {"step": 3, "data_wait": 1, "init": 5, "down": 30}


def test_restoring_before_init_is_written():
    """5 seconds of start, 3 of restoring, then both events at once; the process was not down meanwhile."""
    history = History().begin(0).steps(1, 2).begin(2, down=7)
    for event in history.events[-1:]:
        event["time"] += 3
    history.events.append(
        {"time": history.now + 3, "event": "restore", "attempt": 2, "step": 2, "seconds": 3}
    )
    assert spent(history) == {"step": 3, "data_wait": 1, "init": 10, "restore": 3, "down": 7}


def test_a_clock_that_jumps_back_takes_nothing_away():
    history = History().begin(0).steps(1, 2)
    history.now -= 100
    history.steps(3, 3)
    assert spent(history) == {"step": 4.5, "data_wait": 1.5, "init": 5}


def test_torn_and_unreadable_lines_are_passed_over_and_counted(tmp_path, capsys):
    good = [json.dumps(event) for event in History().begin(0).steps(1, 2).events]
    bad = [
        b'{"time": 3, "eve', b"\xff\xfe", b"[1]", b'"text"', b'{"event": "step"}',
        b'{"time": 1, "event": "step", "step": 3, "seconds": null}',
        b'{"time": 1, "event": "step", "step": 3, "seconds": NaN}',
        b'{"time": 1, "event": "step", "step": true, "seconds": 1}',
        b'{"time": 1, "event": "step", "step": 3, "seconds": -1}',
    ]  # fmt: skip
    lines = [line.encode() for line in good]
    (tmp_path / "events.jsonl").write_bytes(b"\n".join([lines[0], *bad, *lines[1:], b'{"time": 10']))
    assert main(["goodput", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["skipped_lines"] == len(bad) + 1
    assert list(report) == [
        "run", "wall_seconds", "goodput", "seconds", "attempts", "restarts", "steps", "skipped_lines"
    ]  # fmt: skip
    assert (report["run"], report["wall_seconds"], report["steps"]) == (str(tmp_path), 9, 2)
    append_event(tmp_path, {"time": 1011.0, "event": "restart"})  # begins a line of its own
    events, skipped_lines = read_events(tmp_path)
    assert events[-1]["event"] == "restart" and skipped_lines == len(bad) + 1


def test_an_event_behind_a_torn_line_is_read(tmp_path):
    """A run that was begun again by hand writes on where the last one was cut off."""
    first, second = (json.dumps(event) for event in History().begin(0).steps(1, 1).events)
    (tmp_path / "events.jsonl").write_text(first + "\n" + '{"time": 3, "event": "st' + second + "\n")
    events, skipped_lines = read_events(tmp_path)
    assert [event["event"] for event in events] == ["init", "step"] and skipped_lines == 1


def test_an_appended_event_is_the_first_of_a_file_or_follows_a_whole_line(tmp_path):
    for time in (1, 2):
        append_event(tmp_path, {"time": time})
    assert (tmp_path / "events.jsonl").read_text() == '{"time": 1}\n{"time": 2}\n'


def test_table(tmp_path, capsys):
    events = History().begin(0).steps(1, 10).events
    run = tmp_path / "run[bold]"
    run.mkdir()
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert main(["goodput", str(run)]) == 0
    text = capsys.readouterr().out
    assert "run[bold]: goodput 60.0% of 25.0 s\n" in text
    assert "steps 10, attempts 1, restarts 0" in text
    (row,) = [line for line in text.splitlines() if "data wait" in line]
    assert "5.0 s" in row and "20.00%" in row
    assert "evaluate" not in text


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda run: None, "run: no such directory"),
        (lambda run: run.mkdir(), "run/events.jsonl: no such file: no run has begun here"),
        (
            lambda run: (run.mkdir(), (run / "events.jsonl").write_text('{"time": 1, "event": "restart"}\n')),
            "run/events.jsonl: holds no init event",
        ),
    ],
)
@pytest.mark.parametrize("command", ["goodput", "status"])
def test_where_no_run_has_begun(tmp_path, capsys, make, told, command):
    make(tmp_path / "run")
    assert main([command, str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize("command", ["goodput", "status"])
def test_no_jax_is_loaded(tmp_path, command):
    events = History().begin(0).steps(1, 3).events
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "checkpoints" / "3" / "manifest.json").touch()
    code = f"""
import sys
from a3_jax.cli import main
assert main(["{command}", "{tmp_path}"]) == 0
bad = {{"jax", "flax", "orbax", "tensorflow", "seqio"}} & set(sys.modules)
assert not bad, bad
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
