"""What installs the software: `launch/install.sh` with fakes (`make wheel-test` runs it), and the Dockerfile.

Besides, the commands of TPU VMs under gcloud's own linter, and every script under shellcheck.
"""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from a3_jax.cli import _parse as parse
from a3_jax.pods.tpu_vm import tpu_vm_commands
from tests.test_launch_pods import ROOT, SPECS, spec_of

DOCKERFILE = ROOT / "launch/Dockerfile"
# A fake python: makes a virtual environment of fakes, which like itself write down how they were called.
FAKE = """#!/bin/bash
printf '%s\\n' "${UV_FIND_LINKS:-}|${0##*/} $*" >> "$CALLS"
if [ "$1 $2" = "-m venv" ]; then
  mkdir -p "$3/bin"
  for name in python uv a3; do cp "$0" "$3/bin/$name"; done
fi
"""


def fake(path, text=FAKE):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def beside_each_other(directory, *wheels):
    """The script, constraints and wheels in one directory, as they are copied."""
    directory.mkdir()
    for name in ("launch/install.sh", "constraints.txt"):
        shutil.copy(ROOT / name, directory)
    for wheel in wheels:
        (directory / wheel).touch()
    return directory / "install.sh"


def run(tmp_path, *arguments, **environment):
    """Runs a script with the fakes; its finished process and the calls."""
    fake(tmp_path / "fakes/python9")
    base = {name: value for name, value in os.environ.items() if "FIND_LINKS" not in name}
    base |= {"CALLS": str(tmp_path / "calls"), "PATH": f"{tmp_path / 'fakes'}:/usr/bin:/bin"}
    arguments = ["bash", *map(str, arguments)]
    done = subprocess.run(
        arguments, env=base | environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    calls = tmp_path / "calls"
    return done, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize(("extras", "suffix"), [([], ""), (["plot"], ",plot")])
def test_install_takes_the_wheel_and_the_constraints_beside_it(extras, suffix, tmp_path):
    here = beside_each_other(tmp_path / "a b", "a3_jax-0.1.0-py3-none-any.whl").parent
    done, calls = run(tmp_path, here / "install.sh", "python9", tmp_path / "venv", *extras)
    assert done.returncode == 0, done.stderr
    venv, pip, uv, a3 = [call.removeprefix("|") for call in calls]
    assert venv == f"python9 -m venv {tmp_path / 'venv'}"
    assert pip.startswith("python -m pip ") and pip.endswith(f"--constraint {here}/constraints.txt uv")
    assert f" --python {tmp_path}/venv/bin/python --constraint {here}/constraints.txt " in uv
    assert uv.startswith("uv pip install ")
    assert uv.endswith(f" {here}/a3_jax-0.1.0-py3-none-any.whl[tpu{suffix}]")
    assert a3 == "a3 --help"


def test_uv_looks_where_pip_would(tmp_path):
    script = beside_each_other(tmp_path / "x", "a3_jax-0.1.0-py3-none-any.whl")
    _, calls = run(tmp_path, script, "python9", "venv", PIP_FIND_LINKS="/wheels")
    assert [call for call in calls if call.startswith("/wheels|uv pip")]


@pytest.mark.parametrize("wheels", [[], ["a3_jax-0.1.0-a.whl", "a3_jax-0.2.0-a.whl"]])
def test_install_wants_one_wheel(wheels, tmp_path):
    done, calls = run(tmp_path, beside_each_other(tmp_path / "x", *wheels), "python9", "venv")
    assert done.returncode == 2 and calls == [] and done.stderr.count("\n") == 1
    assert all(wheel in done.stderr for wheel in wheels)


def test_tpu_vms_are_set_up_by_the_same_script(tmp_path):
    """From what the command `copy` copies, and nothing else; up to the environment, which isn't made."""
    arguments = tpu_vm_commands(spec_of("v5e-16"))["copy"]
    files = [
        argument for argument in arguments if (ROOT / argument).is_file() or argument.startswith("dist/")
    ]
    (tmp_path / "here").mkdir()
    for name in files:
        path = tmp_path / "here" / pathlib.Path(name).name
        path.write_bytes(b"" if name.startswith("dist/") else (ROOT / name).read_bytes())
    assert "configs" in arguments and len(files) == 4
    fake(tmp_path / "fakes/sudo", FAKE + '[ "$1" != bash ] || "$@"\n')
    fake(tmp_path / "fakes/id", "#!/bin/sh\nexit 1\n")
    fake(tmp_path / "fakes/python3.11", FAKE.replace("mkdir", "exit 9 #"))
    done, calls = run(tmp_path, tmp_path / "here/setup_tpu_vm.sh")
    assert done.returncode == 9, done.stderr
    assert f"|sudo bash {tmp_path}/here/install.sh python3.11 /opt/a3" in calls
    assert calls[-1] == "|python3.11 -m venv /opt/a3"
    assert any(call.startswith("|sudo useradd --system") for call in calls)


def test_systemd_starts_the_command_again():
    """For the statuses that mean so, so many times, SIGTERM for `a3` alone and time to save; $ means $."""
    spec = dataclasses.replace(spec_of("v5e-16"), overrides={"data": "gs://b/$HOME/${x}"})
    (remote,) = [argument for argument in tpu_vm_commands(spec)["run"] if argument.startswith("--command=")]
    arguments = shlex.split(remote.removeprefix("--command="))
    assert arguments[:2] == ["sudo", "systemd-run"]
    properties = dict(
        argument.removeprefix("--property=").split("=", 1)
        for argument in arguments
        if argument.startswith("--property=")
    )
    assert {"75", "76", "77"} <= set(properties["RestartForceExitStatus"].split())
    assert not {"0", "1", "2", "78", "79", "SIGTERM"} & set(properties["RestartForceExitStatus"].split())
    assert properties["StartLimitBurst"] == str(spec.max_restarts + 1)
    assert properties["StartLimitIntervalSec"] == "infinity"
    assert properties["TimeoutStopSec"] == str(spec.grace_seconds) and properties["KillMode"] == "mixed"
    command = arguments[arguments.index("/opt/a3/bin/a3") :]
    assert command[-1] == "--config.data=gs://b/$$HOME/$${x}"
    assert [argument.replace("$$", "$") for argument in command[1:]] == spec.command[1:]


def instructions():
    """(instruction, arguments) of the Dockerfile, lines that go on joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_dockerfile():
    """Pinned; what is copied is there and sent to the builder; installed by the script; run by no root."""
    found = instructions()
    assert [name for name, _ in found].count("FROM") == 1
    base = dict(found)["FROM"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?", base), base
    ignored = (ROOT / "launch/Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*"
    copied = [source for name, value in found if name == "COPY" for source in value.split()[:-1]]
    assert sorted(f"!{source}" for source in copied) == sorted(ignored[1:])
    for source in copied:
        assert source.startswith("dist/") or (ROOT / source).exists(), source
    (installed,) = [value for name, value in found if name == "RUN" and "install" in value]
    assert installed.startswith("bash /tmp/install/install.sh python3 /opt/a3 ") and "pip" not in installed
    users = [value for name, value in found if name == "USER"]
    assert users == ["a3"] and ("ENV", "PATH=/opt/a3/bin:$PATH") in found
    names = [name for name, _ in found]
    assert names.index("USER") > max(index for index, name in enumerate(names) if name == "RUN")


def test_constraints_pin_every_version():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    names = [line.split("==")[0] for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines if not line.startswith("#"))
    assert {"uv", "jax", "libtpu", "requests"} <= set(names)


def readme(program):
    """The command lines of launch/README.md that start a program."""
    lines = (ROOT / "launch/README.md").read_text().splitlines()
    return [line.strip() for line in lines if line.startswith(f"    {program} ")]


@pytest.mark.parametrize("line", readme("a3"))
def test_readme_commands_parse(line):
    assert parse(shlex.split(line)[1:]).run


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="there is no Google Cloud SDK")
def test_gcloud_knows_these_commands(tmp_path, monkeypatch):
    """Offline, by its own linter, which does complain of a flag that it doesn't know."""
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    specs = [spec for spec in map(spec_of, SPECS) if spec.tpu]
    commands = [command for spec in specs for command in tpu_vm_commands(spec).values()]
    lines = [*map(shlex.join, commands), *readme("gcloud"), f"{shlex.join(commands[0])} --misspelt"]
    path = tmp_path / "commands.json"
    path.write_text(json.dumps([{"command_string": line} for line in lines]))
    lint = ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={path}"]
    done = subprocess.run(lint, capture_output=True, text=True, check=True)
    *good, bad = json.loads(done.stdout)
    assert "--misspelt" in bad["error_message"] and len(good) == len(lines) - 1
    assert [each["error_message"] for each in good if not each["success"]] == []


def test_scripts_pass_shellcheck():
    scripts = [*ROOT.glob("launch/*.sh"), ROOT / ".ci/run"]
    assert len(scripts) == 3
    subprocess.run([pathlib.Path(sys.executable).parent / "shellcheck", *map(str, scripts)], check=True)
