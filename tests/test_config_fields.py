"""Whatever a `config.json` says: it is read, or refused, or changes no number in transformers either."""

import copy
import importlib.util
import json

import numpy as np
import pytest

from a3_jax.checkpoints.hf_config import ARCHITECTURES, config_from_hf, read_config
from a3_jax.checkpoints.loading import open_checkpoint
from a3_jax.cli import main
from a3_jax.errors import InputError
from tests.tiny_families import FAMILIES, LLAMA3, edit_config, hf_fields
from tests.tiny_hf import write_tiny_llama

needs_torch = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
    reason="needs torch and transformers",
)
TOKENS = np.random.default_rng(0).integers(0, 61, (1, 24))
# What transformers' model code asks of any config, and what it doesn't know.
EXTRA = {
    "is_causal": [False], "per_layer_config": [{"1": {"intermediate_size": 24}}], "head_dim": [8, 20],
    "num_key_value_heads": [1], "use_bidirectional_attention": [True], "partial_rotary_factor": [0.5],
    "sliding_window": [5, None], "use_sliding_window": [True, False], "attention_chunk_size": [4],
    "layer_types": [["full_attention", "sliding_attention"] * 2, ["full_attention"] * 4, ["linear"] * 4],
    "rope_theta": [77.0], "rope_scaling": [LLAMA3, {"type": "linear", "factor": 3.0}],
    "original_max_position_embeddings": [7], "hidden_size": [16], "num_hidden_layers": [2],
    "max_position_embeddings": [999], "attention_bias": [True], "mlp_bias": [True], "logits_scaling": [2.0],
    "pruned_heads": [{"0": [1]}], "tie_word_embeddings": [True, False], "hidden_act": ["relu"],
    "is_decoder": [True], "add_cross_attention": [True], "qk_norm": [True],
}  # fmt: skip


def other_values(value):
    """Values of the same kind that mean something else, and of other kinds for null."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value * 2, value + 1, None]
    if isinstance(value, str):
        return ["relu", "linear", "anything"]
    if isinstance(value, list):
        swapped = {"full_attention": "sliding_attention", "sliding_attention": "full_attention", 0: 1, 1: 0}
        return [[swapped.get(item, item) for item in value], None]
    return [3, 0.5, True, "anything"] if value is None else [None]


def perturbed(config: dict, front=()):
    """(path of a field, another value of it), fields of objects inside among them."""
    for field, value in config.items():
        if isinstance(value, dict) and value:
            yield from perturbed(value, (*front, field))
        yield from (((*front, field), other) for other in other_values(value))
    if not front:
        yield from (((field,), other) for field, others in EXTRA.items() for other in others)


def changed(config: dict, path, value) -> dict:
    inner = value if len(path) == 1 else changed(config[path[0]], path[1:], value)
    return {**config, path[0]: inner}


def read(config):
    """Our model and what was left aside; None where it was refused."""
    try:
        return read_config(config)
    except InputError:
        return None


@pytest.fixture(scope="module")
def their_model(tmp_path_factory):
    """A function of a config: transformers' model with random parameters, None where it makes none."""
    import torch
    import transformers

    place = tmp_path_factory.mktemp("config")

    def make(config, state=None):
        (place / "config.json").write_text(json.dumps(config))
        try:
            made = transformers.AutoConfig.from_pretrained(place)
            made._attn_implementation = "eager"
            model = transformers.AutoModelForCausalLM.from_config(made).float().eval()
            if state is not None:
                told = model.load_state_dict(state, strict=False)
                assert not told.missing_keys and not told.unexpected_keys
            with torch.no_grad():
                rng = torch.Generator().manual_seed(0)
                for parameter in model.parameters() if state is None else ():
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng) + (parameter.ndim == 1))
                return model.state_dict(), model(torch.tensor(TOKENS)).logits.numpy()
        except Exception:  # what it refuses or can't run says nothing
            return None

    transformers.utils.logging.set_verbosity_error()
    return make


def check_same(changes, config, base, their_model):
    """The logits of transformers under all changes at once, or, where it makes no model of that, under each.

    Returns:
      The fields whose change was seen to do nothing.
    """
    together = config
    for path, value in changes:
        together = changed(together, path, value)
    found = read(together)
    theirs = their_model(together, base[0]) if found and found[0] == read(config)[0] else None
    if theirs is not None:
        np.testing.assert_allclose(theirs[1], base[1], atol=1e-4, err_msg=str(changes))
        return {path[0] for path, _ in changes}
    if len(changes) < 2:
        return set()
    half = len(changes) // 2
    parts = changes[:half], changes[half:]
    return set().union(*(check_same(part, config, base, their_model) for part in parts))


@pytest.mark.torch
@needs_torch
@pytest.mark.parametrize("name", FAMILIES)
def test_no_field_is_passed_over(name, their_model):
    """Where the model that we read stays the same, so do the logits of transformers."""
    import transformers

    def make(fields):
        return transformers.AutoConfig.for_model(**{k: v for k, v in fields.items() if k != "architectures"})

    def is_valid(fields):  # most of what isn't is found out here, which takes a millisecond
        try:
            return bool(make(fields))
        except Exception:
            return False

    fields = hf_fields(name)
    config = json.loads(make(fields).to_json_string(use_diff=False))
    config["architectures"] = fields["architectures"]
    ours, unread = read_config(config)
    assert not unread
    rounds: list[dict] = []  # in each a field has one other value
    for path, value in perturbed(config):
        found = read(changed(config, path, value))
        if found is None or found[0] != ours:
            continue
        assert path[0] not in config or not found[1], f"{path} is a field of transformers, and not listed"
        if not is_valid(changed(config, path, value)):
            continue
        chosen = next((one for one in rounds if path not in one), None)
        if chosen is None:
            rounds.append(chosen := {})
        chosen[path] = value
    base = their_model(config)
    base = copy.deepcopy(base[0]), base[1]
    compared = set().union(*(check_same([*one.items()], config, base, their_model) for one in rounds))
    assert {"initializer_range", "eos_token_id", "use_cache", "logits_scaling"} <= compared


@pytest.mark.torch
@needs_torch
@pytest.mark.parametrize(("name", "mixed"), [("mistral", True), ("mistral", False), ("smollm3", True)])
def test_layer_types_are_followed(tmp_path, name, mixed):
    """Of Mistral too, which transformers then takes for a Ministral."""
    import torch
    import transformers

    from tests.test_conversion_parity import our_logits
    from tests.tiny_families import write_family

    kinds = ["sliding_attention", "full_attention"] * 2 if mixed else ["full_attention"] * 4
    write_family(tmp_path, name, seed=3)
    edit_config(tmp_path, layer_types=kinds, sliding_window=5, use_sliding_window=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(
        our_logits(open_checkpoint(tmp_path), TOKENS.astype(np.int32)), theirs, atol=1e-4
    )


def test_ministral_is_a_mistral_with_layer_types():
    kinds = ["full_attention", "sliding_attention"] * 2
    config = config_from_hf(hf_fields("mistral", layer_types=kinds))
    assert config.local_layers == (1, 3) and config.window == 12
    other = hf_fields("mistral", layer_types=kinds, architectures=["MinistralForCausalLM"])
    assert config_from_hf({**other, "model_type": "ministral"}) == config
    assert config_from_hf({**other, "model_type": "ministral", "architectures": None}) == config


@pytest.mark.parametrize(
    ("name", "changes", "mentions"),
    [
        ("mistral", {"sliding_window": None, "layer_types": ["sliding_attention"] * 4},
         ["layer_types", "sliding_window is null"]),
        ("qwen2", {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 4},
         ["layer_types", "use_sliding_window is false"]),
        ("llama", {"is_causal": False}, ["is_causal", "must be True, got False"]),
        ("olmo2", {"use_bidirectional_attention": True}, ["use_bidirectional_attention", "not causal"]),
        ("llama", {"per_layer_config": {"0": {"head_dim": 8}}}, ["per_layer_config", "head_dim"]),
        ("qwen3", {"compression_config": {"bits": 4}}, ["compression_config", "quantised"]),
        ("gpt2", {"pruned_heads": {"0": [1]}}, ["pruned_heads"]),
        ("gpt2", {"num_hidden_layers": 2}, ["n_layer", "4 contradicts num_hidden_layers=2"]),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}}},
         ["sliding_attention.partial_rotary_factor"]),
    ],
)  # fmt: skip
def test_what_would_change_numbers_is_refused(name, changes, mentions):
    with pytest.raises(InputError) as caught:
        config_from_hf(hf_fields(name, **changes), "config.json")
    assert all(mention in str(caught.value) for mention in ["config.json", *mentions]), str(caught.value)


TYPES = {known.model_types[-1 if known.family == "gemma3" else 0] for known in ARCHITECTURES.values()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_families_in_one_config_are_refused(architecture):
    """In one line that names both fields; the one that transformers follows is `model_type`."""
    family = ARCHITECTURES[architecture].family
    fields = hf_fields({"llada": "llama"}.get(family, family), architectures=[architecture])
    for kind in {*TYPES, "bert"} - {*ARCHITECTURES[architecture].model_types}:
        with pytest.raises(InputError) as caught:
            config_from_hf({**fields, "model_type": kind}, "config.json")
        line = str(caught.value)
        assert all(part in line for part in ("architectures", "model_type", architecture, repr(kind))), line


def test_the_command_refuses_two_families(tmp_path, capsys):
    write_tiny_llama(tmp_path / "hf")
    edit_config(tmp_path / "hf", model_type="mistral")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "a3")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "config.json: architectures: 'LlamaForCausalLM' and model_type 'mistral'" in err
    assert not (tmp_path / "a3").exists()


def test_spellings_that_transformers_takes_too():
    fields = hf_fields("gpt2")
    renamed = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    assert config_from_hf({renamed.get(k, k): v for k, v in fields.items()}) == config_from_hf(fields)
    assert config_from_hf({**fields, "head_dim": 3, "num_key_value_heads": 1}) == config_from_hf(fields)


def test_unknown_fields_are_named_in_one_warning(tmp_path, caplog):
    write_tiny_llama(tmp_path)
    edit_config(tmp_path, logits_scaling=8.0, embedding_multiplier=12, not_on=False, empty={}, nothing=None,
                rope_scaling={"rope_type": "linear", "factor": 2.0, "alpha": 3})  # fmt: skip
    open_checkpoint(tmp_path)
    (warning,) = [line for line in caplog.messages if "left aside" in line]
    assert (
        warning.endswith("logits_scaling, embedding_multiplier, rope_scaling.alpha")
        and "config.json" in warning
    )


OF_THE_HUB = {  # fields as published files have them, beside those of the tiny models
    "llama": {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "initializer_range": 0.02,
        "eos_token_id": [128001, 128008], "mlp_bias": False, "pretraining_tp": 1, "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0", "use_cache": True, "unsloth_fixed": True,
        "quantization_config": None, "_name_or_path": "meta/x", "transformers.js_config": {"dtype": "q4"},
        "pad_token_id": 128004},
    "qwen2": {"use_mrope": False, "attention_dropout": 0.0, "tie_word_embeddings": False, "use_cache": True},
    "gemma2": {
        "_name_or_path": "x", "cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
    "gemma3": {
        "_sliding_window_pattern": 6, "use_bidirectional_attention": False, "attn_logit_softcapping": None},
    "smollm3": {"auto_map": {}, "pretraining_tp": 2, "max_window_layers": 0, "use_sliding_window": False},
    "gpt2": {
        "attn_pdrop": 0.1, "embd_pdrop": 0.1, "n_ctx": 1024, "resid_pdrop": 0.1, "summary_type": "cls_index",
        "summary_first_dropout": 0.1, "summary_use_proj": True, "summary_proj_to_labels": True,
        "task_specific_params": {"text-generation": {"do_sample": True}}, "do_sample": True, "top_k": 50,
        "id2label": {"0": "LABEL_0"}, "pruned_heads": {}, "torchscript": False, "finetuning_task": None,
        "gradient_checkpointing": False, "reorder_and_upcast_attn": False},
}  # fmt: skip


@pytest.mark.parametrize("name", OF_THE_HUB)
def test_fields_of_published_files_pass_without_a_word(name):
    _, unread = read_config(hf_fields(name, **OF_THE_HUB[name]))
    assert not unread
