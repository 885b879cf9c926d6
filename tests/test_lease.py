"""One writer a run directory, with processes that live, die, hang and race."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from a3_jax.errors import InputError
from a3_jax.runtime.lease import Lease, process_start
from tests.fake_bucket import make_bucket

HOLD = """
import sys, time
from a3_jax.runtime.lease import Lease
with Lease(sys.argv[1]):
    assert "jax" not in sys.modules
    print("held", flush=True)
    time.sleep(60)
"""
RACE = """
import sys, time
from a3_jax.errors import InputError
from a3_jax.runtime.lease import Lease
print("ready", flush=True)
for workdir in sys.stdin:
    try:
        with Lease(workdir.strip()):
            print("won", flush=True)
            sys.stdin.readline()
        print("left", flush=True)
    except InputError as error:
        assert "another run writes here" in str(error), error
        print("refused", flush=True)
        sys.stdin.readline()
        print("left", flush=True)
"""


def start(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def holder(tmp_path):
    process = start(HOLD, tmp_path)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def written(tmp_path):
    return json.loads((tmp_path / "lease.json").read_text())


def write(tmp_path, **changes):
    """A lease as another run would have left it."""
    fields = {
        "owner": "ab" * 16, "host": socket.gethostname(), "pid": os.getpid(),
        "process_start": process_start(os.getpid()), "since": 1e9, "renewed": 1e9, "renew_seconds": 0.2,
    }  # fmt: skip
    (tmp_path / "lease.json").write_text(json.dumps(fields | changes))


def assert_taken_at_once(tmp_path):
    begun = time.monotonic()
    with Lease(tmp_path):
        assert time.monotonic() - begun < 2
        assert written(tmp_path)["pid"] == os.getpid()


def test_made_and_given_back(tmp_path):
    with Lease(tmp_path / "new" / "run") as lease:
        fields = written(tmp_path / "new" / "run")
        assert {"owner", "host", "pid", "process_start", "renewed"} <= set(fields)
        assert fields["pid"] == os.getpid()
        lease.check()
    assert not list((tmp_path / "new" / "run").iterdir())


def test_a_killed_holder_is_replaced_at_once(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert_taken_at_once(tmp_path)


def test_a_killed_holder_that_nobody_collected_is_replaced_at_once(tmp_path, holder):
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    assert_taken_at_once(tmp_path)


def test_a_live_holder_is_named(tmp_path, holder):
    with pytest.raises(InputError) as refused, Lease(tmp_path):
        pass
    assert f"host {socket.gethostname()}, pid {holder.pid}, since 20" in str(refused.value)
    assert written(tmp_path)["pid"] == holder.pid


def test_the_same_process_is_refused_too(tmp_path):
    with Lease(tmp_path):
        with pytest.raises(InputError, match=f"pid {os.getpid()},"), Lease(tmp_path):
            pass
        assert written(tmp_path)["pid"] == os.getpid()


def test_a_reused_process_id_is_no_holder(tmp_path):
    write(tmp_path, process_start="1")
    assert_taken_at_once(tmp_path)


def test_where_start_times_can_not_be_told_a_process_is_alive(tmp_path, monkeypatch):
    write(tmp_path, process_start="1")
    monkeypatch.setattr("a3_jax.runtime.lease.process_start", lambda pid: "")
    with pytest.raises(InputError, match="another run writes here"), Lease(tmp_path):
        pass


@pytest.mark.parametrize(
    "changes", [{"host": "elsewhere"}, {"pid_namespace": "pid:[1]"}, {"pid": 2**80}, {"pid": "1"}]
)
def test_another_hosts_lease_is_watched_then_taken(tmp_path, capsys, changes):
    write(tmp_path, **changes)
    begun = time.monotonic()
    with Lease(tmp_path, 1.0):
        assert 0.4 <= time.monotonic() - begun < 5
        assert written(tmp_path)["owner"] != "ab" * 16
    assert capsys.readouterr().err.count("\n") == 1


def test_another_hosts_lease_that_is_renewed(tmp_path):
    write(tmp_path, host="elsewhere", renew_seconds=2)
    renewal = threading.Timer(0.3, lambda: write(tmp_path, host="elsewhere", renewed=2e9))
    renewal.start()
    with pytest.raises(InputError, match="host elsewhere"), Lease(tmp_path):
        pass
    renewal.join()
    assert written(tmp_path)["renewed"] == 2e9


def test_another_hosts_lease_that_is_given_back(tmp_path):
    write(tmp_path, host="elsewhere", renew_seconds=20)
    threading.Timer(0.3, (tmp_path / "lease.json").unlink).start()
    begun = time.monotonic()
    with Lease(tmp_path, 1.0):
        assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    "content",
    [b"", b'{"owner": "a', b"\xff\xfe", b"[" * 9999, b"[1]", b'{"renew_seconds": NaN}', b"x" * 10**6],
)
def test_a_torn_file_counts_as_another_hosts(tmp_path, capsys, content):
    (tmp_path / "lease.json").write_bytes(content)
    begun = time.monotonic()
    with Lease(tmp_path, 0.1):
        assert time.monotonic() - begun >= 0.2
        assert written(tmp_path)["pid"] == os.getpid()
    assert "waiting" in capsys.readouterr().err


@pytest.mark.parametrize("before", [None, {"process_start": "1"}], ids=["absent", "of a dead process"])
def test_of_two_starters_exactly_one_wins(tmp_path, before):
    starters = [start(RACE), start(RACE)]
    for starter in starters:
        assert starter.stdout.readline() == "ready\n"
    for number in range(20):
        workdir = tmp_path / str(number)
        workdir.mkdir()
        if before:
            write(workdir, **before)
        for starter in starters:
            starter.stdin.write(f"{workdir}\n")
        for starter in starters:
            starter.stdin.flush()
        assert sorted(starter.stdout.readline() for starter in starters) == ["refused\n", "won\n"]
        for starter in starters:
            starter.stdin.write("\n")
            starter.stdin.flush()
            assert starter.stdout.readline() == "left\n"
        assert not list(workdir.iterdir())
    for starter in starters:
        starter.communicate()
        assert starter.returncode == 0


def test_it_is_renewed(tmp_path):
    with Lease(tmp_path, 0.05):
        first = written(tmp_path)
        time.sleep(0.4)
        assert written(tmp_path)["renewed"] > first["renewed"]
        assert written(tmp_path)["owner"] == first["owner"]


def test_a_lost_lease_is_noticed_and_left_alone(tmp_path):
    with Lease(tmp_path, 0.05) as lease:
        write(tmp_path)
        time.sleep(0.4)
        assert lease.lost
        with pytest.raises(InputError, match="another run took over"):
            lease.check()
        assert written(tmp_path)["owner"] == "ab" * 16
    assert written(tmp_path)["owner"] == "ab" * 16


def test_a_process_that_slept_looks_before_it_writes(tmp_path, monkeypatch):
    with Lease(tmp_path, 3600) as lease:
        write(tmp_path)
        lease.check()  # it has just been confirmed
        later = time.monotonic() + 7200
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(InputError, match="another run took over"):
            lease.check()


def test_writes_that_fail_are_told_once_and_tried_again(tmp_path, monkeypatch, capsys):
    from a3_jax.runtime import lease as module

    real, calls = module.write_text, []

    def full(path, text):
        calls.append(path)
        raise InputError("No space left on device", file=path)

    with Lease(tmp_path, 0.05) as lease:
        first = written(tmp_path)["renewed"]
        monkeypatch.setattr(module, "write_text", full)
        time.sleep(0.4)
        assert len(calls) > 1
        lease.check()
        monkeypatch.setattr(module, "write_text", real)
        time.sleep(0.3)
        assert written(tmp_path)["renewed"] > first
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_a_directory_that_went_away_is_not_made_again(tmp_path):
    with Lease(tmp_path / "run", 0.05):
        (tmp_path / "run" / "lease.json").unlink()
        (tmp_path / "run").rmdir()
        time.sleep(0.3)
        assert not (tmp_path / "run").exists()


def test_leaving_is_prompt(tmp_path):
    with Lease(tmp_path, 3600):
        begun = time.monotonic()
    assert time.monotonic() - begun < 1


def test_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"), Lease(tmp_path / "file" / "run"):
        pass


def test_in_a_bucket(bucket, capsys):
    with Lease("gs://bucket/run", 0.2):
        assert written(bucket / "run")["pid"] == os.getpid()
        with pytest.raises(InputError, match="another run writes here"), Lease("gs://bucket/run"):
            pass
    assert not (bucket / "run" / "lease.json").exists()
    write(bucket / "run", host="elsewhere")
    with Lease("gs://bucket/run", 0.2) as lease:
        time.sleep(0.5)
        lease.check()
        assert written(bucket / "run")["host"] == socket.gethostname()
    assert "waiting" in capsys.readouterr().err


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    return make_bucket(tmp_path, monkeypatch)
