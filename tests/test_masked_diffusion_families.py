"""LLaDA, Dream, DiffuLLaMA and DiffuGPT under their published names: the models that they are in torch."""

import importlib.util
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from a3_jax.checkpoints.conversion import convert
from a3_jax.checkpoints.hf_config import config_from_hf
from a3_jax.checkpoints.loading import open_checkpoint
from a3_jax.errors import InputError
from a3_jax.evaluation.models.diffusion_forward import predicting_rows
from a3_jax.model.two_stream import TwoStream, logits
from tests.tiny_diffusion import DIFFUGPT, MASK, ROTARY, SHIFTED, V, torch_logits, write_diffusion

needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="needs torch")
every_family = pytest.mark.parametrize("name", SHIFTED)


def our_logits(checkpoint, rows):
    """[T, V] of each text, for each of its tokens, the texts being one padded batch."""
    model = TwoStream(checkpoint.config, precision=jax.lax.Precision.HIGHEST)
    longest = max(map(len, rows)) + 3
    tokens = np.array([np.pad(row, (0, longest - len(row)), constant_values=5) for row in rows], np.int32)
    columns = jnp.broadcast_to(jnp.arange(longest), tokens.shape)
    lengths = jnp.array([len(row) for row in rows])
    hidden = predicting_rows(model, checkpoint.params, jnp.asarray(tokens), lengths, columns)
    out = logits(checkpoint.params, checkpoint.config, hidden, jax.lax.Precision.HIGHEST)
    return [np.asarray(out[i, : len(row)]) for i, row in enumerate(rows)]


@pytest.mark.torch
@needs_torch
@every_family
def test_logits_equal_those_of_torch(tmp_path, name):
    """Of masked texts of two lengths in one batch; shifted by one row in all families but LLaDA."""
    tensors = write_diffusion(tmp_path, name)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.config.mask_token, checkpoint.config.logit_shift) == (MASK, SHIFTED[name])
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, V, length) for length in (13, 6)]
    rows[0][3:8] = MASK
    for ours, row in zip(our_logits(checkpoint, rows), rows, strict=True):
        theirs = torch_logits(name, tensors, row)
        assert np.abs(theirs).max() > 1  # a dead model would agree with anything
        if SHIFTED[name]:
            theirs = np.concatenate([theirs[:1], theirs[:-1]])
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@every_family
def test_a_query_vector_is_not_missed(tmp_path, name, caplog):
    """A masked-diffusion model has no use for one: no warning that one is drawn."""
    write_diffusion(tmp_path, name)
    with caplog.at_level(logging.WARNING):
        open_checkpoint(tmp_path)
    assert not caplog.records


@pytest.mark.parametrize("name", ["llada", "dream", "diffullama, as trained", "diffugpt"])
def test_files_return_as_they_were(tmp_path, name):
    tensors = write_diffusion(tmp_path / "hf", name)
    convert(tmp_path / "hf", tmp_path / "a3")
    assert open_checkpoint(tmp_path / "a3").config == open_checkpoint(tmp_path / "hf").config
    convert(tmp_path / "a3", tmp_path / "back", to="hf")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(tensors) <= set(back)
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value)
    assert open_checkpoint(tmp_path / "back").config == open_checkpoint(tmp_path / "hf").config


def test_published_mask_tokens():
    """Where config.json has none: those of the published models."""

    def mask(fields, **changes):
        fields = {**fields, "vocab_size": 200000, **changes}
        fields.pop("mask_token_id")
        return config_from_hf(fields).mask_token

    assert mask(ROTARY["llada"][0], embedding_size=126464) == 126336
    assert mask(ROTARY["dream"][0]) == 151666
    assert mask(ROTARY["diffullama, as trained"][0]) == 811
    assert mask(ROTARY["diffullama"][0]) is None  # a Llama like any other
    assert mask(DIFFUGPT, vocab_size=50257) == 10541
    assert mask(DIFFUGPT, vocab_size=50258) == 50257


def test_published_shape_of_llada():
    fields = {**ROTARY["llada"][0], "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32,
              "mlp_hidden_size": 12288, "vocab_size": 126464, "embedding_size": 126464,
              "max_sequence_length": 4096, "mask_token_id": 126336}  # fmt: skip
    config = config_from_hf(fields)
    assert (config.head_size, config.vocab_size, config.max_length) == (128, 126464, 4096)
    assert not config.logit_shift and not config.tie_embeddings


REFUSED = {
    "block_type": "sequential", "layer_norm_type": "default", "rope": False, "include_bias": True,
    "include_qkv_bias": True, "alibi": True, "attention_layer_norm": True, "input_emb_norm": True,
    "scale_logits": True, "block_group_size": 2, "activation_type": "swiglu", "mask_token_id": V,
}  # fmt: skip


@pytest.mark.parametrize("field", REFUSED)
def test_what_would_be_another_model_is_refused(tmp_path, field):
    write_diffusion(tmp_path, "llada", **{field: REFUSED[field]})
    with pytest.raises(InputError) as error:
        open_checkpoint(tmp_path)
    assert error.value.field in (field, "mask_token") and "config.json" in str(error.value.file)


def test_a_head_of_its_own_beside_a_tied_one_is_refused(tmp_path):
    write_diffusion(tmp_path, "diffugpt")
    path = tmp_path / "model.safetensors"
    from safetensors.numpy import save_file

    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["embed_tokens.weight"]}, path)
    open_checkpoint(tmp_path)  # equal: the embedding once more
    save_file({**tensors, "lm_head.weight": tensors["embed_tokens.weight"] + 1}, path)
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        open_checkpoint(tmp_path)


def test_a_shift_can_be_said(tmp_path):
    write_diffusion(tmp_path, "diffullama", logit_shift=False)
    assert not open_checkpoint(tmp_path).config.logit_shift
    assert json.loads((tmp_path / "config.json").read_text())["mask_token_id"] == MASK
