"""Ten AdamW steps of a dense PyTorch two-stream model, on equal weights and ranks, give our losses.

The oracle shares nothing with the code under test: float64, unsorted rows, a [T, T] mask from the
ranks, separate projections for each stream, torch's own optimiser and clipping.
"""

import jax
import numpy as np
import pytest

from a3_jax.ordering.intervals import sort_order, take_rows
from a3_jax.training.step import make_train_step
from tests.training_fixtures import TINY, one_device, tiny_state

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.slow]

B, T, STEPS, RATE, WEIGHT_DECAY, CLIP = 2, 16, 10, 1e-2, 0.1, 0.5


def unsorted_batch(seed):
    """Two packed rows: documents of 7 and 6 tokens with 3 of padding, and one of 16; groups of 1 to 3."""
    rng = np.random.default_rng(seed)
    lengths = ((7, 6), (16,))
    tokens = rng.integers(0, TINY.vocab_size, (B, T))
    positions, segments, ranks = (np.zeros((B, T), np.int64) for _ in range(3))
    for row, documents in enumerate(lengths):
        first = 0
        for number, length in enumerate(documents, start=1):
            place = slice(first, first + length)
            positions[row, place], segments[row, place] = np.arange(length), number
            ranks[row, place] = rng.permutation(length) // (seed % 3 + 1)
            first += length
    return {"tokens": tokens, "positions": positions, "segment_ids": segments, "ranks": ranks}


def norm(x, scale):
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + TINY.norm_eps) * scale


def rotate(x_BTNH, positions):
    half = TINY.head_size // 2
    frequencies = TINY.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = (positions[..., None].double() * frequencies)[:, :, None]
    first, second = x_BTNH[..., :half], x_BTNH[..., half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
    )


def attend(weights, stream, content, positions, visible):
    """One stream's attention to the content stream, dense; a row that sees nothing gives zero."""
    groups = TINY.num_heads // TINY.num_kv_heads
    q = rotate(torch.einsum("btd,dnh->btnh", stream, weights["q"]), positions)
    k = rotate(torch.einsum("btd,dnh->btnh", content, weights["k"]), positions).repeat_interleave(groups, 2)
    v = torch.einsum("btd,dnh->btnh", content, weights["v"]).repeat_interleave(groups, 2)
    scores = torch.einsum("btnh,bsnh->bnts", q, k) / TINY.head_size**0.5
    scores = scores.masked_fill(~visible[:, None], -1e30)
    seen = visible.any(-1)[:, None, :, None]
    out = torch.einsum("bnts,bsnh->btnh", torch.softmax(scores, -1) * seen, v)
    return torch.einsum("btnh,nhd->btd", out, weights["o"])


def block(weights, content, query, positions, content_mask, query_mask):
    normed_content, normed_query = (norm(x, weights["attn_norm"]) for x in (content, query))
    content = content + attend(weights, normed_content, normed_content, positions, content_mask)
    query = query + attend(weights, normed_query, normed_content, positions, query_mask)

    def mlp(x):
        y = norm(x, weights["mlp_norm"])
        return x + (torch.nn.functional.silu(y @ weights["gate"]) * (y @ weights["up"])) @ weights["down"]

    return mlp(content), mlp(query)


def oracle_loss(params, batch):
    tokens, positions, segments, ranks = (torch.from_numpy(batch[name]) for name in
                                          ("tokens", "positions", "segment_ids", "ranks"))  # fmt: skip
    together = (segments[:, :, None] == segments[:, None]) & (segments != 0)[:, None]
    content_mask = together & (ranks[:, None] <= ranks[:, :, None])
    query_mask = together & (ranks[:, None] < ranks[:, :, None])
    content = params["embed"][tokens]
    query = params["query_embed"].expand(content.shape)
    first = {name: leaf[0] for name, leaf in params["layers"].items()}
    for weights in (first, params["last_layer"]):
        content, query = block(weights, content, query, positions, content_mask, query_mask)
    logits = norm(query, params["final_norm"]) @ params["head"]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    return (losses * (segments != 0)).sum() / (segments != 0).sum()


def oracle_losses(params, batches):
    leaf = torch.is_tensor
    params = jax.tree.map(lambda x: torch.tensor(x, dtype=torch.float64, requires_grad=True), params)
    named = [(path[-1].key, x) for path, x in jax.tree_util.tree_leaves_with_path(params, is_leaf=leaf)]
    plain = [x for name, x in named if name.endswith(("norm", "query_embed"))]
    matrices = [x for name, x in named if not name.endswith(("norm", "query_embed"))]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for batch in batches:
        adamw.zero_grad()
        loss = oracle_loss(params, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain + matrices, CLIP)
        adamw.step()
        losses.append(loss.item())
    return losses


def our_losses(state, step, batches):
    losses = []
    for batch in batches:
        order = sort_order(batch["ranks"], batch["segment_ids"])
        rows = {name: take_rows(order, array).astype(np.int32) for name, array in batch.items()}
        rows["weights"] = (rows["segment_ids"] != 0).astype(np.float32)
        state, metrics = step(state, rows, np.float32(RATE))
        losses.append(float(metrics["loss"]))
    return losses


def test_losses_of_ten_steps():
    mesh = one_device()
    model, adamw, state = tiny_state(mesh, weight_decay=WEIGHT_DECAY, clip=CLIP)
    params = jax.tree.map(np.array, jax.device_get(state.params))  # copies: the step reuses the buffers
    step = make_train_step(model, adamw, mesh, objective="any_order", microbatches=2)
    batches = [unsorted_batch(step % 3) for step in range(STEPS)]
    expected = oracle_losses(params, batches)
    assert expected[-1] < expected[0] - 0.5  # the steps do something
    np.testing.assert_allclose(our_losses(state, step, batches), expected, atol=1e-4)
