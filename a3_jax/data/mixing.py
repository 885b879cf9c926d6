"""Several sources in one stream, at given rates: which one an example comes from is a function of its number.

    running number  i = block * 1024 + place
    place        -> slot    permute(place, 1024) under (seed, block)
    slots           [ first source's 614 | second source's 410 ]     for rates of 0.6 and 0.4
    example         number  block * 614 + slot  of the first source, for a slot below 614

So every 1024 examples hold each source's share to the nearest example, and any example is found without
those before it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from a3_jax.data.table import PREDICTED
from a3_jax.errors import InputError

BLOCK = 1024
_MIXING_SEED = 0x6D6978  # apart from the seeds that order the rows


@dataclasses.dataclass(frozen=True)
class Joined:
    """Sources of rows of one length, one behind the other.

    Attributes:
      tables: with `num_rows`, `seq_len`, `has_roles`, `largest_id` and `take`, as `Table` or `ShardTable`.
    """

    tables: Sequence[Any]

    @property
    def seq_len(self) -> int:
        return self.tables[0].seq_len

    @property
    def num_rows(self) -> int:
        return sum(table.num_rows for table in self.tables)

    @property
    def has_roles(self) -> bool:
        return any(table.has_roles for table in self.tables)

    @property
    def largest_id(self) -> int:
        return max(table.largest_id for table in self.tables)

    def take(self, rows) -> dict[str, np.ndarray]:
        """As `Table.take`."""
        ends = np.cumsum([table.num_rows for table in self.tables])
        sources = np.searchsorted(ends, rows, side="right")
        firsts = ends - [table.num_rows for table in self.tables]
        own = rows - firsts[sources]
        return gather(sources, lambda source, rows: self.tables[source].take(rows), own, self.has_roles)


@dataclasses.dataclass(frozen=True)
class Mixture(Joined):
    """Sources of rows drawn at rates, each with epochs of its own.

    Attributes:
      rates: relative, each above 0.
    """

    rates: Sequence[float]

    def __post_init__(self):
        if not all(0 < rate < float("inf") for rate in self.rates):
            raise InputError(f"rates must be above 0, got {list(self.rates)}", field="data")
        if 0 in self.counts:
            raise InputError(f"a rate below 1 in {BLOCK} is none: {list(self.rates)}", field="data")

    @property
    def counts(self) -> np.ndarray:
        """[sources] int64: examples of each in a block, the largest remainders rounded up."""
        shares = np.asarray(self.rates, np.float64) / sum(self.rates) * BLOCK
        counts = np.floor(shares).astype(np.int64)
        largest = np.argsort(counts - shares, kind="stable")  # the most negative first
        counts[largest[: BLOCK - counts.sum()]] += 1
        return counts

    def locate(self, numbers, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns where examples come from.

        Args:
          numbers: [B] int, running numbers of the stream.

        Returns:
          ([B] the source, [B] the running number in that source's own stream), int64.
        """
        blocks, places = np.divmod(np.asarray(numbers, np.int64), BLOCK)
        slots = permute(places, BLOCK, seed ^ _MIXING_SEED, blocks)
        ends = np.cumsum(self.counts)
        sources = np.searchsorted(ends, slots, side="right")
        counts = self.counts[sources]
        return sources, blocks * counts + slots - (ends[sources] - counts)


def pick(table, numbers, seed: int) -> dict[str, np.ndarray]:
    """Returns the rows of examples by running number, each row of each source once an epoch.

    Args:
      table: a source with `take`, or a `Mixture` of them.
      numbers: [B] int.
      seed: the run's.

    Returns:
      As `Table.take`.
    """
    if isinstance(table, Mixture):
        sources, own = table.locate(numbers, seed)

        def take(source, numbers):
            return pick(table.tables[source], numbers, seed + 1 + source)

        return gather(sources, take, own, table.has_roles)
    epochs, places = np.divmod(np.asarray(numbers, np.int64), table.num_rows)
    return table.take(permute(places, table.num_rows, seed, epochs))


def gather(sources, take, own, has_roles: bool) -> dict[str, np.ndarray]:
    """Rows of several sources in the order asked for.

    Args:
      sources: [B] int, the source of each row.
      take: (source, [n] numbers) -> its rows.
      own: [B] int, each row's number in its source.
      has_roles: give roles, `PREDICTED` throughout in rows of a source without them.
    """
    gathered: dict[str, np.ndarray] = {}
    for source in np.unique(sources):
        places = np.flatnonzero(sources == source)
        rows = take(int(source), own[places])
        if has_roles and "roles" not in rows:
            rows["roles"] = np.full(rows["tokens"].shape, PREDICTED, np.uint8)
        for name, array in rows.items():
            into = gathered.setdefault(name, np.zeros((len(sources), *array.shape[1:]), array.dtype))
            into[places] = array
    return gathered


_FEISTEL_ROUNDS = 8
_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


def permute(places, num_rows: int, seed: int, epochs) -> np.ndarray:
    """Returns a keyed bijection of 0..num_rows-1, another for each (seed, epoch).

    A Feistel network over the smallest even number of bits that holds them all; what falls outside
    goes through again until it falls inside.

    Args:
      places: [n] int, each in 0..num_rows-1.
      num_rows: R.
      seed: the run's.
      epochs: [n] int.

    Returns:
      [n] int64, rows.
    """
    half_bits = np.uint64(max(1, (int(num_rows - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    keys = _mix(_mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF)) ^ np.asarray(epochs).astype(np.uint64))
    values = np.asarray(places).astype(np.uint64)
    outside = np.ones(values.shape, bool)
    while outside.any():
        left, right, key = values[outside] >> half_bits, values[outside] & mask, keys[outside]
        for turn in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(_mix(key + np.uint64(turn)) ^ right) & mask)
        values[outside] = left << half_bits | right
        outside = values >= num_rows
    return values.astype(np.int64)


def _mix(words):
    """SplitMix64's finaliser: a bijection of 64-bit words in which every bit depends on every other."""
    with np.errstate(over="ignore"):
        words = words + _GOLDEN_RATIO
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return words ^ (words >> np.uint64(31))
