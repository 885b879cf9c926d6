"""The manifest: any other byte in it is noticed, and every damaged file is named by it."""

import errno
import json
import zlib

import pytest

from a3_jax.checkpoints import manifest as module
from a3_jax.checkpoints.manifest import (
    MANIFEST_FILE,
    DamagedCheckpoint,
    File,
    Leaf,
    Manifest,
    find_damage,
    list_files,
    parse_manifest,
    raise_damage,
    read_checksums,
    read_manifest,
    write_manifest,
)
from a3_jax.errors import EXIT_STORAGE, InputError, RunError
from a3_jax.paths import as_path

CONTENTS = {"a": b"", "meta/a3.json": b"{}", "params/d/0": bytes(range(256)) * 40}


@pytest.fixture
def directory(tmp_path):
    place = tmp_path / "12"
    for name, data in CONTENTS.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    files = read_checksums(place, list_files(place))
    write_manifest(place, Manifest(files, {"params/x": Leaf((2, 3), "bfloat16", "00112233aabbccdd")}))
    return place


def sealed(**fields):
    """A text with the right checksum."""
    text = module._text(fields)
    return module._text(fields | {"crc32": zlib.crc32(text.encode())})


def test_written_and_read(directory):
    manifest = read_manifest(directory)
    assert manifest.files == {name: File(len(data), zlib.crc32(data)) for name, data in CONTENTS.items()}
    assert manifest.item("params") == {"x": Leaf((2, 3), "bfloat16", "00112233aabbccdd")}
    assert manifest.item("train") == {}
    assert find_damage(directory, manifest, deep=True) == []
    assert sorted(path.name for path in directory.iterdir()) == ["a", MANIFEST_FILE, "meta", "params"]


def test_every_flipped_bit_is_noticed(directory):
    file = directory / MANIFEST_FILE
    data = file.read_bytes()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(InputError, match=MANIFEST_FILE):
            parse_manifest(bytes(changed), file)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data + b"\n",
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: json.dumps(json.loads(data)).encode(),  # says the same
        lambda data: b"[" * 100_000,
        lambda data: b"[1]",
        lambda data: b"\xff\xfe",
    ],
)
def test_other_texts_are_noticed(directory, change):
    file = directory / MANIFEST_FILE
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(DamagedCheckpoint, match="damaged") as caught:
        read_manifest(directory)
    assert caught.value.step == 12 and str(caught.value).startswith(str(file))


def test_missing(directory):
    (directory / MANIFEST_FILE).unlink()
    with pytest.raises(DamagedCheckpoint, match="missing: unfinished or damaged"):
        read_manifest(directory)
    (directory / MANIFEST_FILE).mkdir()
    with pytest.raises(DamagedCheckpoint, match="can't be read"):
        read_manifest(directory)


def test_another_format(directory):
    (directory / MANIFEST_FILE).write_text(sealed(format_version=3, files={}, leaves={}))
    with pytest.raises(InputError, match="version 3, this a3_jax reads 2") as caught:
        read_manifest(directory)
    assert not isinstance(caught.value, DamagedCheckpoint)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a//b", "./a", "", "a/.."])
def test_files_outside_are_refused(directory, name):
    files = {name: {"bytes": 1, "crc32": 2}}
    (directory / MANIFEST_FILE).write_text(sealed(format_version=2, files=files, leaves={}))
    with pytest.raises(InputError, match="outside"):
        read_manifest(directory)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(b""), "has 0 bytes, was written with 10240"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "has 10239 bytes"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\xfe"), "checksum"),
    ],
)
def test_each_damaged_file_is_named(directory, damage, said):
    manifest = read_manifest(directory)
    damage(directory / "params/d/0")
    (found,) = find_damage(directory, manifest)
    assert str(found) == f"{directory}/params/d/0: {found.message}" and said in found.message
    assert (found.step, found.leaf) == (12, None)
    assert find_damage(directory, manifest, only="meta/") == []
    with pytest.raises(DamagedCheckpoint, match=said):
        raise_damage(directory, manifest)
    (directory / "meta/a3.json").unlink()
    assert len(find_damage(directory, manifest)) == 2


def test_large_files_are_read_when_asked(directory, monkeypatch):
    monkeypatch.setattr(module, "SMALL", 10_000)
    manifest = read_manifest(directory)
    file = directory / "params/d/0"
    file.write_bytes(file.read_bytes()[::-1])
    assert find_damage(directory, manifest) == []
    assert len(find_damage(directory, manifest, deep=True)) == 1


def test_read_a_piece_at_a_time(directory, monkeypatch):
    whole = read_checksums(directory, list_files(directory))
    monkeypatch.setattr(module, "_READ_AT_ONCE", 7)
    assert read_checksums(directory, list_files(directory)) == whole


def test_a_file_system_that_fails_is_no_damage(directory, monkeypatch):
    """Whoever takes an outage for damage sets good checkpoints aside: status 77, to be tried again."""
    manifest = read_manifest(directory)

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module, "_checksum", fails)
    with pytest.raises(RunError, match="can't be read: Input/output error") as caught:
        find_damage(directory, manifest, deep=True)
    assert caught.value.status == EXIT_STORAGE
    monkeypatch.setattr(type(as_path(directory)), "read_bytes", fails)
    with pytest.raises(RunError, match="can't be read: Input/output error"):
        read_manifest(directory)
