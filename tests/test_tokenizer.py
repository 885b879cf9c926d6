"""Text to ids and back: Hugging Face files, bytes, special tokens, BOS, blanks, damaged files."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from a3_jax.errors import InputError
from a3_jax.tokenizer import bytes_tokenizer, from_files, has_tokenizer, load_tokenizer

AWKWARD_TEXTS = ["", " ", "a", "naïve café", "🙂👩‍🚀", "tabs\tand\r\nlines\x00", "<s> typed </s> <bos>"]


def byte_fallback_tokenizer(**config):
    """SentencePiece style: real token 0, byte fallback, BOS added, pad = EOS, a saved truncation."""
    words = ["▁", "▁the", "▁cat", "t", "h", "e", "c", "a"]
    vocabulary = {word: index for index, word in enumerate(words)}
    vocabulary |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("c", "a"), ("ca", "t"), ("▁", "cat")]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("</s>"), pad_token="</s>", length=7)
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(
            {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "pad_token": "</s>"} | config
        ),
        "special_tokens_map.json": json.dumps({"eos_token": "</s>"}),
    }


def word_tokenizer(words=("zero", "one", "two")):
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return from_files({"tokenizer.json": tokenizer.to_str()})


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_bytes_are_the_utf8_bytes(text):
    tokenizer = bytes_tokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_bytes_numbers():
    tokenizer = bytes_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)
    assert not tokenizer.adds_bos
    assert tokenizer.encode("a", bos="yes") == [256, 97]
    assert tokenizer.decode([256, 97, 257]) == "a"
    assert tokenizer.decode([255, 65]) == "�A"  # a byte that is no UTF-8


@pytest.mark.parametrize("text", AWKWARD_TEXTS)
def test_byte_fallback_round_trip(text):
    tokenizer = from_files(byte_fallback_tokenizer())
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, bos="no") == ids[1:]


def test_saved_truncation_and_padding_are_dropped():
    tokenizer = from_files(byte_fallback_tokenizer())
    assert len(tokenizer.encode("the cat the cat the cat", bos="no")) == 6
    assert len(tokenizer.encode("the", bos="no")) == 1


@pytest.mark.parametrize("text", ["<s>", "</s>", "the <s> cat</s>"])
def test_typed_special_tokens_stay_text(text):
    tokenizer = from_files(byte_fallback_tokenizer())
    ids = tokenizer.encode(text, bos="no")
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode(ids) == text


def test_special_ids_come_from_the_companion_files():
    tokenizer = from_files(byte_fallback_tokenizer())
    assert tokenizer.decode([tokenizer.bos_id, tokenizer.eos_id]) == ""
    assert tokenizer.adds_bos and tokenizer.bos_id != tokenizer.eos_id
    assert tokenizer.vocab_size == tokenizer.eos_id + 1


def test_special_ids_without_companion_files():
    only_main = {"tokenizer.json": byte_fallback_tokenizer()["tokenizer.json"]}
    tokenizer, full = from_files(only_main), from_files(byte_fallback_tokenizer())
    assert (tokenizer.bos_id, tokenizer.eos_id) == (full.bos_id, full.eos_id)
    assert tokenizer.fingerprint == full.fingerprint


@pytest.mark.parametrize("told", [True, False, None])
def test_the_post_processor_decides_about_bos(told):
    """As in transformers 5, `add_bos_token` of the config changes nothing about these files."""
    assert from_files(byte_fallback_tokenizer(add_bos_token=told)).adds_bos
    config = {"bos_token": "<bos>", "add_bos_token": told}
    files = bytes_tokenizer().files() | {"tokenizer_config.json": json.dumps(config)}
    assert not from_files(files).adds_bos


def test_no_special_tokens_at_all():
    tokenizer = word_tokenizer()
    assert tokenizer.bos_id is None and tokenizer.eos_id is None and not tokenizer.adds_bos
    assert tokenizer.encode("zero two") == [0, 2]
    assert tokenizer.decode([0, 2]) == "zero two"
    with pytest.raises(InputError, match="no BOS"):
        tokenizer.encode("zero", bos="yes")


def test_vocab_size_counts_holes():
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 9}, unk_token="a"))
    assert from_files({"tokenizer.json": tokenizer.to_str()}).vocab_size == 10


def test_files_and_fingerprint_survive(tmp_path):
    files = byte_fallback_tokenizer()
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "unrelated.txt").write_text("x")
    tokenizer = load_tokenizer(tmp_path)
    assert has_tokenizer(tmp_path)
    assert tokenizer.files() == files
    assert from_files(tokenizer.files()).fingerprint == tokenizer.fingerprint
    assert load_tokenizer(tmp_path / "tokenizer.json").encode("the cat") == tokenizer.encode("the cat")
    assert tokenizer.fingerprint != bytes_tokenizer().fingerprint


@pytest.mark.parametrize("broken", ["", "{", "{}", '{"version": "1.0", "model": {"type": "Unheard"}}'])
def test_damaged_tokenizer_file(tmp_path, broken):
    (tmp_path / "tokenizer.json").write_text(broken)
    with pytest.raises(InputError) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_damaged_tokenizer_config(tmp_path):
    (tmp_path / "tokenizer.json").write_text(bytes_tokenizer().files()["tokenizer.json"])
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config.json"):
        load_tokenizer(tmp_path)


def test_no_tokenizer_there(tmp_path):
    assert not has_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(InputError):
        from_files({})


def test_unencodable_text_and_policy():
    with pytest.raises(InputError, match="surrogate"):
        bytes_tokenizer().encode("\ud800")
    with pytest.raises(InputError, match="UNK"):
        word_tokenizer().encode("three")
    with pytest.raises(InputError, match="bos"):
        bytes_tokenizer().encode("a", bos="maybe")
