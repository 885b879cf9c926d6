"""`a3 bench forwards`: forwards a text by strategy and order, on a Markov chain.

Once with the chain's exact conditionals in the model's place, once with a small model trained on it. How
good what is drawn is: nats a symbol under the true law, whose own samples have its entropy.
"""

import dataclasses
import functools
import types

import jax
import numpy as np
import optax

from a3_jax.benchmarks import chain
from a3_jax.benchmarks.measurement import Row, note
from a3_jax.benchmarks.settings import Settings
from a3_jax.decoding.filling import Task, first_state, make_program
from a3_jax.decoding.generation import generate
from a3_jax.decoding.loop import run_steps, start_state
from a3_jax.decoding.options import GenerateOptions
from a3_jax.decoding.requests import blank_requests, item_lines
from a3_jax.model.config import ModelConfig
from a3_jax.model.sharding import make_mesh
from a3_jax.model.two_stream import TwoStream
from a3_jax.ordering.intervals import sort_order, take_rows
from a3_jax.training.optimizer import make_optimizer
from a3_jax.training.state import init_state
from a3_jax.training.step import make_train_step

SYMBOLS, BLANKS, WINDOW, TEXTS = 16, 64, 8, 64
BOS = SYMBOLS
BATCH, LEARNING_RATE, WARMUP = 64, 3e-3, 50
CONFIG = ModelConfig(
    vocab_size=SYMBOLS + 1, d_model=64, num_layers=2, num_heads=4, num_kv_heads=4, head_size=16,
    mlp_size=192, max_length=BLANKS + 1,
)  # fmt: skip

_DRAWN = {"temperature": 1.0}
STRATEGIES = {
    **{
        f"speculative_{order}": {"strategy": "speculative", "order": order, "window": WINDOW, **_DRAWN}
        for order in ("l2r", "random", "spread")
    },
    **{f"groupwise4_{order}": {"order": order, "group_size": 4, **_DRAWN} for order in ("random", "spread")},
    "dynamic_entropy_bound": {"strategy": "dynamic", "criterion": "entropy", "entropy_bound": 1.0, **_DRAWN},
}


def measure(settings: Settings) -> list[Row]:
    """Forwards, drafts that passed and nats a symbol, by strategy: of the exact chain and of a model."""
    transition = chain.transition_matrix(SYMBOLS, settings.seed)
    rng = np.random.default_rng(settings.seed)
    own = chain.sample_chains(rng, transition, 4096, BLANKS)
    setting = {"symbols": SYMBOLS, "blanks": BLANKS, "window": WINDOW, "texts": TEXTS}
    rows = [Row("chain_entropy", "nats/token", setting, [chain.nats_per_symbol(transition, own)])]
    note(f"forwards: training a model for {settings.steps} steps")
    params, loss = train(transition, settings.steps, settings.seed)
    of_model = setting | {"conditionals": "trained", "steps": settings.steps}
    rows.append(Row("model_loss", "nats/token", of_model, [loss]))
    for name, options in STRATEGIES.items():
        note(f"forwards: {name}")
        options = options | {"seed": settings.seed}
        for figures, where in (
            (decode_exactly(transition, options), setting | {"conditionals": "exact"}),
            (decode_model(params, options), of_model),
        ):
            rows += _rows(name, transition, where, *figures)
    return rows


def decode_exactly(transition, options: dict):
    """(tokens, forwards, drafts that passed): the strategy over the chain's own conditionals."""
    settings = GenerateOptions(**options)
    config = dataclasses.replace(CONFIG, vocab_size=SYMBOLS)  # the chain has no BOS
    checkpoint = types.SimpleNamespace(config=config, tokenizer=None, meta=None)
    requests = blank_requests(item_lines([{"tokens": [None] * BLANKS}]), checkpoint, settings)
    tasks = [Task(requests[0], text, "flat", settings) for text in range(TEXTS)]
    program = make_program(config, settings, None, tasks[0].shape)
    state = start_state(first_state(tasks, tasks[0].shape[0], TEXTS, settings.seed), program)
    network = chain.exact_network(transition, BLANKS)
    final = jax.jit(lambda state: run_steps(state, network, program))(state)
    passed = None
    if final.drafts is not None:
        passed = float(np.sum(final.drafts.accepted) / max(float(np.sum(final.drafts.proposed)), 1.0))
    return np.asarray(final.tokens)[:, :BLANKS], np.asarray(final.forwards)[:TEXTS], passed


def decode_model(params, options: dict):
    """(tokens, forwards, drafts that passed): the strategy over a model, given BOS."""
    checkpoint = types.SimpleNamespace(config=CONFIG, tokenizer=None, meta=None, params=params)
    items = [{"tokens": [BOS] + [None] * BLANKS}]
    results = generate(checkpoint, items, num_samples=TEXTS, context="flat", **options)
    passed = [result["acceptance"] for result in results if result.get("acceptance") is not None]
    tokens = np.array([result["tokens"][1:] for result in results])
    forwards = np.array([result["forwards"] for result in results])
    return tokens, forwards, float(np.mean(passed)) if passed else None


def train(transition, steps: int, seed: int):
    """(parameters, last loss in nats a symbol) of a model trained on random orders, one token a group."""
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
    model, optimizer = TwoStream(CONFIG), make_optimizer(b2=0.99)
    rng = np.random.default_rng(seed)
    rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, min(WARMUP, steps - 1), steps)
    with jax.set_mesh(mesh):
        state = init_state(CONFIG, optimizer, mesh, seed=seed)
        step = make_train_step(model, optimizer, mesh, objective="any_order", microbatches=1)
        losses = []
        for number in range(steps):
            state, metrics = step(state, _batch(rng, transition), np.asarray(rate(number), np.float32))
            losses = [*losses[-49:], metrics["loss"]]
    return state.params, float(np.mean(jax.device_get(losses)))


def _batch(rng, transition) -> dict[str, np.ndarray]:
    """Chains behind a given BOS, sorted by a random order."""
    chains = chain.sample_chains(rng, transition, BATCH, BLANKS)
    tokens = np.pad(chains, ((0, 0), (1, 0)), constant_values=BOS)
    ranks = np.pad(1 + np.argsort(rng.random(chains.shape), axis=1), ((0, 0), (1, 0))).astype(np.int32)
    positions = np.tile(np.arange(BLANKS + 1, dtype=np.int32), (BATCH, 1))
    segment_ids = np.ones_like(tokens)
    order = sort_order(ranks, segment_ids)
    names = ("tokens", "positions", "segment_ids", "ranks")
    batch = dict(zip(names, take_rows(order, tokens, positions, segment_ids, ranks), strict=True))
    return batch | {"weights": (batch["ranks"] > 0).astype(np.float32)}


def _rows(name, transition, setting, tokens, forwards, passed) -> list[Row]:
    row = functools.partial(Row, setting=setting)
    in_chain = np.minimum(tokens, SYMBOLS - 1)  # a model may draw a BOS, which the chain doesn't have
    rows = [
        row(f"{name}_forwards", "forwards", repeats=[float(np.mean(forwards))]),
        row(f"{name}_forwards_at_most", "forwards", repeats=[float(np.max(forwards))]),
        row(f"{name}_nats", "nats/token", repeats=[chain.nats_per_symbol(transition, in_chain)]),
    ]
    return rows + ([] if passed is None else [row(f"{name}_acceptance", "share", repeats=[passed])])
