"""Tiny masked-diffusion checkpoints under their published names, and the same models in plain torch."""

import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

V, D, F, L, N, K, P = 61, 32, 48, 2, 4, 2, 64
MASK, EPS, THETA = 7, 1e-5, 500000.0
_LLAMA = {
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "q": "self_attn.q_proj",
    "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj",
    "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
_LLADA = {
    "attn_norm": "attn_norm", "mlp_norm": "ff_norm", "q": "q_proj", "k": "k_proj", "v": "v_proj",
    "o": "attn_out", "gate": "ff_proj", "up": "up_proj", "down": "ff_out",
}  # fmt: skip
_HF_SHAPE = {
    "vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": N,
    "num_key_value_heads": K, "intermediate_size": F, "max_position_embeddings": P, "rms_norm_eps": EPS,
    "rope_theta": THETA, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
# name -> (config.json, embedding, final norm, head, prefix of a layer, its names, biases of q, k, v)
ROTARY = {
    "llada": (
        {"architectures": ["LLaDAModelLM"], "model_type": "llada", "d_model": D, "n_layers": L, "n_heads": N,
         "n_kv_heads": K, "mlp_hidden_size": F, "mlp_ratio": 4, "vocab_size": V - 2, "embedding_size": V,
         "max_sequence_length": P, "rms_norm_eps": EPS, "rope_theta": THETA, "weight_tying": False,
         "mask_token_id": MASK, "activation_type": "silu", "block_type": "llama", "layer_norm_type": "rms",
         "block_group_size": 1, "rope": True, "rope_full_precision": True, "alibi": False,
         "attention_layer_norm": False, "attention_layer_norm_with_affine": True, "include_bias": False,
         "include_qkv_bias": False, "input_emb_norm": False, "scale_logits": False, "init_fn": "mitchell",
         "bias_for_layer_norm": False, "layer_norm_with_affine": True, "multi_query_attention": None,
         "eos_token_id": 1, "pad_token_id": 1, "use_cache": False},
        "model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out",
        "model.transformer.blocks.", _LLADA, False,
    ),
    "dream": (
        {**_HF_SHAPE, "architectures": ["DreamModel"], "model_type": "Dream", "mask_token_id": MASK,
         "use_sliding_window": False, "max_window_layers": 28, "sliding_window": None, "bos_token_id": 1,
         "eos_token_id": 1, "pad_token_id": 1},
        "model.embed_tokens", "model.norm", "lm_head", "model.layers.", _LLAMA, True,
    ),
    "diffullama": (
        {**_HF_SHAPE, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "mask_token_id": MASK},
        "model.embed_tokens", "model.norm", "lm_head", "model.layers.", _LLAMA, False,
    ),
    "diffullama, as trained": (
        {**_HF_SHAPE, "architectures": ["DiscreteDiffusionModel"], "model_type": "llama",
         "mask_token_id": MASK},
        "embed_tokens", "denoise_model.norm", "lm_head", "denoise_model.layers.", _LLAMA, False,
    ),
}  # fmt: skip
DIFFUGPT = {
    "architectures": ["DiscreteDiffusionModel"], "model_type": "gpt2", "vocab_size": V, "n_embd": D,
    "n_layer": L, "n_head": N, "n_positions": P, "mask_token_id": MASK,
}  # fmt: skip
SHIFTED = {
    "llada": False,
    "dream": True,
    "diffullama": True,
    "diffullama, as trained": True,
    "diffugpt": True,
}


def write_diffusion(directory, name: str, tokenizer=False, **changes) -> dict[str, np.ndarray]:
    """Writes a random model, no norm or bias at its initial value; returns its tensors.

    Args:
      changes: of `config.json`.
    """
    directory, rng = Path(directory), np.random.default_rng(sum(map(ord, name)))
    directory.mkdir(parents=True, exist_ok=True)
    fields, shapes = (
        (DIFFUGPT, _gpt_shapes()) if name == "diffugpt" else (ROTARY[name][0], _rotary_shapes(name))
    )
    tensors = {
        key: (rng.normal(size=shape) * (0.3 if len(shape) == 1 else 0.2)
              + (len(shape) == 1 and key.endswith("weight"))).astype(np.float32)
        for key, shape in shapes.items()
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps({**fields, **changes}))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        from a3_jax.data.embedded import tokenizer_json

        (directory / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    return tensors


def _rotary_shapes(name):
    _, embedding, norm, head, prefix, names, biases = ROTARY[name]
    kv = D // N * K
    shapes = {"q": (D, D), "k": (kv, D), "v": (kv, D), "o": (D, D), "gate": (F, D), "up": (F, D),
              "down": (D, F), "attn_norm": (D,), "mlp_norm": (D,)}  # fmt: skip
    result = {f"{embedding}.weight": (V, D), f"{norm}.weight": (D,), f"{head}.weight": (V, D)}
    for layer in range(L):
        for part, shape in shapes.items():
            result[f"{prefix}{layer}.{names[part]}.weight"] = shape
            if biases and part in "qkv":
                result[f"{prefix}{layer}.{names[part]}.bias"] = shape[:1]
    return result


def _gpt_shapes():
    result = {"embed_tokens.weight": (V, D), "denoise_model.wpe.weight": (P, D)}
    parts = {"ln_1": (D,), "attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "ln_2": (D,),
             "mlp.c_fc": (D, 4 * D), "mlp.c_proj": (4 * D, D)}  # fmt: skip
    for prefix, of in [("denoise_model.", {"ln_f": (D,)})] + [
        (f"denoise_model.h.{n}.", parts) for n in range(L)
    ]:
        for part, shape in of.items():
            result |= {f"{prefix}{part}.weight": shape, f"{prefix}{part}.bias": shape[-1:]}
    return result


def torch_logits(name: str, tensors, tokens):
    """[T, V] of one text, every row seeing all of it; a row's own logits, nothing shifted."""
    import torch

    at = {key: torch.tensor(value, dtype=torch.float64) for key, value in tensors.items()}
    ids = torch.tensor(np.asarray(tokens), dtype=torch.int64)
    return (_gpt(at, ids) if name == "diffugpt" else _rotary(name, at, ids)).numpy()


def _attend(q, k, v):
    """[T, heads, H] each; nothing is hidden."""
    import torch

    weights = torch.softmax(torch.einsum("tnh,snh->nts", q, k) / math.sqrt(q.shape[-1]), dim=-1)
    return torch.einsum("nts,snh->tnh", weights, v).flatten(1)


def _rotary(name, at, ids):
    import torch

    _, embedding, norm, head, prefix, names, biases = ROTARY[name]
    size = D // N
    angles = torch.arange(len(ids))[:, None] * THETA ** (
        -torch.arange(0, size, 2, dtype=torch.float64) / size
    )
    cos, sin = torch.cos(angles)[:, None], torch.sin(angles)[:, None]

    def rotated(x):
        a, b = x[..., : size // 2], x[..., size // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def normed(x, key):
        return at[f"{key}.weight"] * x * torch.rsqrt(torch.mean(x**2, dim=-1, keepdim=True) + EPS)

    x = at[f"{embedding}.weight"][ids]
    for layer in range(L):

        def linear(x, part, layer=layer):
            key = f"{prefix}{layer}.{names[part]}"
            return x @ at[f"{key}.weight"].T + (at[f"{key}.bias"] if biases and part in "qkv" else 0)

        y = normed(x, f"{prefix}{layer}.{names['attn_norm']}")
        q, k, v = (linear(y, part).unflatten(-1, (-1, size)) for part in "qkv")
        k, v = (one.repeat_interleave(N // K, dim=1) for one in (rotated(k), v))
        x = x + linear(_attend(rotated(q), k, v), "o")
        y = normed(x, f"{prefix}{layer}.{names['mlp_norm']}")
        x = x + linear(torch.nn.functional.silu(linear(y, "gate")) * linear(y, "up"), "down")
    return normed(x, norm) @ at[f"{head}.weight"].T


def _gpt(at, ids):
    import torch

    functional = torch.nn.functional

    def normed(x, key):
        return functional.layer_norm(x, (D,), at[f"{key}.weight"], at[f"{key}.bias"], 1e-5)

    def linear(x, key):
        return x @ at[f"{key}.weight"] + at[f"{key}.bias"]

    x = at["embed_tokens.weight"][ids] + at["denoise_model.wpe.weight"][: len(ids)]
    for layer in range(L):
        key = f"denoise_model.h.{layer}."
        q, k, v = (
            part.unflatten(-1, (N, -1))
            for part in linear(normed(x, key + "ln_1"), key + "attn.c_attn").split(D, -1)
        )
        x = x + linear(_attend(q, k, v), key + "attn.c_proj")
        y = functional.gelu(linear(normed(x, key + "ln_2"), key + "mlp.c_fc"), approximate="tanh")
        x = x + linear(y, key + "mlp.c_proj")
    return normed(x, "denoise_model.ln_f") @ at["embed_tokens.weight"].T
