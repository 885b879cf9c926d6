"""`a3 launch xpk` and `tpu-vm`: specs, arguments, manifests that xpk 1.16.0 once wrote, and bad input."""

import dataclasses
import pathlib
import re
import shlex

import pytest
import yaml

from a3_jax.cli import main
from a3_jax.errors import InputError
from a3_jax.pods.spec import check_mesh, read_spec
from a3_jax.pods.tpu_vm import tpu_vm_commands
from a3_jax.pods.xpk import check_manifest, preflight_passed, read_manifest, xpk_arguments

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests/golden/launch"
SPECS = ["v5e-16", "v5e-64", "v5p-64", "v5e-16x2"]
BASE = ROOT / "launch/v5e-16.yaml"


def spec_of(name):
    return read_spec(ROOT / f"launch/{name}.yaml")


def commands(name):
    spec = spec_of(name)
    lists = [["xpk", *xpk_arguments(spec)], *(tpu_vm_commands(spec).values() if spec.tpu else ())]
    return "".join(f"{shlex.join(arguments)}\n" for arguments in lists)


@pytest.mark.parametrize("name", SPECS)
def test_commands_are_the_golden_ones(name):
    assert commands(name) == (GOLDEN / f"{name}.commands").read_text()


@pytest.mark.parametrize("name", SPECS)
def test_golden_manifests_pass(name):
    path = GOLDEN / f"{name}.jobset.yaml"
    check_manifest(read_manifest(path), spec_of(name), path)


@pytest.mark.parametrize("name", SPECS)
def test_spec_round_trip(name, tmp_path):
    spec = spec_of(name)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(dataclasses.asdict(spec)))
    assert read_spec(tmp_path / "s.yaml") == spec


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("maxRestarts:", "maxRestart:", "maxRestart"),
        ("parallelism: 4", "parallelism: '4'", "parallelism"),
        ("parallelism: 4", "parallelism: 5", "parallelism"),
        ("completions: 4", "completions: 5", "completions"),
        ("replicas: 1", "replicas: 2", "replicas"),
        ("[42,75,", "[42,", "75"),
        ("[42,75,", "[1,42,75,", "restart"),
        ("maxRestarts: 50", "maxRestarts: 5", "maxRestarts"),
        ("backoffLimit: 0", "backoffLimit: 1", "backoffLimit"),
        ("restartPolicy: Never", "restartPolicy: OnFailure", "restartPolicy"),
        ("- PodFailurePolicy", "- BackoffLimitExceeded", "rules"),
        ("containerName: jax-tpu", "containerName: other", "containerName"),
        ("PeriodSeconds: 600", "PeriodSeconds: 30", "terminationGracePeriodSeconds"),
        ("a3@sha256:00", "a3@sha256:11", "image"),
        ("tpu-v5-lite-podslice", "tpu-v5p-slice", "accelerator"),
        ("tpu-topology: 4x4", "tpu-topology: 4x8", "topology"),
        ("google.com/tpu: 4", "google.com/tpu: 8", "tpu"),
        ("mountPath: /dev/shm", "mountPath: /shm", "volumeMounts"),
        ("exit $EXIT_CODE", "exit 0", "exit status"),
        ("(a3 train", "(bash -c a3 train", "SIGTERM"),
        ("trap _sigterm", "trap - _sigterm", "SIGTERM"),
        ("a3-v5e-16) &", "a3-v5e-16 | tee log) &", "SIGTERM"),
    ],
)
def test_wrong_manifests(old, new, complaint, tmp_path):
    text, path = (GOLDEN / "v5e-16.jobset.yaml").read_text(), tmp_path / "m.yaml"
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=complaint):
        check_manifest(read_manifest(path), spec_of("v5e-16"), path)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("slices:", "slice:", "slice: unknown key; did you mean 'slices'"),
        ("v5e:4x4", "v5e:4x5", "topology: unknown topology 'v5e:4x5'; did you mean"),
        ("my-project\n", "my;project\n", "project: "),
        ("my-cluster", "$(reboot)", "cluster: "),
        ("@sha256:", ":", "image: .* no digest"),
        ("slices: 1", "slices: '1'", "slices: expected a positive"),
        ("zone: us-west4-a\n", "", "zone: is missing"),
        ("v5e:4x4", "v5e:16x16", "topology: .* can't be split"),
        ("v5e:4x4", "v5litepod-17", "topology: unknown topology 'v5litepod-17'; did you mean 'v5litepod-1"),
        ("slices: 1", "overrides: {mesh.data: 3}", "topology: .* 16 chips"),
        ("slices: 1", 'overrides: {data: "a\\nb"}', "overrides: 'data'"),
        ("slices: 1", "overrides: {'data; reboot': x}", "overrides: 'data; reboot'"),
        ("gs://my-bucket", "gs://`reboot`", "workdir: "),
        ("configs/a3_llama32_1b.py", "configs/none.py", "config: there is no configs/none.py"),
        ("configs/a3_llama32_1b.py", "configs/a b.py", "config: "),
        ("max_restarts: 50", "max_restarts: 0", "max_restarts: expected a positive"),
        ("name: a3-v5e-16\n", f"name: {'a' * 41}\n", "name: "),
    ],
)
@pytest.mark.parametrize("command", ["xpk", "tpu-vm"])
def test_bad_specs_are_one_line(command, old, new, complaint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "s.yaml"
    path.write_text(BASE.read_text().replace(old, new))
    assert main(["launch", command, f"--spec={path}"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and str(path) in output.err
    assert re.search(complaint, output.err)


@pytest.mark.parametrize(
    ("command", "old", "new", "complaint"),
    [
        ("tpu-vm", "slices: 1", "slices: 2", "slices: several slices are launched by xpk"),
        ("tpu-vm", "tpu: a3-v5e-16\n", "", "tpu: is missing"),
        ("xpk", "cluster: my-cluster\n", "", "cluster: is missing"),
    ],
)
def test_what_one_way_of_launching_needs(command, old, new, complaint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "s.yaml"
    path.write_text(BASE.read_text().replace(old, new))
    assert main(["launch", command, f"--spec={path}"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err == f"a3: {path}: {complaint}\n"


def test_unknown_override(tmp_path, capsys, monkeypatch):
    """Named as the flag that it becomes."""
    monkeypatch.chdir(ROOT)
    path = tmp_path / "s.yaml"
    path.write_text(BASE.read_text() + "overrides: {mesh.date: 3}\n")
    assert main(["launch", "xpk", f"--spec={path}"]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert "--config.mesh.date: no such field" in output.err and "did you mean 'data'" in output.err


def test_mesh_that_contradicts_the_topology():
    with pytest.raises(InputError, match="16 chips"):
        check_mesh({"data": 3, "fsdp": -1}, 32, spec_of("v5e-16").pod)


def test_nothing_is_sent_without_preflight(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["launch", "xpk", f"--spec={BASE}", "--xpk=/bin/false", "--submit"]) == 2
    assert "no preflight" in capsys.readouterr().err
    assert not preflight_passed("a", tmp_path)
    (tmp_path / "a.json").write_text('{"passed": true}')
    assert preflight_passed("a", tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("slices: 1", "slices: 010", "slices: 010 is an octal number"),
        ("slices: 1", "slices: 1:30", "slices: 1:30 is a number in base 60"),
        ("slices: 1", "slices: yes", "slices: yes is a truth value"),
        ("zone: ", "zone: no\nzone: ", "zone: the key is given twice"),
        ("slices: 1", "slices: 1\noverrides: {remat: off}", "remat: off is a truth value"),
        ("slices: 1", "slices: 1\noverrides: {seed: 1, seed: 2}", "seed: the key is given twice"),
    ],
)
def test_yaml_of_several_meanings_is_refused(tmp_path, capsys, old, new, complaint):
    text = re.sub(r"(?ms)^(overrides|slices):.*?(?=^\w|\Z)", "", BASE.read_text()) + "\nslices: 1\n"
    assert old in text
    path = tmp_path / "s.yaml"
    path.write_text(text.replace(old, new))
    assert main(["launch", "tpu-vm", f"--spec={path}"]) == 2
    assert re.search(f"^a3: {path}:[0-9]+: {re.escape(complaint)}", capsys.readouterr().err)


def test_a_spec_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "s.yaml").write_bytes(b"\xef\xbb\xbf" + BASE.read_bytes())
    assert read_spec(tmp_path / "s.yaml") == read_spec(BASE)
