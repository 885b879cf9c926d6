"""The formulas against the products of the traced model, against XLA's own count, and by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from a3_jax.model import flops
from a3_jax.model.config import PRESETS, ModelConfig
from a3_jax.model.two_stream import Rows, TwoStream, abstract_params, logits, run_rows
from a3_jax.ordering import intervals

TINY = ModelConfig(
    vocab_size=29, d_model=24, num_layers=3, num_heads=4, num_kv_heads=2, head_size=10, mlp_size=52,
    max_length=64,
)  # fmt: skip
BATCH, CONTENT, QUERY = 2, 8, 6


def arguments(config, content=CONTENT, query=QUERY):
    """Abstract parameters, content rows and query rows."""

    def rows(count, tokens):
        ints = jax.ShapeDtypeStruct((BATCH, count), jnp.int32)
        return Rows(positions=ints, start=ints, limit=ints, tokens=ints if tokens else None)

    return abstract_params(config), rows(content, True), rows(query, False)


def forward(config, outputs="query", attention="dense", **model):
    """A function (params, content, query) -> logits of the rows wanted; dense, every pair is computed."""
    model = TwoStream(config, attention=attention, **model)

    def run(params, content, query):
        hidden = run_rows(model, params, content, query, outputs)
        wanted = [rows for rows in (hidden.content, hidden.query) if rows is not None]
        return logits(params, config, jnp.concatenate(wanted, axis=1))

    return run


def products(jaxpr, times=1):
    """(FLOPs, numbers in the factors and the result, batched or not) of each matrix product traced."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), (batched, _) = equation.params["dimension_numbers"]
            left, right, result = (x.aval.shape for x in (*equation.invars, *equation.outvars))
            inner = math.prod(left[axis] for axis in contracted)
            yield (
                times * 2 * math.prod(result) * inner,
                times * sum(map(math.prod, (left, right, result))),
                bool(batched),
            )
        inside = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
        )
        for value in inside:
            if isinstance(value, ClosedJaxpr | Jaxpr):
                yield from products(getattr(value, "jaxpr", value), times * equation.params.get("length", 1))


def traced(function, config):
    return list(products(jax.make_jaxpr(function)(*arguments(config)).jaxpr))


def dense_flops(config, outputs="query", content=CONTENT, query=QUERY):
    """The formula with as many pairs as dense attention computes, for a batch."""
    pairs = {"content_pairs": content**2, "query_pairs": query * content}
    return flops.forward_flops(config, content, query, outputs=outputs, **pairs) * BATCH


@pytest.mark.parametrize("outputs", ["query", "content", "both"])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_forward_flops_are_those_of_the_products(layers, outputs):
    config = dataclasses.replace(TINY, num_layers=layers)
    found = sum(count for count, _, _ in traced(forward(config, outputs), config))
    assert dense_flops(config, outputs).total == found


@pytest.mark.parametrize("outputs", ["query", "content"])
def test_a_training_step_is_three_times_the_forward_pass(outputs):
    function = forward(TINY, outputs)
    step = jax.value_and_grad(lambda params, content, query: jnp.sum(function(params, content, query) ** 2))
    found = sum(count for count, _, _ in traced(step, TINY))
    assert (dense_flops(TINY, outputs) * flops.TRAINING).total == found


@pytest.mark.parametrize("outputs", ["query", "content", "both"])
def test_forward_bytes_are_those_of_the_products(outputs):
    """All numbers of float32; attention apart, as scores are not counted: its own products are batched."""
    found = sum(4 * count for _, count, batched in traced(forward(TINY, outputs), TINY) if not batched)
    cost = flops.forward_bytes(TINY, CONTENT, QUERY, batch=BATCH, itemsize=4, outputs=outputs)
    assert cost.total - cost.attention == found
    wanted = CONTENT * (outputs != "query") + QUERY * (outputs != "content")
    rows = 2 * (CONTENT + QUERY * (outputs != "content")) + wanted  # over three layers
    queries_and_outputs, keys_and_values = 2 * rows * 4 * 10, 2 * 3 * CONTENT * 2 * 10
    assert cost.attention == 4 * BATCH * (queries_and_outputs + keys_and_values)


BIG = ModelConfig(
    vocab_size=512, d_model=128, num_layers=2, num_heads=8, num_kv_heads=4, head_size=16, mlp_size=384,
    max_length=64,
)  # fmt: skip


def compiled_flops(config, outputs="query"):
    """XLA's count; it takes a scan for one layer, which with two layers it is."""
    compiled = jax.jit(forward(config, outputs)).lower(*arguments(config, 32, 32)).compile()
    return compiled.cost_analysis()["flops"]


def big_flops(config, outputs="query"):
    return dense_flops(config, outputs, content=32, query=32)


@pytest.fixture(scope="module")
def two_layers():
    return compiled_flops(BIG)


def test_the_compiler_counts_the_same(two_layers):
    """Norms, softmax and rotary positions are the few per cent on top."""
    assert 1.0 < two_layers / big_flops(BIG).total < 1.03
    one = dataclasses.replace(BIG, num_layers=1)
    assert 1.0 < compiled_flops(one) / big_flops(one).total < 1.03
    assert 1.0 < compiled_flops(BIG, "content") / big_flops(BIG, "content").total < 1.03


@pytest.mark.parametrize(
    ("field", "part"), [("vocab_size", "head"), ("mlp_size", "mlp"), ("num_kv_heads", "projections")]
)
def test_the_compiler_counts_each_part_the_same(two_layers, field, part):
    """Doubling a size adds what the formula of its part says."""
    doubled = dataclasses.replace(BIG, **{field: 2 * getattr(BIG, field)})
    before, after = big_flops(BIG), big_flops(doubled)
    parts = [
        getattr(after.content, name) + getattr(after.query, name)
        - getattr(before.content, name) - getattr(before.query, name)
        for name in ("projections", "attention", "mlp", "head")
    ]  # fmt: skip
    assert [name for name, more in zip(("projections", "attention", "mlp", "head"), parts) if more] == [part]
    np.testing.assert_allclose(compiled_flops(doubled) - two_layers, sum(parts), rtol=0.03)


@pytest.mark.parametrize(("length", "group_size"), [(1, 1), (12, 1), (12, 4), (13, 4), (7, 8)])
def test_visible_pairs_are_those_of_the_intervals(length, group_size):
    ranks = np.sort(np.random.default_rng(0).permutation(length) // group_size)[None].astype(np.int32)
    start, content_limit, query_limit = intervals.bounds(ranks, ranks, np.ones_like(ranks))
    pairs = [float(np.sum(limit - start)) for limit in (content_limit, query_limit)]
    assert list(flops.visible_pairs(length, group_size)) == pairs
    if length % group_size == 0:
        mean = [(length + group_size) / 2, (length - group_size) / 2]
        np.testing.assert_allclose(pairs, np.multiply(length, mean))


@pytest.mark.parametrize("name", PRESETS)
def test_the_left_to_right_step_is_six_flops_a_weight(name):
    """PaLM's formula: 6 for each weight that is multiplied, 12 L N H for each key that a token sees."""
    c, length = PRESETS[name], 2048
    looked_up = c.d_model * c.vocab_size * (not c.tie_embeddings)
    multiplied = flops.parameter_count(c) - looked_up - (2 * c.num_layers + 2) * c.d_model
    by_hand = 6 * multiplied + 12 * c.num_layers * c.num_heads * c.head_size * (length + 1) / 2
    np.testing.assert_allclose(flops.train_step_flops(c, length, objective="ar").total / length, by_hand)


@pytest.mark.parametrize(
    ("name", "bound"), [("llama-3.2-1b", 1.73), ("llama-3.2-3b", 1.81), ("llama-3.1-8b", 1.88)]
)
def test_the_two_stream_step_costs_less_than_two(name, bound):
    """Not twice, as there is one head, and the last layer's content half is keys and values alone."""
    for group_size in (1, 4):
        assert 1.5 < flops.step_ratio(PRESETS[name], 2048, group_size) < bound


@pytest.mark.parametrize("config", [TINY, *PRESETS.values()], ids=["tiny", *PRESETS])
def test_parameters_are_counted(config):
    leaves = jax.tree.leaves(abstract_params(config))
    assert flops.parameter_count(config) == sum(math.prod(leaf.shape) for leaf in leaves)
