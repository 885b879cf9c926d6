"""Where a conversion may write, and how its paths may be spelled."""

import errno
import os
import shutil

import pytest

from a3_jax.checkpoints import conversion, directories
from a3_jax.checkpoints.inspect import describe
from a3_jax.cli import main
from tests.tiny_families import edit_config, write_family


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("places") / "llama"
    write_family(directory, "llama", num_hidden_layers=1)
    return directory


def refused(capsys, *arguments) -> str:
    assert main(["convert", *map(str, arguments)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    return error[0]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed(llama, tmp_path, exists):
    target, link = tmp_path / "target", tmp_path / "link"
    if exists:
        target.mkdir()
    link.symlink_to("target")
    conversion.convert(llama, link)
    assert link.is_symlink() and not target.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]
    assert describe(target)["family"] == "llama"


@pytest.mark.parametrize("name", ["漢" * 85, "x" * 255])
def test_the_longest_name(llama, tmp_path, name):
    conversion.convert(llama, tmp_path / name, to="hf")
    assert os.listdir(tmp_path) == [name]


def test_file_urls(llama, tmp_path, capsys):
    conversion.convert(f"file://{llama}", f"file://{tmp_path}/out")
    assert describe(f"file://{tmp_path}/out") == describe(tmp_path / "out")
    assert "foo://" in refused(capsys, llama, "foo://bucket/out")


def test_a_mount_is_refused(llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(directories.os.path, "ismount", lambda path: True)
    assert "mounted" in refused(capsys, llama, tmp_path)


@pytest.mark.parametrize("to", ["a3", "hf"])
def test_a_disk_that_fills_up_meanwhile(llama, tmp_path, capsys, monkeypatch, to):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("a3_jax.checkpoints.safetensors._write_tensor", full)
    monkeypatch.setattr("a3_jax.checkpoints.chunk_writer.in_order", lambda array: array[..., :0])  # misfits
    assert "can't be written" in refused(capsys, llama, tmp_path / "out", f"--to={to}")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("field", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
def test_a_text_is_no_flag(llama, tmp_path, capsys, field):
    shutil.copytree(llama, tmp_path / "in")
    edit_config(tmp_path / "in", **{field: "false"})
    assert f"{field}: must be true or false" in refused(capsys, tmp_path / "in", tmp_path / "out")
