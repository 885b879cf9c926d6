"""What `a3 convert` reads: a Hugging Face directory or an A3 checkpoint, both in the same pieces."""

import abc
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from a3_jax.checkpoints import families
from a3_jax.checkpoints.a3_format import Meta, load_meta, load_params
from a3_jax.checkpoints.chunks import Piece, cut, index_of, plan, stored_rows
from a3_jax.checkpoints.families import Tensor, tensor_table
from a3_jax.checkpoints.hf_config import CONFIG_FILE
from a3_jax.checkpoints.hf_export import check_source
from a3_jax.checkpoints.hf_format import (
    HFModel,
    cast,
    check_tied,
    drawn_query,
    kept_files,
    open_hf,
    read_params,
)
from a3_jax.checkpoints.loading import a3_tokenizer, find_checkpoint, hf_tokenizer
from a3_jax.checkpoints.model_card import Facts
from a3_jax.checkpoints.orbax_items import META, META_FILE
from a3_jax.checkpoints.run_facts import run_facts
from a3_jax.checkpoints.safetensors_io import INDEX_FILE
from a3_jax.checkpoints.stored_params import open_params
from a3_jax.errors import InputError

logger = logging.getLogger(__name__)

# Bits of the exponent: all of them are set in NaN and infinity, and nowhere else.
_EXPONENTS = {
    np.dtype(np.float32): 0x7F800000,
    np.dtype(np.float16): 0x7C00,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
}


class Source(abc.ABC):
    """A checkpoint that was checked, not read.

    Attributes:
      config, meta, tokenizer: as `opening.Checkpoint` has them.
      leaves, pieces: of `pieces.plan`, in an order in which reading is fast.
      directory: where it is; `hf_directory` the same, None of an A3 checkpoint.
      files: that are read, of a Hugging Face directory.
    """

    def __init__(self, directory, meta: Meta, tokenizer, dtypes, allow_nonfinite: bool):
        self.directory = directory
        self.config, self.meta, self.tokenizer = meta.model, meta, tokenizer
        self.leaves, self.pieces = plan(meta.model, dtypes)
        self.hf_directory: Any = None
        self.files: Sequence[Any] = ()
        self._table = tensor_table(meta.model)
        self._allow_nonfinite = allow_nonfinite

    @abc.abstractmethod
    def read(self, piece: Piece) -> Iterator[tuple[tuple[str, ...], tuple[int, ...], np.ndarray]]:
        """The parts of leaves that a piece consists of, (path, first index, array), in their dtypes.

        Raises:
          InputError: it can't be read, or has values that can't be kept.
        """

    @abc.abstractmethod
    def read_leaf(self, path: tuple[str, ...], index=()) -> np.ndarray:
        """A part of a leaf as stored: what `hf_export.write_hf` reads with.

        Raises:
          InputError: as `read`.
        """

    @abc.abstractmethod
    def params(self):
        """The whole parameter tree, for a check of the conversion."""

    def facts(self) -> Facts | None:
        """What is known beside `meta`, for a model card."""
        return None

    def _checked(self, array: np.ndarray, path, layer) -> np.ndarray:
        if not self._allow_nonfinite and not is_finite(array):
            self._complain(path, layer)
        return array

    @abc.abstractmethod
    def _complain(self, path, layer) -> None:
        """Raises the InputError that names the tensor of this part."""


class HFSource(Source):
    """A Hugging Face directory."""

    def __init__(self, directory, dtype, seed: int, allow_nonfinite: bool):
        self._model = model = open_hf(directory)
        model.warn()
        check_tied(model)
        self._dtype, self._seed, self._query = dtype, seed, None
        self._stored: dict[tuple[tuple[str, ...], int | None], tuple[Tensor, Any]] = {}
        found: dict[tuple[str, ...], list[np.dtype]] = {}
        embedding = model.stored[families.embedding(model.config)]
        for name, parts in tensor_table(model.config).items():
            stored = model.stored.get(name)  # a query vector may not be there
            for part in parts:
                self._stored[part.leaf, part.layer] = part, stored
                found.setdefault(part.leaf, []).append((stored or embedding).dtype)
        dtypes = {path: np.dtype(dtype or jnp.result_type(*each)) for path, each in found.items()}
        meta = Meta(model.config, source=model.source())
        tokenizer = hf_tokenizer(directory, meta)
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            message = (
                "%s: its tokenizer has ids up to %d, the embedding has rows for fewer: %d; text that makes "
            )
            message += "such ids is refused where it is used"
            logger.warning(message, directory, tokenizer.vocab_size - 1, model.config.vocab_size)
        super().__init__(directory, meta, tokenizer, dtypes, allow_nonfinite)
        self.hf_directory, self.files = directory, _files_of(model)
        self._last: tuple[Any, np.ndarray] | None = None

    def read(self, piece):
        for number, part in enumerate(self._table[piece.name]):
            _, stored = self._stored[part.leaf, part.layer]
            if stored is None:
                yield part.leaf, (0,), self._drawn()
                continue
            if number == 0:
                rows = stored.read(*(stored_rows(part, piece) or ()))
            leaf = cut(part, piece).to_leaf(rows)
            leaf = cast(leaf, self.leaves[part.leaf].dtype, stored.name, stored.file)
            yield _placed(part, piece, self._checked(leaf, part.leaf, part.layer))

    def read_leaf(self, path, index=()):
        layer = index[0] if path[0] == "layers" else None
        part, stored = self._stored[path, layer]
        if stored is None:
            return self._drawn()[index]
        if self._last is None or self._last[0] != stored:
            self._last = None
            self._last = stored, stored.read()
        array = part.to_leaf(self._last[1])[index if layer is None else index[1:]]
        return self._checked(cast(array, self._dtype, stored.name, stored.file), path, layer)

    def params(self):
        return read_params(self._model, self._dtype, self._seed)

    def _drawn(self):
        if self._query is None:
            self._query = drawn_query(self._model, self._seed, self._dtype)
        return self._query

    def _complain(self, path, layer):
        _, stored = self._stored[path, layer]
        raise _nonfinite(cast(stored.read(), self._dtype, stored.name, stored.file), stored.name, stored.file)


class A3Source(Source):
    """An A3 checkpoint."""

    def __init__(self, directory, dtype, allow_nonfinite: bool):
        meta = load_meta(directory)
        if meta.source is not None:
            check_source(meta.source, directory / META / META_FILE)
        self._params, self._dtype, self._lock = open_params(directory), dtype, threading.Lock()
        dtypes = {
            tuple(name.split("/")): np.dtype(dtype or jnp.dtype(leaf.dtype))
            for name, leaf in self._params.leaves.items()
        }
        super().__init__(directory, meta, a3_tokenizer(directory, meta), dtypes, allow_nonfinite)
        order = {path: number for number, path in enumerate(self.leaves)}
        self.pieces = sorted(self.pieces, key=lambda piece: order[self._table[piece.name][0].leaf])

    def read(self, piece):
        for part in self._table[piece.name]:
            yield _placed(part, piece, self.read_leaf(part.leaf, index_of(part, piece)))

    def read_leaf(self, path, index=()):
        with self._lock:
            array = self._params.read(path, index)
        array = cast(array, self._dtype, self._name(path), self.directory)
        return self._checked(array, path, None)

    def params(self):
        return load_params(self.directory)

    def facts(self):
        return run_facts(self.directory, self.meta.step)

    def _name(self, path) -> str:
        return f"params/{'/'.join(path)}"

    def _complain(self, path, layer):
        raise _nonfinite(
            cast(self._params.read(path), self._dtype, self._name(path)), self._name(path), self.directory
        )


def open_source(path, dtype, seed: int, allow_nonfinite: bool) -> Source:
    """Checks what is to be converted.

    Args:
      path: anything that `open_checkpoint` opens.
      dtype: of all parameters; None: as stored.
      seed: draws the query vector where there is none.
      allow_nonfinite: NaN and infinity are no error.

    Raises:
      InputError: it is no checkpoint, is damaged, or not supported.
    """
    directory, is_hf = find_checkpoint(path)
    if is_hf:
        return HFSource(directory, dtype, seed, allow_nonfinite)
    return A3Source(directory, dtype, allow_nonfinite)


def _files_of(model: HFModel) -> list[Any]:
    """All files that are read: config, index, shards, tokenizer, and what goes along."""
    shards = {str(tensor.file): tensor.file for tensor in model.stored.values()}
    named = [model.directory / name for name in (CONFIG_FILE, INDEX_FILE)]
    return [path for path in named if path.exists()] + [*shards.values()] + kept_files(model.directory)


def is_finite(array: np.ndarray) -> bool:
    """Whether no element of a float array is NaN or infinite."""
    mask = array.dtype.type(0).view(f"u{array.dtype.itemsize}").dtype.type(_EXPONENTS[array.dtype])
    return not array.size or bool((array.view(mask.dtype) & mask).max() != mask)


def _placed(part: Tensor, piece: Piece, array: np.ndarray):
    """A part of a leaf without its layer, as (path, first index, array with all axes)."""
    index = index_of(part, piece)
    begin = tuple(at if isinstance(at, int) else at.start for at in index)
    return part.leaf, begin, array if part.layer is None else array[None]


def _nonfinite(array, name, file) -> InputError:
    count = array.size - np.count_nonzero(np.isfinite(array))
    return InputError(
        f"{count} of its {array.size} values are NaN or infinite; --allow_nonfinite converts them too",
        file=file,
        field=name,
    )
