"""A model's parameters in pieces that can be read, checked and written one by one.

A piece is some rows of a stored tensor, and with them whole chunks of the leaves that the tensor is part
of: whoever writes it, in whatever order, meets nobody else in the same chunk.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from a3_jax.checkpoints.families import Tensor, tensor_table
from a3_jax.model.config import ModelConfig

PIECE_BYTES = 1 << 24  # what a thread has in hand, but for rows that are longer
CHUNK_BYTES = 1 << 22  # what a reader must decode at least


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """A leaf as it will be stored.

    Attributes:
      shape, dtype: of the whole.
      chunks: the shape of what is encoded, and read, as one.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a stored tensor.

    Attributes:
      name: of the tensor, in the family's table.
      begin, end: of the first axis of its `Tensor.split`.
      nbytes: of what is written.
    """

    name: str
    begin: int
    end: int
    nbytes: int


def plan(config: ModelConfig, dtypes: Mapping[tuple[str, ...], np.dtype]):
    """The leaves of a model and the pieces that make them: ({path of the leaf: LeafPlan}, [Piece]).

    Args:
      dtypes: of each leaf, as it will be stored.
    """
    leaves: dict[tuple[str, ...], LeafPlan] = {}
    pieces: list[Piece] = []
    for name, parts in tensor_table(config).items():
        itemsize = max(dtypes[part.leaf].itemsize for part in parts)
        of_tensor = pieces_of(name, parts[0], math.prod(parts[0].shape) * itemsize)
        pieces += of_tensor
        for part in parts:
            stack = () if part.layer is None else (config.num_layers - 1,)
            chunks = _chunks(part, of_tensor[0].end, itemsize)
            shape, one = (*stack, *part.leaf_shape), (1,) * len(stack)
            leaves[part.leaf] = LeafPlan(shape, dtypes[part.leaf], (*one, *chunks))
    return leaves, pieces


def pieces_of(name: str, part: Tensor, nbytes: int) -> list[Piece]:
    """A stored tensor, of which `part` is all or a part, in pieces of about `PIECE_BYTES`."""
    rows = part.split[0]
    number = min(rows, math.ceil(nbytes / PIECE_BYTES)) if _has_rows(part) else 1
    step = math.ceil(rows / max(number, 1))
    return [
        Piece(name, begin, min(begin + step, rows), nbytes * min(step, rows - begin) // rows)
        for begin in range(0, rows, step)
    ]


def stored_rows(part: Tensor, piece: Piece) -> tuple[int, int] | None:
    """The rows of the stored tensor that a piece is; None: all of it."""
    if (piece.begin, piece.end) == (0, part.split[0]):
        return None
    merged = part.shape[0] // part.split[0]
    return piece.begin * merged, piece.end * merged


def cut(part: Tensor, piece: Piece) -> Tensor:
    """The table's entry of a tensor that consists of these rows alone."""
    rows = stored_rows(part, piece)
    if rows is None:
        return part
    shape = (rows[1] - rows[0], *part.shape[1:])
    return dataclasses.replace(part, shape=shape, split=(piece.end - piece.begin, *part.split[1:]))


def index_of(part: Tensor, piece: Piece) -> tuple[int | slice, ...]:
    """Where a piece lies in the leaf of `part`: NumPy's index, the layer an integer."""
    layer = () if part.layer is None else (part.layer,)
    if stored_rows(part, piece) is None:
        return (*layer, *(slice(0, size) for size in part.leaf_shape))
    rows = slice(piece.begin, piece.end)
    sizes = zip(part.order, part.leaf_shape, strict=True)
    return (*layer, *(rows if axis == 0 else slice(0, size) for axis, size in sizes))


def _has_rows(part: Tensor) -> bool:
    """Whether the first axis of `split` is one of the leaf's, and the first of the stored tensor's."""
    of_leaf = part.part is None or part.part[0] != 0
    return of_leaf and part.shape[0] % part.split[0] == 0


def _chunks(part: Tensor, step: int, itemsize: int) -> tuple[int, ...]:
    """Of a leaf without its layers: as many rows as a piece has, other axes halved until it is small."""
    chunks = list(part.leaf_shape)
    rows = part.order.index(0) if _has_rows(part) else None
    if rows is not None:
        chunks[rows] = step
    others = [axis for axis in range(len(chunks)) if axis != rows]
    while others and math.prod(chunks) * itemsize > CHUNK_BYTES:
        longest = max(others, key=lambda axis: chunks[axis])
        if chunks[longest] == 1:
            break
        chunks[longest] = math.ceil(chunks[longest] / 2)
    return tuple(chunks)
