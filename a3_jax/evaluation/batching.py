"""Requests of one padded length run together, whatever order they came in."""

from a3_jax.decoding.batching import bucket


def length_bucket(count: int, smallest: int = 16) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds `count` rows.

    Twice as fine as the buckets of `a3 score`: an evaluation runs long enough on each of its lengths to
    pay for its compilation, and a third of its rows would be padding at worst, not half.
    """
    whole = bucket(count, smallest)
    three_quarters = whole // 4 * 3
    return three_quarters if smallest <= count <= three_quarters else whole


def fewest(shape: tuple[int, int]) -> int:
    """Passes that a batch of a padded shape (content rows, query rows) is padded to at least.

    With few rows CPUs take other kernels, whose sums differ by 1e-6 a token: a batch of one would not give
    what a batch of many gives. It costs no more than 1024 rows, in the last batch of a shape.
    """
    content_rows, query_rows = shape
    wanted = min(128 // query_rows, 1024 // (content_rows + query_rows))
    return 1 << max(wanted.bit_length() - 1, 0)


def padded_count(shape: tuple[int, int], count: int) -> int:
    """What a batch of `count` passes of a padded shape is padded to: half octaves, like lengths."""
    return max(fewest(shape), length_bucket(count, 1))
