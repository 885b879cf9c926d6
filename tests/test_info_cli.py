"""`a3 info`: what a checkpoint is, without reading a parameter."""

import dataclasses
import hashlib
import json
import shutil

import jax
import pytest

from a3_jax.checkpoints import safetensors
from a3_jax.checkpoints.a3_format import Meta, save_checkpoint
from a3_jax.checkpoints.conversion import convert
from a3_jax.checkpoints.inspect import describe
from a3_jax.checkpoints.loading import open_checkpoint
from a3_jax.cli import main
from a3_jax.model.sharding import make_mesh
from a3_jax.model.two_stream import param_shardings
from a3_jax.ordering.curriculum import paper_stages
from tests import tiny
from tests.checkpoint_fixtures import META, params, write_run
from tests.tiny_families import hf_fields, model_config
from tests.tiny_hf import write_tiny_llama

KEYS = {
    "path", "format", "family", "sizes", "parameters", "dtypes", "curriculum", "tokenizer", "fingerprint",
    "source", "versions",
}  # fmt: skip
STAGES = [dataclasses.asdict(stage) for stage in paper_stages([3, 4, 5, 6])]


def info(capsys, *arguments):
    status = main(["info", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def hf(tmp_path):
    write_tiny_llama(tmp_path / "hf", dtype="bfloat16", shards=2)
    return tmp_path / "hf"


@pytest.fixture
def unread(monkeypatch):
    """Reading a tensor fails."""

    def refuse(self):
        raise AssertionError(f"{self.name} was read")

    monkeypatch.setattr(safetensors.StoredTensor, "read", refuse)


def test_a_hugging_face_directory(hf, capsys, unread):
    status, out, err = info(capsys, hf, "--json")
    report = json.loads(out)
    assert (status, err, set(report)) == (0, "", KEYS)
    assert report["sizes"] == {
        "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "head_size": 8, "mlp": 48, "context": 256,
        "left_context": 256, "vocabulary": 260,
    }  # fmt: skip
    assert report["parameters"] == {
        "embedding": 260 * 32, "attention": 2 * 2 * (32 + 16) * 32, "mlp": 2 * 3 * 32 * 48, "norms": 5 * 32,
        "head": 260 * 32, "query_vector": 0, "total": 32160,
    }  # fmt: skip
    assert report["dtypes"] == {"bfloat16": 32160}
    assert report["tokenizer"] == {"kind": "bytes", "size": 258, "bos": 256, "eos": 257}
    assert report["fingerprint"] is None and report["curriculum"] is None
    assert report["source"]["architecture"] == "LlamaForCausalLM"
    _, out, _ = info(capsys, hf)
    for words in ("Hugging Face directory", "no manifest", "32,160", "drawn when", "BOS 256", "bfloat16"):
        assert words in out


def test_an_a3_checkpoint_without_its_arrays(hf, tmp_path, capsys):
    """Nothing below `params/` is opened: it may as well be gone."""
    config = json.loads((hf / "config.json").read_text())
    config |= {"_name_or_path": "someone/tiny\x1b[2J", "transformers_version": "4.1"}
    (hf / "config.json").write_text(json.dumps(config))
    convert(hf, tmp_path / "a3")
    whole = describe(tmp_path / "a3")
    shutil.rmtree(tmp_path / "a3" / "params")
    report = describe(tmp_path / "a3")
    assert report == whole and set(report) == KEYS
    assert report["parameters"]["query_vector"] == 32 and report["parameters"]["total"] == 32160 + 32
    assert report["curriculum"] is None and len(report["fingerprint"]) == 16
    assert report["source"] == {
        "architecture": "LlamaForCausalLM", "name": "someone/tiny\x1b[2J", "transformers_version": "4.1",
        "init_from": None,
        "sha256": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "hf").iterdir()
        },
    }  # fmt: skip
    assert "jax" in report["versions"]
    status, out, _ = info(capsys, tmp_path / "a3")
    assert status == 0 and "someone/tiny?[2J" in out and report["fingerprint"] in out


def test_gpt2_has_its_parts(tmp_path):
    """Of one matrix that holds queries, keys and values, and with biases and learned positions."""
    config = model_config("gpt2")
    source = {"config": hf_fields("gpt2"), "tensors": {}, "files": {}}
    save_checkpoint(tmp_path / "a3", tiny.params(config), Meta(config, source=source))
    convert(tmp_path / "a3", tmp_path / "hf", to="hf")
    a3, hf = describe(tmp_path / "a3"), describe(tmp_path / "hf")
    assert a3["parameters"] == hf["parameters"] == {
        "embedding": (61 + 64) * 32, "attention": 4 * 4 * 33 * 32, "mlp": 4 * (2 * 32 * 48 + 48 + 32),
        "norms": 9 * 64, "head": 0, "query_vector": 32, "total": 34112,
    }  # fmt: skip
    assert a3["family"] == hf["family"] == "gpt2"


def test_a_run(tmp_path, capsys):
    """The newest step, and how far each stage is."""
    meta = dataclasses.replace(META, step=9, run_config={"stages": STAGES, "init_from": "llama-hf"})
    save_checkpoint(tmp_path / "run" / "checkpoints" / "9", params(), meta)
    write_run(tmp_path / "run" / "checkpoints")
    report = describe(tmp_path / "run")
    assert report["path"].endswith("/checkpoints/9")
    assert report["curriculum"]["step"] == 9 and report["curriculum"]["stage"] == "l2r"
    assert report["curriculum"]["stages"] == [
        {"name": "l2r", "steps": 3, "done": 3},
        {"name": "contiguous2", "steps": 4, "done": 4},
        {"name": "contiguous4", "steps": 5, "done": 2},
        {"name": "random4", "steps": 6, "done": 0},
    ]
    assert report["source"]["init_from"] == "llama-hf" and report["tokenizer"] is None
    _, out, _ = info(capsys, tmp_path / "run")
    for words in ("step 9, stage l2r", "2 of 5 steps", "token input only", "tied", "init from llama-hf"):
        assert words in out
    assert describe(tmp_path / "run" / "checkpoints" / "1")["curriculum"]["stages"] == []


def test_the_fingerprint_is_that_of_the_parameters(hf, tmp_path):
    """Saved from NumPy or from a mesh, converted again or saved by a run; and another of other numbers."""
    convert(hf, tmp_path / "a3")
    found = describe(tmp_path / "a3")["fingerprint"]
    convert(tmp_path / "a3", tmp_path / "again")
    assert describe(tmp_path / "again")["fingerprint"] == found
    convert(hf, tmp_path / "other", seed=1)
    convert(hf, tmp_path / "wide", dtype="float32")
    assert len({describe(tmp_path / name)["fingerprint"] for name in ("a3", "other", "wide")}) == 3

    model = open_checkpoint(hf)
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    sharded = jax.device_put(model.params, param_shardings(mesh, model.config))
    save_checkpoint(tmp_path / "mesh", sharded, Meta(model.config))
    assert describe(tmp_path / "mesh")["fingerprint"] == found


@pytest.mark.parametrize(("stages", "field"), [([{"name": "a"}], "run_config.stages[0].steps"),
                                               ([3], "run_config.stages[0]")])  # fmt: skip
def test_a_curriculum_that_is_none(tmp_path, capsys, stages, field):
    meta = dataclasses.replace(META, step=1, run_config={"stages": stages})
    save_checkpoint(tmp_path / "a3", params(), meta)
    status, out, err = info(capsys, tmp_path / "a3")
    assert (status, out, err.count("\n")) == (2, "", 1) and field in err and "a3.json" in err


def test_what_is_no_checkpoint(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        status, out, err = info(capsys, tmp_path / name)
        assert (status, out, err.count("\n")) == (2, "", 1) and str(tmp_path / name) in err


def test_help(capsys):
    with pytest.raises(SystemExit) as left:
        main(["info", "--help"])
    assert left.value.code == 0 and "examples:" in capsys.readouterr().out
