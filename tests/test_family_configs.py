"""Published `config.json` files, as they are on the Hub, make models of the published size."""

import json

import pytest

from a3_jax.checkpoints.families import table_names
from a3_jax.checkpoints.hf_config import config_from_hf
from a3_jax.errors import InputError
from a3_jax.model.config import ModelConfig
from a3_jax.model.flops import parameter_count
from tests.tiny_families import FAMILIES, WINDOW, model_config

PUBLISHED = {  # parameters, the fields that matter (the query vector comes on top)
    "SmolLM2-135M": (134_515_008, {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
        "max_position_embeddings": 8192, "rope_theta": 100000, "tie_word_embeddings": True}),
    "Mistral-7B-v0.1": (7_241_732_096, {
        "architectures": ["MistralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "sliding_window": 4096}),
    "Qwen2.5-0.5B": (494_032_768, {
        "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "hidden_size": 896,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
        "sliding_window": 32768, "use_sliding_window": False, "tie_word_embeddings": True}),
    "Qwen3-0.6B": (596_049_920, {
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 1024, "head_dim": 128,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
        "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": True}),
    "SmolLM3-3B": (3_075_098_624, {
        "architectures": ["SmolLM3ForCausalLM"], "vocab_size": 128256, "hidden_size": 2048,
        "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
        "intermediate_size": 11008, "max_position_embeddings": 65536, "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9, "rope_theta": 5e6, "use_sliding_window": False}),
    "OLMo-2-0425-1B": (1_484_916_736, {
        "architectures": ["Olmo2ForCausalLM"], "vocab_size": 100352, "hidden_size": 2048,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
        "intermediate_size": 8192, "max_position_embeddings": 4096, "rope_theta": 500000}),
    "gemma-2-2b": (2_614_341_888, {
        "architectures": ["Gemma2ForCausalLM"], "vocab_size": 256000, "hidden_size": 2304, "head_dim": 256,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
        "intermediate_size": 9216, "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
        "max_position_embeddings": 8192, "sliding_window": 4096}),
    "gemma-3-1b-pt": (999_885_952, {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 262144,
        "hidden_size": 1152, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
        "intermediate_size": 6912, "max_position_embeddings": 32768, "rope_scaling": None,
        "rope_theta": 1000000, "rope_local_base_freq": 10000, "sliding_window": 512,
        "sliding_window_pattern": 6}),
    "gpt2": (124_439_808, {
        "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_embd": 768, "n_layer": 12,
        "n_head": 12, "n_positions": 1024, "n_ctx": 1024}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_have_the_published_count(name):
    count, fields = PUBLISHED[name]
    config = config_from_hf(fields)
    assert parameter_count(config) - config.d_model == count


def test_what_is_local_and_what_is_not_rotated():
    configs = {name: config_from_hf(fields) for name, (_, fields) in PUBLISHED.items()}
    mistral, gemma2, gemma3 = (configs[name] for name in ("Mistral-7B-v0.1", "gemma-2-2b", "gemma-3-1b-pt"))
    assert (mistral.window, mistral.local_layers) == (4096, tuple(range(32)))
    assert (mistral.context_length(), mistral.context_length(left_to_right=True)) == (4096, 32768)
    assert (gemma2.window, gemma2.local_layers) == (4096, tuple(range(0, 26, 2)))
    assert (gemma3.window, gemma3.local_rope_theta, gemma3.rope_theta) == (512, 1e4, 1e6)
    assert set(range(26)) - set(gemma3.local_layers) == {5, 11, 17, 23}
    assert configs["SmolLM3-3B"].unrotated_layers == tuple(range(3, 36, 4))
    for name in ("Qwen2.5-0.5B", "Qwen3-0.6B", "SmolLM3-3B", "SmolLM2-135M"):
        assert (configs[name].local_layers, configs[name].left_length) == ((), None)


@pytest.mark.parametrize("name", FAMILIES)
def test_configs_read_back(name):
    config = model_config(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert (
        config_from_hf({**FAMILIES[name][1], "model_type": FAMILIES[name][1].get("model_type", name)})
        == config
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window: must be a whole number, at least 1"),
        ({"max_length": 64}, f"max_length: 64 is longer than window={WINDOW}"),
        ({"local_layers": [4]}, "local_layers: must be indices of the 4 layers"),
        ({"unrotated_layers": 3}, "unrotated_layers: must be indices"),
        ({"final_softcap": -1.0}, "final_softcap: must be a number, above 0"),
        ({"norm": "rsm"}, "norm: must be one of rms, rms_offset, layer, got 'rsm'; did you mean 'rms'"),
        ({"residual": "release"}, "residual: 'release' adds to the normed state"),
    ],
)
def test_switches_that_make_no_model(changes, message):
    with pytest.raises(InputError, match=message):
        ModelConfig.from_dict(model_config("gemma2").to_dict() | changes)


def test_names_in_the_table():
    """With prefix, without, and what is no parameter."""
    names = ["h.0.attn.bias", "h.0.attn.c_attn.bias", "transformer.wte.weight", "query_embed", "other"]
    assert table_names(names, model_config("gpt2")) == {
        "transformer.h.0.attn.c_attn.bias": "h.0.attn.c_attn.bias",
        "transformer.wte.weight": "transformer.wte.weight",
        "model.query_embed": "query_embed",
        "other": "other",
    }
