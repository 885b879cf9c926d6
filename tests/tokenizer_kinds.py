"""A tokenizer of each kind that models come with, trained on a few lines."""

import functools
import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from a3_jax.tokenizer import Tokenizer, bytes_tokenizer, from_files

CORPUS = [
    "The cat sat on the mat, and then it left. She said: nothing more!",
    "def f(x):\n    y = x\n    y = y + 1\n    return y\n",
    "Question: what goes up?\nAnswer: the mat going home",
    '"Where is the dog?" asked Ann.\n\nShe called, and at last she found the dog',
    "Ann gave Sue the key because Ann was leaving.",
] * 20
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(**options) -> Tokenizer:
    """GPT-2's kind. `add_prefix_space`: RoBERTa's habit."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return _with_specials(tokenizer)


def llama3() -> Tokenizer:
    """Llama 3's kind: words by a pattern in which punctuation takes the line break after it."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    bos = tokenizer.token_to_id("<s>")
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return _with_specials(tokenizer)


def qwen() -> Tokenizer:
    """Qwen's kind: composed characters (NFC), single digits, no BOS."""
    files = llama3().files()
    state = json.loads(files["tokenizer.json"])
    state["normalizer"] = {"type": "NFC"}
    state["post_processor"] = None
    (split, _) = state["pre_tokenizer"]["pretokenizers"]
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace("{1,3}", "")
    return from_files(files | {"tokenizer.json": json.dumps(state)})


def sentence_piece(scheme: str) -> Tokenizer:
    """SentencePiece's kind with byte fallback. `scheme`: "prepend" (a normalizer), or of Metaspace."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=250, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] |= {name: len(vocabulary) + index for index, name in enumerate(_BYTES)}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    if scheme == "prepend":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return _with_specials(tokenizer)


def _with_specials(tokenizer: tokenizers.Tokenizer) -> Tokenizer:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    return from_files({"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config)})


KINDS = {
    "bytes": bytes_tokenizer,
    "byte_level": functools.cache(byte_level),
    "prefix_space": functools.cache(functools.partial(byte_level, add_prefix_space=True)),
    "llama3": functools.cache(llama3),
    "qwen": functools.cache(qwen),
    "prepend": functools.cache(functools.partial(sentence_piece, "prepend")),
    "first": functools.cache(functools.partial(sentence_piece, "first")),
    "always": functools.cache(functools.partial(sentence_piece, "always")),
    "never": functools.cache(functools.partial(sentence_piece, "never")),
}
