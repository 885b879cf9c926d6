"""`a3 launch xpk` with xpk itself (`make xpk`): golden manifests, and what is sent is what was checked.

Renews the golden files, those of `test_launch_pods.py` too: python -m tests.test_xpk
"""

import contextlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import yaml

from a3_jax.cli import main
from a3_jax.pods.spec import check_config, read_spec
from a3_jax.pods.xpk import read_manifest, xpk_arguments
from tests.test_launch_pods import GOLDEN, ROOT, SPECS, commands, spec_of
from tests.test_preflight import ON_TPU, TINY
from tests.tpu_programs import run_apart

XPK = ROOT / ".xpk/bin/xpk"
BASE = ROOT / "launch/v5e-16.yaml"
HOSTILE = "gs://b/$(reboot);`id`|&*'\" #{x}/*.jsonl"
needs_xpk = pytest.mark.skipif(not XPK.exists(), reason="there is no .xpk: make xpk")


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """Neither the caches nor the settings of whoever runs the tests."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


def with_overrides(directory, **overrides):
    """The path of a spec as BASE with these overrides."""
    path = directory / "spec.yaml"
    path.write_text(BASE.read_text() + yaml.safe_dump({"overrides": overrides}))
    return path


def allow(path, passed=True):
    """Preflight's word on a spec."""
    cache = pathlib.Path.home() / ".cache/a3_jax/preflight"
    cache.mkdir(parents=True)
    (cache / f"{check_config(read_spec(path), path)}.json").write_text(json.dumps({"passed": passed}))


def executable(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def fake_xpk(directory, writes=GOLDEN / "v5e-16.jobset.yaml", status=0):
    """An xpk that appends its arguments as JSON to DIRECTORY/calls and writes the manifest it is told to."""
    return executable(
        directory / "bin/xpk",
        f"""#!{sys.executable} -S
import json, os, shutil, sys
assert ("--dry-run" in sys.argv) == (os.environ.get("TELEMETRY_ENABLED") == "false")
open({str(directory / "calls")!r}, "a").write(json.dumps(sys.argv[1:]) + "\\n")
for argument in sys.argv:
    if argument.startswith("--output-manifest-file=") and {bool(writes)}:
        shutil.copy({str(writes)!r}, argument.partition("=")[2])
sys.exit({status})
""",
    )


def calls(directory):
    path = directory / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def launch(directory, spec, xpk, *flags):
    manifest = directory / "m.yaml"
    return main(["launch", "xpk", f"--spec={spec}", f"--xpk={xpk}", f"--manifest={manifest}", *flags])


@needs_xpk
@pytest.mark.parametrize("name", SPECS)
def test_xpk_writes_the_golden_manifest(name, tmp_path):
    """Nothing in it is random: the same bytes each time."""
    assert launch(tmp_path, ROOT / f"launch/{name}.yaml", XPK) == 0
    assert (tmp_path / "m.yaml").read_text() == (GOLDEN / f"{name}.jobset.yaml").read_text()


def run_script(directory, manifest, a3, signalled=False):
    """Runs a container's command with a fake `a3` on PATH and a short `sleep`; its exit status."""
    executable(directory / "bin/a3", a3)
    executable(directory / "bin/sleep", "#!/bin/sh\nexec /bin/sleep 0.05\n")
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    environment = {
        **os.environ,
        "PATH": f"{directory / 'bin'}:/usr/bin:/bin",
        "SEEN": str(directory / "seen"),
    }
    command = pod["containers"][0]["command"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 20
        while signalled and not (directory / "seen").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        if signalled:
            process.send_signal(signal.SIGTERM)
        return process.wait(timeout=20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@needs_xpk
def test_no_shell_reads_what_the_spec_says(tmp_path):
    """Through xpk's template, YAML and its shell, `a3` is given the very arguments of the spec."""
    path = with_overrides(tmp_path, data=HOSTILE)
    assert launch(tmp_path, path, XPK) == 0
    a3 = '#!/bin/bash\nprintf "%s\\0" a3 "$@" > "$SEEN"\n'
    assert run_script(tmp_path, read_manifest(tmp_path / "m.yaml"), a3) == 0
    assert (tmp_path / "seen").read_text().split("\0")[:-1] == read_spec(path).command
    assert HOSTILE in read_spec(path).command[-1]


def test_sigterm_and_the_exit_status_come_through(tmp_path):
    manifest = read_manifest(GOLDEN / "v5e-16.jobset.yaml")
    a3 = '#!/bin/bash\ntrap "exit 75" TERM\ntouch "$SEEN"\nwhile :; do /bin/sleep 0.05; done\n'
    assert run_script(tmp_path, manifest, a3, signalled=True) == 75
    assert run_script(tmp_path, manifest, "#!/bin/sh\nexit 77\n") == 77


def test_submit_sends_what_was_checked(tmp_path, capsys):
    allow(BASE)
    assert launch(tmp_path, BASE, fake_xpk(tmp_path), "--submit") == 0
    dry, sent = calls(tmp_path)
    assert sent == xpk_arguments(read_spec(BASE))
    assert dry[: len(sent)] == sent
    assert dry[len(sent) :] == [
        "--dry-run",
        "--skip-validation",
        f"--output-manifest-file={tmp_path / 'm.yaml'}",
    ]
    assert shlex.split(capsys.readouterr().out) == ["xpk", *sent]


def test_without_submit_nothing_is_sent(tmp_path):
    assert launch(tmp_path, BASE, fake_xpk(tmp_path)) == 0
    assert len(calls(tmp_path)) == 1


@pytest.mark.slow
@needs_xpk
def test_from_preflight_to_submission(tmp_path, capsys, monkeypatch):
    """A tiny run's step compiled for its chips, xpk's own manifest; the sending alone stays here."""
    pytest.importorskip("libtpu")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # what was compiled with others doesn't count
    path, sent = tmp_path / "spec.yaml", tmp_path / "calls"
    (tmp_path / "tiny.py").write_text(TINY)
    changed = {"config": "tiny.py", "topology": "v5e:2x4", "overrides": {"microbatches": 1}}
    path.write_text(yaml.safe_dump(yaml.safe_load(BASE.read_text()) | changed))
    xpk = executable(
        tmp_path / "bin/xpk",
        f"""#!/bin/sh
case "$*" in *--dry-run*) exec {XPK} "$@";; esac
printf '%s\\n' "$@" > {sent}
""",
    )
    assert launch(tmp_path, path, xpk, "--submit") == 2
    assert "no preflight has passed" in capsys.readouterr().err and not sent.exists()
    report = run_apart(ON_TPU, "preflight", f"--spec={path}", "--json", HOME=os.environ["HOME"])
    assert json.loads(report)["fits"]
    assert launch(tmp_path, path, xpk, "--submit") == 0
    assert sent.read_text().splitlines() == xpk_arguments(read_spec(path))
    path.write_text(path.read_text().replace("microbatches: 1", "microbatches: 2"))
    assert launch(tmp_path, path, xpk, "--submit") == 2


@pytest.mark.parametrize("passed", [False, None, "yes"])
def test_submit_wants_a_passed_preflight(passed, tmp_path, capsys):
    if passed is not None:
        allow(BASE, passed)
    assert launch(tmp_path, BASE, fake_xpk(tmp_path), "--submit") == 2
    assert calls(tmp_path) == []
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{BASE}: not sent: no preflight has passed" in error


def test_preflight_of_another_config_is_none(tmp_path, capsys):
    allow(BASE)
    path = with_overrides(tmp_path, microbatches=4)
    assert launch(tmp_path, path, fake_xpk(tmp_path), "--submit") == 2
    assert calls(tmp_path) == [] and "no preflight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fake", "status", "complaint"),
    [
        ({"status": 3}, 1, ""),
        ({"writes": None}, 2, "m.yaml"),
        ({"writes": GOLDEN / "v5e-64.jobset.yaml"}, 2, "metadata.name"),
    ],
)
def test_nothing_is_sent_where_the_manifest_fails(fake, status, complaint, tmp_path, capsys):
    """xpk fails; it writes nothing, where an older manifest lies; it writes another one."""
    allow(BASE)
    (tmp_path / "m.yaml").write_text((GOLDEN / "v5e-16.jobset.yaml").read_text())
    assert launch(tmp_path, BASE, fake_xpk(tmp_path, **fake), "--submit") == status
    assert len(calls(tmp_path)) == 1
    assert complaint in capsys.readouterr().err


def renew():
    """Writes the golden commands and manifests anew."""
    for name in SPECS:
        (GOLDEN / f"{name}.commands").write_text(commands(name))
        with tempfile.TemporaryDirectory() as directory:
            manifest = pathlib.Path(directory) / "m.yaml"
            flags = ["--dry-run", "--skip-validation", f"--output-manifest-file={manifest}"]
            arguments = [XPK, *xpk_arguments(spec_of(name)), *flags]
            quiet = {**os.environ, "TELEMETRY_ENABLED": "false"}
            subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, env=quiet)
            (GOLDEN / f"{name}.jobset.yaml").write_text(manifest.read_text())


if __name__ == "__main__":
    renew()
