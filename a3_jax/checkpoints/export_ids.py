"""What an export's `config.json` and `generation_config.json` say of BOS, EOS and padding."""

import json
from collections.abc import Mapping
from typing import Any

from a3_jax.checkpoints.special_tokens import is_of_source, source_eos_ids
from a3_jax.paths import parse_json
from a3_jax.tokenizer import GENERATION_FILE, Tokenizer, eos_ids_in

_BOS, _EOS, _PAD = "bos_token_id", "eos_token_id", "pad_token_id"


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
      None where none is to be written.
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
    """The fields as `config.json` has them."""
    if tokenizer is None:
        bos, pad, eos = None, None, source_eos_ids(meta.source)
    else:
        bos, pad, eos = tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_ids
    return {_BOS: bos, _EOS: one_or_all(eos), _PAD: pad}


def one_or_all(ids: tuple[int, ...]) -> int | list[int] | None:
    """Returns ids as `config.json` has them: one by itself, several as a list, null for none."""
    return list(ids) if len(ids) > 1 else next(iter(ids), None)
