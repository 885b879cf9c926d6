"""`a3 status`: what the files of a run say about it."""

import json
import os
import socket
import time
import zlib

import pytest

from a3_jax.checkpoints.manifest import File, Manifest, write_manifest
from a3_jax.cli import main
from a3_jax.pods.run_records import last_row
from a3_jax.pods.status import read_status
from a3_jax.runtime.lease import process_start

KEYS = [
    "run", "state", "step", "total_steps", "stage", "loss", "steps_per_second", "tokens_per_second",
    "seconds_left", "checkpoint", "damaged_checkpoints", "attempts", "restarts", "skipped_steps",
    "last_event", "last_event_seconds", "skipped_lines",
]  # fmt: skip
GONE = 2**22 + 1  # more than the kernel's largest process id


def event(name, attempt=1, **fields):
    return {"time": time.time() - 10, "event": name, "attempt": attempt, **fields}


def write_run(run, *events):
    """A run of 20 steps in two stages, 12 of them done, with a step that took 8 times the usual."""
    history = [event("init", seconds=1, first_step=0, total_steps=99)]
    history += [event("step", step=step, seconds=0.5, tokens=100) for step in range(1, 12)]
    history += [event("step", step=12, seconds=4, tokens=100), *events]
    (run / "events.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    (run / "config.json").write_text(json.dumps({"stages": [{"steps": 15}, {"steps": 5}]}))
    rows = [{"step": step, "stage": "l2r", "loss": 3 - step / 10} for step in range(1, 13)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 13, "st')


def write_checkpoint(run, step, content=b"weights"):
    directory = run / "checkpoints" / str(step)
    directory.mkdir(parents=True)
    (directory / "data").write_bytes(content)
    write_manifest(directory, Manifest({"data": File(len(content), zlib.crc32(content))}, {}))
    return directory


def write_lease(run, **fields):
    lease = {"owner": "x", "host": socket.gethostname(), "pid": os.getpid(), "renewed": time.time()}
    lease |= {"process_start": process_start(os.getpid())}
    (run / "lease.json").write_text(json.dumps(lease | fields))


def test_a_running_run(tmp_path):
    write_run(tmp_path)
    write_lease(tmp_path)
    write_checkpoint(tmp_path, 10)
    report = read_status(tmp_path)
    assert list(report) == KEYS
    assert 10 <= report.pop("last_event_seconds") < 60
    assert report == {
        "run": str(tmp_path), "state": "running", "step": 12, "total_steps": 20, "stage": "l2r",
        "loss": pytest.approx(1.8), "steps_per_second": 2, "tokens_per_second": 200, "seconds_left": 4,
        "checkpoint": 10, "damaged_checkpoints": [], "attempts": 1, "restarts": 0, "skipped_steps": 0,
        "last_event": "step", "skipped_lines": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("last", "state"),
    [
        ("finish", "finished"), ("preempt", "preempted"), ("hang", "hung"), ("failed", "failed"),
        ("peer_lost", "stopped"), ("save_failed", "stopped"), ("step", "stopped"),
    ],
)  # fmt: skip
def test_states_without_a_lease(tmp_path, last, state):
    write_run(tmp_path, event(last, step=12, seconds=1))
    report = read_status(tmp_path)
    assert report["state"] == state and report["seconds_left"] is None


@pytest.mark.parametrize(
    ("lease", "state"),
    [
        ({}, "running"),
        ({"renewed": 1.0}, "running"),  # its process lives: that is enough
        ({"pid": GONE}, "stopped"),  # however fresh the lease is
        ({"process_start": "1"}, "stopped"),  # another process has its number
        ({"host": "elsewhere"}, "running"),
        ({"host": "elsewhere", "pid": GONE}, "running"),
        ({"host": "elsewhere", "renewed": time.time() - 120}, "stopped"),
        ({"pid_namespace": "another container", "pid": GONE}, "running"),
        ({"host": None, "pid": "x", "renewed": "y"}, "stopped"),
    ],
)
def test_leases(tmp_path, lease, state):
    write_run(tmp_path)
    write_lease(tmp_path, **lease)
    assert read_status(tmp_path)["state"] == state


def test_a_run_that_goes_on_after_its_end_was_told(tmp_path):
    """Speed is the new attempt's, and so is the state, though the lease is as the old one's."""
    restart = {"time": time.time(), "event": "restart", "exit_status": 75, "process": 0}
    begin = event("init", 2, seconds=1, first_step=10, total_steps=99)
    again = [event("step", 2, step=step, seconds=0.25, tokens=100) for step in (11, 12)]
    write_run(tmp_path, event("failed", problem=""), restart, begin, *again)
    write_lease(tmp_path)
    report = read_status(tmp_path)
    assert (report["state"], report["attempts"], report["restarts"]) == ("running", 2, 1)
    assert report["steps_per_second"] == 4


def test_a_process_that_failed_before_its_init(tmp_path):
    """It has the next one's number, and says nothing about that one."""
    begin = event("init", 2, seconds=1, first_step=0)
    write_run(tmp_path, event("failed", 2, problem=""), begin)
    write_lease(tmp_path)
    assert read_status(tmp_path)["state"] == "running"


def test_skipped_steps_that_were_rolled_back_do_not_count(tmp_path):
    skipped = [event("step", step=step, seconds=1, skipped=True) for step in (13, 14)]
    rolled = event("rollback", from_step=14, to_step=13, skipped_steps=1)
    write_run(tmp_path, *skipped, rolled)
    assert read_status(tmp_path)["skipped_steps"] == 1


def test_the_newest_whole_checkpoint(tmp_path):
    """Unfinished ones are none; those of another size, or with another manifest, are damaged."""
    write_run(tmp_path)
    assert read_status(tmp_path)["checkpoint"] is None
    for step in (8, 9, 10, 11):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoints" / "9" / "data").write_bytes(b"weight")
    manifest = tmp_path / "checkpoints" / "10" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("7", "8", 1))
    (tmp_path / "checkpoints" / "11" / "data").unlink()
    (tmp_path / "checkpoints" / "12").mkdir()
    (tmp_path / "checkpoints" / "7.damaged-2").mkdir()
    report = read_status(tmp_path)
    assert report["checkpoint"] == 8
    assert report["damaged_checkpoints"] == ["7.damaged-2", "11", "10", "9"]


def test_events_alone_are_enough(tmp_path):
    write_run(tmp_path)
    (tmp_path / "config.json").write_text('{"stages": ')
    (tmp_path / "metrics.jsonl").unlink()
    report = read_status(tmp_path)
    assert (report["step"], report["total_steps"], report["stage"], report["loss"]) == (12, 99, None, None)


def test_both_forms(tmp_path, capsys):
    write_run(tmp_path)
    write_lease(tmp_path)
    write_checkpoint(tmp_path, 10)
    (tmp_path / "checkpoints" / "8.damaged").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 12, "stage": "l2r[bold]", "loss": 1.8}\n')
    assert main(["status", str(tmp_path), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == KEYS
    assert main(["status", str(tmp_path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for told in (
        "running",
        "12 of 20",
        "l2r[bold]",
        "8.damaged",
        "1.8000",
        "2 steps/s, 200 tokens/s",
        "4.0 s",
        "step 10",
        "step, ",
    ):
        assert told in text


def test_the_last_row_of_a_long_file(tmp_path):
    """Only its end is read, and a torn line does not matter."""
    file = tmp_path / "rows"
    assert last_row(file) == {}
    file.write_text("".join(f'{{"step": {step}}}\n' for step in range(20_000)) + '{"step": 2')
    assert last_row(file) == {"step": 19_999}
    file.write_text('{"step": ')
    assert last_row(file) == {}
