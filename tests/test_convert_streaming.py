"""Conversion piece by piece: the checkpoint that a save from memory gives, whatever the pieces are."""

import hashlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from a3_jax.checkpoints import chunk_writer, chunks, directories, hf_format
from a3_jax.checkpoints.a3_format import load_params, save_checkpoint
from a3_jax.checkpoints.conversion import convert, open_source
from a3_jax.checkpoints.fingerprint import fingerprints, hexadecimal, sums_of_part, tree_names
from a3_jax.checkpoints.inspect import verify
from a3_jax.checkpoints.loading import open_checkpoint
from a3_jax.checkpoints.manifest import list_files, read_manifest
from a3_jax.checkpoints.step_writer import StepWriter
from a3_jax.cli import main
from a3_jax.errors import InputError
from tests.tiny_families import write_family
from tests.tiny_hf import write_tiny_llama


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    directory = tmp_path_factory.mktemp("streaming") / "hf"
    write_tiny_llama(directory, shards=2, num_layers=4, dtype="bfloat16")
    return directory


@pytest.fixture(scope="module")
def a3(hf):
    convert(hf, hf.parent / "a3")
    return hf.parent / "a3"


@pytest.fixture
def small_pieces(monkeypatch):
    """As if each tensor were large: several pieces a tensor, several chunks a piece."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(chunks, "ZARR_CHUNK_BYTES", 1000)


def same_trees(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for name, leaf in tree_names(expected).items():
        found = tree_names(actual)[name]
        assert found.dtype == leaf.dtype, name
        np.testing.assert_array_equal(np.asarray(found).view(np.uint8), np.asarray(leaf).view(np.uint8), name)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("shape", [(13,), (7, 600), (3, 5, 2, 8), (1, 1)])
def test_sums_of_parts_are_those_of_the_whole(shape, dtype):
    """However the array is cut and laid out; and those of a part at another place are others."""
    rng = np.random.default_rng(0)
    array = rng.normal(size=shape).astype(dtype)
    expected = fingerprints({"x": array})["x"]
    for _ in range(5):
        axis = rng.integers(len(shape))
        at = rng.integers(0, shape[axis] + 1)
        first, second = np.split(np.asfortranarray(array), [at], axis)
        begin = tuple(at if one == axis else 0 for one in range(len(shape)))
        both = sums_of_part(first, (0,) * len(shape)) + sums_of_part(second, begin)
        assert hexadecimal({"x": both})["x"] == expected
    elsewhere = sums_of_part(array, (1,) * len(shape))
    assert hexadecimal({"x": elsewhere})["x"] != expected


def test_a_transposed_copy_is_numpys():
    array = np.arange(40 * 6 * 5, dtype=np.float32).reshape(40, 6, 5)
    for order in [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0), (0, 2, 1)]:
        for view in (array.transpose(order), array.transpose(order)[None], array[:, :1].transpose(order)):
            copy = chunk_writer.in_order(view)
            assert copy.flags.c_contiguous
            np.testing.assert_array_equal(copy, view)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pieces_cover_each_leaf_once_in_whole_chunks(family, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 700)
    monkeypatch.setattr(chunks, "ZARR_CHUNK_BYTES", 150)
    write_family(tmp_path / "hf", family)
    source = open_source(tmp_path / "hf")[0]
    seen = {path: np.zeros(leaf.shape, int) for path, leaf in source.leaves.items()}
    for chunk in source.chunks:
        for path, begin, array in source.read(chunk):
            place = tuple(slice(first, first + size) for first, size in zip(begin, array.shape))
            seen[path][place] += 1
            leaf = source.leaves[path]
            assert array.dtype == leaf.dtype and array.nbytes <= 4096
            for cut, whole, size in zip(place, leaf.shape, leaf.zarr_chunks):
                assert cut.start % size == 0 and (cut.stop % size == 0 or cut.stop == whole)
    assert all((count == 1).all() for count in seen.values())
    assert max(sum(c.name == chunk.name for c in source.chunks) for chunk in source.chunks) > 3


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float16"), ("gpt2", None), ("gemma3", None)])
def test_it_is_what_a_save_from_memory_writes(family, dtype, tmp_path, small_pieces):
    """Values, fingerprints and meta; from Hugging Face's side and from ours."""
    write_family(tmp_path / "hf", family)
    memory = open_checkpoint(tmp_path / "hf", dtype)
    save_checkpoint(tmp_path / "memory", memory.params, memory.meta, memory.tokenizer)
    convert(tmp_path / "hf", tmp_path / "streamed", dtype=dtype)
    convert(tmp_path / "streamed", tmp_path / "again")
    for name in ("streamed", "again"):
        same_trees(load_params(tmp_path / name), load_params(tmp_path / "memory"))
        assert read_manifest(tmp_path / name).leaves == read_manifest(tmp_path / "memory").leaves
        assert not verify(tmp_path / name)[0].problems
    expected = {name for name in list_files(tmp_path / "memory") if "/d/" not in name}
    written = {name for name in list_files(tmp_path / "streamed") if "/d/" not in name}
    assert expected - written <= {name for name in expected if "commit_success" in name or "METADATA" in name
                                  or "array_metadatas" in name or "_sharding" in name}  # fmt: skip
    assert "params/_METADATA" in written


def test_orbax_is_told_what_it_tells_itself(hf, a3):
    """`_METADATA` is that of orbax's own save of the same tree of NumPy arrays, and orbax alone opens it."""
    params = jax.tree.map(np.asarray, open_checkpoint(hf).params)
    handler = ocp.StandardCheckpointHandler()
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(hf.parent / "orbax", args=ocp.args.StandardSave(params))
    told, expected = (
        json.loads((place / "_METADATA").read_text()) for place in (a3 / "params", hf.parent / "orbax")
    )
    assert told == expected
    with ocp.StandardCheckpointer() as checkpointer:
        same_trees(checkpointer.restore(a3 / "params"), params)


def test_it_is_restored_sharded_and_as_a_step(a3, tmp_path):
    mesh = jax.make_mesh((1, 4, 2), ("data", "fsdp", "tensor"))
    params = load_params(a3)
    sharded = load_params(a3, mesh)
    same_trees(jax.device_get(sharded), jax.device_get(params))
    assert len({shard.device for shard in sharded["layers"]["gate"].addressable_shards}) == 8
    shutil.copytree(a3, tmp_path / "run" / "5")
    with StepWriter(tmp_path / "run") as writer:
        assert writer.latest_step() == 5


def test_one_layer(tmp_path):
    """No layers are stacked then."""
    write_tiny_llama(tmp_path / "hf", num_layers=1, tied=True, query_embed=True)
    convert(tmp_path / "hf", tmp_path / "a3")
    same_trees(load_params(tmp_path / "a3"), open_checkpoint(tmp_path / "hf").params)


def test_hugging_face_to_itself_is_not_read_as_a_whole(hf, tmp_path, monkeypatch):
    """Tensor after tensor: with the same bytes, and no parameter tree."""
    monkeypatch.setattr(hf_format, "read_tree", None)
    convert(hf, tmp_path / "again", to="hf")
    convert(tmp_path / "again", tmp_path / "a3")
    same_trees(load_params(tmp_path / "a3"), open_checkpoint(hf).params)


def recorded(checkpoint):
    source = open_checkpoint(checkpoint).meta.source
    assert source is not None
    return source["sha256"]


def test_sums_of_the_inputs_are_recorded(hf, a3, tmp_path, capsys):
    files = [*hf.glob("*.safetensors"), *hf.glob("*.json")]
    expected = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert len(expected) == 6
    assert main(["info", str(a3), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"]["sha256"] == expected
    assert main(["info", str(a3)]) == 0
    assert all(digits[:20] in capsys.readouterr().out for digits in [*expected.values()][:1])
    convert(a3, tmp_path / "f32", dtype="float32")
    assert recorded(tmp_path / "f32") == expected


@pytest.fixture
def listed(hf, tmp_path):
    """A list as sha256sum prints it, of more than is there; calling it edits it."""
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()} *./{p.name}" for p in sorted(hf.iterdir())]
    file = tmp_path / "sums.txt"

    def write(edit=lambda lines: None):
        edited = ["", f"{'0' * 64}  some/other.bin", *lines]
        edit(edited)
        file.write_text("\n".join(edited) + "\n")
        return str(file)

    return write


def test_a_list_that_agrees(hf, listed, tmp_path):
    assert main(["convert", str(hf), str(tmp_path / "dst"), f"--sha256={listed()}", "--no-check"]) == 0
    assert len(recorded(tmp_path / "dst")) == 6


@pytest.mark.parametrize("to", ["a3", "hf"])
@pytest.mark.parametrize(
    ("edit", "mentions"),
    [
        (lambda lines: lines.__setitem__(2, "0" * 64 + lines[2][64:]), ["config.json", "SHA-256", "0" * 64]),
        (lambda lines: lines.pop(4), ["model-00002-of-00002.safetensors", "is not listed in"]),
        (lambda lines: lines.insert(0, "no sum"), ["sums.txt:1", "sha256sum"]),
        (lambda lines: lines.append("1" * 64 + lines[3][64:]), ["another sum"]),
    ],
)
def test_a_list_that_does_not(hf, listed, tmp_path, to, edit, mentions):
    file, before = listed(edit), sorted(tmp_path.iterdir())
    with pytest.raises(InputError) as caught:
        convert(hf, tmp_path / "dst", to=to, sha256=file)
    line = str(caught.value)
    assert "\n" not in line and all(mention in line for mention in mentions), line
    assert sorted(tmp_path.iterdir()) == before


def test_a_list_for_a_checkpoint_of_ours(a3, listed, tmp_path):
    with pytest.raises(InputError, match="a3 verify"):
        convert(a3, tmp_path / "dst", sha256=listed())


@pytest.mark.parametrize(("to", "dtype", "size"), [("a3", None, 2), ("hf", None, 2), ("a3", "float32", 4)])
def test_a_disk_that_is_too_small(hf, tmp_path, monkeypatch, to, dtype, size):
    numbers = sum(leaf.size for leaf in jax.tree.leaves(open_checkpoint(hf).params))
    usage = shutil.disk_usage(tmp_path)

    def ask(place):
        assert pathlib.Path(place) == tmp_path
        return usage._replace(free=numbers * size - 1)

    monkeypatch.setattr(directories.shutil, "disk_usage", ask)
    with pytest.raises(
        InputError, match=f"too small: {numbers * size:,} bytes .* {numbers * size - 1:,} are"
    ):
        convert(hf, tmp_path / "new" / "dst", to=to, dtype=dtype)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(directories.shutil, "disk_usage", lambda place: usage._replace(free=numbers * size))
    convert(hf, tmp_path / "new" / "dst", to=to, dtype=dtype)


def test_progress_is_told_on_standard_error(hf, tmp_path, monkeypatch, capsys):
    """Plain lines where there is no terminal, each some seconds after the last one."""
    assert main(["convert", str(hf), str(tmp_path / "a"), "--no-check"]) == 0
    assert "%" not in capsys.readouterr().err
    monkeypatch.setattr("a3_jax.progress._SECONDS_BETWEEN_LINES", -1)
    for to, name in (("a3", "b"), ("hf", "c")):
        assert main(["convert", str(hf), str(tmp_path / name), f"--to={to}", "--no-check"]) == 0
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if "converted" in line]
        assert out == f"wrote {tmp_path / name}\n"
        assert lines[-1].startswith("100 %") and "MB/s" in lines[-1] and len(lines) > 10


CHILD = """
import os, signal, sys
import tests.conftest
from a3_jax.checkpoints import hf_export, chunk_writer
from a3_jax.checkpoints.conversion import convert
owner, name = (chunk_writer._Writer, "write") if sys.argv[3] == "a3" else (hf_export, "cast")
function, left = getattr(owner, name), iter(range(20, -1, -1))
def counted(*args, **kwargs):
    if next(left) == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **kwargs)
setattr(owner, name, counted)
convert(*sys.argv[1:])
"""


@pytest.mark.parametrize("to", ["a3", pytest.param("hf", marks=pytest.mark.drill)])
def test_killed_half_way(hf, tmp_path, to):
    """Nothing is there; what is left is named after the destination, and the next conversion clears it."""
    dst = tmp_path / "dst"
    (tmp_path / ".dst.other.tmp").mkdir()  # no lock: whose it is can't be told
    done = subprocess.run([sys.executable, "-c", CHILD, hf, dst, to], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    left = [path for path in tmp_path.iterdir() if path.name != ".dst.other.tmp"]
    assert len(left) == 2 and all(path.name.startswith(".dst.") for path in left)
    assert sum(len(list_files(path)) for path in left if path.is_dir()) > 0
    convert(hf, dst, to=to)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".dst.other.tmp", "dst"]
    open_checkpoint(dst)


def test_a_conversion_that_lives_is_left_alone(hf, tmp_path):
    with directories.new_directory(tmp_path / "dst") as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("mine")
        convert(hf, tmp_path / "dst")
        assert (temporary / "file").read_text() == "mine"
        shutil.rmtree(tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["dst"]


def test_a_failure_in_a_thread_is_one_line_and_leaves_nothing(hf, tmp_path, monkeypatch):
    def fail(writer, parts):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chunk_writer._Writer, "write", fail)
    with pytest.raises(InputError, match="dst: can't be written: No space left on device"):
        convert(hf, tmp_path / "dst")
    assert list(tmp_path.iterdir()) == []


def in_two_processes(*command):
    """What each of two processes printed; the port and the number of each follow the command."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    together = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
    processes = [
        subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | together | {"A3_NUM_PROCESSES": "2", "A3_PROCESS_ID": str(number)},
        )
        for number in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=150) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


PROCESS = """
import os, sys
from a3_jax.runtime.distributed import join
join()
from a3_jax.checkpoints import chunks, hf_format
from a3_jax.checkpoints.conversion import convert
from a3_jax.errors import InputError
chunks.CHUNK_BYTES = 2048
read, names = hf_format.HFSource.read, []
def counted(source, chunk):
    names.append(chunk.name)
    return read(source, chunk)
hf_format.HFSource.read = counted
convert(sys.argv[1], sys.argv[2])
print("read", len(names), os.path.isdir(sys.argv[2]))
convert(sys.argv[2], sys.argv[3], to="hf")
print("there", os.path.isdir(sys.argv[3]))
if os.environ["A3_PROCESS_ID"] == "1":
    hf_format.HFSource.read = None
try:
    convert(sys.argv[1], sys.argv[2] + "-2")
except (InputError, TypeError) as error:
    print("failed", os.path.exists(sys.argv[2] + "-2"))
"""


@pytest.mark.drill
def test_two_processes_write_one_checkpoint(hf, a3, tmp_path):
    """Each reads its half; arrays and manifest are those of one process; a failure of one is both's."""
    seen = in_two_processes("-c", PROCESS, hf, tmp_path / "two", tmp_path / "back")
    assert [status for status, _, _ in seen] == [0, 0], seen
    seen = [out.split("\n") for _, out, _ in seen]
    counts = [int(lines[0].split()[1]) for lines in seen]
    assert abs(counts[0] - counts[1]) <= 1 and min(counts) > 10
    assert all(
        lines[0].endswith("True") and lines[1:] == ["there True", "failed False", ""] for lines in seen
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "two"]
    assert read_manifest(tmp_path / "two").leaves == read_manifest(a3).leaves
    assert open_checkpoint(tmp_path / "two").meta == open_checkpoint(a3).meta
    assert {name.split("/")[1] for name in list_files(tmp_path / "two") if "/d/" in name} >= {
        "ocdbt.process_0", "ocdbt.process_1"}  # fmt: skip
    assert not verify(tmp_path / "two")[0].problems
    same_trees(load_params(tmp_path / "two"), load_params(a3))
    same_trees(open_checkpoint(tmp_path / "back").params, load_params(a3))


@pytest.mark.drill
def test_the_command_in_two_processes(hf, a3, tmp_path):
    """Where the environment names others; the second time both say that the destination is in use."""
    command = ["-m", "a3_jax.cli", "convert", str(hf), str(tmp_path / "dst")]
    seen = in_two_processes(*command)
    assert [(status, out) for status, out, _ in seen] == [(0, f"wrote {tmp_path / 'dst'}\n")] * 2, seen
    assert read_manifest(tmp_path / "dst").leaves == read_manifest(a3).leaves
    assert len(list((tmp_path / "dst" / "params").glob("ocdbt.process_*"))) == 2
    seen = in_two_processes(*command)
    assert [status for status, _, _ in seen] == [2, 2] and all("not empty" in err for _, _, err in seen), seen
