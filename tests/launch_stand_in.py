"""What stands in for `a3 train` under `a3 launch local`: each attempt does what a plan says, in Python."""

import json
import os
import pathlib
import signal
import sys
import time

SLEEP = "time.sleep(60)"
COMMAND = (sys.executable, "-m", "tests.launch_stand_in")


def plan(workdir, *plans) -> list[str]:
    """The arguments of processes that follow the plans: for each process a line for each attempt."""
    workdir.mkdir(exist_ok=True)
    (workdir / "plan.json").write_text(json.dumps(plans))
    return [str(workdir)]


def run(arguments) -> int:
    workdir = pathlib.Path(arguments[0])
    process = int(os.environ.get("A3_PROCESS_ID", 0))
    with open(workdir / f"pids-{process}", "a") as file:
        file.write(f"{os.getpid()} {os.environ.get('JAX_COORDINATOR_ADDRESS')}\n")

    def attempts(process):
        file = workdir / f"pids-{process}"
        return len(file.read_text().splitlines()) if file.exists() else 0

    attempt = attempts(process)
    while any(attempts(other) < attempt for other in range(int(os.environ.get("A3_NUM_PROCESSES", 1)))):
        time.sleep(0.005)  # none does anything before all are there

    def checkpoint(step):
        (workdir / "checkpoints" / str(step)).mkdir(parents=True)
        (workdir / "checkpoints" / str(step) / "manifest.json").write_text("{}")

    def sleep_till(number, status):
        signal.signal(number, lambda *_: sys.exit(status))
        (workdir / f"ready-{process}").touch()
        time.sleep(60)

    lines = json.loads((workdir / "plan.json").read_text())[process]
    names = {"checkpoint": checkpoint, "sleep_till": sleep_till, "workdir": workdir}
    exec(lines[min(attempt, len(lines)) - 1], {**globals(), **names})
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
