"""Packing keeps every token, in rows that nothing else shares."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a3_jax.data import table
from a3_jax.data.table import first_fit, long_first_fit, pack
from a3_jax.errors import InputError

LENGTHS = st.lists(st.integers(0, 25), max_size=30)


def documents_of(lengths):
    """Documents of distinct tokens, the first of them 0: a real token."""
    starts = np.cumsum(lengths) - lengths
    return [
        np.arange(start, start + length, dtype=np.int32)
        for start, length in zip(starts, lengths, strict=True)
    ]


def segments_of(packed):
    """(tokens, positions) of every packed chunk."""
    for row in range(packed.num_rows):
        for segment in range(1, packed.segment_ids[row].max() + 1):
            is_here = packed.segment_ids[row] == segment
            yield packed.tokens[row][is_here], packed.positions[row][is_here]


def test_hand_drawn():
    packed = pack([np.array([7, 8, 9]), np.array([1, 2, 3, 4]), np.array([5, 6]), np.array([0])], 5)
    assert packed.tokens.tolist() == [[7, 8, 9, 5, 6], [1, 2, 3, 4, 0]]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert packed.segment_ids.tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 1, 2]]


@given(LENGTHS, st.integers(1, 10))
def test_tokens_are_conserved(lengths, seq_len):
    documents = documents_of(np.array(lengths, int))
    packed = pack(documents, seq_len)
    assert packed.num_tokens == sum(lengths)
    assert sorted(packed.tokens[packed.segment_ids > 0]) == list(range(sum(lengths)))
    chunks = {
        tuple(document[i : i + seq_len]) for document in documents for i in range(0, len(document), seq_len)
    }
    assert {tuple(tokens) for tokens, _ in segments_of(packed)} == chunks
    for tokens, positions in segments_of(packed):
        assert positions.tolist() == list(range(len(tokens)))


@given(LENGTHS, st.integers(1, 10))
def test_padding_is_last_and_segments_ascend(lengths, seq_len):
    packed = pack(documents_of(np.array(lengths, int)), seq_len)
    for row in packed.segment_ids:
        kept = row[row > 0]
        assert (row[: len(kept)] == kept).all() and (np.diff(kept) >= 0).all() and (np.diff(kept) <= 1).all()
        assert row[0] == 1


@given(LENGTHS, st.integers(1, 10))
def test_without_packing_a_row_is_one_truncated_document(lengths, seq_len):
    documents = [document for document in documents_of(np.array(lengths, int)) if len(document)]
    packed = pack(documents, seq_len, packing=False)
    assert packed.num_rows == len(documents)
    for row, (document, (tokens, _)) in enumerate(zip(documents, segments_of(packed), strict=True)):
        assert tokens.tolist() == document[:seq_len].tolist()
        assert packed.segment_ids[row].max() == 1


@given(st.lists(st.integers(1, 10), max_size=60))
def test_first_fit_is_first_fit(lengths):
    """Against the plain loop."""
    rows, offsets, segments = first_fit(np.array(lengths, int), 10)
    used, counts = [], []
    for index, length in enumerate(lengths):
        row = next((row for row, count in enumerate(used) if count + length <= 10), len(used))
        if row == len(used):
            used.append(0)
            counts.append(0)
        assert (rows[index], offsets[index], segments[index]) == (row, used[row], counts[row] + 1)
        used[row] += length
        counts[row] += 1


@given(st.lists(st.integers(1, 10), max_size=60))
def test_first_fit_in_a_small_window(lengths):
    """Old rows are closed, never reused for new ones, and still none overflows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "OPEN_ROWS", 2)
        rows, offsets, _ = first_fit(np.array(lengths, int), 10)
    newest = np.maximum.accumulate(rows)
    assert (rows >= newest - 1).all()
    for row in set(rows):
        ends = (offsets + lengths)[rows == row]
        assert offsets[rows == row].tolist() == [0, *ends[:-1]] and ends[-1] <= 10


def test_padding_of_a_large_set():
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(400), 1, 5_000), 1, 2048).astype(int)
    packed = pack([np.ones(length, np.int32) for length in lengths], 2048)
    assert 1 - packed.num_tokens / packed.tokens.size <= 0.01


def test_bad_seq_len():
    with pytest.raises(InputError, match="seq_len"):
        pack([], 0)


@given(LENGTHS, st.integers(1, 10))
def test_concatenation_pads_the_last_row_alone(lengths, seq_len):
    packed = pack(documents_of(np.array(lengths, int)), seq_len, "concat")
    assert packed.tokens.ravel()[: sum(lengths)].tolist() == list(range(sum(lengths)))
    assert packed.num_tokens == sum(lengths)
    assert packed.num_rows == -(-sum(lengths) // seq_len)
    for tokens, positions in segments_of(packed):
        assert positions.tolist() == list(range(len(tokens)))
        assert (np.diff(np.searchsorted(np.cumsum(lengths), tokens, side="right")) == 0).all()  # one document


def test_concatenation_hand_drawn():
    packed = pack([np.array([7, 8, 9]), np.array([1, 2]), np.array([3, 4, 5, 6, 0])], 4, "concat")
    assert packed.tokens.tolist() == [[7, 8, 9, 1], [2, 3, 4, 5], [6, 0, 0, 0]]
    assert packed.positions.tolist() == [[0, 1, 2, 0], [0, 0, 1, 2], [0, 1, 0, 0]]
    assert packed.segment_ids.tolist() == [[1, 1, 1, 2], [1, 2, 2, 2], [1, 1, 0, 0]]


@pytest.mark.parametrize("packing", table.PACKINGS)
def test_roles_stay_with_their_tokens(packing):
    documents = documents_of(np.array([3, 7, 5, 1]))
    packed = pack(documents, 4, packing, [(document % 3).astype(np.uint8) for document in documents])
    is_token = packed.segment_ids > 0
    assert (packed.roles[is_token] == packed.tokens[is_token] % 3).all()
    assert packed.roles.dtype == np.uint8 and not packed.roles[~is_token].any()


def test_bad_packing():
    with pytest.raises(InputError, match="packing: must be one of"):
        pack([], 4, "tight")


@given(st.lists(st.integers(1, 10), max_size=60))
def test_long_first_fit_fills_rows_without_overlap(lengths):
    rows, offsets, segments = long_first_fit(np.array(lengths, int), 10)
    assert sorted(set(rows.tolist())) == list(range(len(set(rows.tolist()))))
    for row in set(rows.tolist()):
        here = np.flatnonzero(rows == row)
        here = here[np.argsort(segments[here])]
        ends = offsets[here] + np.array(lengths)[here]
        assert segments[here].tolist() == list(range(1, len(here) + 1))
        assert offsets[here].tolist() == [0, *ends[:-1]] and ends[-1] <= 10
    firsts = [int(np.flatnonzero(rows == row)[0]) for row in range(len(set(rows.tolist())))]
    assert firsts == sorted(firsts)  # rows are in the order of their first documents


def test_long_first_fit_hand_drawn():
    documents = [np.array([1]), np.array([2, 2]), np.array([3, 3, 3]), np.array([4, 4, 4]), np.array([5])]
    packed = pack(documents, 5, first_fit_by=long_first_fit)
    assert packed.tokens.tolist() == [[3, 3, 3, 1, 5], [4, 4, 4, 2, 2]]
    assert packed.segment_ids.tolist() == [[1, 1, 1, 2, 3], [1, 1, 1, 2, 2]]


@pytest.mark.parametrize("sigma", [0.5, 0.8, 1.0, 1.2])
def test_long_first_leaves_next_to_no_padding(sigma):
    lengths = np.random.default_rng(0).lognormal(np.log(400), sigma, 1000).astype(int) + 1
    packed = pack([np.ones(length, np.int32) for length in lengths], 2048, first_fit_by=long_first_fit)
    assert packed.num_tokens == lengths.sum()
    assert 1 - packed.num_tokens / packed.tokens.size <= 0.01
