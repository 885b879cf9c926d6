"""A tiny model of each family with all its options on: fields of its `config.json`, random weights."""

import json
from pathlib import Path

import numpy as np

from a3_jax.checkpoints.hf_config import config_from_hf

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
WINDOW = 12
_SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
_BIASES = {"attention_bias": True, "mlp_bias": True}
_SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW}
FAMILIES = {
    "llama": ("LlamaForCausalLM", {**_SHAPE, **_BIASES, "head_dim": 16, "rope_scaling": LLAMA3}),
    "mistral": ("MistralForCausalLM", {**_SHAPE, "head_dim": 16, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2ForCausalLM", {**_SHAPE, **_SLIDING, "max_window_layers": 2, "rope_scaling": YARN}),
    "qwen3": (
        "Qwen3ForCausalLM",
        {**_SHAPE, **_SLIDING, "max_window_layers": 1, "attention_bias": True, "head_dim": 16,
         "tie_word_embeddings": True, "rope_theta": 1e6},
    ),
    "smollm3": (
        "SmolLM3ForCausalLM",
        {**_SHAPE, **_BIASES, **_SLIDING, "no_rope_layers": [1, 0, 1, 0], "tie_word_embeddings": True},
    ),
    "olmo2": ("Olmo2ForCausalLM", {**_SHAPE, "attention_bias": True, "rope_theta": 5e5}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {**_SHAPE, "head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 24,
         "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0, "attention_bias": True},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {**_SHAPE, "model_type": "gemma3_text", "head_dim": 16, "sliding_window": WINDOW,
         "query_pre_attn_scalar": 24, "final_logit_softcapping": 5.0, "attention_bias": True,
         "layer_types": ["sliding_attention", "full_attention"] * 2,
         "rope_parameters": {
             "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 61, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 48, "n_positions": 64,
         "bos_token_id": 0, "eos_token_id": 1},
    ),
}  # fmt: skip


def hf_fields(name: str, **changes) -> dict:
    """The `config.json` of a family, some of its fields changed."""
    architecture, fields = FAMILIES[name]
    return {"architectures": [architecture], "model_type": name, **fields, **changes}


def model_config(name: str, **changes):
    return config_from_hf(hf_fields(name, **changes))


def write_family(directory, name: str, *, seed=0, dtype="float32", **changes):
    """Writes a model of transformers' own class, every parameter random, and returns it.

    No norm or bias is at its initial value, and none so large that the logits lose digits.
    """
    import torch
    import transformers

    fields = hf_fields(name, **changes)
    config = transformers.AutoConfig.for_model(
        **{key: value for key, value in fields.items() if key != "architectures"}
    )
    config._attn_implementation = "eager"
    model = getattr(transformers, fields["architectures"][0])(config)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            values = rng.standard_normal(parameter.shape) * (0.3 if parameter.ndim == 1 else 0.2)
            is_scale = parameter.ndim == 1 and key.endswith("weight") and not name.startswith("gemma")
            parameter.copy_(torch.as_tensor(values + is_scale))
    model = model.to(getattr(torch, dtype)).eval()
    model.save_pretrained(directory)
    return model


def rewrite(directory, edit) -> None:
    """Replaces the tensors of a directory by `edit(tensors)`, a dictionary of NumPy arrays."""
    from safetensors.numpy import load_file, save_file

    path = Path(directory) / "model.safetensors"
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def edit_config(directory, **changes) -> None:
    path = Path(directory) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
