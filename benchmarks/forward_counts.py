"""`a3 bench forwards`: forwards per text by strategy and order, on a Markov chain.

Once with the chain's exact conditionals in the model's place, once with a small model trained on it. How
good the drawn texts are: nats per symbol under the true distribution, whose own samples have its entropy.
"""

import dataclasses
import types

import jax
import numpy as np
import optax

from a3_jax.decoding.filling import Task, first_state, make_program
from a3_jax.decoding.generation import generate
from a3_jax.decoding.loop import run_steps, start_state
from a3_jax.decoding.options import GenerateOptions
from a3_jax.decoding.requests import blank_requests, item_lines
from a3_jax.model.config import ModelConfig
from benchmarks.markov_chain import exact_network, nats_per_symbol, sample_chains, transition_matrix
from benchmarks.measurement import Row, note
from benchmarks.settings import Settings
from benchmarks.train_steps import TrainStep

SYMBOLS, BLANKS, WINDOW, TEXTS = 16, 64, 8, 64
BOS = SYMBOLS
BATCH, LEARNING_RATE, WARMUP = 64, 3e-3, 50
CONFIG = ModelConfig(
    vocab_size=SYMBOLS + 1, d_model=64, num_layers=2, num_heads=4, num_kv_heads=4, head_size=16,
    mlp_size=192, max_length=BLANKS + 1,
)  # fmt: skip
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
    note(f"forwards: training a model for {settings.steps} steps")
    params, loss = train(transition, settings)
    of_chain = setting | {"conditionals": "exact"}
    of_model = setting | {"conditionals": "trained", "steps": settings.steps}
    rows = [
        Row("chain_entropy", "nats/token", setting, [nats_per_symbol(transition, samples)]),
        Row("model_loss", "nats/token", of_model, [loss]),
    ]
    for name, strategy in STRATEGIES.items():
        note(f"forwards: {name}")
        options = strategy | {"temperature": 1.0, "seed": settings.seed}
        rows += _rows(name, transition, of_chain, *decode_exactly(transition, options))
        rows += _rows(name, transition, of_model, *decode_model(params, options))
    return rows


def _rows(name, transition, setting, tokens, forwards, acceptance) -> list[Row]:
    in_chain = np.minimum(tokens, SYMBOLS - 1)  # a model may draw a BOS, which the chain doesn't have
    figures = {
        "forwards": ("forwards", np.mean(forwards)),
        "forwards_at_most": ("forwards", np.max(forwards)),
        "nats": ("nats/token", nats_per_symbol(transition, in_chain)),
        "acceptance": ("share", acceptance),
    }
    return [
        Row(f"{name}_{metric}", unit, setting, [float(value)])
        for metric, (unit, value) in figures.items() if value is not None
    ]  # fmt: skip


def decode_exactly(transition, options: dict):
    """Returns tokens, forwards and share of accepted drafts: the strategy on the chain's own conditionals."""
    settings = GenerateOptions(**options)
    config = dataclasses.replace(CONFIG, vocab_size=SYMBOLS)  # the chain has no BOS
    checkpoint = types.SimpleNamespace(config=config, tokenizer=None, meta=None)
    requests = blank_requests(item_lines([{"tokens": [None] * BLANKS}]), checkpoint, settings)
    tasks = [Task(requests[0], text, "flat", settings) for text in range(TEXTS)]
    program = make_program(config, settings, None, tasks[0].shape)
    state = start_state(first_state(tasks, tasks[0].shape[0], TEXTS, settings.seed), program)
    network, acceptance = exact_network(transition, BLANKS), None
    final = jax.jit(lambda state: run_steps(state, network, program))(state)
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
    rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, min(WARMUP, steps - 1), steps)
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
