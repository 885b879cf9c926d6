"""`a3 launch local`: who is started again, who is ended, and with which status it all ends.

The children are stand-ins that do what a plan says (`launch_stand_in`).
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from a3_jax.cli import main
from a3_jax.errors import EXIT_NO_PROGRESS, EXIT_OK, EXIT_PREEMPTED, InputError
from a3_jax.pods import local
from a3_jax.pods.local import REPORT, Launch, child_environment, supervise, write_report
from a3_jax.pods.run_records import newest_step, position, read_events
from tests import launch_stand_in
from tests.launch_stand_in import SLEEP

# The supervisor in a process of its own, to be signalled.
DRIVER = """
import sys
from a3_jax.pods import local
from tests.launch_stand_in import COMMAND
local._POLL, local._LEAVE, local._END, local._STOP, local._FIRST_PAUSE = 0.02, 0.5, 0.3, 0.3, 30
launch = local.Launch(sys.argv[3:], sys.argv[1], int(sys.argv[2]), command=COMMAND)
sys.exit(local.supervise(launch))
"""


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    for name, seconds in {
        "_POLL": 0.02,
        "_LEAVE": 10,
        "_END": 0.3,
        "_STOP": 0.3,
        "_FIRST_PAUSE": 0.02,
    }.items():
        monkeypatch.setattr(local, name, seconds)


def run(workdir, *plans, **options) -> int:
    arguments = launch_stand_in.plan(workdir, *plans)
    return supervise(Launch(arguments, str(workdir), len(plans), command=launch_stand_in.COMMAND, **options))


def started(workdir, process=0) -> list[int]:
    return [int(line.split()[0]) for line in (workdir / f"pids-{process}").read_text().splitlines()]


def is_alive(pid) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def test_all_end_well(tmp_path, capfd):
    assert run(tmp_path, ["print('step 1')"], ["print('quiet')"]) == EXIT_OK
    told = capfd.readouterr().err
    assert "step 1\n" in told and "quiet" not in told and str(tmp_path / "logs") in told
    assert not (tmp_path / "events.jsonl").exists()
    log = (tmp_path / "logs" / "process-1.log").read_text().splitlines()
    assert log[0].startswith("=== attempt 1, process 1, ") and log[1:] == ["quiet"]


@pytest.mark.parametrize("status", [1, 2, 3, 78, 79])
def test_what_a_restart_would_not_mend_ends_it(tmp_path, capfd, status):
    complaint = f"print('a3: it is so'); print('a3: WARNING: by the way'); print('more'); sys.exit({status})"
    assert run(tmp_path, [SLEEP], [complaint]) == status
    assert capfd.readouterr().err.splitlines()[-1] == "a3: it is so"
    assert len(started(tmp_path)) == 1 and not is_alive(started(tmp_path)[0])


def test_without_a_word_of_ours_the_last_line_is_told(tmp_path, capfd):
    assert run(tmp_path, ["raise KeyError('odd')"]) == 1
    assert capfd.readouterr().err.splitlines()[-1] == "KeyError: 'odd'"


@pytest.mark.parametrize(
    ("end", "status"),
    [("sys.exit(75)", 75), ("sys.exit(76)", 76), ("sys.exit(77)", 77), ("os.kill(os.getpid(), 9)", -9)],
)
def test_all_start_again(tmp_path, end, status):
    assert run(tmp_path, ["sys.exit(75)", ""], [f"time.sleep(0.1); {end}", ""]) == EXIT_OK
    assert len(started(tmp_path)) == len(started(tmp_path, 1)) == 2
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert abs(event.pop("time") - time.time()) < 60
    # 75 is what those say that were left alone: the other's status is the cause
    process = 0 if status == 75 else 1
    assert event == {
        "event": "restart", "exit_status": status, "process": process, "restarts_without_progress": 1
    }  # fmt: skip


def test_a_failure_seen_later_than_its_echo_still_ends_it(tmp_path):
    assert run(tmp_path, ["sys.exit(75)"], ["time.sleep(0.2); sys.exit(79)"]) == 79


@pytest.mark.parametrize("poll", [0.02, 0.5])
def test_a_failure_for_want_of_a_peer_is_no_failure(tmp_path, monkeypatch, poll):
    """The one that was killed is the cause, seen before the other's failure or together with it."""
    monkeypatch.setattr(local, "_POLL", poll)
    killed = "(workdir / 'gone').touch(); os.kill(os.getpid(), 9)"
    echo = "while not (workdir / 'gone').exists(): pass\ntime.sleep(0.1); sys.exit(1)"
    assert run(tmp_path, [echo, ""], [killed, ""]) == EXIT_OK
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["process"], event["exit_status"]) == (1, -9)


def test_a_failure_that_its_peer_calls_a_loss_ends_it(tmp_path):
    assert run(tmp_path, ["sys.exit(1)"], ["time.sleep(0.2); sys.exit(75)"]) == 1


@pytest.mark.parametrize(
    "way", [SLEEP, "signal.signal(15, signal.SIG_IGN); " + SLEEP, "os.kill(os.getpid(), 19)"]
)
def test_who_does_not_leave_is_ended(tmp_path, monkeypatch, way):
    """Asleep, deaf to SIGTERM, or stopped."""
    monkeypatch.setattr(local, "_LEAVE", 0.3)
    assert run(tmp_path, [way, ""], ["time.sleep(0.2); sys.exit(75)", ""]) == EXIT_OK
    first, _ = started(tmp_path)
    assert not is_alive(first)


def test_each_attempt_has_a_coordinator_of_its_own(tmp_path):
    run(tmp_path, ["sys.exit(75)", ""], ["sys.exit(75)", ""])
    addresses = [
        [line.split()[1] for line in (tmp_path / f"pids-{process}").read_text().splitlines()]
        for process in (0, 1)
    ]
    assert addresses[0] == addresses[1]
    for address in addresses[0]:
        host, port = address.split(":")
        assert host == "127.0.0.1" and int(port) > 0


def test_environment(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "elsewhere:1")
    alone = child_environment(Launch([], "", 1, devices=3), 0, 7, "/programs")
    assert alone["XLA_FLAGS"] == "--xla_dump_to=x --xla_force_host_platform_device_count=3"
    assert (alone["JAX_PLATFORMS"], alone["A3_COMPILATION_CACHE"]) == ("cpu", "/programs")
    assert not {"JAX_COORDINATOR_ADDRESS", "A3_NUM_PROCESSES", "A3_PROCESS_ID"} & set(alone)
    second = child_environment(Launch([], "", 2), 1, 7, "/programs")
    assert [second[name] for name in ("JAX_COORDINATOR_ADDRESS", "A3_NUM_PROCESSES", "A3_PROCESS_ID")] == [
        "127.0.0.1:7", "2", "1"
    ]  # fmt: skip


def test_no_progress(tmp_path, capfd):
    """A crash at the same step each time: 78 after two restarts for nothing, and what was in flight."""
    launch_stand_in.plan(tmp_path)
    events = [
        {"time": 1.0, "event": "init", "attempt": 1, "seconds": 1, "first_step": 40},
        {"time": 2.0, "event": "step", "attempt": 1, "step": 41, "seconds": 1},
    ]
    (tmp_path / "events.jsonl").write_text(
        "".join(json.dumps(event) + "\n" for event in events) + '{"time": 3'
    )
    (tmp_path / "config.json").write_text('{"batch_size": 8}')
    crash = "os.kill(os.getpid(), signal.SIGSEGV)"
    plan = [f"checkpoint(40); {crash}", crash]
    assert run(tmp_path, plan, max_restarts=2) == EXIT_NO_PROGRESS
    # the first attempt brought a checkpoint, the second none, nor the two restarts that are allowed
    assert len(started(tmp_path)) == 4
    recorded, torn = read_events(tmp_path)
    assert torn == 1
    assert [event.get("restarts_without_progress") for event in recorded] == [None, None, 0, 1, 2]
    assert json.loads((tmp_path / REPORT).read_text()) == {
        "restarts": 3,
        "restarts_without_progress": 2,
        "exit_statuses": [[-11]] * 4,
        "newest_checkpoint": 40,
        "last_step": 41,
        "in_flight": [
            {"step": 42, "first_example": 328, "last_example": 335},
            {"step": 43, "first_example": 336, "last_example": 343},
        ],
    }
    told = capfd.readouterr().err.splitlines()
    assert "a3 launch: the step after 41 was in flight" in told
    assert "no checkpoint after step 40 in 2 restarts" in told[-1]
    assert run(tmp_path, [""]) == EXIT_OK
    assert not (tmp_path / REPORT).exists()


@pytest.mark.parametrize(
    ("name", "step", "expected"), [("step", 5, (5, 4)), ("init", 3, (3, 4)), ("init", 2, (2, 0))]
)
def test_a_rollback_shifts_the_rows(name, step, expected):
    """As long as the run goes on from a checkpoint that is newer than the one it rolled back to."""
    begin = {"event": "init", "first_step": 0}
    last = {"event": name, "step": step, "first_step": step}
    assert position([begin, {"event": "rollback", "from_step": 6, "to_step": 2}, last]) == expected


def test_a_report_counts_from_the_rows_a_rollback_passed_over(tmp_path):
    events = [
        {"time": 1.0, "event": "init", "attempt": 1, "seconds": 1, "first_step": 0},
        {"time": 2.0, "event": "rollback", "attempt": 1, "from_step": 6, "to_step": 2},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (tmp_path / "config.json").write_text('{"batch_size": 8}')
    write_report(tmp_path, 0, 0, [[-9]])
    entry = json.loads((tmp_path / REPORT).read_text())["in_flight"][0]
    assert entry == {"step": 3, "first_example": 48, "last_example": 55}


def test_progress_forgives_restarts(tmp_path):
    """Five restarts where one without progress is allowed."""
    plan = [f"checkpoint({attempt}); sys.exit(75)" if attempt % 2 else "sys.exit(75)" for attempt in range(5)]
    assert run(tmp_path, [*plan, ""], max_restarts=1) == EXIT_OK
    assert len(started(tmp_path)) == 6


def test_newest_step_is_one_with_a_manifest(tmp_path):
    assert newest_step(tmp_path) is None
    for name in ("9", "10", "11", "12.damaged", "x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for name in ("9", "10", "12.damaged", "x"):
        (tmp_path / "checkpoints" / name / "manifest.json").touch()
    assert newest_step(tmp_path) == 10


def start(workdir, *plans, **options) -> subprocess.Popen:
    """A supervisor of its own, once all its children listen."""
    command = [
        sys.executable,
        "-c",
        DRIVER,
        str(workdir),
        str(len(plans)),
        *launch_stand_in.plan(workdir, *plans),
    ]
    with open(workdir / "supervisor.err", "wb") as errors:
        supervisor = subprocess.Popen(command, stderr=errors, **options)
    wait_for(lambda: all((workdir / f"ready-{process}").exists() for process in range(len(plans))))
    return supervisor


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_nothing_starts_again(tmp_path, number):
    supervisor = start(tmp_path, ["sleep_till(15, 75)"], ["sleep_till(15, 0)"])
    supervisor.send_signal(number)
    assert supervisor.wait(20) == EXIT_PREEMPTED
    assert len(started(tmp_path)) == 1


@pytest.mark.parametrize(("statuses", "worst"), [((77, 1), 1), ((0, 76), 76), ((0, 0), 0)])
def test_without_a_75_the_worst_status_counts(tmp_path, statuses, worst):
    supervisor = start(tmp_path, *([f"sleep_till(15, {status})"] for status in statuses))
    supervisor.terminate()
    assert supervisor.wait(20) == worst


def test_a_signal_before_a_restart_prevents_it(tmp_path):
    supervisor = start(tmp_path, ["(workdir / 'ready-0').touch(); sys.exit(77)"])
    wait_for(lambda: "start again in 30 s" in (tmp_path / "supervisor.err").read_text())
    supervisor.terminate()
    assert supervisor.wait(20) == EXIT_PREEMPTED
    assert len(started(tmp_path)) == 1 and not (tmp_path / "events.jsonl").exists()


def test_a_second_signal_is_passed_on_and_ends_the_deaf(tmp_path):
    deaf = "signal.signal(15, lambda *_: (workdir / 'told').open('a').write('.')); sleep_till(10, 0)"
    deaf += "\nwhile True: time.sleep(60)"
    supervisor = start(tmp_path, [deaf])
    for calls in (1, 2):
        supervisor.terminate()
        wait_for(
            lambda calls=calls: (tmp_path / "told").exists() and (tmp_path / "told").stat().st_size == calls
        )
    assert supervisor.wait(20) == EXIT_PREEMPTED
    assert not is_alive(started(tmp_path)[0])


def test_a_signal_to_the_whole_group_is_the_supervisors_to_pass_on(tmp_path):
    """As `timeout` sends it: the children have sessions of their own, save, and say so."""
    slow = "signal.signal(15, lambda *_: (time.sleep(1), sys.exit(75))); (workdir / 'ready-0').touch()"
    supervisor = start(tmp_path, [f"{slow}; {SLEEP}"], start_new_session=True)
    os.killpg(supervisor.pid, signal.SIGTERM)
    assert supervisor.wait(20) == EXIT_PREEMPTED
    assert "ended with status" not in (tmp_path / "supervisor.err").read_text()


def test_children_do_not_outlive_a_killed_supervisor(tmp_path):
    supervisor = start(tmp_path, ["sleep_till(15, 75)"], ["sleep_till(15, 75)"])
    supervisor.kill()
    supervisor.wait(20)
    wait_for(lambda: not any(is_alive(started(tmp_path, process)[0]) for process in (0, 1)))


def test_processes_of_others_are_left_alone(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", SLEEP.replace("time", "__import__('time')")])
    try:
        run(tmp_path, [SLEEP], ["sys.exit(1)"])
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config=nowhere.py"], "nowhere.py: no such config file, or it can't be read"),
        (["--processes=0"], "launch local: --processes: must be at least 1, got 0"),
        (["--devices=-1"], "launch local: --devices: must be at least 1, got -1"),
        (["--max_restarts=-1"], "launch local: --max_restarts: must be at least 0, got -1"),
        (["--proceses=2"], "launch local: unknown argument '--proceses=2'; did you mean '--processes'?"),
        (["--workdir=gs://bucket/run"], "gs://bucket/run: --workdir: must be a directory of this machine"),
        (["--workdir=FILE"], "is no directory"),
        (["--processes=two"], "invalid int value: 'two'"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, told):
    config = tmp_path / "config.py"
    config.touch()
    arguments = [argument.replace("FILE", str(config)) for argument in arguments]
    given = [f"--config={config}", f"--workdir={tmp_path / 'run'}", *arguments]
    assert main(["launch", "local", *given]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and told in lines[0]
    assert not (tmp_path / "run").exists()


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "logs").touch()
    with pytest.raises(InputError, match="can't be written"):
        run(tmp_path, [""])


def test_the_command_runs_a3_train_and_loads_no_jax(tmp_path):
    """The real children, which refuse a config at once."""
    (tmp_path / "config.py").write_text("")
    code = f"""
import sys
from a3_jax.cli import main
status = main(["launch", "local", "--config={tmp_path}/config.py", "--workdir={tmp_path}/run",
               "--config.seed=3"])
assert "jax" not in sys.modules
sys.exit(status)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.splitlines()[-1] == f"a3: {tmp_path}/config.py: has no function get_config()"
    heading = (tmp_path / "run" / "logs" / "process-0.log").read_text().splitlines()[0]
    assert heading.endswith(
        f": a3 train --config={tmp_path}/config.py --workdir={tmp_path}/run --config.seed=3"
    )
    assert os.listdir(tmp_path / "run") == ["logs"]
