"""`a3 bench forwards`: forwards per text by strategy and order, on a Markov chain.

Once with the chain's own conditionals in the model's place, once with a small model trained on it. Texts are
judged by their nats per symbol under the chain, whose own samples have its entropy.
"""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from a3_jax.decoding.decode_state import lay_drafts
from a3_jax.decoding.generation import generate
from a3_jax.decoding.loop import ModelFns, run_steps, start_state
from a3_jax.decoding.options import GenerateOptions
from a3_jax.model.config import ModelConfig
from a3_jax.ordering.intervals import sort_order
from benchmarks.fill_times import make_fill
from benchmarks.measurement import Row, note
from benchmarks.settings import Settings
from benchmarks.train_steps import TrainStep

SYMBOLS, BLANKS, WINDOW, TEXTS = 16, 64, 8, 64
BOS = SYMBOLS
BATCH, LEARNING_RATE, WARMUP = 64, 3e-3, 50
CONFIG = ModelConfig(vocab_size=SYMBOLS + 1, d_model=64, num_layers=2, num_heads=4, num_kv_heads=4,
                     head_size=16, mlp_size=192, max_length=BLANKS + 1)  # fmt: skip
CONCENTRATION = 0.3  # of the Dirichlet prior of rows: a neighbour says much, a symbol far away little
STRATEGIES = {
    **{f"speculative_{order}": {"strategy": "speculative", "order": order, "window": WINDOW}
       for order in ("l2r", "random", "spread")},
    **{f"groupwise4_{order}": {"order": order, "group_size": 4} for order in ("random", "spread")},
    "dynamic_entropy_bound": {"strategy": "dynamic", "criterion": "entropy", "entropy_bound": 1.0},
}  # fmt: skip


def measure(settings: Settings) -> list[Row]:
    """Counts forwards and accepted drafts, and computes nats per symbol, for each strategy."""
    transition = transition_matrix(SYMBOLS, settings.seed)
    samples = sample_chains(np.random.default_rng(settings.seed), transition, 4096, BLANKS)
    setting = {"symbols": SYMBOLS, "blanks": BLANKS, "window": WINDOW, "texts": TEXTS}
    of_chain = setting | {"conditionals": "exact"}
    of_model = setting | {"conditionals": "trained", "steps": settings.steps}
    rows = [Row("chain_entropy", "nats/token", setting, [nats_per_symbol(transition, samples)])]
    note(f"forwards: training a model for {settings.steps} steps")
    params, loss = train(transition, settings)
    rows.append(Row("model_loss", "nats/token", of_model, [loss]))
    for name, strategy in STRATEGIES.items():
        note(f"forwards: {name}")
        options = strategy | {"temperature": 1.0, "seed": settings.seed}
        rows += _rows(name, transition, of_chain, *decode_exactly(transition, options))
        rows += _rows(name, transition, of_model, *decode_model(params, options))
    return rows


def _rows(name, transition, setting, tokens, forwards, acceptance) -> list[Row]:
    in_chain = np.minimum(tokens, SYMBOLS - 1)  # a model may draw a BOS, which the chain doesn't have
    figures = [
        ("forwards", "forwards", np.mean(forwards)),
        ("forwards_at_most", "forwards", np.max(forwards)),
        ("nats", "nats/token", nats_per_symbol(transition, in_chain)),
        *([] if acceptance is None else [("acceptance", "share", acceptance)]),
    ]
    return [Row(f"{name}_{metric}", unit, setting, [float(value)]) for metric, unit, value in figures]


def decode_exactly(transition, options: dict):
    """Returns tokens, forwards and share of accepted drafts: the strategy on the chain's own conditionals."""
    config = dataclasses.replace(CONFIG, vocab_size=SYMBOLS)  # the chain has no BOS
    spec, state = make_fill(config, [{"tokens": [None] * BLANKS}], GenerateOptions(**options), TEXTS)
    model_fns, acceptance = exact_model_fns(transition, BLANKS), None
    final = jax.jit(lambda state: run_steps(state, model_fns, spec))(start_state(state, spec))
    if final.drafts is not None:
        acceptance = np.sum(final.drafts.accepted) / max(np.sum(final.drafts.proposed), 1)
    return np.asarray(final.tokens)[:, :BLANKS], np.asarray(final.forwards)[:TEXTS], acceptance


def decode_model(params, options: dict):
    """Returns tokens, forwards and share of accepted drafts: the strategy on a model, given BOS."""
    checkpoint = types.SimpleNamespace(config=CONFIG, tokenizer=None, meta=None, params=params)
    items = [{"tokens": [BOS] + [None] * BLANKS}]
    results = generate(checkpoint, items, num_samples=TEXTS, context="flat", **options)
    accepted = [result["acceptance"] for result in results if result.get("acceptance") is not None]
    tokens = np.array([result["tokens"][1:] for result in results])
    return tokens, [result["forwards"] for result in results], np.mean(accepted) if accepted else None


def train(transition, settings: Settings):
    """Trains a model on random orders, one token per group; returns parameters and last loss in nats."""
    rng, steps = np.random.default_rng(settings.seed), settings.steps
    rate: Any = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, min(WARMUP, steps - 1), steps)
    like = _draw_batch(np.random.default_rng(settings.seed), transition)
    step = TrainStep(settings, CONFIG, like, "any_order", b2=0.99)
    losses = [step(_draw_batch(rng, transition), float(rate(n)))["loss"] for n in range(steps)]
    return step.state.params, float(np.mean(losses[-50:]))


def _draw_batch(rng, transition) -> dict[str, np.ndarray]:
    """Draws chains after a given BOS, in random orders."""
    chains = sample_chains(rng, transition, BATCH, BLANKS)
    ranks = np.pad(1 + np.argsort(rng.random(chains.shape), axis=1), ((0, 0), (1, 0))).astype(np.int32)
    return {
        "tokens": np.pad(chains, ((0, 0), (1, 0)), constant_values=BOS),
        "positions": np.tile(np.arange(BLANKS + 1, dtype=np.int32), (BATCH, 1)),
        "segment_ids": np.ones_like(ranks),
        "ranks": ranks,
        "weights": (ranks > 0).astype(np.float32),
    }


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


def exact_model_fns(transition, length: int) -> ModelFns:
    """Returns the chain's conditionals in the place of a model, for texts of `length` columns.

    p(x | l at distance a before it, r at distance b after it, ...) is proportional to P^a[l, x] P^b[x, r].
    """
    matrices = [np.linalg.matrix_power(transition, distance) for distance in range(length + 1)]
    powers = jnp.asarray(np.stack(matrices), jnp.float32)
    backward = jnp.swapaxes(powers, 1, 2)  # [distance, to, from]

    def forward(state, offer, active):
        del active
        tokens, ranks, drafted = lay_drafts(state)
        columns, size = jnp.arange(tokens.shape[1]), tokens.shape[1]
        filled = state.filled & state.present
        # Sorted by rank, a candidate sees a prefix: what is filled, and the drafts before its own.
        slots = jnp.argsort(sort_order(ranks, (filled | drafted).astype(jnp.int32)), axis=1)
        limit = jnp.sum(filled, axis=1, dtype=jnp.int32)[:, None] + offer.num_visible_drafts
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
        on_right = jnp.where(after[..., None] == length, 1.0, backward[after, right_token])
        product = powers[before, left_token] * on_right
        return jnp.log(product / jnp.sum(product, axis=-1, keepdims=True)), state

    return ModelFns(forward, lambda hidden: hidden)
