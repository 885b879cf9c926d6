"""The ids that end a text of a model.

A tokenizer names one EOS token. The files that a model came with may state more: those of models that chat
end a turn with another token than a document. All of them count, the tokenizer's own first. An export states
them, with the ids of BOS and padding, in its `config.json` and `generation_config.json`.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from a3_jax.checkpoints.a3_format import META, META_FILE
from a3_jax.checkpoints.hf_config import CONFIG_FILE
from a3_jax.errors import InputError
from a3_jax.paths import as_path, parse_json
from a3_jax.tokenizer import GENERATION_FILE, Tokenizer, eos_ids_in

_MAIN_FILE = "tokenizer.json"
_BOS, _EOS, _PAD = "bos_token_id", "eos_token_id", "pad_token_id"


def with_all_eos(tokenizer: Tokenizer | None, meta, directory, is_a3: bool) -> Tokenizer | None:
    """Adds the EOS ids that the files of a model's source state to those of its tokenizer.

    Args:
      tokenizer: the checkpoint's; None stays None, see `source_eos_ids`.
      meta: the checkpoint's `Meta`.
      directory: the checkpoint's directory; names its files in errors.
      is_a3: whether that holds an A3 checkpoint, else a Hugging Face model.
    """
    size = meta.model.vocab_size
    # Classes of transformers write their default into the config of a model with a smaller vocabulary.
    stated = [
        token for ids, _, _ in _stated(meta.source, tokenizer, as_path(directory), is_a3) for token in ids
    ]
    return None if tokenizer is None else tokenizer.with_eos_ids(stated, below=size)


def source_eos_ids(source: dict[str, Any] | None) -> tuple[int, ...]:
    """Returns the EOS ids that the files of a source state (see `Meta`), those of its generation first."""
    return tuple(dict.fromkeys(token for ids, _, _ in _stated(source, None) for token in ids))


def check_eos_ids(tokenizer: Tokenizer | None, ids, size: int, file=None, field="eos_token_id") -> None:
    """Refuses an id that the model has no row for, unless it is the tokenizer's own."""
    own = None if tokenizer is None else tokenizer.eos_id
    outside = [token for token in ids if token >= size and token != own]
    if outside:
        raise InputError(f"{outside[0]} is outside the vocabulary of {size}", file=file, field=field)


def is_of_source(tokenizer: Tokenizer | None, source: dict[str, Any] | None) -> bool:
    """Returns whether the tokenizer's ids are those of a source: a run may have replaced it."""
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


def _stated(source, tokenizer, directory=None, is_a3=False) -> Iterator[tuple[tuple[int, ...], Any, str]]:
    """Yields the ids that each file of a source states, and how errors name it; none if it was replaced."""
    if not is_of_source(tokenizer, source):
        return
    for name in (GENERATION_FILE, CONFIG_FILE):
        file, field = directory and directory / name, "eos_token_id"
        if is_a3 and directory:
            file, field = directory / META / META_FILE, f"source: {name}: {field}"
        config = source.get("config")
        if name == GENERATION_FILE:
            config = parse_json(_kept(source, name) or "null", file)
        yield eos_ids_in(config, file, field), file, field


def _kept(source, name) -> str | None:
    """Returns the text of a file that came along with a source; None if there is none."""
    files = source.get("files")
    text = files.get(name) if isinstance(files, dict) else None
    return text if isinstance(text, str) else None


def with_special_ids(config: Mapping[str, Any], meta, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Returns a `config.json` with the ids of BOS, EOS and padding that it lacks; null where there is none.

    Without them transformers assumes ids of its own. What the source of a model says is kept.
    """
    ids = _special_ids(meta, tokenizer)
    if not is_of_source(tokenizer, meta.source):
        return {**config, **ids}
    ids.pop(_PAD)
    return {**config, **{name: ids[name] for name in ids if name not in config and ids[name] is not None}}


def generation_config(config: Mapping[str, Any], meta, tokenizer: Tokenizer | None) -> Any:
    """Returns the `generation_config.json` that goes with a `config.json`, as `Meta.source` keeps files.

    A source's own goes back as it was, unless a run has trained the model to end texts otherwise. One that
    had none gets one where its `config.json` doesn't state every EOS id.

    Returns:
      None if no file is to be written.
    """
    ids = _special_ids(meta, tokenizer)
    kept = None if meta.source is None else meta.source["files"].get(GENERATION_FILE)
    fields = parse_json(kept) if isinstance(kept, str) else {}
    fields = fields if isinstance(fields, dict) else {}
    wanted = source_eos_ids(meta.source) if tokenizer is None else tokenizer.eos_ids
    if not is_of_source(tokenizer, meta.source):
        fields = {**fields, **ids}
    elif kept is None:
        if set(wanted) <= set(eos_ids_in(config)):
            return None
        fields = {name: config.get(name) for name in (_BOS, _PAD)} | {_EOS: ids[_EOS]}
    elif meta.step is None or set(wanted) <= set(eos_ids_in(fields)):
        return kept
    else:
        fields = {**fields, _EOS: ids[_EOS]}
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def _special_ids(meta, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Returns the fields as `config.json` has them."""
    if tokenizer is None:
        bos, pad, eos = None, None, source_eos_ids(meta.source)
    else:
        bos, pad, eos = tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_ids
    return {_BOS: bos, _EOS: one_or_all(eos), _PAD: pad}


def one_or_all(ids: tuple[int, ...]) -> int | list[int] | None:
    """Returns ids as `config.json` has them: one by itself, several as a list, null for none."""
    return list(ids) if len(ids) > 1 else next(iter(ids), None)
