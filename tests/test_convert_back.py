"""A3 to Hugging Face and to the authors' format: piece by piece, nothing damaged, no other model."""

import collections
import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from a3_jax.checkpoints import chunks, manifest
from a3_jax.checkpoints.a3_format import Meta, load_meta, load_params, save_checkpoint
from a3_jax.checkpoints.conversion import A3Source, convert
from a3_jax.checkpoints.fingerprint import tree_names
from a3_jax.checkpoints.hf_export import plan_hf_export, plan_release_export, tree_reader, write_hf
from a3_jax.checkpoints.loading import open_checkpoint
from a3_jax.checkpoints.manifest import DamagedCheckpoint
from a3_jax.checkpoints.safetensors import list_tensors
from a3_jax.cli import main
from a3_jax.errors import InputError
from a3_jax.model.config import ModelConfig
from a3_jax.model.sharding import make_mesh
from a3_jax.model.two_stream import param_shardings
from tests import tiny
from tests.tiny_families import hf_fields, model_config
from tests.tiny_hf import write_tiny_llama


def release_config(**changes):
    return ModelConfig(**{**tiny.CONFIG.to_dict(), "num_layers": 3, "residual": "release", **changes})


def read_all(directory):
    return {name: tensor.read() for name, tensor in list_tensors(directory).items()}


def assert_same_tree(actual, expected):
    """Equal names, dtypes and bits."""
    actual, expected = tree_names(actual), tree_names(expected)
    assert actual.keys() == expected.keys()
    for name, leaf in expected.items():
        assert actual[name].dtype == leaf.dtype, name
        assert np.asarray(actual[name]).tobytes() == np.asarray(leaf).tobytes(), name


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """An A3 checkpoint in bfloat16 whose arrays lay on 8 devices."""
    directory = tmp_path_factory.mktemp("stored") / "a3"
    config = ModelConfig(**{**tiny.CONFIG.to_dict(), "vocab_size": 32, "num_layers": 4})
    params = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), tiny.params(config))
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    save_checkpoint(directory, jax.device_put(params, param_shardings(mesh, config)), Meta(config))
    return directory


def test_parts_of_leaves(stored):
    params, found = load_params(stored), A3Source(stored)
    for path, index in (
        (("layers", "q"), (1,)),
        (("layers", "gate"), (2, slice(None), slice(3, 7))),
        (("last_layer", "o"), (slice(0, 2),)),
        (("embed",), (slice(5, 9),)),
        (("final_norm",), ()),
    ):
        leaf = tree_reader(params)(path)
        part = found.read_leaf(path, index)
        assert part.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(part, leaf[index])


@pytest.mark.parametrize("name", ["llama", "olmo2", "gemma3", "gpt2"])
def test_pieces_make_up_the_tensors(tmp_path, monkeypatch, name):
    """One piece a tensor, or one a row; each leaf is opened once, three together in GPT-2."""
    changes = {"n_inner": 128} if name == "gpt2" else {}  # as wide as published ones: three matrices are less
    config = model_config(name, **changes)
    params = tiny.params(config)
    meta = Meta(config, source={"config": hf_fields(name, **changes), "tensors": {}, "files": {}})
    save_checkpoint(tmp_path / "a3", params, meta)
    found, target = A3Source(tmp_path / "a3"), plan_hf_export(meta)
    write_hf(tmp_path / "whole", tree_reader(params), target, meta, None)
    opened, sizes, told = collections.Counter(), [], []
    open_leaf = A3Source._open
    monkeypatch.setattr(A3Source, "_open", lambda self, leaf: opened.update([leaf]) or open_leaf(self, leaf))
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 700)

    def read(path, index=()):
        part = found.read_leaf(path, index)
        sizes.append(part.nbytes)
        return part

    write_hf(
        tmp_path / "pieces", read, target, meta, None, on_tensor=lambda *tensor: told.append(tensor),
        max_shard_bytes=30_000,
    )  # fmt: skip
    whole, in_pieces = read_all(tmp_path / "whole"), read_all(tmp_path / "pieces")
    assert whole.keys() == in_pieces.keys() == dict(told).keys()
    for tensor, array in whole.items():
        np.testing.assert_array_equal(in_pieces[tensor], array)
    assert opened == collections.Counter(tree_names(params).keys())
    assert sum(nbytes for _, nbytes in told) == target.nbytes
    longest_row = max(array.nbytes // len(array) for array in whole.values() if array.ndim > 1)
    assert max(sizes) <= max(2 * 700, longest_row * config.head_size)  # rows of a head go together


def test_leaves_in_memory_are_never_more_than_the_largest(stored):
    found = A3Source(stored)
    sizes = {name: leaf.nbytes for name, leaf in tree_names(load_params(stored)).items()}
    for name in [*sizes, *reversed(sizes)]:
        found.read_leaf(tuple(name.split("/")))
        assert name in found._arrays
        assert sum(sizes[it] for it in found._arrays) <= max(sizes.values())


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[:-1] if how == "cut" else data)


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_refused(tmp_path, capsys, monkeypatch, how):
    """Before anything is written, naming the file, however large it is."""
    monkeypatch.setattr(manifest, "SMALL", 0)
    save_checkpoint(tmp_path / "a3", tiny.params(), Meta(tiny.CONFIG))
    file = max((tmp_path / "a3" / "params").rglob("*"), key=lambda path: path.is_file() * path.stat().st_size)
    file.unlink() if how == "gone" else damage(file, how)
    with pytest.raises(DamagedCheckpoint, match=file.name):
        A3Source(tmp_path / "a3")
    assert main(["convert", str(tmp_path / "a3"), str(tmp_path / "hf"), "--to=hf"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and file.name in err
    assert [path.name for path in tmp_path.iterdir()] == ["a3"]


def test_bit_for_bit_in_pieces(tmp_path, monkeypatch):
    """There and back, by rows, in shards."""
    tensors = write_tiny_llama(tmp_path / "hf", num_layers=3, dtype="bfloat16", query_embed=True)
    convert(tmp_path / "hf", tmp_path / "a3")
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1000)
    convert(tmp_path / "a3", tmp_path / "back", to="hf", max_shard_bytes=20_000)
    back = read_all(tmp_path / "back")
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        assert back[name].dtype == array.dtype and back[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize(("tied", "dtype"), [(True, "float32"), (False, "bfloat16")])
def test_the_authors_format_and_back(tmp_path, tied, dtype):
    """Same model and bits; the vector and a tied head are there, as in the state dict of their class."""
    config = release_config(tie_embeddings=tied)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), tiny.params(config))
    save_checkpoint(tmp_path / "a3", params, Meta(config))
    convert(tmp_path / "a3", tmp_path / "release", to="release", dtype=dtype)
    convert(tmp_path / "release", tmp_path / "again")
    assert load_meta(tmp_path / "again").model == config
    assert_same_tree(load_params(tmp_path / "again"), params)
    tensors = load_file(tmp_path / "release" / "model.safetensors")
    assert {"lm_head.weight", "model.query_embed"} <= tensors.keys()
    fields = json.loads((tmp_path / "release" / "config.json").read_text())
    assert fields["architectures"] == ["LlamaTwoStreamForCausalLM"] and fields["torch_dtype"] == dtype
    assert "adds the MLP to the *normed*" in (tmp_path / "release" / "README.md").read_text()


def test_their_names_where_the_source_had_others(tmp_path):
    """A file without the prefix, of a config that transformers 5 wrote: ids of tokens go along."""
    tensors = write_tiny_llama(
        tmp_path / "hf", architecture="LlamaTwoStreamForCausalLM", tied=True, query_embed=True
    )
    rename(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "a3")
    convert(tmp_path / "a3", tmp_path / "release", to="release")
    written = read_all(tmp_path / "release")
    tied = tensors["model.embed_tokens.weight"]
    assert written.keys() == {*tensors, "lm_head.weight"}
    for name, array in {**tensors, "lm_head.weight": tied}.items():
        np.testing.assert_array_equal(written[name], array)
    fields = json.loads((tmp_path / "release" / "config.json").read_text())
    assert fields["eos_token_id"] == 257 and fields["rope_theta"] == 10000.0
    assert "rope_parameters" not in fields


def rename(directory):
    from safetensors.numpy import save_file

    tensors = load_file(directory / "model.safetensors")
    tensors = {name.removeprefix("model."): array for name, array in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((directory / "config.json").read_text())
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    fields.pop("rope_scaling")
    (directory / "config.json").write_text(json.dumps(fields))


def test_what_their_class_is_not_is_refused(tmp_path, capsys):
    """The standard residual, above all: the same weights would be another model without a word."""
    save_checkpoint(tmp_path / "a3", tiny.params(), Meta(tiny.CONFIG))
    assert main(["convert", str(tmp_path / "a3"), str(tmp_path / "release"), "--to=release"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "model.residual" in err and "another model" in err
    assert [path.name for path in tmp_path.iterdir()] == ["a3"]
    for changes, field in (
        ({"head_size": 16}, "model.head_size"),
        ({"qk_norm": "head"}, "model.qk_norm"),
        ({"qkv_bias": True}, "model.qkv_bias"),
    ):
        with pytest.raises(InputError, match=field):
            plan_release_export(Meta(release_config(**changes)))
    plan_release_export(Meta(release_config(qkv_bias=True, out_bias=True, mlp_bias=True)))


def test_a_release_model_goes_to_hf_as_what_it_is(tmp_path):
    """`--to=hf` of it names the authors' architecture: transformers is not told that it were a Llama."""
    config = release_config()
    save_checkpoint(tmp_path / "a3", tiny.params(config), Meta(config))
    convert(tmp_path / "a3", tmp_path / "hf", to="hf")
    assert open_checkpoint(tmp_path / "hf").config == config


@pytest.fixture(scope="module")
def torch_release(tmp_path_factory):
    """(directory, lines for `score`, log-probabilities by the stand-in for their class)."""
    torch = pytest.importorskip("torch")
    from types import SimpleNamespace

    from tests.release_stand_in import LlamaTwoStreamForCausalLM

    directory = tmp_path_factory.mktemp("release")
    config = release_config(tie_embeddings=True, vocab_size=29)
    save_checkpoint(directory / "a3", tiny.params(config), Meta(config))
    convert(directory / "a3", directory / "release", to="release")
    fields = json.loads((directory / "release" / "config.json").read_text())
    model = LlamaTwoStreamForCausalLM(SimpleNamespace(**fields))
    weights = load_file(directory / "release" / "model.safetensors")
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=True)
    kept = []
    model.lm_head.register_forward_hook(lambda _, __, out: kept.append(out))
    rng = np.random.default_rng(0)
    tokens, ranks = rng.integers(0, 29, (2, 12)), rng.permuted(np.arange(24).reshape(2, 12) % 12 // 2, axis=1)
    with torch.no_grad():
        model(
            input_ids=torch.from_numpy(tokens), labels=torch.from_numpy(tokens),
            group_ids=torch.from_numpy(ranks), use_cache=False, return_dict=True,
        )  # fmt: skip
    logprobs = torch.log_softmax(kept[0], -1).gather(-1, torch.from_numpy(tokens)[..., None])[..., 0]
    rows = [{"tokens": own.tolist(), "ranks": of.tolist()} for own, of in zip(tokens, ranks)]
    return directory, rows, logprobs.numpy()


@pytest.mark.torch
def test_their_class_computes_what_ours_does(torch_release):
    """Every name of the state dict, and the same log-probabilities in random groups of two."""
    from a3_jax.decoding.scoring import score

    directory, rows, expected = torch_release
    for path in ("a3", "release"):
        results = score(open_checkpoint(directory / path), rows, dtype="float32")
        actual = np.array([result["logprobs"] for result in results])
        np.testing.assert_allclose(actual, expected, atol=2e-5)


@pytest.mark.torch
def test_the_residual_matters(torch_release):
    """The positive half: under the standard residual the same weights say something else."""
    from a3_jax.decoding.scoring import score

    directory, rows, expected = torch_release
    checkpoint = open_checkpoint(directory / "a3")
    config = dataclasses.replace(checkpoint.config, residual="standard")
    meta = dataclasses.replace(checkpoint.meta, model=config)
    checkpoint = dataclasses.replace(checkpoint, config=config, meta=meta)
    result = score(checkpoint, rows, dtype="float32")[0]
    assert np.abs(np.array(result["logprobs"]) - expected[0]).max() > 0.1


@pytest.mark.torch
def test_transformers_opens_it_unchanged(tmp_path):
    """Without the vector no name is unknown to it; with the vector that one alone, and nothing is missing."""
    transformers = pytest.importorskip("transformers")
    write_tiny_llama(tmp_path / "hf", num_layers=3)
    convert(tmp_path / "hf", tmp_path / "a3")
    for name, query_vector in (("plain", False), ("whole", True)):
        convert(tmp_path / "a3", tmp_path / name, to="hf", query_vector=query_vector, max_shard_bytes=30_000)
        _, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert set(told["unexpected_keys"]) == ({"model.query_embed"} if query_vector else set())
        assert not told["missing_keys"] and not told["mismatched_keys"]
