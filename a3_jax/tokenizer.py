"""Text to token ids and back: any Hugging Face `tokenizer.json`, plain bytes, and `[[n]]` blanks.

Text is only ever text here: a special token typed in it (`<s>`, `<|end_of_text|>`) is encoded like
any other characters, never as the special id. Of what a tokenizer's post-processor would add, only
BOS is kept. Nothing is compared with a padding id: a tokenizer may have a real token 0 and pad = EOS.
"""

import contextlib
import functools
import hashlib
import json
import re

import tokenizers

from a3_jax.errors import InputError, nearest
from a3_jax.paths import as_path, parse_json, read_text, snapshot_hint

BOS_POLICIES = ("auto", "yes", "no")
MAX_VOCAB_SIZE = 1 << 24  # far above any vocabulary: a model has a row for each id
MAX_BLANK = 1 << 20  # tokens in one blank: far above any context, far below what fills the memory

_MAIN_FILE = "tokenizer.json"
_SPECIAL_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_COMPANION_FILES = (*_SPECIAL_TOKEN_FILES, "added_tokens.json", "chat_template.jinja")
_BOS_NAMES = ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]")
_EOS_NAMES = ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>", "[EOS]")
_BLANK = re.compile(r"\[\[([0-9]+)\]\]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACE_MARKS = (" ", "▁", "Ġ")  # how vocabularies write a space at the front of a word


class Tokenizer:
    """A Hugging Face tokenizer with its files.

    Attributes:
      vocab_size: largest id + 1, added tokens included.
      bos_id, eos_id: int, or None where the tokenizer has none.
      adds_bos: whether its own post-processor puts BOS first; what `bos="auto"` follows.
    """

    def __init__(self, files: dict[str, str], place=None):
        """From the texts of its files, by name. `place` names them in errors (see `from_files`)."""
        self._files = dict(files)
        self._tokenizer = _parse(self._files[_MAIN_FILE], place)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise InputError(f"token id {self.vocab_size - 1} is not below {MAX_VOCAB_SIZE}", file=place)
        with _refusing("not a tokenizer that can encode", place):
            first = self._tokenizer.encode("", add_special_tokens=True).ids[:1]
        configs = [_config(self._files, name, place) for name in _SPECIAL_TOKEN_FILES]
        self.bos_id = self._special_id(*_named(configs, "bos_token"), *_BOS_NAMES)
        self.eos_id = self._special_id(*_named(configs, "eos_token"), *_EOS_NAMES)
        if self.bos_id is None and first != [self.eos_id]:  # some add EOS alone
            self.bos_id = next(iter(first), None)
        self.adds_bos = bool(first) and first[0] == self.bos_id

    def _special_id(self, *names) -> int | None:
        """The id of the first of these names that is in the vocabulary."""
        ids = (self._tokenizer.token_to_id(name) for name in names)
        return next((token for token in ids if token is not None), None)

    def encode(self, text: str, bos: str = "auto") -> list[int]:
        """Token ids of a text; BOS first if `bos` is "yes", or "auto" and the tokenizer adds one.

        Raises:
          InputError: text that can't be encoded, or BOS asked of a tokenizer that has none.
        """
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

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a text without BOS, and behind which of its characters each token ends.

        Raises:
          InputError: text that can't be encoded.
        """
        with _refusing("the tokenizer can't encode the text"):
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]

    def decode(self, ids) -> str:
        """The text of token ids; special tokens are left out."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def files(self) -> dict[str, str]:
        """The texts of its files by name, as read: `tokenizer.json` and what came with it."""
        return dict(self._files)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what decides the ids of a text: `tokenizer.json` and the BOS policy."""
        main = json.dumps(json.loads(self._files[_MAIN_FILE]), sort_keys=True)
        policy = json.dumps([self.bos_id, self.eos_id, self.adds_bos])
        return hashlib.sha256(f"{main}\n{policy}".encode("utf-8", "surrogatepass")).hexdigest()

    def encodes_like(self, other: "Tokenizer") -> bool:
        """Whether the other gives every text the same ids, BOS and EOS aside."""
        return json.loads(self._files[_MAIN_FILE]) == json.loads(other._files[_MAIN_FILE])

    def special_tokens(self) -> dict[int, tokenizers.AddedToken]:
        """Its special tokens by id."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token: value for token, value in added.items() if value.special}

    def token_text(self, token: int | None) -> str:
        """A token as the vocabulary writes it; empty for None."""
        return "" if token is None else self._tokenizer.id_to_token(token) or ""

    @functools.cached_property
    def space_starts_word(self) -> bool:
        """Whether a space is part of the word after it: " a" has as many tokens as "a"."""
        return self.prepends_space or len(self._probe(" a")) == len(self._probe("a"))

    @functools.cached_property
    def prepends_space(self) -> bool:
        """Whether a text's first word gets a space that was not typed (SentencePiece's habit)."""
        return "".join(self._probe("a")).startswith(_SPACE_MARKS)

    def _probe(self, text: str) -> list[str]:
        """The tokens of a text as the vocabulary writes them; none where it can't be encoded."""
        try:
            return [self._tokenizer.id_to_token(token) or "" for token in self.encode(text, "no")]
        except InputError:
            return []

    def _front(self, bos: str) -> list[int]:
        if bos not in BOS_POLICIES:
            raise InputError(f"must be one of {', '.join(BOS_POLICIES)}, got {bos!r}", field="bos")
        if bos == "no" or (bos == "auto" and not self.adds_bos):
            return []
        if self.bos_id is None:
            raise InputError("the tokenizer has no BOS token", field="bos")
        return [self.bos_id]


def load_tokenizer(source) -> Tokenizer:
    """A tokenizer by name or path.

    Args:
      source: "bytes", a `tokenizer.json` file, or a directory that holds one (and perhaps
        `tokenizer_config.json`, `special_tokens_map.json`).

    Raises:
      InputError: absent, damaged, or no tokenizer.
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
    return Tokenizer({name: read_text(path / name) for name in present}, path)


def has_tokenizer(directory) -> bool:
    return (as_path(directory) / _MAIN_FILE).exists()


def from_files(files: dict[str, str], place=None) -> Tokenizer:
    """The inverse of `Tokenizer.files`.

    Args:
      files: texts by file name, `tokenizer.json` among them.
      place: the directory or file they were read from, for error messages.
    """
    if _MAIN_FILE not in files:
        raise InputError(f"no {_MAIN_FILE} among the tokenizer's files", file=place)
    return Tokenizer(files, place)


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


def encode_blanks(tokenizer: Tokenizer, text: str, bos: str = "auto") -> list[int | None]:
    """Tokens of a text with blanks: `[[n]]` becomes n times None.

    Each piece of text between blanks is encoded by itself. Where a tokenizer makes a space part of
    the word after it, one space before a blank belongs to the blank's first token and is dropped:

        "The [[2]] sat."  ->  The  None  None  Ġsat  .

    Raises:
      InputError: a malformed blank (`[[x]]`, `[[0]]`, `[[` alone), or as `Tokenizer.encode`.
    """
    tokens: list[int | None] = list(tokenizer.encode("", bos))
    pieces = _BLANK.split(text)  # text, blank's number, text, ..., text
    for index, piece in enumerate(pieces):
        if index % 2:
            tokens += [None] * _blank_length(piece)
        else:
            piece = _between_blanks(tokenizer, piece, first=index == 0, last=index == len(pieces) - 1)
            tokens += tokenizer.encode(piece, "no")
    return tokens


def _between_blanks(tokenizer: Tokenizer, piece: str, first: bool, last: bool) -> str:
    """A piece of text without the spaces that the tokenizer counts to the tokens around it."""
    if "[[" in piece:
        malformed = piece[piece.index("[[") :][:12]
        raise InputError(f"malformed blank {malformed!r}: write [[n]] with n a number of tokens")
    if not first and tokenizer.prepends_space:
        piece = piece.removeprefix(" ")
    if not last and tokenizer.space_starts_word:
        piece = piece.removesuffix(" ")
    return piece


def _blank_length(digits: str) -> int:
    digits = digits.lstrip("0")
    if not digits:
        raise InputError("malformed blank '[[0]]': a blank has at least one token")
    if len(digits) > len(str(MAX_BLANK)) or int(digits) > MAX_BLANK:
        raise InputError(f"a blank has at most {MAX_BLANK} tokens, got [[{digits[:12]}]]")
    return int(digits)


def _parse(text: str, place) -> tokenizers.Tokenizer:
    with _refusing("not a tokenizer that `tokenizers` can read", place):
        tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = True  # special tokens typed in a text stay text
    tokenizer.no_truncation()  # files may carry both settings of whoever saved them
    tokenizer.no_padding()
    return tokenizer


@contextlib.contextmanager
def _refusing(message: str, place=None):
    """What the library raises as an `InputError`: bare Exceptions, or a panic, which isn't even that."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{message}: {error}", file=place) from error


def _config(files: dict[str, str], name: str, place) -> dict:
    """The JSON object in one of the companion files; empty where there is none."""
    where = name if place is None else as_path(place) / name
    config = parse_json(files.get(name, "{}"), where)
    return config if isinstance(config, dict) else {}


def _named(configs: list[dict], key: str) -> list[str]:
    """What the configs call a special token: a string, or an object with "content"."""
    values = [config.get(key) for config in configs]
    names = [value.get("content") if isinstance(value, dict) else value for value in values]
    return [name for name in names if isinstance(name, str)]


def _byte_letters() -> list[str]:
    """The printable letter that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]
