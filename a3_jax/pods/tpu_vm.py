"""`a3 launch tpu-vm`: the commands of a run on TPU VMs by queued resources, printed, never run.

Every host runs the same unit of systemd; they find each other by themselves (`runtime.tpu_hosts`).
"""

import shlex

from a3_jax import __version__
from a3_jax.errors import EXIT_OK, InputError
from a3_jax.pods.spec import Spec, check_config, read_spec
from a3_jax.pods.xpk import RESTART_CODES

_TPUS = ["gcloud", "compute", "tpus"]
_KILLED = ("SIGKILL", "SIGABRT", "SIGSEGV", "SIGBUS")  # as xpk restarts on 134 to 139
_RESTART_SECONDS = 15  # in which the other hosts notice, and leave too


def tpu_vm_commands(spec: Spec) -> dict[str, list[str]]:
    """Argument lists by stage: create, wait, copy, install, run, logs, stop, delete."""
    where = [f"--project={spec.project}", f"--zone={spec.zone}"]
    queued, vm = [*_TPUS, "queued-resources"], [*_TPUS, "tpu-vm"]
    # Restarts are for these statuses alone, and are over after max_restarts: the interval never ends. SIGTERM
    # goes to the one process that knows what to do with it. libtpu locks more memory than a service may.
    properties = {
        "RestartForceExitStatus": " ".join([*map(str, RESTART_CODES), *_KILLED]),
        "RestartSec": _RESTART_SECONDS,
        "StartLimitIntervalSec": "infinity", "StartLimitBurst": spec.max_restarts + 1,
        "KillMode": "mixed", "TimeoutStopSec": spec.grace_seconds, "LimitMEMLOCK": "infinity",
    }  # fmt: skip
    unit = [
        "sudo", "systemd-run", f"--unit={spec.name}", "--collect", "--uid=a3",
        "--setenv=PATH=/opt/a3/bin:/usr/bin:/bin", "--working-directory=/opt/a3",
        *(f"--property={name}={value}" for name, value in properties.items()),
        # systemd reads $NAME in a command, and $$ as $
        *(argument.replace("$", "$$") for argument in ["/opt/a3/bin/a3", *spec.command[1:]]),
    ]  # fmt: skip

    def on_all(command):
        return [*vm, "ssh", spec.tpu, *where, "--worker=all", f"--command={shlex.join(command)}"]

    files = [
        "launch/setup_tpu_vm.sh",
        "launch/install.sh",
        "constraints.txt",
        f"dist/a3_jax-{__version__}-py3-none-any.whl",
        "configs",
    ]
    return {
        "create": [
            *queued, "create", spec.tpu, *where, f"--node-id={spec.tpu}",
            f"--accelerator-type={spec.slice.tpu_type}", f"--runtime-version={spec.slice.runtime}",
        ],
        "wait": [*queued, "describe", spec.tpu, *where, "--format=value(state.state)"],
        "copy": [*vm, "scp", *files, f"{spec.tpu}:", *where, "--worker=all", "--recurse"],
        "install": on_all(["bash", "setup_tpu_vm.sh"]),
        "run": on_all(unit),
        "logs": on_all(["sudo", "journalctl", f"--unit={spec.name}", "--lines=100", "--no-pager"]),
        "stop": on_all(["sudo", "systemctl", "stop", spec.name]),
        "delete": [*queued, "delete", spec.tpu, *where, "--force", "--quiet"],
    }  # fmt: skip


def run_tpu_vm(args) -> int:
    """Runs `a3 launch tpu-vm`."""
    spec = read_spec(args.spec)
    if not spec.tpu:
        raise InputError("is missing", file=args.spec, field="tpu")
    if spec.slices > 1:
        raise InputError("several slices are launched by xpk", file=args.spec, field="slices")
    check_config(spec, args.spec)
    for stage, command in tpu_vm_commands(spec).items():
        print(f"# {stage}\n{shlex.join(command)}")
    return EXIT_OK
