"""A Hugging Face model directory, checked and read; `hf_export` is the way back."""

import base64
import dataclasses
import fnmatch
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from a3_jax.checkpoints import families
from a3_jax.checkpoints.chunks import (
    FLOATS,
    Path,
    TensorChunk,
    TensorSource,
    cast,
    cut,
    placed,
    read_tree,
    stored_rows,
)
from a3_jax.checkpoints.families import QUERY_TENSOR, LeafPart
from a3_jax.checkpoints.hf_config import CONFIG_FILE, read_config
from a3_jax.checkpoints.safetensors import INDEX_FILE, StoredTensor, list_tensors
from a3_jax.errors import InputError
from a3_jax.model.config import ModelConfig
from a3_jax.paths import as_path, is_file_name, read_bytes, read_json

CARD_FILE = "README.md"
SOURCE_CARD_FILE = "README.source.md"  # in a directory of ours: the card of the model that it came from
_KEPT_FILES = (  # licences ask that they and notices go along
    "*.json", "*.jinja", "*.txt", "tokenizer.model", CARD_FILE, SOURCE_CARD_FILE, "LICENSE", "LICENSE.md",
    "NOTICE", "NOTICE.md", "USE_POLICY.md",
)  # fmt: skip
_COMPARED_BYTES = 1 << 24  # of each of two tensors
_MAX_KEPT_BYTES = 1 << 25  # per file; the largest tokenizers have 20 MB

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class HFModel:
    """A Hugging Face directory that was checked, not read: names, shapes and dtypes fit the config.

    `stored` goes by the names of the family's table; each tensor knows its own. `unread`: fields of the
    config that were left aside.
    """

    directory: Any
    config: ModelConfig
    hf_config: dict[str, Any]
    stored: dict[str, StoredTensor]
    unread: list[str]

    def warn(self) -> None:
        """Warns of the fields of `config.json` that were ignored."""
        if self.unread:
            message = "%s: left aside are fields that change nothing in transformers' model either: %s"
            logger.warning(message, self.directory / CONFIG_FILE, ", ".join(self.unread)[:500])

    def source(self) -> dict[str, Any]:
        """Returns what `Meta.source` keeps, so that the way back gives the same names, dtypes and files."""
        files = _read_kept_files(self.directory)
        if SOURCE_CARD_FILE in files:  # it was written by `hf_export`, so its card is ours
            files[CARD_FILE] = files.pop(SOURCE_CARD_FILE)
        return {
            "config": self.hf_config,
            "tensors": {tensor.name: tensor.dtype.name for tensor in self.stored.values()},
            "files": files,
        }


def open_hf(directory) -> HFModel:
    """Checks a Hugging Face directory against its config."""
    directory = as_path(directory)
    hf_config = read_json(directory / CONFIG_FILE)
    config, unread = read_config(hf_config, directory / CONFIG_FILE)
    tensors = list_tensors(directory)
    names = families.table_names(tensors, config, directory)
    families.check_names(names, config, directory)
    stored = {name: tensors[in_file] for name, in_file in names.items()}
    for name, tensor in stored.items():
        _check_tensor(tensor, families.shape_of(name, config))
    return HFModel(directory, config, hf_config, stored, unread)


def _check_tensor(tensor: StoredTensor, shape) -> None:
    if tensor.shape != shape:
        raise InputError(
            f"shape {list(tensor.shape)}, the config asks for {list(shape)}",
            file=tensor.file,
            field=tensor.name,
        )
    if tensor.dtype not in FLOATS:
        raise InputError(
            f"{tensor.dtype.name} is no parameter dtype; known: {', '.join(dtype.name for dtype in FLOATS)}",
            file=tensor.file,
            field=tensor.name,
        )


def check_tied(model: HFModel) -> None:
    """Compares a tied head that is stored all the same with the embedding, a few rows at a time."""
    head = model.stored.get(families.tied_head(model.config) or "")
    if head is None:
        return
    embedding = model.stored[families.embedding(model.config)]
    rows = head.shape[0]
    step = max(1, _COMPARED_BYTES * rows // max(head.nbytes, 1))
    for begin in range(0, rows, step):
        here = begin, min(begin + step, rows)
        if not np.array_equal(head.read(*here), embedding.read(*here)):
            raise InputError(
                "differs from the embedding, but the config has tie_word_embeddings",
                file=head.file,
                field=head.name,
            )


class HFSource(TensorSource):
    """A Hugging Face directory, read by chunk. A model without query vector gets one drawn from `seed`."""

    def __init__(self, model: HFModel, dtype=None, seed: int = 0, allow_nonfinite: bool = True):
        """Checks the one thing that headers don't tell: a tied head that is stored all the same.

        Args:
          model: the directory.
          dtype: of all leaves; None: the source's, the widest of those that one leaf is made of.
          seed: draws the query vector.
          allow_nonfinite: reads NaN and infinity too.
        """
        check_tied(model)
        self._model, self._dtype, self._seed = model, dtype, seed
        self._stored: dict[tuple[Path, int | None], tuple[LeafPart, StoredTensor | None]] = {}
        self._query: np.ndarray | None = None
        self._last: tuple[StoredTensor, np.ndarray] | None = None
        found: dict[Path, list[np.dtype]] = {}
        embedding = model.stored[families.embedding(model.config)]
        for name, parts in families.tensor_table(model.config).items():
            stored = model.stored.get(name)  # a query vector may not be there
            for part in parts:
                self._stored[part.leaf, part.layer] = part, stored
                found.setdefault(part.leaf, []).append((stored or embedding).dtype)
        dtypes = {path: np.dtype(dtype or jnp.result_type(*each)) for path, each in found.items()}
        super().__init__(model.directory, model.config, dtypes, allow_nonfinite)
        shards = {str(tensor.file): tensor.file for tensor in model.stored.values()}
        named = [model.directory / name for name in (CONFIG_FILE, INDEX_FILE)]
        kept = kept_files(model.directory)
        self.files = [path for path in named if path.exists()] + [*shards.values()] + kept

    def read(self, chunk: TensorChunk):
        rows = None
        for part in self._table[chunk.name]:
            _, stored = self._stored[part.leaf, part.layer]
            if stored is None:
                yield part.leaf, (0,), self._drawn_query()
                continue
            if rows is None:  # once for all parts
                rows = stored.read(*(stored_rows(part, chunk) or ()))
            leaf = cast(
                cut(part, chunk).to_leaf(rows), self.leaves[part.leaf].dtype, stored.name, stored.file
            )
            yield placed(part, chunk, self._check_finite(leaf, part.leaf, part.layer))

    def read_leaf(self, path, index=()):
        layer = index[0] if path[0] == "layers" else None
        part, stored = self._stored[path, layer]
        if stored is None:
            return self._drawn_query()[index]
        if self._last is None or self._last[0] != stored:
            self._last = None
            self._last = stored, stored.read()
        array = part.to_leaf(self._last[1])[index if layer is None else index[1:]]
        return self._check_finite(cast(array, self._dtype, stored.name, stored.file), path, layer)

    def params(self):
        return read_tree(self, lambda path, leaf: jnp.asarray(leaf))

    def _whole_tensor(self, path, layer):
        _, stored = self._stored[path, layer]
        assert stored is not None  # a drawn vector is finite
        return stored.name, stored.file, cast(stored.read(), self._dtype, stored.name, stored.file)

    def _drawn_query(self) -> np.ndarray:
        """Draws the query vector, [D], of a model that has none, with a warning, once.

        It is rounded as if the source had stored it, so that every way of reading returns the same.
        """
        if self._query is None:
            config = self.config
            if config.mask_token is None:  # masked diffusion reads none
                message = "%s: has no %s; the query vector is drawn from seed %d"
                logger.warning(message, self.directory, QUERY_TENSOR, self._seed)
            key, embedding = jax.random.key(self._seed), self._model.stored[families.embedding(config)]
            vector = config.query_init_scale * jax.random.normal(key, (config.d_model,), jnp.float32)
            stored = np.asarray(vector).astype(embedding.dtype)
            self._query = stored if self._dtype is None else stored.astype(self._dtype)
        return self._query


def _read_kept_files(directory) -> dict[str, Any]:
    """Reads the files that go along unread, by name: text as a string, others as {"base64": ...}.

    None of them may be a Git LFS pointer.
    """
    files = {}
    for path in kept_files(directory):
        if path.stat().length > _MAX_KEPT_BYTES:
            logger.warning("%s: larger than %d bytes, not kept", path, _MAX_KEPT_BYTES)
            continue
        data = read_bytes(path)
        try:
            files[path.name] = data.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError:
            files[path.name] = {"base64": base64.b64encode(data).decode("ascii")}
    return files


def kept_files(directory) -> list[Any]:
    return [path for path in sorted(as_path(directory).iterdir()) if is_kept(path.name) and path.is_file()]


def is_kept(name: str) -> bool:
    """Returns whether a file of this name may go along, when it is read and when it is written."""
    fits = any(fnmatch.fnmatchcase(name, pattern) for pattern in _KEPT_FILES)
    return fits and is_file_name(name) and name not in (CONFIG_FILE, INDEX_FILE)


def kept_bytes(content) -> bytes:
    return content.encode("utf-8") if isinstance(content, str) else base64.b64decode(content["base64"])


def check_source(source: dict[str, Any], file) -> None:
    """Checks what a checkpoint, perhaps an untrusted one, keeps of its source: see `HFModel.source`.

    Args:
      source: of the checkpoint's `Meta`.
      file: names it in errors.
    """
    for part in ("config", "tensors", "files"):
        if not isinstance(source.get(part), dict):
            raise InputError("expected an object", file=file, field=f"source.{part}")
    sums = source.get("sha256", {})  # a checkpoint from memory has none
    if not isinstance(sums, dict) or not all(isinstance(sum_, str) for sum_ in sums.values()):
        raise InputError("expected sums by file name", file=file, field="source.sha256")
    dtypes = [dtype.name for dtype in FLOATS]
    for name, dtype in source["tensors"].items():
        if dtype not in dtypes:
            why = f"{str(dtype)[:60]!r} is no parameter dtype; known: {', '.join(dtypes)}"
            raise InputError(why, file=file, field=f"source.tensors: {name[:200]}")
    for name, content in source["files"].items():
        if not is_kept(name):  # it might be code, or stand in for the weights
            raise InputError(f"{name[:60]!r} is no name for a file to keep", file=file, field="source.files")
        try:
            kept_bytes(content)
        except (TypeError, KeyError, ValueError) as error:
            raise InputError("neither text nor base64", file=file, field=f"source.files: {name}") from error
