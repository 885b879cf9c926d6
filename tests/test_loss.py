"""The chunked loss is the dense one: value and gradients, for every chunk size, with rows of weight zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from a3_jax.model.sharding import make_mesh, partition_spec
from a3_jax.training.loss import cross_entropy

B, T, D, V = 3, 10, 8, 17


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    head = rng.normal(size=(D, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = (rng.random((B, T)) < 0.6).astype(np.float32) * rng.random((B, T)).astype(np.float32)
    return hidden, head, targets, weights


def dense(hidden, head, targets, weights):
    """NumPy, float64: (sum, weight, gradient of hidden, gradient of head)."""
    hidden, head, weights = (np.asarray(x, np.float64) for x in (hidden, head, weights))
    logits = hidden @ head
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    one_hot = np.eye(head.shape[1])[targets]
    losses = -np.log((probabilities * one_hot).sum(-1))
    d_logits = (probabilities - one_hot) * weights[..., None]
    return (
        (losses * weights).sum(),
        weights.sum(),
        d_logits @ head.T,
        np.einsum("btd,btv->dv", hidden, d_logits),
    )


@pytest.mark.parametrize("chunk", [1, 3, 5, 10, 64])
def test_equals_the_dense_loss(arrays, chunk):
    hidden, head, targets, weights = arrays

    def loss(hidden, head):
        return cross_entropy(hidden, head, targets, weights, vocab_first=False, chunk_rows=chunk)

    (total, weight), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)
    expected = dense(hidden, head, targets, weights)
    np.testing.assert_allclose([total, weight], expected[:2], rtol=1e-5)
    np.testing.assert_allclose(gradients[0], expected[2], atol=1e-5)
    np.testing.assert_allclose(gradients[1], expected[3], atol=1e-5)


def test_rows_of_weight_zero_change_nothing(arrays):
    """Other targets and other hidden states there: the same loss, and no gradient."""
    hidden, head, targets, weights = arrays
    unseen = weights == 0
    other_targets = np.where(unseen, (targets + 5) % V, targets)
    other_hidden = np.where(unseen[..., None], 1e3, hidden)

    def loss(hidden, targets):
        return cross_entropy(hidden, head, targets, weights, vocab_first=False, chunk_rows=4)[0]

    assert loss(hidden, targets) == loss(other_hidden, other_targets)
    gradient = np.asarray(jax.grad(loss)(jnp.asarray(hidden), targets))
    assert unseen.any() and not gradient[unseen].any()
    assert (np.abs(gradient[~unseen]).max(-1) > 0).all()


def test_nothing_to_predict_is_zero(arrays):
    hidden, head, targets, weights = arrays
    total, weight = cross_entropy(hidden, head, targets, np.zeros_like(weights), vocab_first=False)
    assert (float(total), float(weight)) == (0.0, 0.0)


def test_no_array_of_all_logits(arrays):
    """Neither forward nor backward holds [B, T, V] (or a flat view of it)."""
    hidden, head, targets, weights = arrays

    def loss(hidden, head):
        return cross_entropy(hidden, head, targets, weights, vocab_first=False, chunk_rows=6)[0]

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, head).as_text()
    assert f"tensor<6x{V}xf32>" in text
    for shape in (f"{B}x{T}x{V}x", f"{B * T}x{V}x", f"{B * T // 6}x6x{V}x"):
        assert f"tensor<{shape}f32>" not in text


@pytest.mark.parametrize("vocab_first", [False, True])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2), (1, 1, 8), (8, 1, 1)])
def test_a_mesh_changes_nothing(sizes, vocab_first):
    """Rows over data and fsdp, the vocabulary over tensor; no device holds logits of the whole of it."""
    rows, length, width, vocabulary = 8, 6, 8, 40
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(rows, length, width)).astype(np.float32)
    head = rng.normal(size=(width, vocabulary)).astype(np.float32)
    targets = rng.integers(0, vocabulary, (rows, length)).astype(np.int32)
    weights = rng.random((rows, length)).astype(np.float32)
    total, weight, d_hidden, d_head = dense(hidden, head, targets, weights)
    if vocab_first:
        head, d_head = head.T, d_head.T

    def loss(hidden, head, targets, weights):
        return cross_entropy(hidden, head, targets, weights, vocab_first=vocab_first, chunk_rows=4)

    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    of_head = ("vocab", "embed") if vocab_first else ("embed", "vocab")
    of_rows = ("batch", "length")
    placed = [
        jax.device_put(array, jax.NamedSharding(mesh, partition_spec(axes)))
        for array, axes in (
            (hidden, (*of_rows, "embed_act")), (head, of_head), (targets, of_rows), (weights, of_rows)
        )
    ]  # fmt: skip
    with jax.set_mesh(mesh):
        function = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        compiled = jax.jit(function).lower(*placed).compile()
        got, gradients = compiled(*placed)
        value_alone = jax.jit(loss)(*placed)
    np.testing.assert_allclose(got, (total, weight), rtol=1e-5)
    np.testing.assert_allclose(value_alone, (total, weight), rtol=1e-5)
    np.testing.assert_allclose(gradients[0], d_hidden, atol=1e-5)
    np.testing.assert_allclose(gradients[1], d_head, atol=1e-5)
    if sizes[2] > 1:
        assert f",{vocabulary}]" not in compiled.as_text().replace("{", "]")
        assert f"[{vocabulary},{width}]" not in compiled.as_text()


@pytest.mark.parametrize("vocab_first", [False, True])
def test_a_softcap_reaches_the_loss_and_its_gradients(arrays, vocab_first):
    """Against automatic differentiation of the formula."""
    hidden, head, targets, weights = arrays
    head = head.T if vocab_first else head

    def plain(hidden, head):
        capped = 3.0 * jnp.tanh(hidden @ (head.T if vocab_first else head) / 3.0)
        losses = (
            jax.nn.logsumexp(capped, axis=-1) - jnp.take_along_axis(capped, targets[..., None], -1)[..., 0]
        )
        return jnp.sum(losses * weights)

    def ours(hidden, head):
        how = {"vocab_first": vocab_first, "softcap": 3.0, "chunk_rows": 7}
        return cross_entropy(hidden, head, targets, weights, **how)[0]

    found, expected = (jax.value_and_grad(f, argnums=(0, 1))(hidden, head) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)
