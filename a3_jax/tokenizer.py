"""Text to token ids and back: any Hugging Face `tokenizer.json`, or plain bytes.

Text is only ever text here: a special token typed in it (`<s>`, `<|end_of_text|>`) is encoded like
any other characters, never as the special id. Of what a tokenizer's post-processor would add, only
BOS is kept. Nothing is compared with a padding id: a tokenizer may have a real token 0 and pad = EOS.
"""

import contextlib
import copy
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers

from a3_jax.checks import one_of
from a3_jax.errors import InputError, nearest
from a3_jax.paths import as_path, parse_json, read_text, snapshot_hint

BOS_POLICIES = ("auto", "yes", "no")
MAX_VOCAB_SIZE = 1 << 24  # far above any vocabulary: a model has a row for each id

GENERATION_FILE = "generation_config.json"
_MAIN_FILE, _MODEL_FILE = "tokenizer.json", "config.json"
_SPECIAL_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_COMPANION_FILES = (*_SPECIAL_TOKEN_FILES, "added_tokens.json", "chat_template.jinja", GENERATION_FILE)
_BOS_NAMES = ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]")
_EOS_NAMES = ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>", "[EOS]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_BEFORE = ("a", ".", "\n", "0", "\ue000")  # what text may follow; the last is in no vocabulary

_SPACE_MARKS = ("▁", "Ġ", " ")  # how vocabularies write a space at the front of a word

Offsets = tuple[list[int], list[tuple[int, int]]]


class Tokenizer:
    """A Hugging Face tokenizer with its files.

    Attributes:
      vocab_size: largest id + 1, added tokens included.
      bos_id, eos_id, pad_id: int, or None where the tokenizer has none.
      adds_bos: whether its own post-processor puts BOS first; what `bos="auto"` follows.
    """

    def __init__(self, files: dict[str, str], file=None):
        """From the texts of its files, by name. `file` names them in errors (see `from_files`)."""
        self._files, self._stated = dict(files), ()
        self._tokenizer = _parse(self._files[_MAIN_FILE], file)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise InputError(f"token id {self.vocab_size - 1} is not below {MAX_VOCAB_SIZE}", file=file)
        with _refusing("not a tokenizer that can encode", file):
            first = self._tokenizer.encode("", add_special_tokens=True).ids[:1]
        configs = [_config(self._files, name, file) for name in _SPECIAL_TOKEN_FILES]
        self.bos_id = self._special_id(*_named(configs, "bos_token"), *_BOS_NAMES)
        self.eos_id = self._special_id(*_named(configs, "eos_token"), *_EOS_NAMES)
        self.pad_id = self._special_id(*_named(configs, "pad_token"))
        if self.bos_id is None and first != [self.eos_id]:  # some add EOS alone
            self.bos_id = next(iter(first), None)
        self.adds_bos = bool(first) and first[0] == self.bos_id
        # Nothing else of the post-processor is wanted, least of all offsets that leave out spaces.
        self._tokenizer.post_processor = None
        generation = _config(self._files, GENERATION_FILE, file)
        self._state(eos_ids_in(generation, None if file is None else as_path(file) / GENERATION_FILE))

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a text: `eos_id`, then those that the model's files state beside it."""
        own = () if self.eos_id is None else (self.eos_id,)
        return tuple(dict.fromkeys((*own, *self._stated)))

    def with_eos_ids(self, ids: Iterable[int], below: int = MAX_VOCAB_SIZE) -> "Tokenizer":
        """Returns the same tokenizer with more ids that end a text, all of them below a number of tokens."""
        other = copy.copy(self)
        other._state(token for token in (*self._stated, *ids) if token < below)
        return other

    def _state(self, ids: Iterable[int]) -> None:
        """Keeps ids beside `eos_id`, and nothing else of `generation_config.json`, among the files."""
        self._stated = tuple(token for token in dict.fromkeys(ids) if token != self.eos_id)
        self._files = {name: text for name, text in self._files.items() if name != GENERATION_FILE}
        if self._stated:
            self._files[GENERATION_FILE] = json.dumps({"eos_token_id": list(self.eos_ids)}) + "\n"

    def _special_id(self, *names) -> int | None:
        """Returns the id of the first of these names that is in the vocabulary."""
        ids = (self._tokenizer.token_to_id(name) for name in names)
        return next((token for token in ids if token is not None), None)

    def encode(self, text: str, bos: str = "auto") -> list[int]:
        """Token ids of a text; BOS first if `bos` is "yes", or "auto" and the tokenizer adds one."""
        return self.encode_batch([text], bos)[0]

    def encode_batch(self, texts: list[str], bos: str = "auto") -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        front = self._front(bos)
        try:
            with _refusing("the tokenizer can't encode the text"):  # such as for a missing [UNK]
                encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except InputError as error:
            if any(_SURROGATE.search(text) for text in texts):
                raise InputError("text holds half of a surrogate pair, which is no character") from error
            raise
        return [front + encoding.ids for encoding in encodings]

    def encode_with_offsets(self, texts: list[str], goes_on: bool = False) -> list[Offsets]:
        """Token ids of texts without BOS, and the characters that each token covers.

        Args:
          texts: encoded each by itself.
          goes_on: encodes each as what follows other text, so that nothing is put in front of it.

        Returns:
          (ids, [(start, end) of each token in its text]) per text. The tokens of one character written
          in several bytes all cover it.
        """
        if goes_on:
            return [self._continued(text) for text in texts]
        with _refusing("the tokenizer can't encode the text"):
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that follows other text: nothing is put in front of it."""
        return self._continued(text)[0]

    def _continued(self, text: str) -> Offsets:
        # Encoded behind a stand-in for what precedes it, one that shares no token with it.
        for before in _BEFORE if text else ():
            try:
                ((ids, offsets),) = self.encode_with_offsets([before + text])
            except InputError:  # a vocabulary without it
                continue
            size = len(before)
            first = sum(end <= size for _, end in offsets)
            rest = offsets[first:]
            if rest and all(start >= size for start, _ in rest):
                return ids[first:], [(start - size, end - size) for start, end in rest]
        return self.encode_with_offsets([text])[0]

    def decode(self, ids) -> str:
        """Returns the text of token ids; special tokens are left out."""
        text = self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)
        return text.removeprefix(" ") if self._decodes_a_space_more else text

    def completion(self, prefix, answer) -> str:
        """Returns the text that an answer adds to a prefix: decode(prefix + answer) less decode(prefix)."""
        given, text = self.decode(prefix), self.decode([*prefix, *answer])
        if not text.startswith(given):  # a character that the prefix holds in part is complete now
            given = given.rstrip("\ufffd")
        return text[len(given) :] if text.startswith(given) else self.decode(answer)

    def files(self) -> dict[str, str]:
        """Returns the texts of its files by name, as read: `tokenizer.json` and what came with it.

        `generation_config.json` is there where it states more EOS ids than `eos_id`, and states these alone.
        """
        return dict(self._files)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what decides the ids of a text: `tokenizer.json` and the BOS policy."""
        main = json.dumps(json.loads(self._files[_MAIN_FILE]), sort_keys=True)
        policy = json.dumps([self.bos_id, self.eos_id, self.adds_bos])
        return hashlib.sha256(f"{main}\n{policy}".encode("utf-8", "surrogatepass")).hexdigest()

    def encodes_like(self, other: "Tokenizer") -> bool:
        """Returns whether the other gives every text the same ids, BOS and EOS aside."""
        return json.loads(self._files[_MAIN_FILE]) == json.loads(other._files[_MAIN_FILE])

    def special_tokens(self) -> dict[int, tokenizers.AddedToken]:
        """Its special tokens by id."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token: value for token, value in added.items() if value.special}

    def token_text(self, token: int | None) -> str:
        """Returns a token as the vocabulary writes it; empty for None."""
        return "" if token is None else self._tokenizer.id_to_token(token) or ""

    @functools.cached_property
    def space_starts_word(self) -> bool:
        """Returns whether a space is part of the word after it, or of no token at all."""
        names = self._tokenizer.get_vocab()
        has_such = any(name[:1] in _SPACE_MARKS and name[1:2].isalpha() for name in names)
        return has_such or not self.encode(" ", "no")

    @functools.cached_property
    def _decodes_a_space_more(self) -> bool:
        """Returns whether a text comes back with a space in front, such as RoBERTa's tokenizer adds."""
        try:
            return self._tokenizer.decode(self.encode("a", "no")) == " a"
        except InputError:
            return False

    @functools.cached_property
    def restarts_after_special(self) -> bool:
        """Returns whether text after a special token is encoded like the beginning of a text."""
        special = next((token.content for token in self.special_tokens().values()), None)
        if special is None:
            return True
        self._tokenizer.encode_special_tokens = False
        try:
            ids = self._tokenizer.encode(f"{special}a", add_special_tokens=False).ids
        finally:
            self._tokenizer.encode_special_tokens = True
        return ids[1:] == self.encode("a", "no")

    def _front(self, bos: str) -> list[int]:
        one_of("bos", bos, BOS_POLICIES)
        if bos == "no" or (bos == "auto" and not self.adds_bos):
            return []
        if self.bos_id is None:
            raise InputError("the tokenizer has no BOS token", field="bos")
        return [self.bos_id]


def load_tokenizer(source) -> Tokenizer:
    """Returns a tokenizer by name or path.

    Args:
      source: "bytes", a `tokenizer.json` file, or a directory that holds one (and perhaps
        `tokenizer_config.json`, `special_tokens_map.json`; of a model's `generation_config.json` and
        `config.json` the EOS ids count).
    """
    if source == "bytes":
        return bytes_tokenizer()
    path = as_path(source)
    if not path.exists():
        raise InputError(
            f"no such file or directory, nor is it 'bytes'{nearest(source, ['bytes'])}", file=path
        )
    if not path.is_dir():
        return Tokenizer({_MAIN_FILE: read_text(path)}, path)
    if not has_tokenizer(path):
        raise InputError(f"no {_MAIN_FILE} in this directory{snapshot_hint(path)}", file=path)
    present = (name for name in (_MAIN_FILE, *_COMPANION_FILES) if (path / name).exists())
    tokenizer = Tokenizer({name: read_text(path / name) for name in present}, path)
    model_file = path / _MODEL_FILE
    if not model_file.exists():
        return tokenizer
    return tokenizer.with_eos_ids(eos_ids_in(parse_json(read_text(model_file), model_file), model_file))


def has_tokenizer(directory) -> bool:
    return (as_path(directory) / _MAIN_FILE).exists()


def from_files(files: dict[str, str], file=None) -> Tokenizer:
    """Returns the inverse of `Tokenizer.files`.

    Args:
      files: texts by file name, `tokenizer.json` among them.
      file: the directory or file they were read from, for error messages.
    """
    if _MAIN_FILE not in files:
        raise InputError(f"no {_MAIN_FILE} among the tokenizer's files", file=file)
    return Tokenizer(files, file)


@functools.cache
def bytes_tokenizer() -> Tokenizer:
    """Plain bytes: the id of a byte is its value, 256 is `<bos>`, 257 is `<eos>`; adds neither."""
    # Byte-level BPE without merges, so that bytes too have a `tokenizer.json` that others can read.
    vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(name, normalized=False) for name in ("<bos>", "<eos>")]
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
    return Tokenizer({_MAIN_FILE: tokenizer.to_str(), "tokenizer_config.json": json.dumps(config)})


def eos_ids_in(config: Any, file=None, field: str = "eos_token_id") -> tuple[int, ...]:
    """Returns the ids that a `config.json` or `generation_config.json` says end a text: one, a list or none.

    Args:
      config: its JSON value.
      file, field: name them in errors.
    """
    value = config.get("eos_token_id") if isinstance(config, Mapping) else None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if type(token) is not int or not 0 <= token < MAX_VOCAB_SIZE:
            message = f"must be a token id, a list of them or null, got {value!r}"
            raise InputError(message[:200], file=file, field=field)
    return tuple(dict.fromkeys(ids))


def _parse(text: str, file) -> tokenizers.Tokenizer:
    with _refusing("not a tokenizer that `tokenizers` can read", file):
        tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = True  # special tokens typed in a text stay text
    tokenizer.no_truncation()  # files may carry both settings of whoever saved them
    tokenizer.no_padding()
    return tokenizer


@contextlib.contextmanager
def _refusing(message: str, file=None):
    """Turns what the library raises, bare Exceptions or panics, into an `InputError`."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{message}: {error}", file=file) from error


def _config(files: dict[str, str], name: str, file) -> dict:
    """Returns the JSON object in one of the companion files; empty where there is none."""
    where = name if file is None else as_path(file) / name
    config = parse_json(files.get(name, "{}"), where)
    return config if isinstance(config, dict) else {}


def _named(configs: list[dict], key: str) -> list[str]:
    """Returns what the configs call a special token: a string, or an object with "content"."""
    values = [config.get(key) for config in configs]
    names = [value.get("content") if isinstance(value, dict) else value for value in values]
    return [name for name in names if isinstance(name, str)]


def _byte_letters() -> list[str]:
    """Returns the printable letter that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]
