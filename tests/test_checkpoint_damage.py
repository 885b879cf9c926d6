"""Every file of a checkpoint, damaged in every way: named, never read as something else.

Small files are compared with their checksums before anything is read; with `SMALL` below zero all files
are treated as large ones are: read by orbax first, and judged by the fingerprints of what came out.
"""

import functools
import shutil
import uuid

import jax
import numpy as np
import pytest

from a3_jax.checkpoints import manifest
from a3_jax.checkpoints.a3_format import (
    list_steps,
    load_checkpoint_tokenizer,
    load_meta,
    load_params,
    save_checkpoint,
)
from a3_jax.checkpoints.inspect import verify
from a3_jax.checkpoints.loading import open_checkpoint
from a3_jax.checkpoints.manifest import MANIFEST_FILE, DamagedCheckpoint
from a3_jax.checkpoints.step_writer import StepWriter
from a3_jax.errors import InputError
from a3_jax.tokenizer import bytes_tokenizer
from tests.checkpoint_fixtures import META, assert_same, params, restore_newest, train_state, write_run

DAMAGES = {
    "flipped": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :]
    ),
    "truncated": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "deleted": None,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "checkpoints")


def files_of(step):
    return sorted(str(path.relative_to(step)) for path in step.rglob("*") if path.is_file())


def damage(file, kind):
    """Gives the bytes to be put back."""
    data = file.read_bytes()
    if kind == "deleted":
        file.unlink()
    else:
        file.write_bytes(DAMAGES[kind](data))
    return data


def refused(read, step, name):
    """Whether a reader names the file or a leaf, in one line; it may be right instead: see the callers."""
    try:
        return None, read(step)
    except DamagedCheckpoint as damage:
        error = damage
    named = str(error.file) == str(step / name) or error.leaf
    assert named and error.step == 2 and "\n" not in str(error), str(error)
    return error, None


def test_every_file_in_every_way(run):
    """Small files are compared before anything is read, so nothing can be right by chance."""
    step, writer = run / "2", StepWriter(run)

    def restore(_):
        return writer.restore(2, params(0), train_state(0))

    for turn, name in enumerate(files_of(step)):
        for number, kind in enumerate(DAMAGES):
            if kind in ("flipped", "truncated") and (step / name).stat().st_size < 2:
                continue
            data = damage(step / name, kind)
            for read in (load_params, restore):
                error, _ = refused(read, step, name)
                assert error is not None and str(error.file) == str(step / name), (name, kind)
            others = ((load_meta, "meta/"), (load_checkpoint_tokenizer, "tokenizer/")) if not number else ()
            for read, place in others:
                error, _ = refused(read, step, name)
                assert (error is not None) == (name == MANIFEST_FILE or name.startswith(place)), (name, kind)
            if (turn + number) % len(DAMAGES) == 0:  # as slow as reading everything
                (verdict,) = verify(step)
                assert str(step / name) in [str(problem.file) for problem in verdict.problems], (name, kind)
            (step / name).write_bytes(data)
    assert verify(step)[0].problems == []


def test_every_large_file(run, tmp_path, monkeypatch):
    """What orbax makes of a damaged file is refused, or right because nothing depends on the file."""
    monkeypatch.setattr(manifest, "SMALL", -1)
    harmless = set()
    for name in files_of(run / "2"):
        for kind in ("flipped", "emptied", "deleted"):
            step = fresh_copy(run, tmp_path)
            damage(step / name, kind)
            with StepWriter(step.parent) as writer:
                restore = functools.partial(writer.restore, 2, params(0), train_state(0))
                error, found = refused(lambda _, restore=restore: restore(), step, name)
            if error is None:
                assert_same(found, (params(2), train_state(2)))
                harmless.add(name)
    assert any("/d/" in name for name in set(files_of(run / "2")) - harmless)


def fresh_copy(run, tmp_path):
    """Of step 2, in a place that tensorstore has no bytes of in its cache."""
    place = tmp_path / uuid.uuid4().hex / "2"
    shutil.copytree(run / "2", place)
    return place


@pytest.mark.parametrize("first", range(2))
def test_the_earlier_step_is_used(run, tmp_path, first, capsys):
    """Whatever file of the newest step is damaged; each is named once."""
    place, kinds = tmp_path / "checkpoints", list(DAMAGES)
    for turn, name in enumerate(files_of(run / "2")):
        kind = kinds[(turn + first) % len(kinds)] if (run / "2" / name).stat().st_size > 1 else "longer"
        shutil.copytree(run, place)
        damage(place / "2" / name, kind)
        with StepWriter(place) as writer:
            assert restore_newest(writer) == 1, name
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and str(place / "2" / name) in said[0]
        assert sorted(path.name for path in place.iterdir()) == ["1", "2.damaged"]
        shutil.rmtree(place)
    shutil.copytree(run, place)
    (place / "2" / MANIFEST_FILE).unlink()  # as if it had never been finished
    with StepWriter(place) as writer:
        assert restore_newest(writer) == 1
    assert list_steps(place) == [1] and capsys.readouterr().err == ""


def test_flips_in_the_bytes_of_arrays(run, tmp_path, monkeypatch):
    """Where files are too large for a checksum at each start, the fingerprint names the leaf."""
    monkeypatch.setattr(manifest, "SMALL", -1)
    named, rng = set(), np.random.default_rng(0)
    sizes = {name: (run / "2" / name).stat().st_size for name in files_of(run / "2") if "params/" in name}
    name = max(sizes, key=lambda name: sizes[name])
    for place in rng.integers(0, sizes[name], 24).tolist():
        step = fresh_copy(run, tmp_path)
        data = bytearray((step / name).read_bytes())
        data[place] ^= 1 << place % 8
        (step / name).write_bytes(data)
        error, found = refused(load_params, step, name)
        if error is None:  # a byte that no array is in
            assert_same(found, params(2))
            continue
        with pytest.raises(DamagedCheckpoint, match=name):  # before bytes that change are read
            load_params(step, dtype="bfloat16")
        if error.leaf and error.leaf not in named:
            problems = verify(step)[0].problems
            assert str(step / name) in [str(problem.file) for problem in problems]
            assert error.leaf in [problem.field for problem in problems]
            named.add(error.leaf)
    assert len(named) >= 3, "orbax noticed all by itself, so nothing was tested"


def test_each_leaf_by_its_fingerprint(tmp_path):
    """One bit of a value differs, in files that agree with each other: eight leaves, each named."""
    right, other, place = params(2), tmp_path / "other", tmp_path / "a3"

    def change(leaf):
        words = np.array(leaf).view(np.uint32)
        words.reshape(-1)[words.size // 2] ^= 1
        return words.view(leaf.dtype)

    save_checkpoint(other, right, META)
    save_checkpoint(place, jax.tree.map(change, right), META)
    wanted, found = manifest.read_manifest(other).leaves, manifest.read_manifest(place)
    for name in sorted(wanted)[:8]:
        assert wanted[name] != found.leaves[name]
        leaves = dict(found.leaves) | {name: wanted[name]}
        manifest.write_manifest(place, manifest.Manifest(found.files, leaves))
        with pytest.raises(DamagedCheckpoint, match="fingerprint") as caught:
            load_params(place)
        assert caught.value.leaf == name
        assert [problem.field for problem in verify(place)[0].problems] == [name]


def test_text_is_checked_before_it_is_parsed(tmp_path):
    place = tmp_path / "a3"
    save_checkpoint(place, params(), META, bytes_tokenizer())
    for file, read in (("meta/a3.json", load_meta), ("tokenizer/tokenizer.json", load_checkpoint_tokenizer)):
        data = (place / file).read_bytes()
        for kind in DAMAGES:
            damage(place / file, kind)
            with pytest.raises(DamagedCheckpoint, match=file):
                read(place)
            (place / file).write_bytes(data)
    (place / "meta/a3.json").write_bytes(b"{}")  # still no Hugging Face directory, nor nothing
    with pytest.raises(DamagedCheckpoint, match=r"a3\.json"):
        open_checkpoint(place)


def test_no_manifest(tmp_path):
    place = tmp_path / "a3"
    save_checkpoint(place, params(), META)
    (place / MANIFEST_FILE).unlink()
    for read in (open_checkpoint, load_meta, load_params):
        with pytest.raises(InputError, match=r"manifest\.json: is missing: unfinished or damaged"):
            read(place)
