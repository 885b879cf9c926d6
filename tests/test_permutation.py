"""Invariant 3: storage order is nothing; (tokens, positions, ranks) alone decide."""

import numpy as np
import pytest

from tests import tiny


@pytest.mark.parametrize("outputs", ["query", "content"])
def test_permuting_storage_permutes_the_outputs(outputs):
    rng = np.random.default_rng(0)
    row = tiny.packed_row(rng, [7, 6], padding=3)
    order = rng.permutation(len(row[0]))
    straight = tiny.run(row, outputs)
    permuted = tiny.run(tuple(array[order] for array in row), outputs)
    real = row[2][order] > 0
    np.testing.assert_allclose(permuted[real], straight[order][real], atol=2e-5)


def test_positions_and_ranks_do_matter():
    """The positive half: other positions, or another order, are another distribution."""
    tokens, positions, segments, ranks = tiny.packed_row(np.random.default_rng(1), [8])
    straight = tiny.run((tokens, positions, segments, ranks))
    assert np.abs(tiny.run((tokens, positions[::-1].copy(), segments, ranks)) - straight).max() > 1e-3
    assert np.abs(tiny.run((tokens, positions, segments, ranks.max() - ranks)) - straight).max() > 1e-3


def test_rotary_positions_are_relative():
    """Shifting all positions of a document changes nothing: attention sees differences only."""
    tokens, positions, segments, ranks = tiny.packed_row(np.random.default_rng(2), [8])
    shifted = tiny.run((tokens, positions + 17, segments, ranks))
    np.testing.assert_allclose(shifted, tiny.run((tokens, positions, segments, ranks)), atol=5e-5)
