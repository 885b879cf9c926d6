"""A stationary Markov chain: a distribution whose any-order conditionals are known exactly.

With transitions P, a symbol at distance a after l and b before r has p(x | l, r) proportional to
P^a[l, x] P^b[x, r], whatever else is known.
"""

import jax.numpy as jnp
import numpy as np

from a3_jax.decoding.loop import Network
from a3_jax.decoding.state import lay_drafts
from a3_jax.ordering.intervals import sort_order

CONCENTRATION = 0.3  # of the Dirichlet prior of rows: a neighbour says much, a symbol far away little


def transition_matrix(symbols: int, seed: int) -> np.ndarray:
    """Returns [symbols, symbols] float64, whose rows add up to 1."""
    rows = np.random.default_rng(seed).dirichlet([CONCENTRATION] * symbols, size=symbols)
    return (rows + 1e-6) / (rows + 1e-6).sum(-1, keepdims=True)


def stationary(transition) -> np.ndarray:
    """Returns the stationary distribution, [symbols] float64."""
    return np.linalg.matrix_power(transition, 500)[0]


def sample_chains(rng: np.random.Generator, transition, count: int, length: int) -> np.ndarray:
    """Returns [count, length] int32, each row starting from the stationary distribution."""
    symbols, cumulative = len(transition), transition.cumsum(axis=1)
    chains = [rng.choice(symbols, count, p=stationary(transition))]
    for _ in range(length - 1):
        below = (rng.random(count)[:, None] > cumulative[chains[-1]]).sum(axis=1)
        chains.append(below.clip(0, symbols - 1))
    return np.stack(chains, axis=1).astype(np.int32)


def nats_per_symbol(transition, chains) -> float:
    """Returns the mean of -log p over [count, length] chains; for the chain's own samples, its entropy."""
    first = np.log(stationary(transition))[chains[:, 0]]
    steps = np.log(transition)[chains[:, :-1], chains[:, 1:]]
    return -float(first.sum() + steps.sum()) / chains.size


def exact_network(transition, length: int) -> Network:
    """Returns the chain's conditionals in the place of a model, for texts of `length` columns."""
    powers = [np.eye(len(transition))]
    for _ in range(length):
        powers.append(powers[-1] @ transition)
    powers = jnp.asarray(np.stack(powers), jnp.float32)

    def forward(state, offer, active):
        del active
        tokens, ranks, drafted = lay_drafts(state)
        columns, size = jnp.arange(tokens.shape[1]), tokens.shape[1]
        filled = state.filled & state.present
        # Sorted by rank, a candidate sees a prefix: what is filled, and the drafts before its own.
        slots = jnp.argsort(sort_order(ranks, (filled | drafted).astype(jnp.int32)), axis=1)
        limit = jnp.sum(filled, axis=1, dtype=jnp.int32)[:, None] + offer.behind
        seen = slots[:, None] < limit[..., None]
        here = offer.columns[..., None]
        left = jnp.max(jnp.where(seen & (columns < here), columns, -1), axis=-1)
        right = jnp.min(jnp.where(seen & (columns > here), columns, size), axis=-1)
        # Without a neighbour, one so far away that hardly anything is left of it.
        before = jnp.where(left < 0, length, offer.columns - left)
        after = jnp.where(right >= size, length, right - offer.columns)
        left_token, right_token = (
            jnp.take_along_axis(tokens, jnp.clip(column, 0, size - 1), axis=1) for column in (left, right)
        )
        towards = jnp.moveaxis(powers[after], -2, -1)  # [B, Q, to, from]
        on_right = jnp.take_along_axis(towards, right_token[..., None, None], axis=-2)[..., 0, :]
        product = powers[before, left_token] * jnp.where(after[..., None] == length, 1.0, on_right)
        return jnp.log(product / jnp.sum(product, axis=-1, keepdims=True)), state

    return Network(forward, lambda hidden: hidden)
