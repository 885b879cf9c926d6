"""Which ids end a text of a model.

A tokenizer names one EOS token. The files that a model came with may state more: those of models that chat
end a turn with another token than a document. All of them count, the tokenizer's own first.
"""

import json
from collections.abc import Iterator
from typing import Any

from a3_jax.checkpoints.a3_format import META, META_FILE
from a3_jax.checkpoints.hf_config import CONFIG_FILE
from a3_jax.errors import InputError
from a3_jax.paths import as_path, parse_json
from a3_jax.tokenizer import GENERATION_FILE, Tokenizer, eos_ids_in

_MAIN_FILE = "tokenizer.json"


def with_all_eos(tokenizer: Tokenizer | None, meta, place, is_a3: bool) -> Tokenizer | None:
    """Adds the EOS ids that the files of a model's source state to those of its tokenizer.

    Args:
      tokenizer: the checkpoint's; None stays None, see `source_eos_ids`.
      meta: the checkpoint's `Meta`.
      place: the checkpoint's directory; names its files in errors.
      is_a3: whether that holds an A3 checkpoint, else a Hugging Face model.

    Raises:
      InputError: an id that is none, with the file that states it.
    """
    size = meta.model.vocab_size
    # Classes of transformers write their default into the config of a model with a smaller vocabulary.
    stated = [token for ids, _, _ in _stated(meta.source, tokenizer, as_path(place), is_a3) for token in ids]
    return None if tokenizer is None else tokenizer.with_eos_ids(stated, below=size)


def source_eos_ids(source: dict[str, Any] | None) -> tuple[int, ...]:
    """Returns the EOS ids that the files of a source state (see `Meta`), those of its generation first."""
    return tuple(dict.fromkeys(token for ids, _, _ in _stated(source, None) for token in ids))


def check_eos_ids(tokenizer: Tokenizer | None, ids, size: int, file=None, field="eos_token_id") -> None:
    """Refuses an id that the model has no row for; a tokenizer's own is not for this to judge."""
    own = None if tokenizer is None else tokenizer.eos_id
    outside = [token for token in ids if token >= size and token != own]
    if outside:
        raise InputError(f"{outside[0]} is outside the vocabulary of {size}", file=file, field=field)


def is_of_source(tokenizer: Tokenizer | None, source: dict[str, Any] | None) -> bool:
    """Whether there is a source whose ids mean what the tokenizer's mean: a run may have replaced it."""
    if source is None:
        return False
    theirs = _kept(source, _MAIN_FILE)
    if tokenizer is None or theirs is None:
        return True
    ours, theirs = tokenizer.files()[_MAIN_FILE], theirs.removeprefix("\ufeff")
    try:
        return ours == theirs or json.loads(ours) == json.loads(theirs)
    except (ValueError, RecursionError):
        return False


def _stated(source, tokenizer, place=None, is_a3=False) -> Iterator[tuple[tuple[int, ...], Any, str]]:
    """The ids that each file of a source states, and how errors name it; none of a replaced tokenizer's."""
    if not is_of_source(tokenizer, source):
        return
    for name in (GENERATION_FILE, CONFIG_FILE):
        file, field = place and place / name, "eos_token_id"
        if is_a3 and place:
            file, field = place / META / META_FILE, f"source: {name}: {field}"
        config = source.get("config")
        if name == GENERATION_FILE:
            config = parse_json(_kept(source, name) or "null", file)
        yield eos_ids_in(config, file, field), file, field


def _kept(source, name) -> str | None:
    """The text of a file that came along with a source; None where there is none."""
    files = source.get("files")
    text = files.get(name) if isinstance(files, dict) else None
    return text if isinstance(text, str) else None
