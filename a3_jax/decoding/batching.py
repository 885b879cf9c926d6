"""Requests of one padded shape run together: a new length of a known bucket compiles nothing."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

_BATCH_ROWS = 8192  # rows of one stream in a batch, at most (but at least one request)


def bucket(count: int, smallest: int = 16) -> int:
    """Returns the smallest power of two, at least `smallest`, that holds `count`."""
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


def length_bucket(count: int, smallest: int = 16) -> int:
    """Returns the smallest of 16, 24, 32, 48, 64, 96, ... that holds `count` rows.

    Twice as fine as `bucket`: an evaluation runs long enough on each of its lengths to pay for the
    compilation, and at worst a third of its rows are padding, not half.
    """
    whole = bucket(count, smallest)
    three_quarters = whole // 4 * 3
    return three_quarters if smallest <= count <= three_quarters else whole


def fewest(shape: tuple[int, int]) -> int:
    """Returns the least number of passes in a batch of a padded shape (content rows, query rows).

    With few rows CPUs use other kernels, whose sums differ by 1e-6 per token: a batch of one would not give
    what a batch of many gives. The padding costs at most 1024 rows, in the last batch of a shape.
    """
    content_rows, query_rows = shape
    wanted = min(128 // query_rows, 1024 // (content_rows + query_rows))
    return 1 << max(wanted.bit_length() - 1, 0)


def padded_count(shape: tuple[int, int], count: int) -> int:
    """Returns the batch size of `count` passes of a padded shape: the next of 1, 2, 3, 4, 6, 8, ..."""
    return max(fewest(shape), length_bucket(count, 1))
