"""Invariant 8, in short form: trained on a chain whose law is known, the model's any-order conditionals
approach the true ones.

Between a token at distance a to the left and one at distance b to the right, a stationary Markov
chain with transitions P has p(x | l, r) proportional to P^a[l, x] * P^b[x, r].

Every row begins with a given BOS. It must: the softmax over a single key is 1 wherever that key
stands, so a row that sees one token and nothing else can't know how far away it is.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from a3_jax.model.config import ModelConfig
from a3_jax.model.two_stream import init_params
from tests import tiny

SYMBOLS, LENGTH, BATCH, STEPS = 3, 6, 128, 500
CONFIG = ModelConfig(
    vocab_size=SYMBOLS + 1, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_size=8, mlp_size=64,
    max_length=16,
)  # fmt: skip


def sample_chains(rng, transitions, count):
    """[count, LENGTH] chains that start in the stationary law."""
    stationary = np.linalg.matrix_power(transitions, 64)[0]
    chains = [rng.choice(SYMBOLS, count, p=stationary)]
    cumulative = transitions.cumsum(axis=1)
    for _ in range(LENGTH - 1):
        chains.append((rng.random(count)[:, None] > cumulative[chains[-1]]).sum(axis=1).clip(0, SYMBOLS - 1))
    return np.stack(chains, axis=1).astype(np.int32)


def true_conditional(transitions, tokens, known, position):
    """p(x at `position` | tokens at `known`), [SYMBOLS], from powers of the transition matrix."""
    left = [k for k in known if k < position]
    right = [k for k in known if k > position]
    stationary = np.linalg.matrix_power(transitions, 64)[0]
    law = np.linalg.matrix_power(transitions, position - left[-1])[tokens[left[-1]]] if left else stationary
    if right:
        law = law * np.linalg.matrix_power(transitions, right[0] - position)[:, tokens[right[0]]]
    return law / law.sum()


def rows_of(tokens, ranks):
    """A batch of rows, BOS first, in the arguments' order of `tiny.forward`."""
    tokens = np.pad(tokens, ((0, 0), (1, 0)), constant_values=SYMBOLS)
    positions = np.broadcast_to(np.arange(LENGTH + 1, dtype=np.int32), tokens.shape)
    return tokens, positions, np.ones_like(tokens), np.pad(ranks.astype(np.int32) + 1, ((0, 0), (1, 0)))


def predict(weights, tokens, ranks):
    """p of each symbol at each position of the chains, [B, LENGTH, SYMBOLS]."""
    out = tiny.run(rows_of(tokens, ranks), weights=weights, config=CONFIG)[:, 1:, :SYMBOLS]
    return np.asarray(jax.nn.softmax(out))


@functools.cache
def trained_model():
    """(transitions, parameters) after a few hundred steps on random orders, one token a group."""
    rng = np.random.default_rng(3)
    transitions = rng.dirichlet(np.full(SYMBOLS, 0.5), SYMBOLS)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 30, STEPS), b2=0.99)
    weights = init_params(CONFIG, jax.random.key(0))
    state = optimizer.init(weights)

    def loss(weights, row):
        out = tiny.forward(weights, *row, config=CONFIG)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(out, row[0])[:, 1:])

    @jax.jit
    def step(weights, state, row):
        updates, state = optimizer.update(jax.grad(loss)(weights, row), state)
        return optax.apply_updates(weights, updates), state

    for _ in range(STEPS):
        ranks = np.argsort(rng.random((BATCH, LENGTH)), axis=1)
        weights, state = step(weights, state, rows_of(sample_chains(rng, transitions, BATCH), ranks))
    return transitions, weights


@pytest.mark.slow
def test_any_order_conditionals_approach_the_chain():
    """Mean total variation over random subsets: far below that of a law that ignores the right."""
    transitions, weights = trained_model()
    rng = np.random.default_rng(1)
    tokens = sample_chains(rng, transitions, 200)
    ranks = np.argsort(rng.random(tokens.shape), axis=1)
    predicted = predict(weights, tokens, ranks)
    distances = {"model": [], "left only": [], "nothing": []}
    for row, position in np.ndindex(tokens.shape):
        known = [k for k in range(LENGTH) if ranks[row, k] < ranks[row, position]]
        laws = {
            "model": predicted[row, position],
            "left only": true_conditional(
                transitions, tokens[row], [k for k in known if k < position], position
            ),
            "nothing": true_conditional(transitions, tokens[row], [], position),
        }
        truth = true_conditional(transitions, tokens[row], known, position)
        for name, law in laws.items():
            distances[name].append(0.5 * np.abs(law - truth).sum())
    mean = {name: np.mean(values) for name, values in distances.items()}
    assert mean["model"] < 0.06 and mean["model"] < 0.5 * mean["left only"], mean
    assert mean["left only"] < mean["nothing"], "the chain must be one where context matters"


@pytest.mark.slow
def test_right_context_is_used():
    """Given the next token only, the model inverts the chain: it does not just continue it."""
    transitions, weights = trained_model()
    tokens = np.tile(np.arange(SYMBOLS, dtype=np.int32)[:, None], (1, LENGTH))
    ranks = np.tile(np.array([2, 2, 2, 1, 0, 2]), (SYMBOLS, 1))  # 4 known, 3 asked
    predicted = predict(weights, tokens, ranks)[:, 3]
    for symbol in range(SYMBOLS):
        truth = true_conditional(transitions, tokens[symbol], [4], 3)
        assert 0.5 * np.abs(predicted[symbol] - truth).sum() < 0.08
