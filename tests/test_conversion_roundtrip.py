"""Hugging Face to A3 and back: the same tensors bit for bit, the same names, dtypes, configs and files."""

import json
import logging

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from a3_jax.checkpoints.a3_format import Meta, load_meta, load_params, save_checkpoint
from a3_jax.checkpoints.conversion import convert
from a3_jax.checkpoints.hf_config import config_from_hf
from a3_jax.checkpoints.hf_export import config_to_hf
from a3_jax.checkpoints.loading import open_checkpoint
from a3_jax.checkpoints.safetensors import TensorSpec, list_tensors, write_tensors
from a3_jax.model.config import PRESETS, ModelConfig, RopeScaling
from a3_jax.model.sharding import make_mesh
from a3_jax.model.two_stream import abstract_params
from tests import tiny
from tests.tiny_hf import DIMS, DTYPES, LLAMA3_ROPE, hf_config, write_tiny_llama

QUERY = "model.query_embed"


def read_all(directory):
    return {name: tensor.read() for name, tensor in list_tensors(directory).items()}


def assert_same_tensors(actual, expected):
    """Equal names, dtypes, shapes and bits."""
    assert set(actual) == set(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        assert actual[name].shape == array.shape, name
        assert actual[name].tobytes() == array.tobytes(), name


def there_and_back(tmp_path, **options):
    convert(tmp_path / "hf", tmp_path / "a3")
    convert(tmp_path / "a3", tmp_path / "back", to="hf", **options)
    return read_all(tmp_path / "back")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tensors_return_bit_for_bit(tmp_path, tied, dtype):
    tensors = write_tiny_llama(tmp_path / "hf", tied=tied, dtype=dtype, num_layers=3)
    back = there_and_back(tmp_path)
    assert back.pop(QUERY).shape == (1, 1, 32)
    assert_same_tensors(back, tensors)


def test_the_plain_model_can_be_written_without_its_query_vector(tmp_path):
    """Other models of the same shape keep theirs: the table of tensors is shared."""
    tensors = write_tiny_llama(tmp_path / "hf")
    assert_same_tensors(there_and_back(tmp_path, query_vector=False), tensors)
    convert(tmp_path / "back", tmp_path / "again")
    assert load_params(tmp_path / "again")["query_embed"].shape == (32,)


def test_sharded_in_and_out(tmp_path):
    tensors = write_tiny_llama(tmp_path / "hf", shards=3, dtype="bfloat16", query_embed=True)
    back = there_and_back(tmp_path, max_shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(path.stat().st_size < 24_000 for path in (tmp_path / "back").glob("*.safetensors"))
    assert_same_tensors(back, tensors)


def test_config_and_files_go_along(tmp_path):
    """config.json verbatim, other json files, tokenizer files, one that is no text among them, the licence.

    The source's card moves aside for ours.
    """
    write_tiny_llama(tmp_path / "hf", rope=LLAMA3_ROPE)
    (tmp_path / "hf" / "generation_config.json").write_text('{"temperature": 0.6}')
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"\x00\xff\xfe not text")
    (tmp_path / "hf" / "README.md").write_text("the source's")
    (tmp_path / "hf" / "LICENSE").write_text("a licence")
    (tmp_path / "hf" / "training_log.md").write_text("not kept")
    there_and_back(tmp_path)
    before, after = (
        {
            path.name: path.read_bytes()
            for path in (tmp_path / side).iterdir()
            if path.suffix != ".safetensors"
        }
        for side in ("hf", "back")
    )
    before.pop("training_log.md")
    before["README.source.md"] = before.pop("README.md")
    assert b"[README.source.md](README.source.md)" in after.pop("README.md")
    assert json.loads(after.pop("config.json")) == json.loads(before.pop("config.json"))
    assert after == before


def test_without_tokenizer_stays_without(tmp_path):
    write_tiny_llama(tmp_path / "hf", tokenizer=None)
    there_and_back(tmp_path)
    assert not (tmp_path / "a3" / "tokenizer").exists()
    assert open_checkpoint(tmp_path / "a3").tokenizer is None
    assert not (tmp_path / "back" / "tokenizer.json").exists()


def test_release_format(tmp_path):
    """The authors' architecture selects their residual, and returns under its name with its query vector."""
    tensors = write_tiny_llama(tmp_path / "hf", architecture="LlamaTwoStreamForCausalLM", query_embed=True)
    back = there_and_back(tmp_path)
    assert open_checkpoint(tmp_path / "a3").config.residual == "release"
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == [
        "LlamaTwoStreamForCausalLM"
    ]
    assert_same_tensors(back, tensors)
    np.testing.assert_array_equal(load_params(tmp_path / "a3")["query_embed"], tensors[QUERY][0, 0])


def test_query_vector_is_drawn_once_with_one_warning(tmp_path, caplog):
    """From the seed at its scale; the same on the fly as after conversion; no warning where it is stored."""
    write_tiny_llama(tmp_path / "hf", dtype="bfloat16")
    with caplog.at_level(logging.WARNING, "a3_jax"):
        on_the_fly = open_checkpoint(tmp_path / "hf", dtype="float32", seed=3)
    assert [record.message.count(QUERY) for record in caplog.records if record.name.startswith("a3_jax")] == [
        1
    ]
    convert(tmp_path / "hf", tmp_path / "a3", seed=3)
    convert(tmp_path / "hf", tmp_path / "other", seed=4)
    caplog.clear()
    stored = open_checkpoint(tmp_path / "a3", dtype="float32")
    assert not [record for record in caplog.records if record.name.startswith("a3_jax")]
    vector = np.asarray(stored.params["query_embed"])
    np.testing.assert_array_equal(vector, on_the_fly.params["query_embed"])
    assert 0.01 < vector.std() < 0.03
    assert not np.array_equal(vector, np.asarray(load_params(tmp_path / "other")["query_embed"], np.float32))


def test_mixed_dtypes_return(tmp_path):
    """Norms in float32 beside bfloat16, but one layer's: widened inside, narrowed again."""
    tensors = write_tiny_llama(tmp_path / "hf", num_layers=3, dtype="bfloat16", query_embed=True)
    for name in list(tensors):
        if "norm" in name and "layers.1." not in name:
            tensors[name] = tensors[name].astype(np.float32) + np.float32(1e-4)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert_same_tensors(there_and_back(tmp_path), tensors)


def test_tied_head_stored_twice_and_buffers(tmp_path):
    """A repeated tied head is accepted and comes back; rotary buffers are passed over."""
    tensors = write_tiny_llama(tmp_path / "hf", tied=True, query_embed=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_file({**tensors, **buffer}, tmp_path / "hf" / "model.safetensors")
    assert_same_tensors(there_and_back(tmp_path), tensors)


def test_dtype_option(tmp_path):
    tensors = write_tiny_llama(tmp_path / "hf", query_embed=True)
    convert(tmp_path / "hf", tmp_path / "a3", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(load_params(tmp_path / "a3"))} == {
        np.dtype(ml_dtypes.bfloat16)
    }
    convert(tmp_path / "hf", tmp_path / "half", to="hf", dtype="float16")
    assert_same_tensors(
        read_all(tmp_path / "half"), {name: array.astype(np.float16) for name, array in tensors.items()}
    )
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "float16"


def test_checkpoint_without_source_becomes_a_llama(tmp_path):
    """Llama names, LlamaForCausalLM, float32; read again it is the same model."""
    params = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), tiny.params())
    save_checkpoint(tmp_path / "a3", params, Meta(tiny.CONFIG))
    convert(tmp_path / "a3", tmp_path / "hf", to="hf")
    assert {array.dtype for array in read_all(tmp_path / "hf").values()} == {np.dtype(np.float32)}
    again = open_checkpoint(tmp_path / "hf")
    assert again.config == tiny.CONFIG
    jax.tree.map(
        np.testing.assert_array_equal, again.params, jax.tree.map(lambda x: x.astype(np.float32), params)
    )


def test_parameters_lie_on_the_mesh(tmp_path):
    """Both formats, restored straight to the shardings of an 8-device mesh, equal those on one device."""
    write_tiny_llama(tmp_path / "hf", query_embed=True)
    convert(tmp_path / "hf", tmp_path / "a3")
    one = open_checkpoint(tmp_path / "a3").params
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    for path in ("hf", "a3"):
        params = open_checkpoint(tmp_path / path, mesh=mesh).params
        assert len(params["layers"]["q"].sharding.device_set) == 8
        assert params["layers"]["q"].addressable_shards[0].data.size == params["layers"]["q"].size // 4
        jax.tree.map(np.testing.assert_array_equal, params, one)


def test_the_tree_is_the_models(tmp_path):
    """Names, shapes and dtypes are those of `abstract_params`, for one layer too."""
    for layers in (1, 3):
        write_tiny_llama(tmp_path / f"{layers}", num_layers=layers, query_embed=True)
        checkpoint = open_checkpoint(tmp_path / f"{layers}")
        described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), checkpoint.params)
        assert described == abstract_params(checkpoint.config)


@pytest.mark.parametrize("version", [4, 5])
def test_rotary_fields_of_both_transformers_versions(version):
    fields = hf_config(DIMS, rope=LLAMA3_ROPE)
    fields["rope_theta"] = 5e5
    if version == 5:
        rope = {**fields.pop("rope_scaling"), "rope_theta": fields.pop("rope_theta")}
        fields["rope_parameters"] = rope
    config = config_from_hf(fields)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling("llama3", 4.0, 1.0, 4.0, 64)


def test_config_defaults():
    """What old configs leave out: kv heads, head size, tying, rotary base."""
    fields = hf_config(DIMS)
    for name in ("num_key_value_heads", "head_dim", "tie_word_embeddings", "rope_theta", "rope_scaling"):
        del fields[name]
    config = config_from_hf(fields)
    assert (config.num_kv_heads, config.head_size, config.tie_embeddings) == (4, 8, False)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_their_config_json(name):
    assert config_from_hf(config_to_hf(PRESETS[name])) == PRESETS[name]
    assert ModelConfig.from_dict(json.loads(json.dumps(PRESETS[name].to_dict()))) == PRESETS[name]


def test_files_are_readable_by_the_library_and_deterministic(tmp_path):
    """The `safetensors` library reads what we write; equal bytes for equal input; all aligned."""
    rng = np.random.default_rng(0)
    tensors = {
        "b": rng.standard_normal((3, 5)).astype(np.float16),
        "a": rng.standard_normal((7,)).astype(np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.float32(2.5).reshape(()),
    }
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in tensors.items()}
    for directory in ("one", "two"):
        (tmp_path / directory).mkdir()
        write_tensors(tmp_path / directory, specs, lambda name: [tensors[name]])
    one, two = (tmp_path / directory / "model.safetensors" for directory in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    with safe_open(one, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert_same_tensors({name: file.get_tensor(name) for name in file.keys()}, tensors)  # noqa: SIM118
    assert all(
        tensor.offset % tensor.dtype.itemsize == 0 for tensor in list_tensors(tmp_path / "one").values()
    )


def test_meta_says_where_it_came_from(tmp_path):
    write_tiny_llama(tmp_path / "hf", dtype="float16")
    convert(tmp_path / "hf", tmp_path / "a3")
    meta = load_meta(tmp_path / "a3")
    assert meta.source["config"]["architectures"] == ["LlamaForCausalLM"]
    assert set(meta.source["tensors"].values()) == {"float16"}
    assert meta.versions["jax"] == jax.__version__
