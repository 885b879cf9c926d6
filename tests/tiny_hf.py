"""Tiny random Llama checkpoints as HF directories, written without torch."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

DIMS = {
    "vocab_size": 260, "d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_size": 8,
    "mlp_size": 48, "max_length": 256,
}  # fmt: skip
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def write_tiny_llama(
    directory, *, tied=False, dtype="float32", rope=None, query_embed=False, tokenizer="bytes", shards=1,
    seed=0, architecture="LlamaForCausalLM", scale=0.2, **dims,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Writes an HF Llama directory and returns the tensors it holds, by their names in the file.

    Args:
      directory: made if absent.
      tied: the head is the embedding; no `lm_head.weight` is written.
      dtype: "float32", "float16" or "bfloat16", of all tensors.
      rope: the config's `rope_scaling`, for instance LLAMA3_ROPE; None for the plain rotary embedding.
      query_embed: also write a query vector, `model.query_embed` [1, 1, D].
      tokenizer: "bytes" for the 258-token byte tokenizer, None for a directory without one.
      shards: how many safetensors files; with more than one an index names them.
      scale: standard deviation of the matrices; norms are drawn around 1.
      dims: any of DIMS.
    """
    dims = {**DIMS, **_checked(dims)}
    rng = np.random.default_rng(seed)
    tensors = {
        name: (scale * rng.standard_normal(shape) + (len(shape) == 1)).astype(DTYPES[dtype])
        for name, shape in tensor_shapes(dims, tied, query_embed).items()
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = hf_config(dims, tied=tied, dtype=dtype, rope=rope, architecture=architecture)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    _write_tensors(directory, tensors, shards)
    if tokenizer == "bytes":
        from a3_jax.tokenizer import bytes_tokenizer

        for name, text in bytes_tokenizer().files().items():
            (directory / name).write_text(text, encoding="utf-8")
    return tensors


def tensor_shapes(dims, tied=False, query_embed=False) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a Llama, matrices as [out, in]."""
    d, f, h = dims["d_model"], dims["mlp_size"], dims["head_size"]
    q, kv = dims["num_heads"] * h, dims["num_kv_heads"] * h
    shapes = {"model.embed_tokens.weight": (dims["vocab_size"], d)}
    for layer in range(dims["num_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (d,),
            prefix + "self_attn.q_proj.weight": (q, d),
            prefix + "self_attn.k_proj.weight": (kv, d),
            prefix + "self_attn.v_proj.weight": (kv, d),
            prefix + "self_attn.o_proj.weight": (d, q),
            prefix + "post_attention_layernorm.weight": (d,),
            prefix + "mlp.gate_proj.weight": (f, d),
            prefix + "mlp.up_proj.weight": (f, d),
            prefix + "mlp.down_proj.weight": (d, f),
        }
    shapes["model.norm.weight"] = (d,)
    if not tied:
        shapes["lm_head.weight"] = (dims["vocab_size"], d)
    if query_embed:
        shapes["model.query_embed"] = (1, 1, d)
    return shapes


def hf_config(dims, *, tied=False, dtype="float32", rope=None, architecture="LlamaForCausalLM") -> dict:
    """`config.json` as transformers 4 writes it."""
    return {
        "architectures": [architecture], "model_type": "llama", "vocab_size": dims["vocab_size"],
        "hidden_size": dims["d_model"], "num_hidden_layers": dims["num_layers"],
        "num_attention_heads": dims["num_heads"], "num_key_value_heads": dims["num_kv_heads"],
        "head_dim": dims["head_size"], "intermediate_size": dims["mlp_size"], "hidden_act": "silu",
        "max_position_embeddings": dims["max_length"], "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "rope_scaling": rope, "tie_word_embeddings": tied, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": 256, "eos_token_id": 257, "torch_dtype": dtype,
    }  # fmt: skip


def _checked(dims):
    unknown = set(dims) - set(DIMS)
    if unknown:
        raise TypeError(f"unknown dimensions {sorted(unknown)}; known: {sorted(DIMS)}")
    return dims


def _write_tensors(directory, tensors, shards):
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
