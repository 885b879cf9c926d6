"""Invariant 4 for scoring and generation: padding and batch mates change nothing."""

import numpy as np

from a3_jax.decoding import generate, score
from a3_jax.decoding.loop import decode
from tests import oracles
from tests.tiny_checkpoint import blanks, tiny_checkpoint

OPTIONS = {"order": "random", "group_size": 2, "temperature": 1.0, "top_k": 5, "num_samples": 2}


def random_items(rng, lengths):
    for length in lengths:
        yield {
            "tokens": rng.integers(0, 23, length).tolist(),
            "ranks": rng.integers(0, length, length).tolist(),
            "positions": rng.permutation(60)[:length].tolist(),
            "scored": rng.integers(0, 2, length).tolist(),
        }


def test_scores_alone_and_together():
    """Lines of one bucket and of several, scored one by one, together, and by the dense model."""
    items = list(random_items(np.random.default_rng(0), [1, 3, 9, 16, 17, 30, 5]))
    checkpoint = tiny_checkpoint()
    together = score(checkpoint, items)
    for item, result in zip(items, together, strict=True):
        alone = score(checkpoint, [item])[0]
        scored = np.array(item["scored"], bool)
        assert [value is None for value in result["logprobs"]] == (~scored).tolist()
        values = np.array(result["logprobs"], float)[scored]
        np.testing.assert_allclose(values, np.array(alone["logprobs"], float)[scored], atol=2e-5)
        dense = oracles.any_order_logprobs(
            checkpoint.params, checkpoint.config, item["tokens"], item["ranks"], item["positions"]
        )
        np.testing.assert_allclose(values, dense[scored], atol=1e-4)
        np.testing.assert_allclose(result["logprob"], dense[scored].sum(), atol=1e-4)


def test_draws_alone_and_together():
    """Sampled text depends on (seed, line number, sample) and on nothing else in the file."""
    rng = np.random.default_rng(1)
    items = [{"tokens": blanks(rng, length)} for length in (6, 12)]
    checkpoint = tiny_checkpoint()
    together = generate(checkpoint, items, **OPTIONS)
    with_others = generate(checkpoint, [{"tokens": blanks(rng, 15)}, items[1]], **OPTIONS)
    for one, other in zip(together[2:4], with_others[2:4], strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["commit_rank"] == other["commit_rank"]
        np.testing.assert_allclose(one["logprob"], other["logprob"], atol=2e-5)
    assert together[2]["tokens"] != together[3]["tokens"], "samples differ"
    other_seed = generate(checkpoint, items, **OPTIONS, seed=1)
    assert [r["tokens"] for r in other_seed] != [r["tokens"] for r in together]


def test_a_new_prompt_of_a_known_bucket_compiles_nothing():
    rng = np.random.default_rng(2)
    checkpoint = tiny_checkpoint()
    generate(checkpoint, [{"tokens": blanks(rng, 16)}] * 2, **OPTIONS)
    compiled = decode._cache_size()
    for length in (3, 10, 15):
        generate(checkpoint, [{"tokens": blanks(rng, length)}] * 2, **OPTIONS)
    assert decode._cache_size() == compiled
