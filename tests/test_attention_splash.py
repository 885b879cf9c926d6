"""Splash attention with traced intervals, interpreted on CPU, against dense attention in NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a3_jax.model import attention_splash, sharding
from a3_jax.model.attention_chunked import AttentionArgs
from a3_jax.model.attention_splash import splash_attention
from tests.test_attention import loop_attention

BLOCK, KEYS, SCALE = 128, 300, 0.3  # three blocks of keys, the last one ragged


def reference(query, key, value, start, limit, weight, softcap=None):
    """Sum of weight * attention, and its gradients: float64, all scores at once, differentiated by hand."""
    group = query.shape[2] // key.shape[2]
    q, k, v, w = (np.float64(array).transpose(0, 2, 1, 3) for array in (query, key, value, weight))
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    s = np.arange(key.shape[1])
    visible = ((s >= start[..., None]) & (s < limit[..., None]))[:, None]
    scores = SCALE * q @ k.swapaxes(2, 3)
    slope = SCALE
    if softcap is not None:
        slope = SCALE * (1 - np.tanh(scores / softcap) ** 2)
        scores = softcap * np.tanh(scores / softcap)
    p = np.where(visible, np.exp(scores), 0)
    p = p / np.maximum(p.sum(axis=-1, keepdims=True), 1e-300)
    dp = w @ v.swapaxes(2, 3)
    ds = slope * p * (dp - (p * dp).sum(axis=-1, keepdims=True))
    gradients = ds @ k, ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ w

    def heads_last(array, summed):
        array = array.reshape(array.shape[0], -1, summed, *array.shape[2:]).sum(axis=2)
        return array.transpose(0, 2, 1, 3)

    return (w * (p @ v)).sum(), [heads_last(a, n) for a, n in zip(gradients, (1, group, group))]


@functools.partial(jax.jit, static_argnames=("softcap", "block"))
def run(query, key, value, start, limit, weight, softcap=None, block=BLOCK):
    """(output [B, T, N, H], gradients of sum(weight * output))."""

    def total(query, key, value):
        out = splash_attention(
            query, key, value, start, limit, AttentionArgs(SCALE, softcap), interpret=True, block=block
        )
        return jnp.sum(weight * out), out

    gradients, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(query, key, value)
    return out, gradients


def both_streams(documents, keys=KEYS):
    """Intervals of the content rows, then of the query rows: [2 T]; documents are lists of group sizes."""
    content, query, begin = [], [], 0
    for sizes in documents:
        position = begin
        for size in sizes:
            content += [(begin, position + size)] * size
            query += [(begin, position)] * size
            position += size
        begin = position
    padding = [(0, 0)] * (keys - begin)
    return np.array(content + padding + query + padding, np.int32).T


ORDERS = {
    "left to right": [[1] * KEYS],
    "a context group over three blocks": [[290, 4, 4, 2]],
    "packed, ragged groups, padding": [[4, 4, 1], [7] * 20 + [3], [100, 1, 9, 2]],
    "a document that begins at a block": [[8] * 16, [2] * 64],
    "all rows padded": [],
}


def arrays(*orders, heads=4, kv_heads=2, size=8, seed=0):
    rng = np.random.default_rng(seed)
    start, limit = np.stack([both_streams(ORDERS[order]) for order in orders], axis=1)
    shapes = [(*start.shape, heads, size)] + [(len(orders), KEYS, kv_heads, size)] * 2
    query, key, value = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return query, key, value, start, limit, rng.normal(size=query.shape).astype(np.float32)


def largest_errors(result, given, softcap=None):
    """Of the output and of the gradients with respect to query, key and value."""
    out, gradients = result
    expected = loop_attention(*given[:5], scale=SCALE, softcap=softcap)
    pairs = [(out, expected), *zip(gradients, reference(*given, softcap=softcap)[1])]
    return [float(np.abs(np.asarray(a, np.float64) - b).max()) for a, b in pairs]


def assert_close(result, given, softcap=None):
    errors = largest_errors(result, given, softcap)
    assert errors[0] < 2e-6 and max(errors[1:]) < 5e-5, errors  # nan fails too


@pytest.mark.parametrize("order", ORDERS)
def test_equals_the_reference(order):
    """Beside another example, so that one in which nothing is visible has a mate that must not notice."""
    given = arrays(order, "packed, ragged groups, padding")
    out, gradients = run(*given)
    assert_close((out, gradients), given)
    unseen = given[3] >= given[4]
    assert unseen.any() and np.all(np.asarray(out)[unseen] == 0)
    assert np.all(np.asarray(gradients[0])[unseen] == 0)


def test_one_compilation_for_all_orders():
    one = jax.jit(lambda *given: run(*given))
    outputs = [one(*arrays(order, order))[0] for order in ORDERS]
    assert one._cache_size() == 1
    assert len({np.asarray(out).tobytes() for out in outputs}) == len(ORDERS)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "softcap"), [(4, 1, 2.0), (3, 3, None)], ids=["one kv head, softcap", "no groups"]
)
def test_heads_and_softcap(heads, kv_heads, softcap):
    given = arrays(*list(ORDERS)[1:3], heads=heads, kv_heads=kv_heads)
    assert_close(run(*given, softcap=softcap), given, softcap)


def test_any_intervals_and_lengths_with_blocks_chosen_by_length():
    rng = np.random.default_rng(3)
    start = rng.integers(0, 140, (3, 135)).astype(np.int32)
    limit = np.minimum(140, start + rng.integers(-20, 140, start.shape)).astype(np.int32)
    query, key, value, weight = (
        rng.normal(size=(3, rows, 2, 8)).astype(np.float32) for rows in (135, 140, 140, 135)
    )
    given = query, key, value, start, limit, weight
    assert_close(run(*given, block=None), given)


def test_bfloat16_keeps_its_type_and_an_exact_scale():
    """0.3 rounded to bfloat16 is 0.1 % off; scores of 100 would be off by 0.1."""
    query, key, value, start, limit, _ = arrays("left to right", "left to right")
    rows = [jnp.asarray(array, jnp.bfloat16) for array in (10 * query, 5 * key, value)]
    out = splash_attention(*rows, start, limit, AttentionArgs(SCALE), interpret=True, block=BLOCK)
    assert out.dtype == jnp.bfloat16
    scaled = (rows[0].astype(jnp.float32) * SCALE).astype(jnp.bfloat16)
    expected = loop_attention(scaled, *rows[1:], start, limit, scale=1.0)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=0.02)


def test_a_wrong_limit_is_seen():
    """Negative control: the comparison notices one key too many."""
    given = arrays("packed, ragged groups, padding", "left to right")
    start, limit = given[3:5]
    wrong = np.where((limit > start) & (limit < KEYS), limit + 1, limit)
    errors = largest_errors(run(*given[:4], wrong, given[5]), given)
    assert min(errors) > 0.1, errors


def test_a_needed_block_switched_off_is_seen(monkeypatch):
    """Negative control: the block mask decides what is computed, in every kernel."""
    needed_blocks = attention_splash._needed_blocks
    monkeypatch.setattr(
        attention_splash, "_needed_blocks", lambda *args: needed_blocks(*args).at[0, 2, 1].set(False)
    )
    given = arrays("left to right", "left to right")
    errors = largest_errors(jax.jit(lambda *given: run.__wrapped__(*given))(*given), given)
    assert min(errors) > 0.1, errors


def test_a_mesh_changes_nothing():
    """Each device with its own examples and heads, as `attention.attention` calls it."""
    given = arrays(*list(ORDERS)[:4])
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    row, heads = (sharding.partition_spec(axes) for axes in (("batch",), attention_splash._QUERY_AXES))
    specs = (heads, heads, heads, row, row, heads)
    function = jax.shard_map(
        run.__wrapped__, mesh=mesh, in_specs=specs, out_specs=(heads, (heads,) * 3), check_vma=False
    )
    placed = [jax.device_put(a, jax.NamedSharding(mesh, spec)) for a, spec in zip(given, specs)]
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*placed).compile()
        result = compiled(*placed)
    assert_close(result, given)
    assert not any(f" {name}(" in compiled.as_text() for name in ("all-gather", "all-reduce", "all-to-all"))
    assert result[0].sharding.spec == heads


def test_needed_blocks_are_those_with_a_visible_key():
    start, limit = np.stack([both_streams(documents) for documents in ORDERS.values()], axis=1)
    start, limit = (np.pad(array, ((0, 0), (0, 40))) for array in (start, limit))  # 5 x 640 rows
    keys = np.arange(384)
    dense = (keys >= start[..., None]) & (keys < limit[..., None])
    expected = dense.reshape(5, 5, 128, 3, 128).any(axis=(2, 4))
    np.testing.assert_array_equal(attention_splash._needed_blocks(start, limit, 3, (128, 128)), expected)
    assert 20 < expected.sum() < 55


def test_blocks_that_are_not_needed_are_not_fetched():
    """Along the grid the index never names a skipped block, and names needed ones where they are."""
    needed = np.array([[0, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], bool)
    expected = [[1, 1, 4, 4, 4, 4], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(attention_splash._next_needed(jnp.asarray(needed), axis=1), expected)
    np.testing.assert_array_equal(
        attention_splash._next_needed(jnp.asarray(needed.T), axis=0), np.transpose(expected)
    )


def test_intervals_in_one_int32():
    """Up to the largest length, and for examples whose offset is far beyond 2**16."""
    rng = np.random.default_rng(5)
    size = attention_splash.MAX_KEYS
    start, limit, key = rng.integers(0, size + 1, (3, 20000))
    start[:3], limit[:3], key[:3] = (0, 0, size - 1), (size, size, size), (size - 1, 0, size - 2)
    key[3:8000] = np.clip(limit[3:8000] + rng.integers(-2, 3, 7997), 0, size - 1)
    key[8000:16000] = np.clip(start[8000:16000] + rng.integers(-2, 3, 8000), 0, size - 1)
    for offset in (0, 2**16 * 3 + 640, 65408 * 7):
        packed = attention_splash._pack(jnp.int32(start + offset), jnp.int32(limit - start))
        visible = attention_splash._visible(packed, jnp.int32(key + offset))
        np.testing.assert_array_equal(visible, (start <= key) & (key < limit))


@pytest.mark.parametrize(
    ("length", "block"), [(1, 128), (300, 128), (512, 512), (700, 256), (1000, 512), (2048, 512), (640, 128)]
)
def test_blocks_pad_by_little(length, block):
    assert attention_splash._choose_block(length) == block


def test_why_not(monkeypatch, capsys):
    reason = attention_splash.unavailable
    mesh = jax.sharding.AbstractMesh((1, 2, 4), ("data", "fsdp", "tensor"))
    assert reason((3, 256, 8, 64), (3, 256, 2, 64)) is None
    with jax.sharding.use_abstract_mesh(mesh):
        assert reason((4, 256, 8, 64), (4, 256, 4, 64)) is None
        assert reason((3, 256, 8, 64), (3, 256, 4, 64)) == "axis batch of size 3 can't be split in 2"
        assert reason((4, 256, 8, 64), (4, 256, 2, 64)) == "axis kv_heads of size 2 can't be split in 4"
    assert reason((1, 512, 8, 64), (1, 65536, 8, 64)) == "65536 keys are more than 65535"
    assert "4096 examples of 256 rows" in str(reason((4096, 256, 8, 64), (4096, 256, 8, 64)))

    attention_splash._warn_once.cache_clear()
    answers = [attention_splash.available((1, 1, 8, 64), (1, size, 8, 64)) for size in (70000, 70000, 7)]
    assert answers == [False, False, True]
    assert capsys.readouterr().err == (
        "warning: attention without the TPU kernel, which is slower: 70000 keys are more than 65535\n"
    )
    with pytest.raises(ValueError, match="splash attention can't be used: 65536 keys are more than 65535"):
        splash_attention(
            *[jnp.zeros((1, 65536, 1, 8))] * 3, *[jnp.zeros((1, 65536), int)] * 2, AttentionArgs(1.0)
        )


def test_a_library_without_the_names_is_named(monkeypatch):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    library = attention_splash._library.__wrapped__
    monkeypatch.setattr(attention_splash, "_library", library)
    monkeypatch.setattr(splash_attention_kernel, "BlockSizes", lambda block_q, block_kv: None)
    assert "has no block_q_dq" in str(attention_splash.unavailable((1, 1, 1, 8), (1, 1, 1, 8)))
    monkeypatch.delattr(splash_attention_kernel, "SplashAttentionKernel")
    assert "SplashAttentionKernel" in str(attention_splash.unavailable((1, 1, 1, 8), (1, 1, 1, 8)))
