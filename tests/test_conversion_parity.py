"""The converted model is the pretrained one: content stream with rank = position against `transformers`."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a3_jax.checkpoints.conversion import convert
from a3_jax.checkpoints.loading import open_checkpoint
from a3_jax.model.two_stream import Rows, TwoStream, logits
from tests.tiny_hf import LLAMA3_ROPE, write_tiny_llama

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
        reason="needs torch and transformers",
    ),
]

ROPES = {"plain": None, "linear": {"rope_type": "linear", "factor": 2.0}, "llama3": LLAMA3_ROPE}


def their_logits(directory, tokens):
    """Logits [B, T, V] of what transformers makes of a directory."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def our_logits(checkpoint, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    rows = Rows(
        positions=positions, start=jnp.zeros_like(positions), limit=positions + 1, tokens=jnp.asarray(tokens)
    )
    model = TwoStream(checkpoint.config, precision=jax.lax.Precision.HIGHEST)
    hidden = model.apply({"params": checkpoint.params}, rows, outputs="content").content
    return np.asarray(logits(checkpoint.params, checkpoint.config, hidden, jax.lax.Precision.HIGHEST))


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_equal_those_of_transformers(tmp_path, tied, rope):
    """Invariant 1, on grouped kv heads, three layers, and lengths beyond the original context."""
    write_tiny_llama(tmp_path / "hf", tied=tied, rope=ROPES[rope], num_layers=3, tokenizer=None)
    tokens = np.random.default_rng(0).integers(0, 260, (2, 150)).astype(np.int32)
    ours = our_logits(open_checkpoint(tmp_path / "hf"), tokens)
    theirs = their_logits(tmp_path / "hf", tokens)
    assert np.abs(theirs).max() > 1  # a dead model would agree with anything
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("rope", ["plain", "llama3"])
def test_a_checkpoint_that_transformers_wrote(tmp_path, rope):
    """`save_pretrained` of version 5 writes rope_parameters; many heads on one kv head, one layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope_parameters = {**(ROPES[rope] or {"rope_type": "default"}), "rope_theta": 5000.0}
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=128, rope_parameters=rope_parameters,
        initializer_range=0.3, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    assert "rope_parameters" in json.loads((tmp_path / "hf" / "config.json").read_text())
    tokens = np.random.default_rng(1).integers(0, 61, (1, 90)).astype(np.int32)
    checkpoint = open_checkpoint(tmp_path / "hf")
    assert checkpoint.config.rope_theta == 5000.0
    np.testing.assert_allclose(
        our_logits(checkpoint, tokens), their_logits(tmp_path / "hf", tokens), atol=1e-4
    )


def test_exported_directory_opens_in_transformers(tmp_path):
    """There and back through A3, and an A3 checkpoint as LlamaForCausalLM: the same logits."""
    write_tiny_llama(tmp_path / "hf", rope=LLAMA3_ROPE)
    convert(tmp_path / "hf", tmp_path / "a3")
    convert(tmp_path / "a3", tmp_path / "back", to="hf")
    tokens = np.random.default_rng(2).integers(0, 260, (1, 20)).astype(np.int32)
    np.testing.assert_array_equal(
        their_logits(tmp_path / "back", tokens), their_logits(tmp_path / "hf", tokens)
    )
    np.testing.assert_allclose(
        our_logits(open_checkpoint(tmp_path / "a3"), tokens), their_logits(tmp_path / "hf", tokens), atol=1e-4
    )
