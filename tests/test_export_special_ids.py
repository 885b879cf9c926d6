"""What exports say of BOS, EOS and padding: what the tokenizer says, and of a source what it said."""

import json

import pytest
import tokenizers

from a3_jax.checkpoints.a3_format import Meta, save_checkpoint
from a3_jax.checkpoints.conversion import convert
from a3_jax.model.config import ModelConfig
from a3_jax.tokenizer import bytes_tokenizer, from_files
from tests import tiny
from tests.tiny_hf import write_tiny_llama

CONFIG = ModelConfig(**{**tiny.CONFIG.to_dict(), "vocab_size": 260})
NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")


def without_special_tokens():
    inner = json.loads(bytes_tokenizer().files()["tokenizer.json"])
    return from_files({"tokenizer.json": json.dumps({**inner, "added_tokens": []})})


def with_padding():
    inner = tokenizers.Tokenizer.from_str(bytes_tokenizer().files()["tokenizer.json"])
    inner.add_special_tokens(["<pad>"])
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": {"content": "<pad>"}}
    return from_files({"tokenizer.json": inner.to_str(), "tokenizer_config.json": json.dumps(names)})


def told(directory):
    """The three fields of `config.json`, which must be there, and those of `generation_config.json`."""
    config, generation = (
        json.loads((directory / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    return [config[name] for name in NAMES], [generation[name] for name in NAMES]


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (bytes_tokenizer, [256, 257, None]),
        (lambda: bytes_tokenizer().with_eos_ids([10, 33]), [256, [257, 10, 33], None]),
        (with_padding, [256, 257, 258]),
        (without_special_tokens, [None, None, None]),
        (lambda: None, [None, None, None]),
    ],
    ids=["bytes", "several", "padding", "none", "tokens"],
)
def test_a_model_from_nothing_says_what_its_tokenizer_says(tmp_path, tokenizer, expected):
    """To Hugging Face and to the authors' format; nulls where transformers would assume ids of its own."""
    for to, residual in (("hf", "standard"), ("release", "release")):
        config = ModelConfig(**{**CONFIG.to_dict(), "residual": residual})
        save_checkpoint(tmp_path / f"a3-{to}", tiny.params(config), Meta(config, step=3), tokenizer())
        convert(tmp_path / f"a3-{to}", tmp_path / to, to=to)
        assert told(tmp_path / to) == (expected, expected)
        assert not (tmp_path / to / "config.json").read_text().count("_token_id") > 3
    convert(tmp_path / "hf", tmp_path / "again")
    convert(tmp_path / "again", tmp_path / "back", to="hf")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_of_a_source_what_is_absent_is_added(tmp_path):
    """And nothing else: what it says of EOS, or of padding, stays."""
    write_tiny_llama(tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    fields = json.loads(file.read_text())
    for given, expected in (
        ({}, [256, 257]),
        ({"eos_token_id": None}, [256, None]),
        ({"bos_token_id": 3}, [3, 257]),
    ):
        source = {name: value for name, value in fields.items() if name not in NAMES} | given
        file.write_text(json.dumps(source))
        convert(tmp_path / "hf", tmp_path / f"{expected}", to="hf")
        written = json.loads((tmp_path / f"{expected}" / "config.json").read_text())
        assert written == source | dict(zip(NAMES, expected))
    file.write_text(json.dumps({name: value for name, value in fields.items() if name not in NAMES}))
    (tmp_path / "hf" / "tokenizer.json").unlink()
    convert(tmp_path / "hf", tmp_path / "tokens", to="hf")
    assert json.loads((tmp_path / "tokens" / "config.json").read_text()) == json.loads(file.read_text())


@pytest.mark.torch
@pytest.mark.parametrize("ids", [[], [33, 34]], ids=["one", "several"])
def test_transformers_begins_and_stops_with_them(tmp_path, ids):
    """`generate` ends at the first of them that the model writes; without, it goes on."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = bytes_tokenizer().with_eos_ids(ids)
    save_checkpoint(tmp_path / "a3", tiny.params(CONFIG), Meta(CONFIG, step=3), tokenizer)
    convert(tmp_path / "a3", tmp_path / "hf", to="hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    generation, wanted = model.generation_config, list(tokenizer.eos_ids)
    assert generation.bos_token_id == model.config.bos_token_id == 256
    assert generation.eos_token_id == model.config.eos_token_id == (wanted if ids else 257)
    with torch.no_grad():
        for end in wanted:  # a head that always gives this token
            model.lm_head.weight.zero_()
            hidden = model.model(torch.tensor([[97]])).last_hidden_state[0, -1]
            model.lm_head.weight[end] = hidden
            assert model.generate(torch.tensor([[97]]), max_new_tokens=6, do_sample=False).tolist() == [
                [97, end]
            ]
        model.lm_head.weight.zero_()
        model.lm_head.weight[1] = hidden  # transformers' own idea of BOS, and 2 of EOS
        out = model.generate(torch.tensor([[97]]), max_new_tokens=2, do_sample=False)
        assert out.tolist() == [[97, 1, 1]]
