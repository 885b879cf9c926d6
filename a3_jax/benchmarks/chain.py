"""A stationary Markov chain: the one law whose any-order conditionals are known exactly.

With transitions P, a symbol at distance a behind l and b before r has
p(x | l, r) proportional to P^a[l, x] P^b[x, r], whatever else is known.
"""

import jax.numpy as jnp
import numpy as np

from a3_jax.decoding.loop import Network
from a3_jax.decoding.state import lay_drafts

_CONCENTRATION = 0.3  # of the rows' Dirichlet law: a neighbour says much, a symbol far away little


def transition_matrix(symbols: int, seed: int) -> np.ndarray:
    """[symbols, symbols] float64, rows that add up to 1."""
    rows = np.random.default_rng(seed).dirichlet([_CONCENTRATION] * symbols, size=symbols)
    return (rows + 1e-6) / (rows + 1e-6).sum(-1, keepdims=True)


def stationary_law(transition) -> np.ndarray:
    """[symbols] float64."""
    return np.linalg.matrix_power(transition, 500)[0]


def sample_chains(rng: np.random.Generator, transition, count: int, length: int) -> np.ndarray:
    """[count, length] int32, each from the stationary law on."""
    symbols, cumulative = len(transition), transition.cumsum(axis=1)
    chains = [rng.choice(symbols, count, p=stationary_law(transition))]
    for _ in range(length - 1):
        below = (rng.random(count)[:, None] > cumulative[chains[-1]]).sum(axis=1)
        chains.append(below.clip(0, symbols - 1))
    return np.stack(chains, axis=1).astype(np.int32)


def nats_per_symbol(transition, chains) -> float:
    """Mean of -log p over all symbols of [count, length] chains; the law's own samples have its entropy."""
    first = np.log(stationary_law(transition))[chains[:, 0]]
    steps = np.log(transition)[chains[:, :-1], chains[:, 1:]]
    return -float(first.sum() + steps.sum()) / chains.size


def exact_network(transition, length: int) -> Network:
    """The chain's conditionals in the place of a model: given the nearest known symbols on both sides.

    Args:
      length: columns of a text.
    """
    powers = [np.eye(len(transition))]
    for _ in range(length):
        powers.append(powers[-1] @ transition)
    powers = jnp.asarray(np.stack(powers), jnp.float32)
    far = length  # no neighbour: hardly anything is left of it after so many steps

    def forward(state, offer, active):
        del active
        tokens, ranks, drafted = lay_drafts(state)
        here = offer.columns[..., None]
        seen = (state.filled | drafted)[:, None] & state.present[:, None]
        seen &= ranks[:, None] < state.next_rank[:, None, None] + offer.behind[..., None]
        column = jnp.arange(tokens.shape[1])
        left = jnp.max(jnp.where(seen & (column < here), column, -1), axis=-1)
        right = jnp.min(jnp.where(seen & (column > here), column, tokens.shape[1]), axis=-1)

        def token_at(place):
            return jnp.take_along_axis(tokens, jnp.clip(place, 0, tokens.shape[1] - 1), axis=1)

        before = jnp.where(left < 0, far, offer.columns - left)
        after = jnp.where(right >= tokens.shape[1], far, right - offer.columns)
        law = powers[before, token_at(left)]
        towards = jnp.moveaxis(powers[after], -2, -1)  # [B, Q, to, from]
        behind = jnp.take_along_axis(towards, token_at(right)[..., None, None], axis=-2)[..., 0, :]
        law = law * jnp.where(after[..., None] == far, 1.0, behind)
        return jnp.log(law / jnp.sum(law, axis=-1, keepdims=True)), state

    return Network(forward, lambda hidden: hidden)
