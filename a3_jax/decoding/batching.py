"""Requests of one padded shape run together: a new length of a known bucket compiles nothing."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

_BATCH_ROWS = 8192  # rows of one stream in a batch, at most (but at least one request)


def bucket(count: int, smallest: int = 16) -> int:
    """The smallest power of two, at least `smallest`, that holds `count`."""
    return max(smallest, 1 << max(count - 1, 0).bit_length())


def batches(
    requests: Iterable[Any], shape_of: Callable[[Any], tuple], most: int | None = None
) -> Iterator[tuple[tuple, list[int], int]]:
    """Groups requests by padded shape.

    Args:
      requests: anything.
      shape_of: a request's padded shape; its first number is the rows of its longest stream.
      most: requests a batch, at most; None: as many as their rows allow.

    Yields:
      (shape, indices into `requests`, batch size to pad to): a power of two, so that the last batch of
      a bucket finds a compiled program too.
    """
    by_shape: dict[tuple, list[int]] = {}
    for index, request in enumerate(requests):
        by_shape.setdefault(shape_of(request), []).append(index)
    for shape, indices in sorted(by_shape.items()):
        size = max(1, _BATCH_ROWS // shape[0])
        size = size if most is None else 1 << (min(size, most).bit_length() - 1)
        for first in range(0, len(indices), size):
            chunk = indices[first : first + size]
            yield shape, chunk, bucket(len(chunk), 1)
