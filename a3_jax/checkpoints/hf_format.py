"""A Hugging Face model directory as parameters; `hf_export` is the way back."""

import base64
import dataclasses
import fnmatch
import logging
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from a3_jax.checkpoints import families
from a3_jax.checkpoints.families import QUERY_LEAF, QUERY_TENSOR, Tensor
from a3_jax.checkpoints.hf_config import CONFIG_FILE, read_config
from a3_jax.checkpoints.safetensors_io import INDEX_FILE, StoredTensor, list_tensors
from a3_jax.errors import InputError
from a3_jax.model.config import ModelConfig
from a3_jax.paths import as_path, is_file_name, read_bytes, read_json

CARD_FILE = "README.md"
SOURCE_CARD_FILE = "README.source.md"  # in a directory of ours: the card of the model that it came from
FLOATS = tuple(np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16))
_KEPT_FILES = (  # licences ask that they and notices go along
    "*.json", "*.jinja", "*.txt", "tokenizer.model", CARD_FILE, SOURCE_CARD_FILE, "LICENSE", "LICENSE.md",
    "NOTICE", "NOTICE.md", "USE_POLICY.md",
)  # fmt: skip
_COMPARED_BYTES = 1 << 24  # of each of two tensors
_MAX_KEPT_BYTES = 1 << 25  # a file; the largest tokenizers have 20 MB

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
        """Names the fields of `config.json` that were left aside."""
        if self.unread:
            message = "%s: left aside are fields that change nothing in transformers' model either: %s"
            logger.warning(message, self.directory / CONFIG_FILE, ", ".join(self.unread)[:500])

    def source(self) -> dict[str, Any]:
        """What `Meta.source` keeps, so that the way back gives the same names, dtypes and files."""
        files = _read_kept_files(self.directory)
        if SOURCE_CARD_FILE in files:  # it was written by `hf_export`, so its card is ours
            files[CARD_FILE] = files.pop(SOURCE_CARD_FILE)
        return {
            "config": self.hf_config,
            "tensors": {tensor.name: tensor.dtype.name for tensor in self.stored.values()},
            "files": files,
        }


def open_hf(directory) -> HFModel:
    """Checks a Hugging Face directory against its config.

    Raises:
      InputError: what is missing, damaged, contradicting or not supported, by file and tensor.
    """
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


def read_params(model: HFModel, dtype=None, seed: int = 0, place=lambda path, leaf: leaf):
    """The parameter tree of a Hugging Face directory, read leaf by leaf.

    A model without query vector gets one that is drawn from `seed`, with a warning.

    Args:
      dtype: of all leaves; None: the source's, the widest of those that one leaf is made of.
      place: called with (path, NumPy array) of each leaf, gives what the tree shall hold.
    """
    check_tied(model)
    leaves: dict[tuple[str, ...], list[Tensor]] = {}
    for parts in families.tensor_table(model.config).values():
        for tensor in parts:
            leaves.setdefault(tensor.leaf, []).append(tensor)
    tree: dict[str, Any] = {}
    for path, tensors in leaves.items():
        if path == QUERY_LEAF and QUERY_TENSOR not in model.stored:
            leaf = drawn_query(model, seed, dtype)
        else:
            leaf = _read_leaf(tensors, model.stored, dtype)
        parent = tree
        for key in path[:-1]:
            parent = parent.setdefault(key, {})
        parent[path[-1]] = place(path, leaf)
    return tree


def cast(array: np.ndarray, dtype, name: str, file=None) -> np.ndarray:
    """An array in another float type.

    Raises:
      InputError: a finite number that the type can't hold.
    """
    if dtype is None or array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    # Only float16 has a smaller range than the others.
    if dtype == np.float16 and np.any(np.isinf(result) & np.isfinite(array)):
        raise InputError("a value is too large for float16", file=file, field=name)
    return result


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
    """Compares a tied head that is stored all the same with the embedding, a few rows at a time.

    Raises:
      InputError: it is another one.
    """
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


def _read_leaf(tensors: list[Tensor], stored, dtype) -> np.ndarray:
    """One leaf from the tensors that it is made of: one, or one a layer."""
    parts = [stored[tensor.name] for tensor in tensors]
    dtype = dtype or jnp.result_type(*(part.dtype for part in parts))
    if tensors[0].layer is None:
        array = np.ascontiguousarray(tensors[0].to_leaf(parts[0].read()))
        return cast(array, dtype, parts[0].name, parts[0].file)
    leaf = np.empty((len(tensors), *tensors[0].leaf_shape), dtype)
    for tensor, part in zip(tensors, parts, strict=True):
        leaf[tensor.layer] = cast(tensor.to_leaf(part.read()), dtype, part.name, part.file)
    return leaf


def drawn_query(model: HFModel, seed: int, dtype=None) -> np.ndarray:
    """The query vector, [D], of a model that has none, with a warning.

    It is one that the source might have stored, so that every way of reading gives the same.
    """
    config = model.config
    if config.mask_token is None:  # masked diffusion reads none
        logger.warning(
            "%s: has no %s; the query vector is drawn from seed %d", model.directory, QUERY_TENSOR, seed
        )
    vector = config.query_init_scale * jax.random.normal(jax.random.key(seed), (config.d_model,), jnp.float32)
    embedding = model.stored[families.embedding(config)]
    stored = np.asarray(vector).astype(embedding.dtype)
    return stored if dtype is None else stored.astype(dtype)


def _read_kept_files(directory) -> dict[str, Any]:
    """Files that go along, by name: text as a string, others as {"base64": ...}.

    Raises:
      InputError: one of them is a Git LFS pointer.
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
    """Whether a file goes along: of those that are read, and of those that an A3 checkpoint says to write."""
    fits = any(fnmatch.fnmatchcase(name, pattern) for pattern in _KEPT_FILES)
    return fits and is_file_name(name) and name not in (CONFIG_FILE, INDEX_FILE)
