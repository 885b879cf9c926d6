"""Safetensors files, read and written by rows of a tensor.

The safetensors library maps local files, and writes a shard from memory as a whole; here a file may lie in a
bucket, no more than one tensor is in memory, and damage is reported by tensor. The tests hold both to the
same bytes.

A file is `<8 bytes: N, little endian> <N bytes: JSON header> <data>`; the header gives each tensor's
dtype, shape and byte range in the data. A model is one `model.safetensors`, or several files and
`model.safetensors.index.json`, which says in which file each tensor is. What a header or an index
claims is checked against the files before anything is read.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping

import ml_dtypes
import numpy as np

from a3_jax.errors import InputError
from a3_jax.paths import POINTER_BYTES, as_path, is_file_name, read_json, refuse_pointer, write_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_SHARD_BYTES = 5_000_000_000
_STRIP_BYTES = 32

# Every dtype of the format has a size; those with a NumPy type can be read.
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
_CODES = {np.dtype(dtype).name: code for code, dtype in DTYPES.items()}


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
        """Reads the tensor, or its rows `begin` to `end` (along the first axis); the array is read-only."""
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
    """Lists the tensors of a model directory by name; none is read."""
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
    """Lists the tensors of one file, after checking that its header and its length agree."""
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
    """Reads the header, the byte where the data begins, and the file's length."""
    try:
        size = file.stat().length
        with file.open("rb") as stream:
            refuse_pointer(stream.read(POINTER_BYTES), file)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise InputError(f"the file is truncated inside its header: {size} bytes", file=file)
            if length > MAX_HEADER_BYTES:
                raise InputError(f"damaged header: claims to be {length} bytes long", file=file)
            header = json.loads(stream.read(length))
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
    """Lists the tensors that an index names; others in the shards don't count."""
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


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its dtype (NumPy) and shape."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_tensors(
    directory,
    specs: Mapping[str, TensorSpec],
    chunks: Callable[[str], Iterable[np.ndarray]],
    max_shard_bytes=MAX_SHARD_BYTES,
    on_tensor: Callable[[str, int], None] = lambda name, nbytes: None,
) -> None:
    """Writes a model's tensors into a directory: the same bytes for the same input.

    Args:
      directory: exists; the caller makes the whole of it atomic.
      specs: dtype and shape of every tensor by name, in the order in which they fill the shards; inside
        one wide dtypes go first, so that every tensor is aligned to its item size.
      chunks: yields a tensor when its turn comes, as arrays that follow each other in its bytes; one at a
        time is in memory.
      max_shard_bytes: a new file begins before this is exceeded; a tensor is never split.
      on_tensor: called with name and bytes of each tensor that was written.
    """
    directory = as_path(directory)
    shards = _plan_shards(specs, max_shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / file, {name: specs[name] for name in names}, chunks, on_tensor)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(spec.nbytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / INDEX_FILE, index)


def _plan_shards(specs, max_shard_bytes) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    return shards


def _write_file(path, specs: Mapping[str, TensorSpec], chunks, on_tensor) -> None:
    names = sorted(specs, key=lambda name: -np.dtype(specs[name].dtype).itemsize)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        spec = specs[name]
        begin, end = end, end + spec.nbytes
        code = _CODES[np.dtype(spec.dtype).name]
        header[name] = {"dtype": code, "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            _write_tensor(file, name, specs[name], chunks(name))
            on_tensor(name, specs[name].nbytes)


def _write_tensor(file, name, spec: TensorSpec, chunks: Iterable[np.ndarray]) -> None:
    written = 0
    for chunk in chunks:
        if chunk.dtype != spec.dtype or chunk.shape[1:] != tuple(spec.shape[1:]):
            raise ValueError(f"{name}: promised {spec}, got {chunk.dtype} {chunk.shape}")
        file.write(_contiguous(chunk).tobytes())
        written += chunk.nbytes
    if written != spec.nbytes:
        raise ValueError(f"{name}: promised {spec.nbytes} bytes, got {written}")


def _contiguous(array: np.ndarray) -> np.ndarray:
    """Returns the same numbers in C order; a transposed matrix in strips, four times faster than at once."""
    if array.ndim != 2 or array.flags.c_contiguous:
        return array
    result = np.empty(array.shape, array.dtype)
    width = max(1, _STRIP_BYTES // array.dtype.itemsize)
    for begin in range(0, array.shape[1], width):
        result[:, begin : begin + width] = array[:, begin : begin + width]
    return result
