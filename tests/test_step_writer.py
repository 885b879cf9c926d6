"""Steps of a run: proven, kept by a limit, and given up only for an older one that is intact."""

import errno
import os
import resource
import subprocess
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from a3_jax.checkpoints import step_writer
from a3_jax.checkpoints.a3_format import latest_step, list_steps
from a3_jax.checkpoints.fingerprint import fingerprints, tree_names
from a3_jax.checkpoints.manifest import MANIFEST_FILE, DamagedCheckpoint, read_manifest
from a3_jax.checkpoints.step_writer import SaveFailed, StepWriter
from a3_jax.errors import EXIT_STORAGE, InputError, RunError
from a3_jax.paths import as_path
from tests.checkpoint_fixtures import META, assert_same, params, restore_newest, save, train_state, write_run


@pytest.fixture
def place(tmp_path):
    return tmp_path / "checkpoints"


def largest_file(directory):
    """Of the arrays."""
    return max((path for path in directory.rglob("params/**/d/*")), key=lambda path: path.stat().st_size)


def flip(file, at=0.5):
    data = bytearray(file.read_bytes())
    data[int(len(data) * at)] ^= 4
    file.write_bytes(data)


def files(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_events(place):
    events = []
    write_run(place, on_event=lambda name, **fields: events.append((name, fields)))
    assert [(name, fields["step"]) for name, fields in events] == [("saved", 1), ("saved", 2)]
    for step, (_, fields) in zip((1, 2), events):
        on_disk = sum(path.stat().st_size for path in (place / str(step)).rglob("*") if path.is_file())
        assert fields["bytes"] == on_disk - (place / str(step) / MANIFEST_FILE).stat().st_size
        assert fields["seconds"] > 0


def test_events_that_can_not_be_written(place):
    """Are lost, and nothing else is; names that only look like steps are none either."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (place / "007").mkdir(parents=True)
    write_run(place, keep=1, on_event=full)
    assert list_steps(place) == [2] and (place / "007").is_dir()


def test_the_manifest_makes_the_step(place, monkeypatch):
    """While the manifest isn't written there is no step, and the loop was not kept waiting."""
    write, go = step_writer.write_manifest, threading.Event()
    monkeypatch.setattr(step_writer, "write_manifest", lambda *args: go.wait(30) and write(*args))
    with StepWriter(place) as writer:
        assert save(writer, 1)
        assert (writer.latest_step(), writer.failure()) == (None, None)
        go.set()
        writer.wait()
        assert writer.latest_step() == 1


def test_donated_after_save(place):
    """The next step writes over the arrays; fingerprints and files are of those that were saved."""
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with StepWriter(place) as writer:
        for step in (1, 2, 3):
            arrays = {"x": jnp.full((256, 1024), step, jnp.float32)}
            writer.save(step, arrays, {"n": step}, META)
            arrays = jax.tree.map(overwrite, arrays)
            del arrays
            writer.wait()
            restored, _ = writer.restore(step, {"x": np.empty((256, 1024), np.float32)}, {"n": 0})
            assert (np.asarray(restored["x"]) == step).all()


def test_restore_newest(place, capsys):
    write_run(place, (1, 2, 3))
    events = []
    with StepWriter(place, on_event=lambda name, **fields: events.append((name, fields))) as writer:
        assert restore_newest(writer) == 3
        assert restore_newest(writer, at_most=2) == 2
        assert restore_newest(writer, at_most=0) is None
        flip(largest_file(place / "3"))
        flip(place / "2" / MANIFEST_FILE)
        assert list_steps(place) == [1, 3]
        assert restore_newest(writer) == 1
        assert sorted(path.name for path in place.iterdir()) == ["1", "2.damaged", "3.damaged"]
        assert [(name, fields["step"]) for name, fields in events] == [("damaged", 3), ("damaged", 2)]
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 2 and "3/params/" in said[0] and MANIFEST_FILE in said[1]
        assert restore_newest(writer) == 1 and not capsys.readouterr().err  # told once
        assert save(writer, 3)
        writer.wait()
        flip(largest_file(place / "3"))
        assert restore_newest(writer) == 1
    assert (place / "3.damaged-2").is_dir()


def test_a_run_that_lost_everything_does_not_begin_anew(place):
    """All steps stay where they are: a second start is refused like the first."""
    write_run(place)
    for step in (1, 2):
        (largest_file(place / str(step))).write_bytes(b"")
    with StepWriter(place) as writer:
        for _ in range(2):
            with pytest.raises(DamagedCheckpoint, match="has 0 bytes") as caught:
                restore_newest(writer)
            assert caught.value.step == 2
    assert list_steps(place) == [1, 2]


def test_no_steps(place):
    with StepWriter(place) as writer:
        assert restore_newest(writer) is None
    (place / "5").mkdir()
    with StepWriter(place) as writer:
        assert restore_newest(writer) is None and writer.latest_step() is None


def test_another_tree_is_no_damage(place):
    """A target that doesn't fit is the user's: named, and nothing is set aside."""
    write_run(place)
    other = {
        "dtype float32|dtype bfloat16": train_state(0) | {"mu": jnp.zeros((64, 32))},
        r"shape \(64, 32\)": train_state(0) | {"mu": jnp.zeros((32, 64), jnp.bfloat16)},
        "more": train_state(0) | {"more": 1},
    }
    with StepWriter(place) as writer:
        for said, state in other.items():
            with pytest.raises(InputError, match=said) as caught:
                writer.restore_newest(params(), state)
            assert not isinstance(caught.value, DamagedCheckpoint)
    assert list_steps(place) == [1, 2]


def test_discard_after(place):
    write_run(place, (1, 2, 3))
    with StepWriter(place) as writer:
        writer.discard_after(1)
        assert list_steps(place) == [1]
        assert save(writer, 2)


def test_keep_deletes_nothing_when_the_newest_is_damaged(place, monkeypatch, capsys):
    """The newest is damaged as soon as it is written: the old ones stay, and it is told."""
    write_run(place, (1, 2), keep=2)
    write = step_writer.write_manifest

    def write_and_damage(directory, manifest):
        write(directory, manifest)
        flip(largest_file(place / "3"))

    monkeypatch.setattr(step_writer, "write_manifest", write_and_damage)
    events = []
    with StepWriter(place, keep=2, on_event=lambda name, **_: events.append(name)) as writer:
        save(writer, 3)
        with pytest.raises(SaveFailed, match=r"3/params/.*checksum"):
            writer.wait()
        assert events == ["saved", "save_failed"]
        monkeypatch.undo()
        assert list_steps(place) == [1, 2, 3]
        assert restore_newest(writer) == 2
        save(writer, 4)
        writer.wait()
        assert list_steps(place) == [2, 4]


def test_a_directory_that_is_another_runs_by_now(place):
    """A process that was stopped for so long that its lease went: nothing comes to exist, or goes."""
    write_run(place)
    lost = []

    def may_write():
        if lost:
            raise InputError("another run took over", file=place)

    with StepWriter(place, keep=1, may_write=may_write) as writer:
        save(writer, 3)
        writer.wait()
        assert list_steps(place) == [3]
        join = writer._checkpointer.wait_until_finished
        writer._checkpointer.wait_until_finished = lambda: (join(), lost.append(True))
        save(writer, 4)
        with pytest.raises(SaveFailed, match="another run took over"):
            writer.wait()
        assert list_steps(place) == [3] and (place / "4").exists()
        with pytest.raises(InputError, match="another run took over"):
            writer.discard_after(0)
        assert list_steps(place) == [3]


@pytest.mark.parametrize("moment", ["read_checksums", "write_manifest"])
def test_a_lease_that_goes_within_the_commit(place, monkeypatch, moment):
    """While the checksums are taken, or between the manifest and the removals: nothing is removed."""
    write_run(place)
    before, lost, action = files(place), [], getattr(step_writer, moment)

    def may_write():
        if lost:
            raise InputError("another run took over", file=place)

    def then_lost(*args):
        result = action(*args)
        lost.append(True)
        return result

    monkeypatch.setattr(step_writer, moment, then_lost)
    with StepWriter(place, keep=1, may_write=may_write) as writer:
        save(writer, 3)
        with pytest.raises(SaveFailed, match="another run took over"):
            writer.wait()
    now = files(place)
    assert before.items() <= now.items(), "the steps of before are there"
    assert (place / "3" / MANIFEST_FILE in now) == (moment == "write_manifest")


def test_storage_that_fails_while_old_steps_are_removed(place, monkeypatch, capsys):
    """The new step is whole, and no old one has to go."""
    write_run(place)

    def fails(*_, **__):
        raise RunError(EXIT_STORAGE, "can't be read: Input/output error")

    monkeypatch.setattr(step_writer, "raise_damage", fails)
    with StepWriter(place, keep=1) as writer:
        save(writer, 3)
        writer.wait()
    assert list_steps(place) == [1, 2, 3]
    assert "warning: no old step is removed: can't be read" in capsys.readouterr().err


def test_an_old_step_that_stays_makes_the_new_one_no_worse(place, monkeypatch, capsys):
    write_run(place)

    def busy(path):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    with StepWriter(place, keep=1) as writer:
        monkeypatch.setattr(step_writer, "_remove", busy)
        save(writer, 3)
        writer.wait()
    assert latest_step(place) == 3
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert told.startswith("a3: warning: step 1 can't be removed") and "busy" in told


def test_a_damaged_step_that_can_not_be_set_aside(place, monkeypatch):
    """Left where it is it would count as saved later: the run ends, to be started again."""
    write_run(place)
    flip(largest_file(place / "2"))

    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(type(as_path(place)), "rename", fails)
    with StepWriter(place) as writer, pytest.raises(RunError, match="can't be set aside") as caught:
        restore_newest(writer)
    assert caught.value.status == EXIT_STORAGE


def test_leftovers_are_cleared_by_the_next_save(place):
    write_run(place, (1, 2))
    (place / "2" / MANIFEST_FILE).unlink()
    (place / "7").mkdir()
    (place / "notes").mkdir()
    (place / "1" / "meta" / "a3.json").rename(place / "1" / "a3.json")
    assert list_steps(place) == []
    (place / "1" / "a3.json").rename(place / "1" / "meta" / "a3.json")
    assert list_steps(place) == [1]
    with StepWriter(place) as writer:
        assert save(writer, 2)
        writer.wait()
    assert sorted(path.name for path in place.iterdir()) == ["1", "2", "notes"]


def test_a_failure_is_known_without_waiting(place, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(step_writer, "write_manifest", fail)
    events = []
    with StepWriter(place, on_event=lambda name, **fields: events.append((name, fields["step"]))) as writer:
        assert save(writer, 1)
        writer._thread.join()
        failure = writer.failure()
        assert isinstance(failure, SaveFailed) and "No space left" in str(failure)
        assert writer.failure() is None
        writer.wait()  # it was returned
        assert events == [("save_failed", 1)]
        assert list(place.iterdir()) == []
        assert save(writer, 1)
        with pytest.raises(SaveFailed, match=r"step 1 .*No space left"):
            save(writer, 2)
        monkeypatch.undo()
        assert save(writer, 1)
    assert latest_step(place) == 1


@pytest.fixture
def full_disk(tmp_path):
    """A place whose disk is full after 300 kB, and what gives it room again."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        yield place, lambda: subprocess.run(["mount", "-o", "remount,size=30m", str(place)], check=True)
        subprocess.run(["umount", "-l", str(place)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)  # not root: no file may be larger
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    yield place, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_full(full_disk):
    """The save before stays; the failed one is told of, leaves nothing, and can be made again."""
    place, make_room = full_disk
    rng = np.random.default_rng(0)
    large = {"x": rng.integers(0, 2**32, 200_000, dtype=np.uint32)}  # 800 kB that don't compress
    with StepWriter(place) as writer:
        assert save(writer, 1)
        writer.wait()
        assert writer.save(2, large, {"n": 1}, META)
        with pytest.raises(SaveFailed, match=r"No space left|ENOSPC|File too large|RESOURCE_EXHAUSTED"):
            writer.wait()
        assert [path.name for path in place.iterdir()] == ["1"]
        assert restore_newest(writer) == 1
        make_room()
        assert writer.save(2, large, {"n": 1}, META)
        writer.wait()
        assert_same(writer.restore(2, large, {"n": 0})[0], large)


def test_saved_on_one_mesh_restored_on_others(place):
    array = np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32)

    def tree(shape, spec=("a", "b")):
        mesh = jax.make_mesh(shape, ("a", "b"), devices=jax.devices()[: shape[0] * shape[1]])
        sharding = NamedSharding(mesh, P(*spec))
        return {"x": jax.device_put(array, sharding), "y": jax.device_put(array[0], NamedSharding(mesh, P()))}

    first = tree((2, 2))
    with StepWriter(place) as writer:
        writer.save(1, first, {"n": 1}, META)
        writer.wait()
        written = {name: leaf.fingerprint for name, leaf in read_manifest(place / "1").item("params").items()}
        for shape in ((1, 4), (4, 1), (2, 1), (1, 8)):
            target = tree(shape)
            restored, _ = writer.restore(1, target, {"n": 0})
            assert restored["x"].sharding == target["x"].sharding
            assert fingerprints(tree_names(restored)) == written
            assert_same(restored, first)
