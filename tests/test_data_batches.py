"""A batch is a function of (seed, step): epochs, hosts, orders; plain NumPy."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from a3_jax.data.batches import BatchPlan, batch, eval_batch, examples
from a3_jax.data.mixing import permute
from a3_jax.data.table import FILLER, GIVEN, PREDICTED, Table, pack
from a3_jax.errors import InputError
from a3_jax.ordering.curriculum import Order, Stage, release_stages
from a3_jax.ordering.ranks import draw

RANDOM = (Stage("random", 1000, orders=(Order("random", (1, 2)),)),)


def small_table(num_rows=7):
    """Row r holds documents of 4 and 1 tokens; token 0 is real, and stands in padding too."""
    tens = 10 + 10 * np.arange(num_rows)
    columns = [tens, tens + 1, tens + 2, 0 * tens, tens + 3, 0 * tens]
    layout = np.ones((num_rows, 1), np.int32)
    return Table(
        tokens=np.stack(columns, axis=1).astype(np.int32),
        positions=layout * np.array([0, 1, 2, 3, 0, 0], np.int32),
        segment_ids=layout * np.array([1, 1, 1, 1, 2, 0], np.int32),
    )


@given(st.integers(1, 300), st.integers(0, 2**64 - 1), st.integers(0, 2**40))
def test_permute_is_a_bijection(num_rows, seed, epoch):
    rows = permute(np.arange(num_rows), num_rows, seed, np.full(num_rows, epoch))
    assert sorted(rows) == list(range(num_rows))


def test_permute_is_uniform():
    """Every row stands at every place equally often over the epochs."""
    num_rows, epochs = 5, 4000
    places = np.tile(np.arange(num_rows), epochs)
    rows = permute(places, num_rows, 3, np.repeat(np.arange(epochs), num_rows))
    counts = np.zeros((num_rows, num_rows))
    np.add.at(counts, (places, rows), 1)
    expected = epochs / num_rows
    assert ((counts - expected) ** 2 / expected).sum() < 45  # 16 degrees of freedom, 1 in 10,000
    assert len({tuple(epoch) for epoch in rows.reshape(epochs, num_rows)}) > 100  # of 120


def test_golden_permutation():
    """The stream of a seed is a promise to every run that resumes: these numbers stay."""
    assert permute(np.arange(10), 10, 42, np.full(10, 3)).tolist() == [0, 6, 5, 2, 3, 1, 7, 4, 8, 9]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 16])
def test_each_row_once_an_epoch(batch_size):
    table = small_table()
    plan = BatchPlan(table, RANDOM, 1, batch_size)
    steps = range(-(-4 * table.num_rows // batch_size))
    rows = np.concatenate([examples(plan, step)["tokens"][:, 1] // 10 - 1 for step in steps])[
        : 4 * table.num_rows
    ]
    epochs = rows.reshape(4, table.num_rows)
    assert all(sorted(epoch) == list(range(table.num_rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_hosts_share_the_global_batch(num_hosts):
    table = small_table()
    for step in (0, 1, 5):
        whole = batch(BatchPlan(table, RANDOM, 1, 8), step)
        parts = [batch(BatchPlan(table, RANDOM, 1, 8, host, num_hosts), step) for host in range(num_hosts)]
        for name, array in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


def test_examples_do_not_depend_on_the_batch_size():
    """Example i has its row and its order, however many stand in a batch: new ones each epoch."""
    table = small_table()
    by_size = {
        size: [
            {name: array[b] for name, array in made.items()}
            for step in range(24 // size)
            for made in [batch(BatchPlan(table, RANDOM, 1, size), step)]
            for b in range(size)
        ]
        for size in (1, 3, 8)
    }
    for made in zip(*by_size.values(), strict=True):
        for name in made[0]:
            assert all((other[name] == made[0][name]).all() for other in made)


def test_a_row_meets_new_orders():
    table = small_table(num_rows=1)
    orders = {tuple(batch(BatchPlan(table, RANDOM, 1, 1), step)["tokens"][0]) for step in range(100)}
    assert len(orders) > 20


def test_rows_are_sorted_and_whole():
    table = small_table()
    made = batch(BatchPlan(table, RANDOM, 1, 7), 0)
    assert {name: (array.dtype.name, array.shape) for name, array in made.items()} == {
        **dict.fromkeys(("tokens", "positions", "segment_ids", "ranks"), ("int32", (7, 6))),
        "weights": ("float32", (7, 6)),
    }
    assert (made["segment_ids"] == [1, 1, 1, 1, 2, 0]).all()
    assert (np.diff(made["ranks"][:, :4]) >= 0).all()
    order = np.argsort(made["positions"][:, :4], axis=1)
    in_reading_order = np.take_along_axis(made["tokens"][:, :4], order, axis=1)
    assert {tuple(row) for row in in_reading_order} == {tuple(row) for row in table.tokens[:, :4]}


def test_ranks_are_those_of_the_running_number():
    table = small_table()
    plan = BatchPlan(table, RANDOM, 5, 4)
    given_rows, made = examples(plan, 3), batch(plan, 3)
    for b in range(4):
        expected = draw(RANDOM[0], given_rows["positions"][b], given_rows["segment_ids"][b], 5, 12 + b).ranks
        found = dict(zip(made["positions"][b, :4], made["ranks"][b, :4], strict=True))
        assert [found[position] for position in range(4)] == expected[:4].tolist()


def test_padding_is_a_mask():
    """Token 0 is real, padding holds it too (as pad = EOS would): weights tell them apart."""
    made = batch(BatchPlan(small_table(), RANDOM, 1, 7), 0)
    assert (made["weights"] == (made["segment_ids"] > 0)).all()
    assert Counter(made["weights"][made["tokens"] == 0].tolist()) == {1.0: 7, 0.0: 7}


BOS = 10  # the first token of row 0 of `small_table`


def of_token(made, name):
    """What stands beside each token of the first document of each row, in reading order: [B, 4]."""
    order = np.argsort(made["positions"][:, :4] + 99 * (made["segment_ids"][:, :4] != 1), axis=1)
    return np.take_along_axis(made[name][:, :4], order, axis=1)


def test_bos_is_given_where_a_stage_says_so():
    """At the start of a document alone, and where the plan knows the BOS."""
    table = pack([np.array([BOS, 3, BOS, 4]), np.array([3, BOS])], 6)
    for bos_given, bos_id, places in ((True, BOS, [0]), (False, BOS, []), (True, None, []), (True, 3, [4])):
        stage = Stage("a", 9, orders=RANDOM[0].orders, bos_given=bos_given)
        for step in range(9):
            made = batch(BatchPlan(table, (stage,), 1, 1, bos_id=bos_id), step)
            reading = np.argsort(made["positions"][0] + 4 * (made["segment_ids"][0] - 1))
            weights, ranks = made["weights"][0, reading], made["ranks"][0, reading]
            assert np.flatnonzero(weights == 0).tolist() == places
            assert all(ranks[place] == 0 < ranks[place + 1] for place in places)


def test_prompts_are_given_and_filler_has_no_weight():
    roles = [GIVEN, GIVEN, PREDICTED, FILLER]
    tokens = np.arange(4)
    table = pack([tokens] * 5, 6, roles=[np.array(roles, np.uint8)] * 5)
    for context, of_prompt in (("flat", [0, 0]), ("l2r", [0, 1])):
        stage = Stage("a", 9, orders=(Order("random", (1,), context=context),))
        ranks = set()
        for step in range(9):
            made = batch(BatchPlan(table, (stage,), 1, 4), step)
            assert set(made) == {"tokens", "positions", "segment_ids", "ranks", "weights"}
            assert (of_token(made, "weights") == [0, 0, 1, 0]).all()
            assert (made["weights"][:, 4:] == 0).all()
            assert (of_token(made, "ranks")[:, :2] == of_prompt).all()
            ranks |= {tuple(row - of_prompt[1]) for row in of_token(made, "ranks")[:, 2:]}
        assert ranks == {(1, 2), (2, 1)}  # filler has its place in the order


def test_absent_tokens_stand_with_the_padding():
    stage = Stage("a", 30, orders=RANDOM[0].orders, absent=1.0)
    table = small_table()
    sizes = Counter()
    for step in range(30):
        made = batch(BatchPlan(table, (stage,), 1, 7), step)
        assert (made["weights"] == (made["segment_ids"] > 0)).all()
        present = (made["segment_ids"] == 1).sum(axis=1)
        assert all((made["segment_ids"][row, count] == 2) for row, count in enumerate(present))
        assert (made["ranks"][made["segment_ids"] == 0] == 0).all()
        sizes.update(present.tolist())
    assert set(sizes) == {2, 3}  # of four


def test_held_out_batches_score_what_training_predicts():
    table = pack([np.array([BOS, 3, 5, 4])] * 3, 6, roles=[np.array([GIVEN, PREDICTED, GIVEN, FILLER])] * 3)
    for objective in ("any_order", "ar"):
        (made,) = eval_batch(table, "l2r", 1, 0, 4, objective=objective, context="flat")
        assert (of_token(made, "weights")[:3] == [0, 1, 0, 0]).all()
        expected = [0, 1, 0, 2] if objective == "any_order" else [0, 1, 2, 3]
        assert (of_token(made, "ranks")[:3] == expected).all()
        assert (made["weights"][3] == 0).all()
    plain = pack([np.array([BOS, 3, 5, 4])] * 3, 6)
    for bos_given in (True, False):
        (made,) = eval_batch(plain, "random", 1, 0, 4, bos_given=bos_given, bos_id=BOS)
        assert (of_token(made, "weights")[:3] == [not bos_given, 1, 1, 1]).all()


def test_one_order_for_a_batch():
    """The release: all rows of a step follow one permutation, another at the next step."""
    table = pack([np.arange(100 * row, 100 * row + 16) for row in range(8)], 16, packing=False)
    stages = release_stages([1, 1, 1, 50, 1, 1])
    steps = [batch(BatchPlan(table, stages, 1, 4), step)["positions"] for step in range(3, 20)]
    assert all((positions == positions[0]).all() for positions in steps)
    assert len({tuple(positions[0]) for positions in steps}) == len(steps)
    own_orders = batch(BatchPlan(table, RANDOM, 1, 4), 3)["positions"]
    assert not (own_orders == own_orders[0]).all()


def test_stage_of_a_step_decides_the_order():
    stages = (
        Stage("a", 2),
        Stage("b", 3, orders=(Order("contiguous", (4,)),)),
        Stage("c", 1, objective="ar"),
    )
    ranks = [
        batch(BatchPlan(small_table(), stages, 0, 2), step)["ranks"][0, :4].tolist() for step in range(6)
    ]
    assert ranks == [[0, 1, 2, 3]] * 2 + [[0, 0, 0, 0]] * 3 + [[0, 1, 2, 3]]


def test_eval_batches_hold_each_row_once():
    table = small_table()
    batches = list(eval_batch(table, "random", 1, seed=0, batch_size=4))
    assert [made["tokens"].shape for made in batches] == [(4, 6)] * 2
    assert sum(made["weights"].sum() for made in batches) == table.num_tokens
    assert (batches[1]["segment_ids"][3] == 0).all() and (batches[1]["weights"][3] == 0).all()
    again = list(eval_batch(table, "random", 1, seed=0, batch_size=4))
    assert all((made[name] == other[name]).all() for made, other in zip(batches, again) for name in made)
    halves = [list(eval_batch(table, "random", 1, 0, 4, host=host, num_hosts=2)) for host in (0, 1)]
    joined = np.concatenate([halves[0][1]["tokens"], halves[1][1]["tokens"]])
    assert (joined == batches[1]["tokens"]).all()
    assert len(list(eval_batch(table, "l2r", 4, 0, 4, max_batches=1))) == 1


def test_bad_plans():
    with pytest.raises(InputError, match=r"batch_size: .*multiple of the 2 hosts"):
        BatchPlan(small_table(), RANDOM, 0, 3, 0, 2)
    with pytest.raises(InputError, match="no row"):
        BatchPlan(pack([], 4), RANDOM, 0, 1)


def test_batches_need_neither_seqio_nor_tensorflow():
    code = (
        "import sys, a3_jax.data.batches, a3_jax.data.table, a3_jax.data.documents, a3_jax.data.embedded;"
        "sys.exit(any(name.split('.')[0] in ('seqio', 'tensorflow', 't5') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
