"""Safetensors files, read tensor by tensor (`safetensors_writer` writes them).

The safetensors library maps local files; here a file may lie in a bucket, no more than one tensor is in
memory, and damage is reported by tensor. The tests hold both to the same bytes.

A file is `<8 bytes: N, little endian> <N bytes: JSON header> <data>`; the header gives each tensor's
dtype, shape and byte range in the data. A model is one `model.safetensors`, or several files and
`model.safetensors.index.json`, which says in which file each tensor lies. What a header or an index
claims is checked against the files before anything is read.
"""

import dataclasses
import json
import math

import ml_dtypes
import numpy as np

from a3_jax.errors import InputError
from a3_jax.paths import POINTER_BYTES, as_path, is_file_name, read_json, refuse_pointer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit

# Every dtype of the format has a size; those with a NumPy type can be read.
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet.

    Attributes:
      name, file: which, where.
      dtype: NumPy dtype.
      shape: as stored.
      offset: bytes from the beginning of the file.
    """

    name: str
    file: object
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, begin: int = 0, end: int | None = None) -> np.ndarray:
        """The tensor, or its rows `begin` to `end` (along the first axis), read-only.

        Raises:
          InputError: the file ends before it, or can't be read.
        """
        shape, first = self.shape, 0
        if end is not None:
            row = math.prod(self.shape[1:]) * self.dtype.itemsize
            shape, first = (end - begin, *self.shape[1:]), begin * row
        nbytes = math.prod(shape) * self.dtype.itemsize
        try:
            with as_path(self.file).open("rb") as file:
                file.seek(self.offset + first)
                data = file.read(nbytes)
        except OSError as error:  # its header could be read before
            why = f"can't be read: {error.strerror or error}"
            raise InputError(why, file=self.file, field=self.name) from error
        if len(data) != nbytes:
            raise InputError("the file is truncated inside this tensor", file=self.file, field=self.name)
        return np.frombuffer(data, self.dtype).reshape(shape)


def has_tensors(directory) -> bool:
    directory = as_path(directory)
    return any((directory / name).exists() for name in (SINGLE_FILE, INDEX_FILE))


def list_tensors(directory) -> dict[str, StoredTensor]:
    """The tensors of a model directory by name, none of them read.

    Raises:
      InputError: no safetensors, a shard that is missing or damaged, an index that names something
        that is not there.
    """
    directory = as_path(directory)
    if (directory / SINGLE_FILE).exists():
        return read_header(directory / SINGLE_FILE)
    if (directory / INDEX_FILE).exists():
        return _list_sharded(directory, directory / INDEX_FILE)
    if any(directory.glob("*.bin")):
        raise InputError(
            "only pickled weights (*.bin), which are not read because they can run code; "
            "save the model with safe_serialization=True first", file=directory,
        )  # fmt: skip
    raise InputError(f"neither {SINGLE_FILE} nor {INDEX_FILE} in this directory", file=directory)


def read_header(file) -> dict[str, StoredTensor]:
    """The tensors of one file, after checking that its header and its length agree.

    Raises:
      InputError: naming the file and, where one is concerned, the tensor.
    """
    header, data_start, size = _read_header_json(as_path(file))
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            tensors[name] = _stored_tensor(file, name, entry, data_start)
    end = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            raise InputError(
                "damaged header: tensors overlap or leave a gap here", file=file, field=tensor.name
            )
        end += tensor.nbytes
        if end > size:
            raise InputError(
                f"the file is truncated: {size} bytes, this tensor ends at byte {end}",
                file=file,
                field=tensor.name,
            )
    if end != size:
        raise InputError(f"{size} bytes, but its header accounts for {end}", file=file)
    return tensors


def _read_header_json(file) -> tuple[dict, int, int]:
    """The header, the byte where the data begins, the file's length."""
    try:
        size = file.stat().length
        with file.open("rb") as opened:
            refuse_pointer(opened.read(POINTER_BYTES), file)
            opened.seek(0)
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > size - 8:
                raise InputError(f"the file is truncated inside its header: {size} bytes", file=file)
            if length > MAX_HEADER_BYTES:
                raise InputError(f"damaged header: claims to be {length} bytes long", file=file)
            header = json.loads(opened.read(length))
    except OSError as error:
        raise InputError(f"can't be read: {error.strerror or error}", file=file) from error
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors both
        raise InputError("not a safetensors file: its header is no JSON", file=file) from error
    if not isinstance(header, dict):
        raise InputError("not a safetensors file: its header is no JSON object", file=file)
    return header, 8 + length, size


def _stored_tensor(file, name, entry, data_start) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = [begin, end, *shape]
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(
            "damaged header: entry without dtype, shape or offsets", file=file, field=name
        ) from error
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise InputError("damaged header: a shape or offset is no natural number", file=file, field=name)
    # Bounds that NumPy keeps even where a size of 0 leaves no bytes.
    if len(shape) > 8 or math.prod(max(size, 1) for size in shape) >= 2**60:
        raise InputError("damaged header: no tensor can have this shape", file=file, field=name)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(
            f"dtype {str(dtype)[:60]!r} is not supported; known: {', '.join(DTYPES)}", file=file, field=name
        )
    tensor = StoredTensor(name, file, np.dtype(DTYPES[dtype]), shape, data_start + begin)
    if tensor.nbytes != end - begin:
        raise InputError(
            f"damaged header: shape {list(shape)} of {dtype} is {tensor.nbytes} bytes, not {end - begin}",
            file=file, field=name,
        )  # fmt: skip
    return tensor


def _list_sharded(directory, index_file) -> dict[str, StoredTensor]:
    """The tensors that an index names; it decides, whatever else the shards hold."""
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("no tensors are named", file=index_file, field="weight_map")
    shards: dict[str, dict[str, StoredTensor]] = {}
    tensors = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard not in shards:
            shards[shard] = read_header(_shard_path(directory, index_file, name, shard))
        if name not in shards[shard]:
            raise InputError(
                f"{INDEX_FILE} puts this tensor here, but it isn't", file=directory / shard, field=name
            )
        tensors[name] = shards[shard][name]
    return tensors


def _shard_path(directory, index_file, name, shard):
    # Checked by the letters of the name: in the Hub's cache the shards are links out of the directory.
    if not is_file_name(shard):
        why = f"{str(shard)[:60]!r} is no file name inside this directory"
        raise InputError(why, file=index_file, field=name)
    path = directory / shard
    if not path.exists():
        raise InputError(f"shard is missing; {INDEX_FILE} names it", file=path, field=name)
    return path
