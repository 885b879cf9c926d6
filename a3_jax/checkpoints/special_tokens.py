"""Which ids end a text of a model, and what its `config.json` and `generation_config.json` say of them.

A tokenizer names one EOS token. The files that a model came with may state more: those of models that chat
end a turn with another token than a document. All of them count, the tokenizer's own first.
"""

import json
from collections.abc import Mapping
from typing import Any

from a3_jax.checkpoints.hf_config import CONFIG_FILE
from a3_jax.errors import InputError
from a3_jax.paths import as_path, parse_json
from a3_jax.tokenizer import GENERATION_FILE, Tokenizer, eos_ids_in

_BOS, _EOS, _PAD = "bos_token_id", "eos_token_id", "pad_token_id"
_TOKENIZER_FILE = "tokenizer.json"


def with_all_eos(tokenizer: Tokenizer | None, meta, place, described_in=None) -> Tokenizer | None:
    """Adds the EOS ids that the files of a model's source state to those of its tokenizer.

    Args:
      tokenizer: the checkpoint's; None stays None, see `source_eos_ids`.
      meta: the checkpoint's `Meta`.
      place: the checkpoint's directory; names its files in errors.
      described_in: of an A3 checkpoint, the file that holds the source's.

    Raises:
      InputError: an id that is none, with the file that states it.
    """
    size = meta.model.vocab_size
    stated = source_eos_ids(meta.source, tokenizer, place, described_in, size)
    return None if tokenizer is None else tokenizer.with_eos_ids(stated, below=size)


def source_eos_ids(
    source: Mapping[str, Any] | None,
    tokenizer: Tokenizer | None = None,
    place=None,
    described_in=None,
    size=None,
) -> tuple[int, ...]:
    """Returns the EOS ids that the files of a source state, those of `generation_config.json` first.

    Args:
      source: of `Meta`. None states none, nor does one whose tokenizer was replaced by another.
      tokenizer: the checkpoint's, None where it has none.
      place, described_in: as in `with_all_eos`.
      size: of the vocabulary; ids beyond it end nothing and are left out. None: they are kept.

    Raises:
      InputError: as `with_all_eos`.
    """
    found: list[int] = []
    for name, config in (
        _configs(source, place, described_in).items() if _is_of_source(tokenizer, source) else ()
    ):
        file, field = as_path(place or "") / name, _EOS
        if described_in is not None:
            file, field = described_in, f"source: {name}: {_EOS}"
        # Classes of transformers write their default into the config of a model with a smaller vocabulary.
        found += [token for token in eos_ids_in(config, file, field) if size is None or token < size]
    return tuple(dict.fromkeys(found))


def _configs(source, place, described_in) -> dict[str, Any]:
    """The JSON values of a source's two files, those that it has."""
    configs = {CONFIG_FILE: source.get("config")}
    text = source["files"].get(GENERATION_FILE) if isinstance(source.get("files"), dict) else None
    if isinstance(text, str):
        file = described_in or as_path(place or "") / GENERATION_FILE
        configs = {GENERATION_FILE: parse_json(text, file), **configs}
    return configs


def check_eos_ids(tokenizer: Tokenizer | None, ids, size: int, file=None, field=_EOS) -> None:
    """Refuses an id that the model has no row for; a tokenizer's own is not for this to judge."""
    own = None if tokenizer is None else tokenizer.eos_id
    outside = [token for token in ids if token >= size and token != own]
    if outside:
        raise InputError(f"{outside[0]} is outside the vocabulary of {size}", file=file, field=field)


def _is_of_source(tokenizer: Tokenizer | None, source) -> bool:
    """Whether there is a source whose ids mean what the tokenizer's mean: a run may have replaced it."""
    if source is None:
        return False
    files = source.get("files")
    theirs = files.get(_TOKENIZER_FILE) if isinstance(files, dict) else None
    if tokenizer is None or not isinstance(theirs, str):
        return True
    ours = tokenizer.files()[_TOKENIZER_FILE]
    theirs = theirs.removeprefix("\ufeff")
    if ours == theirs:
        return True
    try:
        return json.loads(ours) == json.loads(theirs)
    except (ValueError, RecursionError):
        return False


def with_special_ids(config: Mapping[str, Any], meta, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Returns a `config.json` with the ids of BOS, EOS and padding that it lacks; null where there is none.

    Without them transformers assumes ids of its own. What the source of a model says is kept.
    """
    ids = _special_ids(meta, tokenizer)
    if not _is_of_source(tokenizer, meta.source):
        return {**config, **ids}
    ids.pop(_PAD)
    return {**config, **{name: ids[name] for name in ids if name not in config and ids[name] is not None}}


def generation_config(config: Mapping[str, Any], meta, tokenizer: Tokenizer | None) -> Any:
    """Returns the `generation_config.json` that goes with a `config.json`, as `Meta.source` keeps files.

    A source's own goes back as it was, unless a run has trained the model to end texts otherwise. One that
    had none gets one where its `config.json` doesn't state every EOS id.

    Returns:
      None where none is to be written.
    """
    ids = _special_ids(meta, tokenizer)
    kept = None if meta.source is None else meta.source["files"].get(GENERATION_FILE)
    fields = parse_json(kept) if isinstance(kept, str) else {}
    fields = fields if isinstance(fields, dict) else {}
    wanted = source_eos_ids(meta.source, tokenizer) if tokenizer is None else tokenizer.eos_ids
    if not _is_of_source(tokenizer, meta.source):
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
    """The fields as `config.json` has them."""
    if tokenizer is None:
        bos, pad, eos = None, None, source_eos_ids(meta.source)
    else:
        bos, pad, eos = tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_ids
    return {_BOS: bos, _EOS: one_or_all(eos), _PAD: pad}


def one_or_all(ids: tuple[int, ...]) -> int | list[int] | None:
    """Returns ids as `config.json` has them: one by itself, several as a list, null for none."""
    return list(ids) if len(ids) > 1 else next(iter(ids), None)
