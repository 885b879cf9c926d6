"""Invariant 2: a token reaches no query row whose rank is not greater than its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a3_jax.ordering.contexts import CONTEXT_SHAPES
from a3_jax.ordering.curriculum import Order, Stage
from a3_jax.ordering.ranks import TRAINING_CONTEXTS, draw
from tests import tiny


@pytest.mark.parametrize("seed", range(3))
def test_changing_a_token_changes_only_later_ranks(seed):
    """Exactly zero where the law says zero; a change at every row where it says there may be one."""
    rng = np.random.default_rng(seed)
    tokens, positions, segments, ranks = tiny.packed_row(rng, [9, 5], padding=2, group_size=2)
    before = tiny.run((tokens, positions, segments, ranks))
    for changed in range(len(tokens)):
        other = tokens.copy()
        other[changed] = (tokens[changed] + 1) % tiny.CONFIG.vocab_size
        difference = np.abs(tiny.run((other, positions, segments, ranks)) - before).max(axis=-1)
        may_change = (segments == segments[changed]) & (ranks > ranks[changed]) & (segments[changed] > 0)
        assert np.all(difference[~may_change] == 0), f"token {changed} leaks"
        assert np.all(difference[may_change] > 1e-6), f"token {changed} does not reach its later ranks"


def test_gradient_of_a_query_row_reaches_earlier_ranks_only():
    """d(logits of row i) / d(embedding of token j): non-zero if and only if rank j < rank i."""
    config, weights = tiny.CONFIG, tiny.params()
    row = tiny.packed_row(np.random.default_rng(7), [10], group_size=3)
    tokens, ranks = row[0], row[3]
    # Each token gets an embedding of its own, so that the gradient tells tokens apart.
    own = weights | {"embed": jnp.asarray(weights["embed"])[jnp.asarray(tokens)]}
    own_config = tiny.ModelConfig(**{**config.to_dict(), "vocab_size": len(tokens)})
    own["head"] = weights["head"][:, : len(tokens)]
    batch = [jnp.atleast_2d(jnp.asarray(a)) for a in (np.arange(len(tokens), dtype=np.int32), *row[1:])]

    def row_logits(embed):
        return tiny.forward(own | {"embed": embed}, *batch, config=own_config)[0].sum(axis=-1)

    jacobian = np.abs(jax.jacrev(row_logits)(own["embed"])).sum(axis=-1)
    earlier = ranks[None, :] < ranks[:, None]
    assert np.all(jacobian[~earlier] == 0)
    assert np.all(jacobian[earlier] > 0)


def test_content_rows_see_their_own_group():
    """The content stream is bidirectional inside a group, causal between groups."""
    rng = np.random.default_rng(3)
    tokens, positions, segments, ranks = tiny.packed_row(rng, [8], group_size=2)
    before = tiny.run((tokens, positions, segments, ranks), outputs="content")
    other = tokens.copy()
    other[2] = (tokens[2] + 1) % tiny.CONFIG.vocab_size
    difference = np.abs(tiny.run((other, positions, segments, ranks), outputs="content") - before).max(
        axis=-1
    )
    np.testing.assert_array_equal(difference > 0, ranks >= ranks[2])


@pytest.mark.parametrize("mode", TRAINING_CONTEXTS)
def test_what_is_given_sees_nothing_that_is_predicted_and_absent_tokens_are_seen_by_none(mode):
    """As training draws them. Exactly zero, in both streams; what is given reaches all that is predicted."""
    rng = np.random.default_rng(4)
    tokens, positions, segments, _ = tiny.packed_row(rng, [9, 7], padding=2)
    order = Order("random", (2,), 1.0, CONTEXT_SHAPES[1:], mode)
    drawn = draw(Stage("test", 1, orders=(order,), absent=1.0), positions, segments, 0, 3)
    given, absent = (drawn.segment_ids > 0) & ~drawn.predicted, (segments > 0) & (drawn.segment_ids == 0)
    assert given.any() and absent.any()

    def logits(tokens):
        row = (tokens, positions, drawn.segment_ids, drawn.ranks)
        return np.stack([tiny.run(row, outputs=stream) for stream in ("content", "query")])

    before = logits(tokens)
    for changed in np.flatnonzero(segments):
        other = tokens.copy()
        other[changed] = (tokens[changed] + 1) % tiny.CONFIG.vocab_size
        content, query = np.abs(logits(other) - before).max(axis=-1) > 0
        document = drawn.segment_ids == segments[changed]
        if absent[changed]:
            assert not (content | query)[drawn.segment_ids > 0].any()
        elif drawn.predicted[changed]:
            assert not (content | query)[given].any()
        else:
            assert query[document & drawn.predicted].all()
