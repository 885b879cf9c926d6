"""Bad checkpoints and destinations: one line that names file and field, and nothing half-written."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from a3_jax.checkpoints.a3_format import Meta, save_checkpoint
from a3_jax.checkpoints.conversion import convert
from a3_jax.checkpoints.families import tensor_table
from a3_jax.checkpoints.hf_config import config_from_hf
from a3_jax.checkpoints.loading import open_checkpoint
from a3_jax.cli import main
from a3_jax.decoding import generate, score
from a3_jax.errors import InputError
from a3_jax.tokenizer import from_files
from tests import tiny
from tests.checkpoint_fixtures import reseal
from tests.tiny_families import hf_fields
from tests.tiny_hf import write_tiny_llama

Q0 = "model.layers.0.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def hf(tmp_path):
    write_tiny_llama(tmp_path / "hf", shards=2, query_embed=True)
    return tmp_path / "hf"


def single(hf, **changes):
    """The model in one file, some tensors replaced (or left out: None)."""
    tensors = write_tiny_llama(hf, query_embed=True) | changes
    for path in [*hf.glob("model-*"), hf / INDEX]:
        path.unlink(missing_ok=True)
    save_file({name: array for name, array in tensors.items() if array is not None}, hf / "model.safetensors")


def edit_json(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(values))


def refused(src, *mentions, dst=None, **options):
    """Converting fails in one line with these words, and leaves nothing behind."""
    dst = dst or src.parent / "dst"
    before = sorted(src.parent.iterdir())
    with pytest.raises(InputError) as caught:
        convert(src, dst, **options)
    line = str(caught.value)
    assert "\n" not in line
    for mention in mentions:
        assert str(mention) in line, line
    assert sorted(src.parent.iterdir()) == before
    return caught.value


def test_missing_shard(hf):
    (hf / "model-00002-of-00002.safetensors").unlink()
    refused(hf, "model-00002-of-00002.safetensors", "missing", "model.layers.0.input_layernorm.weight")


@pytest.mark.parametrize("keep", [0, 5, 100, -1, -5000])
def test_truncated_shard(hf, keep):
    shard = hf / "model-00001-of-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:keep])
    error = refused(hf, shard.name, "truncated")
    if keep < 0:  # the header is whole, so the tensor is known
        assert error.field.startswith(("model.", "lm_head"))


def test_longer_file(hf):
    shard = hf / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes() + b"more")
    refused(hf, shard.name, "accounts for")


@pytest.mark.parametrize(
    "header",
    [b"not json", b"[1]", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
     b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
     b'{"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}',
     b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', b"\xff\xfe"],
)  # fmt: skip
def test_damaged_header(hf, header):
    (hf / "model-00001-of-00002.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(8)
    )
    refused(hf, "model-00001-of-00002.safetensors")


def test_header_that_claims_too_much(hf):
    (hf / "model-00001-of-00002.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    refused(hf, "truncated")


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3])
def test_index_that_leaves_the_directory(hf, shard):
    index = json.loads((hf / INDEX).read_text())
    edit_json(hf / INDEX, weight_map={**index["weight_map"], Q0: shard})
    refused(hf, INDEX, Q0)


def test_index_that_names_the_wrong_shard(hf):
    index = json.loads((hf / INDEX).read_text())["weight_map"]
    other = next(file for file in index.values() if file != index[Q0])
    edit_json(hf / INDEX, weight_map={**index, Q0: other})
    refused(hf, other, Q0)


def test_wrong_shape(hf):
    single(hf, **{Q0: np.zeros((16, 32), np.float32)})
    refused(hf, "model.safetensors", Q0, "[16, 32]", "[32, 32]")


def test_missing_and_unknown_tensors(hf):
    single(hf, **{Q0: None})
    refused(hf, Q0, "missing")
    single(hf, **{"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)})
    refused(hf, "q_proj.bias", "unknown")
    edit_json(hf / "config.json", num_hidden_layers=1)
    single_config = json.loads((hf / "config.json").read_text())
    single(hf)
    (hf / "config.json").write_text(json.dumps(single_config))
    refused(hf, "model.layers.1.", "unknown")


def test_integer_parameters(hf):
    single(hf, **{Q0: np.zeros((32, 32), np.int8)})
    refused(hf, Q0, "int8", "bfloat16")


def test_tied_head_that_differs(hf):
    single(hf)
    edit_json(hf / "config.json", tie_word_embeddings=True)
    refused(hf, "lm_head.weight", "differs")


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"architectures": ["LlamaForCausalML"]}, ["LlamaForCausalML", "did you mean 'LlamaForCausalLM'"]),
        ({"architectures": ["MambaForCausalLM"]}, ["architectures", "supported: LlamaForCausalLM"]),
        ({"architectures": [], "model_type": "mamba"}, ["architectures"]),
        ({"architectures": "LlamaForCausalLM"}, ["architectures", "list"]),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, ["supported:", "'Gemma3ForCausalLM'"]),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, ["rope_scaling.type", "'su'", "llama3, yarn"]),
        ({"rope_scaling": {"rope_type": "yarn"}, "original_max_position_embeddings": -1}, ["original_max"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["differ by layer"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "partly rotated"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "partly rotated"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["rope_parameters.rope_type", "longrope"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor", "missing"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["factor", "missing"]),
        ({"rope_scaling": [1]}, ["rope_scaling", "object"]),
        ({"hidden_act": "mish"}, ["hidden_act", "'mish'", "silu, swish"]),
        ({"num_local_experts": 8}, ["num_local_experts", "mixtures of experts"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
        ({"hidden_size": "32"}, ["hidden_size", "'32'"]),
        ({"vocab_size": None}, ["vocab_size", "missing"]),
        ({"num_key_value_heads": 3}, ["config.json", "num_kv_heads"]),
        ({"rms_norm_eps": -1}, ["rms_norm_eps"]),
    ],
)  # fmt: skip
def test_config_that_is_not_supported(hf, changes, mentions):
    edit_json(hf / "config.json", **changes)
    refused(hf, "config.json", *mentions)


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_biases_that_the_config_has_and_the_file_has_not(hf, bias):
    edit_json(hf / "config.json", **{bias: True})
    refused(hf, "_proj.bias", "tensor is missing")


@pytest.mark.parametrize(
    ("name", "changes", "mentions"),
    [
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}, ["layer_types", "chunked_attention"]),
        ("qwen3", {"layer_types": ["full_attention"]}, ["layer_types", "list of 4"]),
        ("smollm3", {"no_rope_layers": [1, 0]}, ["no_rope_layers", "list of 4"]),
        ("gemma2", {"use_bidirectional_attention": True}, ["use_bidirectional_attention", "not causal"]),
        ("gemma2", {"hidden_activation": "tanh"}, ["hidden_activation", "'tanh'"]),
        ("gemma3", {"attn_logit_softcapping": 3.0}, ["attn_logit_softcapping", "3.0"]),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
         ["rope_parameters.sliding_attention.rope_type", "yarn"]),
        ("gemma3", {"rope_parameters": {"full_attention": 3}}, ["rope_parameters.full_attention", "object"]),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        ("gpt2", {"add_cross_attention": True}, ["cross-attention"]),
        ("gpt2", {"n_head": 0}, ["n_head", "positive integer"]),
        ("mistral", {"sliding_window": 0}, ["sliding_window", "positive integer"]),
    ],
)  # fmt: skip
def test_config_of_a_family_that_is_not_supported(name, changes, mentions):
    """Named as the family's own files name it."""
    with pytest.raises(InputError) as caught:
        config_from_hf(hf_fields(name, **changes), "config.json")
    assert all(mention in str(caught.value) for mention in ["config.json", *mentions]), str(caught.value)


def test_config_that_is_no_json(hf):
    (hf / "config.json").write_text("{")
    refused(hf, "config.json", "not JSON")
    (hf / "config.json").unlink()
    refused(hf, "no config.json")


def test_pickled_weights(hf):
    for path in hf.glob("model*"):
        path.unlink()
    refused(hf, "neither model.safetensors")
    (hf / "pytorch_model.bin").write_bytes(b"")
    refused(hf, "pickled")


def test_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no checkpoint")
    refused(tmp_path / "absent", "no such")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file")
    (tmp_path / "run" / "checkpoints" / "5").mkdir(parents=True)
    refused(tmp_path / "run", "no finished checkpoint")


@pytest.mark.parametrize("to", ["a3", "hf"])
def test_destination_in_use(hf, tmp_path, to):
    (tmp_path / "file").write_text("keep me")
    refused(hf, "file", "exists", dst=tmp_path / "file", to=to)
    assert (tmp_path / "file").read_text() == "keep me"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("keep me")
    refused(hf, "full", "not empty", dst=tmp_path / "full", to=to)
    refused(hf, "can't be made", dst=tmp_path / "file" / "below", to=to)


@pytest.mark.parametrize("to", ["a3", "hf"])
def test_parents_are_made_and_empty_directories_used(hf, tmp_path, to):
    (tmp_path / "empty").mkdir()
    for dst in (tmp_path / "new" / "deep", tmp_path / "empty"):
        convert(hf, dst, to=to)
        open_checkpoint(dst)
        assert [path.name for path in dst.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("to", ["a3", "hf"])
def test_failure_while_writing_leaves_nothing(hf, tmp_path, to, monkeypatch):
    def fail(*_, **__):
        raise OSError("no space left on device")

    target = "a3_format._TextFiles.save" if to == "a3" else "hf_export._write_kept_files"
    monkeypatch.setattr(f"a3_jax.checkpoints.{target}", fail)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="no space"):
        convert(hf, tmp_path / "dst", to=to)
    assert sorted(tmp_path.iterdir()) == before


def test_options(hf):
    refused(hf, "dtype", "did you mean 'float32'", dtype="float23")
    refused(hf, "to", "a3, hf", to="onnx")


def test_value_too_large_for_float16(hf):
    single(hf, **{Q0: np.full((32, 32), 1e6, np.float32)})
    refused(hf, Q0, "float16", dtype="float16")


@pytest.fixture
def a3(tmp_path):
    save_checkpoint(tmp_path / "a3", tiny.params(), Meta(tiny.CONFIG))
    return tmp_path / "a3"


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"format_version": 3}, ["written by a newer format"]),
        ({"format": "b4"}, ["format"]),
        ({"model": None}, ["model"]),
        ({"model": {"vocab_size": 3}}, ["missing"]),
        ({"source": []}, ["source"]),
    ],
)
def test_description_of_an_a3_checkpoint(a3, changes, mentions):
    edit_json(a3 / "meta" / "a3.json", **changes)
    refused(a3, "a3.json", "written", to="hf")
    reseal(a3)
    refused(a3, "a3.json", *mentions, to="hf")


def test_parameters_that_contradict_the_description(a3):
    model = json.loads((a3 / "meta" / "a3.json").read_text())["model"]
    edit_json(a3 / "meta" / "a3.json", model={**model, "mlp_size": 50})
    reseal(a3)
    refused(a3, "params", "down", "(48, 32)", to="hf")
    edit_json(a3 / "meta" / "a3.json", model={**model, "tie_embeddings": True})
    reseal(a3)
    refused(a3, "params", "head", "unknown", to="hf")


def test_damaged_arrays(a3):
    (a3 / "params" / "manifest.ocdbt").write_bytes(b"")
    refused(a3, "params/manifest.ocdbt", "has 0 bytes", to="hf")
    reseal(a3)
    refused(a3, "can't be read", to="hf")
    shutil.rmtree(a3 / "params")
    refused(a3, "params/", "is missing", to="hf")


def test_a_tokenizer_larger_than_the_embedding(hf, tmp_path, caplog):
    """As of Gemma 3, text: a warning; the text that makes such an id is refused where it is used."""
    for name, text in word_tokenizer(262).files().items():
        (hf / name).write_text(text)
    for src, dst, to in (
        (hf, "a3", "a3"),
        (tmp_path / "a3", "back", "hf"),
        (tmp_path / "back", "again", "a3"),
    ):
        convert(src, tmp_path / dst, to=to)
    (message,) = {line.split(": ", 1)[1] for line in caplog.messages if "tokenizer" in line}
    assert message.startswith("its tokenizer has ids up to 261, the embedding has rows for fewer: 260")
    why = r"text: token id 261 \(value 1\) is outside the vocabulary of 260"
    for place in (hf, tmp_path / "again"):
        checkpoint = open_checkpoint(place)
        score(checkpoint, [{"text": "w3 w259"}])
        with pytest.raises(InputError, match=why):
            score(checkpoint, [{"text": "w3 w261"}])
        with pytest.raises(InputError, match=why):
            generate(checkpoint, [{"text": "w3 w261 [[2]]"}])
    for name, text in word_tokenizer(260).files().items():
        (hf / name).write_text(text)
    caplog.clear()
    convert(hf, tmp_path / "fits")
    assert not caplog.messages


def word_tokenizer(size):
    model = {"type": "WordLevel", "vocab": {f"w{n}": n for n in range(size)}, "unk_token": "w0"}
    spaces = {"pre_tokenizer": {"type": "Whitespace"}}
    return from_files({"tokenizer.json": json.dumps({"version": "1.0", "model": model, **spaces})})


WRAPPED = {  # front of all names -> family, whether its head is tied
    "_orig_mod.": ("llama", False), "module.": ("gpt2", True), "model.": ("llama", False),
    "base_model.model.": ("gemma3", True), "language_model.": ("qwen2", True),
    "anything.at.all.": ("olmo2", False),
}  # fmt: skip


@pytest.mark.parametrize("front", WRAPPED)
def test_all_names_have_a_wrapper_in_front(tmp_path, capsys, front):
    """One line names it, whatever it is, instead of the first tensor that isn't there."""
    family, tied = WRAPPED[front]
    names = family_tensors(tmp_path, family, tied, lambda name: front + name)
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "a3")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"all {len(names)} tensor names begin with {front!r}" in err
    assert "missing" not in err and "state dict" in err and f"hf: {front}" in err
    assert not (tmp_path / "a3").exists()


@pytest.mark.parametrize(
    ("new_name", "mention"),
    [
        (lambda name: name.replace("model.", "model.language_model."), "begin with 'model.language_model.'"),
        (lambda name: name.replace("model.layers", "model._orig_mod.layers"), "_orig_mod"),
        (lambda name: "module." + name.replace(".self_attn", "._fsdp_wrapped_module.self_attn"), "wrapper"),
        (lambda name: f"base_model.model.{name}".replace("proj.w", "proj.lora_A.w"), "LoRA"),
        (
            lambda name: name.replace("model.norm", "module.model.norm"),
            "model.norm.weight: tensor is missing",
        ),
    ],
    ids=["all but the head", "inside", "both", "adapter", "one alone"],
)
def test_names_with_wrappers_in_some_places(tmp_path, new_name, mention):
    family_tensors(tmp_path, "llama", False, new_name)
    refused(tmp_path / "hf", mention)


def family_tensors(place, family, tied, new_name):
    """Writes a model under other names; nothing is in its tensors."""
    fields = hf_fields(family, tie_word_embeddings=tied)
    table = tensor_table(config_from_hf(fields))
    (place / "hf").mkdir()
    (place / "hf" / "config.json").write_text(json.dumps(fields))
    tensors = {new_name(name): np.zeros(of[0].shape, np.float16) for name, of in table.items()}
    tensors.pop(new_name("model.query_embed"))
    save_file(tensors, place / "hf" / "model.safetensors")
    return tensors


def test_the_card_of_the_origin_survives_two_round_trips(hf, tmp_path):
    (hf / "README.md").write_text("---\nlicense: mit\n---\nThe first card.\n")
    for number in range(2):
        convert(hf, tmp_path / f"a3-{number}")
        hf = tmp_path / f"hf-{number}"
        convert(tmp_path / f"a3-{number}", hf, to="hf")
        assert (hf / "README.source.md").read_text().endswith("The first card.\n")
        assert "Written by a3_jax" in (hf / "README.md").read_text()
