"""Invariant 4: a packed document has the logits it has alone; padding and batch mates change nothing."""

import numpy as np
import pytest

from tests import tiny


@pytest.mark.parametrize("outputs", ["query", "content"])
def test_a_packed_document_is_as_when_alone(outputs):
    rng = np.random.default_rng(0)
    row = tiny.packed_row(rng, [6, 9, 1], padding=4)
    packed = tiny.run(row, outputs)
    for segment in (1, 2, 3):
        here = row[2] == segment
        tokens, positions, segments, ranks = (array[here] for array in row)
        alone = tiny.run((tokens, positions, np.ones_like(segments), ranks), outputs)
        np.testing.assert_allclose(packed[here], alone, atol=2e-5)


def test_batch_mates_change_nothing():
    rng = np.random.default_rng(1)
    rows = [tiny.packed_row(rng, lengths, padding=12 - sum(lengths)) for lengths in ([12], [3, 4], [1])]
    batch = tuple(np.stack(arrays) for arrays in zip(*rows, strict=True))
    together = tiny.run(batch)
    for row, out in zip(rows, together, strict=True):
        real = row[2] > 0
        np.testing.assert_allclose(out[real], tiny.run(row)[real], atol=2e-5)


def test_tokens_of_padding_are_never_read():
    rng = np.random.default_rng(2)
    tokens, positions, segments, ranks = tiny.packed_row(rng, [7], padding=5)
    other = np.where(segments == 0, 3, tokens).astype(np.int32)
    np.testing.assert_array_equal(
        tiny.run((tokens, positions, segments, ranks))[:7], tiny.run((other, positions, segments, ranks))[:7]
    )
