"""`a3 verify`: 0 intact, 1 damaged with every file and leaf named, 2 no checkpoint."""

import json
import os
import shutil
import socket

import pytest

from a3_jax.checkpoints import inspect as module
from a3_jax.checkpoints.a3_format import save_checkpoint
from a3_jax.checkpoints.manifest import MANIFEST_FILE, Manifest, read_manifest, write_manifest
from a3_jax.cli import main
from a3_jax.runtime.lease import process_start
from tests.checkpoint_fixtures import META, params, write_run
from tests.tiny_hf import write_tiny_llama


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    write_run(place / "checkpoints")
    return place


@pytest.fixture
def run(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def a3(tmp_path):
    save_checkpoint(tmp_path / "a3", params(), META)
    return tmp_path / "a3"


def verify(capsys, *arguments):
    status = main(["verify", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err.splitlines()


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_intact(a3, capsys):
    status, out, err = verify(capsys, a3)
    files = sum(path.is_file() for path in a3.rglob("*")) - 1
    assert (status, len(out), err) == (0, 1, [])
    assert out[0].startswith(f"{a3}: intact: {files} files, ") and out[0].endswith(" 12 arrays")


def test_every_damaged_file_is_a_line(a3, capsys):
    names = ["meta/a3.json", "params/_METADATA", "params/_sharding"]
    for name in names[:2]:
        flip(a3 / name)
    (a3 / names[2]).unlink()
    status, out, err = verify(capsys, a3)
    assert (status, err) == (1, [])
    for name in names:
        assert sum(line.startswith(f"{a3}/{name}: is ") for line in out) == 1
    assert out[-1].startswith(f"{a3}: DAMAGED")


def test_every_damaged_leaf_is_a_line(a3, capsys, monkeypatch):
    """Also where the arrays are read in parts because they would not fit at once."""
    manifest = read_manifest(a3)
    wrong = {name: manifest.leaves[name] for name in sorted(manifest.leaves)[::3]}
    changed = {name: type(leaf)(leaf.shape, leaf.dtype, "0" * 16) for name, leaf in wrong.items()}
    write_manifest(a3, Manifest(manifest.files, {**manifest.leaves, **changed}))
    for at_once in (1 << 30, 5000):
        monkeypatch.setattr(module, "AT_ONCE", at_once)
        status, out, _ = verify(capsys, a3)
        said = sorted(line.split(": ")[1] for line in out if "fingerprint" in line)
        assert (status, said) == (1, sorted(wrong))


def test_leaves_that_are_gone(a3, capsys):
    manifest = read_manifest(a3)
    leaf = next(iter(manifest.leaves.values()))
    write_manifest(a3, Manifest(manifest.files, {**manifest.leaves, "params/more": leaf, "train/x": leaf}))
    status, out, _ = verify(capsys, a3)
    assert status == 1 and f"{a3}: params/more: is missing" in out
    assert any(line.startswith(f"{a3}: train: can't be read") for line in out)


def test_a_run(run, capsys):
    assert verify(capsys, run)[0] == 0
    flip(run / "checkpoints" / "1" / "train" / "_METADATA")
    (run / "checkpoints" / "7").mkdir()
    (run / "checkpoints" / "9.damaged").mkdir()
    for path in (run, run / "checkpoints"):
        status, out, _ = verify(capsys, path)
        assert status == 1 and f"{run}/checkpoints/1/train/_METADATA: is damaged" in out[0]
        assert [line.split(":")[1] for line in out[-2:]] == [" intact", " unfinished"]
    shutil.rmtree(run / "checkpoints" / "1")
    assert verify(capsys, run)[0] == 0  # what is unfinished is not damaged
    (run / "checkpoints" / "2" / MANIFEST_FILE).unlink()  # orbax had finished
    status, out, _ = verify(capsys, run)
    assert status == 1 and f"{run}/checkpoints/2/{MANIFEST_FILE}: is missing" in out[0]


def test_a_step_that_a_living_run_is_about_to_finish(run, capsys):
    """Orbax has ended, the manifest isn't there yet: no damage while the holder of the lease lives."""
    newest = max((run / "checkpoints").iterdir(), key=lambda step: int(step.name))
    (newest / "manifest.json").unlink()
    assert verify(capsys, run)[0] == 1
    lease = {"host": socket.gethostname(), "pid": os.getpid(), "process_start": "1"}
    for left in ("{}", "[", json.dumps(lease)):  # of a process that is gone
        (run / "lease.json").write_text(left)
        assert verify(capsys, run)[0] == 1
    (run / "lease.json").write_text(json.dumps(lease | {"process_start": process_start(os.getpid())}))
    status, out, _ = verify(capsys, run)
    assert status == 0 and "being written" in out[-1]


def test_json(run, capsys):
    flip(run / "checkpoints" / "2" / "meta" / "a3.json")
    status, out, _ = verify(capsys, run, "--json")
    result = json.loads("\n".join(out))
    assert (status, result["intact"]) == (1, False)
    first, second = result["checkpoints"]
    assert first["intact"] and first["leaves"] == 16 and first["bytes"] > 10_000 and not first["problems"]
    (problem,) = second["problems"]
    assert problem["file"] == f"{run}/checkpoints/2/meta/a3.json" and problem["leaf"] is None
    assert "checksum" in problem["problem"]


@pytest.mark.parametrize("damage", ["meta", "manifest"])
def test_a_damaged_checkpoint_is_still_one(a3, capsys, damage):
    name = {"meta": "meta/a3.json", "manifest": MANIFEST_FILE}[damage]
    (a3 / name).unlink()
    status, out, _ = verify(capsys, a3)
    assert status == 1 and out[0].startswith(f"{a3}/{name}: is missing")


def test_hugging_face(tmp_path, capsys):
    hf = tmp_path / "hf"
    write_tiny_llama(hf, shards=2)
    status, out, _ = verify(capsys, hf)
    assert status == 0 and "intact: 2 files" in out[0] and "no manifest" in out[1] and len(out) == 2
    shard = hf / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    status, out, _ = verify(capsys, hf)
    assert status == 1 and out[0].startswith(f"{shard}: ") and "truncated" in out[0]


def test_no_checkpoint(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("empty", "file", "absent"):
        status, out, err = verify(capsys, tmp_path / name)
        assert (status, out, len(err)) == (2, [], 1) and str(tmp_path / name) in err[0]


def test_help(capsys):
    with pytest.raises(SystemExit) as left:
        main(["verify", "--help"])
    assert left.value.code == 0 and "examples:" in capsys.readouterr().out
