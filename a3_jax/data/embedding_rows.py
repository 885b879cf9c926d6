"""How many token ids the model has rows for that a tokenizer came with."""

import contextlib
from typing import Any

from a3_jax.errors import InputError
from a3_jax.paths import as_path, read_json

# Where a model says so, from its tokenizer's directory: beside it, or in the A3 checkpoint around it.
_PLACES = (("config.json", ()), ("config.json", ("text_config",)), ("../meta/a3.json", ("model",)))


def embedding_rows(tokenizer) -> int | None:
    """Returns the size of the vocabulary of the model that a tokenizer lies with; None where none does.

    Tokenizers may have ids beyond it, such as Gemma 3's for images.

    Args:
      tokenizer: as for `load_tokenizer`.
    """
    directory = as_path(tokenizer)
    if not directory.is_dir():
        return None
    for name, keys in _PLACES:
        fields: Any = {}
        with contextlib.suppress(InputError):  # absent; whoever reads the model tells what else it is
            fields = read_json(directory / name)
        for key in keys:
            fields = fields.get(key) if isinstance(fields, dict) else None
        size = fields.get("vocab_size") if isinstance(fields, dict) else None
        if type(size) is int and size > 0:
            return size
    return None
