"""Every family: the content stream is the pretrained model, and its files return as they were.

Each model is one of transformers' own, random to the last norm and bias, with all the options on that
the family has (`tests.tiny_families`).
"""

import importlib.util

import numpy as np
import pytest

from a3_jax.checkpoints.conversion import convert
from a3_jax.checkpoints.loading import open_checkpoint
from a3_jax.decoding import generate, score
from a3_jax.errors import InputError
from tests.test_conversion_parity import our_logits
from tests.test_conversion_roundtrip import QUERY, assert_same_tensors, read_all
from tests.tiny_families import FAMILIES, WINDOW, YARN, edit_config, rewrite, write_family

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
        reason="needs torch and transformers",
    ),
]
every_family = pytest.mark.parametrize("name", FAMILIES)


def their_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.int64)).logits.float().numpy()


def assert_parity(directory, model, length=40):
    """Invariant 1, beyond windows and original contexts."""
    tokens = np.random.default_rng(1).integers(0, 61, (2, length)).astype(np.int32)
    theirs = their_logits(model, tokens)
    assert np.abs(theirs).max() > 1  # a dead model would agree with anything
    np.testing.assert_allclose(our_logits(open_checkpoint(directory), tokens), theirs, atol=1e-4)


@every_family
def test_logits_equal_those_of_transformers(tmp_path, name):
    assert_parity(tmp_path, write_family(tmp_path, name))


VARIANTS = {
    "llama, another activation": ("llama", {"hidden_act": "gelu", "tie_word_embeddings": True}),
    "llama, yarn's own attention": ("llama", {"rope_scaling": {
        **YARN, "attention_factor": 1.3, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}}),
    "llama, yarn of two scales": ("llama", {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4}}),
    "llama, dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "qwen2, no window": ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": True}),
    "smollm3, every fourth layer": ("smollm3", {
        "no_rope_layers": None, "use_sliding_window": False, "rope_scaling": YARN}),
    "gemma2, no softcaps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3, untied": ("gemma3", {"tie_word_embeddings": False, "layer_types": None}),
    "gpt2, unscaled": ("gpt2", {"scale_attn_weights": False, "activation_function": "relu"}),
    "gpt2, odd heads": ("gpt2", {"n_embd": 36, "n_inner": None, "tie_word_embeddings": False}),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_a_family(tmp_path, variant):
    name, changes = VARIANTS[variant]
    assert_parity(tmp_path, write_family(tmp_path, name, seed=2, **changes))


@every_family
def test_fields_of_transformers_4(tmp_path, name):
    """Rotary fields as version 4 wrote them, and no layer types: the same model."""
    write_family(tmp_path, name)
    before = open_checkpoint(tmp_path).config
    changes = FAMILIES[name][1]
    if name == "gemma3":
        changes = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 2,
                   "rope_scaling": {"rope_type": "linear", "factor": 8.0}}  # fmt: skip
    edit_config(tmp_path, **{"layer_types": None, "rope_parameters": None, **changes})
    assert open_checkpoint(tmp_path).config == before


@every_family
def test_tensors_return_bit_for_bit_and_open_in_transformers(tmp_path, name):
    import transformers

    write_family(tmp_path / "hf", name, dtype="bfloat16")
    convert(tmp_path / "hf", tmp_path / "a3")
    convert(tmp_path / "a3", tmp_path / "back", to="hf")
    back = read_all(tmp_path / "back")
    assert back.pop(QUERY).shape == (1, 1, 32)
    assert_same_tensors(back, read_all(tmp_path / "hf"))
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_text().split() == (tmp_path / "hf" / file).read_text().split()
    before, after = (
        their_logits(
            transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / directory, dtype="float32", attn_implementation="eager"
            ).eval(),
            np.arange(20)[None],
        )
        for directory in ("hf", "back")
    )
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(
    ("name", "prefix"), [("qwen3", "model."), ("gpt2", "transformer."), ("llama", "model.")]
)
def test_names_without_prefix_are_read_and_written(tmp_path, name, prefix):
    """As files of the model without its head have them; GPT-2's are published so."""
    model = write_family(tmp_path / "hf", name, tie_word_embeddings=True)
    rewrite(tmp_path / "hf", lambda tensors: {k.removeprefix(prefix): v for k, v in tensors.items()})
    assert_parity(tmp_path / "hf", model)
    convert(tmp_path / "hf", tmp_path / "back", to="hf", query_vector=False)
    assert_same_tensors(read_all(tmp_path / "back"), read_all(tmp_path / "hf"))


def test_a_tensor_with_and_without_prefix_is_refused(tmp_path):
    write_family(tmp_path, "gpt2")
    rewrite(tmp_path, lambda tensors: tensors | {"wpe.weight": tensors["transformer.wpe.weight"]})
    with pytest.raises(InputError, match=r"wpe\.weight: is the same tensor as"):
        open_checkpoint(tmp_path)


BUFFERS = {
    "llama": {"model.rotary_emb.inv_freq": 8, "model.layers.0.self_attn.rotary_emb.inv_freq": 8},
    "gpt2": {"transformer.h.0.attn.bias": (1, 1, 64, 64), "transformer.h.3.attn.masked_bias": ()},
}


@pytest.mark.parametrize("bare", [False, True], ids=["prefixed", "bare"])
@pytest.mark.parametrize("name", BUFFERS)
def test_known_buffers_are_passed_over(tmp_path, name, bare):
    """By name, of any shape and type; what is written back has none."""
    model = write_family(tmp_path / "hf", name)
    plain = read_all(tmp_path / "hf")
    prefix = {"llama": "model.", "gpt2": "transformer."}[name]
    buffers = {key.removeprefix(prefix if bare else ""): np.ones(shape, np.uint8)
               for key, shape in BUFFERS[name].items()}  # fmt: skip
    rewrite(tmp_path / "hf", lambda tensors: tensors | buffers)
    assert_parity(tmp_path / "hf", model)
    convert(tmp_path / "hf", tmp_path / "back", to="hf", query_vector=False)
    assert_same_tensors(read_all(tmp_path / "back"), plain)


@pytest.mark.parametrize(("name", "embedding"), [
    ("gemma2", "model.embed_tokens.weight"), ("gpt2", "transformer.wte.weight")])  # fmt: skip
def test_a_head_stored_beside_its_embedding(tmp_path, name, embedding):
    """Equal: read, and written again. Another: refused."""
    model = write_family(tmp_path / "hf", name)
    rewrite(tmp_path / "hf", lambda tensors: tensors | {"lm_head.weight": tensors[embedding].copy()})
    assert_parity(tmp_path / "hf", model)
    convert(tmp_path / "hf", tmp_path / "back", to="hf", query_vector=False)
    assert_same_tensors(read_all(tmp_path / "back"), read_all(tmp_path / "hf"))
    rewrite(tmp_path / "hf", lambda tensors: tensors | {"lm_head.weight": tensors[embedding] + 1})
    with pytest.raises(InputError, match=r"lm_head\.weight: differs from the embedding"):
        open_checkpoint(tmp_path / "hf")


@pytest.mark.parametrize(("name", "embedding", "stored"), [
    ("gemma2", "model.embed_tokens.weight", "lm_head.weight"),
    ("smollm3", "model.embed_tokens.weight", "lm_head.weight"),
    ("gpt2", "transformer.wte.weight", "lm_head.weight"),
])  # fmt: skip
def test_a_tied_matrix_stored_as_the_head_alone(tmp_path, name, embedding, stored):
    """It is the embedding, and returns under the name that it had."""
    model = write_family(tmp_path / "hf", name)
    rewrite(tmp_path / "hf", lambda tensors: tensors | {stored: tensors.pop(embedding)})
    assert_parity(tmp_path / "hf", model)
    checked = convert(tmp_path / "hf", tmp_path / "a3", check=True)
    assert checked is not None and (checked.difference or 0) < 1e-4
    convert(tmp_path / "a3", tmp_path / "back", to="hf", query_vector=False)
    assert_same_tensors(read_all(tmp_path / "back"), read_all(tmp_path / "hf"))
    edit_config(tmp_path / "hf", tie_word_embeddings=False)
    with pytest.raises(InputError, match=f"{embedding}: tensor is missing"):
        open_checkpoint(tmp_path / "hf")


def test_an_untied_config_without_head_is_refused(tmp_path):
    write_family(tmp_path, "gemma3")
    edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"lm_head\.weight: tensor is missing.*tie_word_embeddings"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_left_to_right_beyond_the_window(tmp_path, name):
    """Scores and greedy tokens are those of transformers; in any other order the window is the limit."""
    model = write_family(tmp_path, name)
    checkpoint = open_checkpoint(tmp_path)
    tokens = np.random.default_rng(3).integers(0, 61, (1, 3 * WINDOW))
    law = their_logits(model, tokens)[0].astype(np.float64)
    law -= np.log(np.exp(law).sum(axis=-1, keepdims=True))
    expected = law[np.arange(len(law) - 1), tokens[0, 1:]]
    item = {"tokens": tokens[0].tolist()}
    found = score(checkpoint, [item], model="ar", dtype="float32")[0]["logprobs"]
    np.testing.assert_allclose(found[1:], expected, atol=1e-4)

    prompt = tokens[0, :5].tolist()
    blanks = {"tokens": prompt + [None] * (2 * WINDOW)}
    (written,) = generate(checkpoint, [blanks], model="ar", dtype="float32")
    for place in range(5, 5 + 2 * WINDOW):
        assert written["tokens"][place] == their_logits(model, [written["tokens"][:place]])[0, -1].argmax()

    for call in (lambda: score(checkpoint, [item]), lambda: generate(checkpoint, [blanks])):
        with pytest.raises(InputError, match=f"tokens, more than the sliding window of {WINDOW}"):
            call()
