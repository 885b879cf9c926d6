"""Cross-entropy fused with the head: logits of some rows at a time, and their gradients at once.

    rows     [ chunk | chunk | chunk | rest + padding of weight 0 ]
    chunk    hidden --head--> logits [rows, V] --> loss sum
                                    \\--> (softmax - target) weight --> gradient of hidden, of head

A chunk's gradients need nothing that comes later but one factor, the gradient of the sum: they are
computed while its logits are there, kept, and multiplied in the backward pass. So logits are
computed once, and no [B, T, V] array is ever alive.
"""

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from a3_jax.model.layers import softcap as softcapped
from a3_jax.model.layers import softcap_slope
from a3_jax.model.sharding import axis_parts, mesh_axes, partition_spec, platform

# Rows of a device whose logits are alive at once. Each chunk reads and writes the head's gradient: larger
# ones pay where arithmetic is fast, smaller ones save memory where it is slow.
_CHUNK_ROWS = {"cpu": 512}
_CHUNK_ROWS_ELSEWHERE = 1024
_AXES = ("batch", "length", "embed_act")


def cross_entropy(
    hidden_BTD, head, targets_BT, weights_BT, *, vocab_first, softcap=None, precision=None, chunk_rows=None
) -> tuple[jax.Array, jax.Array]:
    """Returns the weighted sum of negative log-likelihoods, and the sum of the weights.

    The mean is left to the caller: sums add up over microbatches and hosts, means don't.

    On a mesh (`jax.set_mesh`) every device takes its own examples and its own part of the vocabulary:
    maxima, sums and the target's logit travel, logits don't. The head is gathered once along `embed`,
    and its gradient scattered once.

    Args:
      hidden_BTD: [B, T, D] final hidden states, any float dtype; the head is cast to it.
      head: [V, D] if `vocab_first` (a tied embedding table), else [D, V].
      targets_BT: int32 token ids in 0..V-1; where the weight is 0 any value will do.
      weights_BT: float32, 0 for rows that aren't predicted. No gradient flows to them.
      vocab_first: which of the two layouts `head` has.
      softcap: logits become cap * tanh(logits / cap) when given.
      precision: that of the matrix products; they accumulate in float32.
      chunk_rows: rows of a device at a time; None: by its platform.

    Returns:
      (sum in nats, sum of weights): float32 scalars.
    """
    weights_BT = weights_BT.astype(jnp.float32)
    chunk_rows = chunk_rows or _CHUNK_ROWS.get(platform(), _CHUNK_ROWS_ELSEWHERE)
    with jax.named_scope("loss"):
        how = _How(vocab_first, softcap, precision, chunk_rows)
        total = _loss_sum(hidden_BTD, head, targets_BT, weights_BT, how)
        return cast(jax.Array, total), jnp.sum(weights_BT)


class _How(NamedTuple):
    """The arguments of `cross_entropy` besides arrays; static."""

    vocab_first: bool
    softcap: float | None
    precision: Any
    chunk_rows: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss_sum(hidden_BTD, head, targets_BT, weights_BT, how):
    run = _on_mesh(_value, hidden_BTD, how, with_gradients=False)
    return run(hidden_BTD, head, targets_BT, weights_BT)


def _forward_rule(hidden_BTD, head, targets_BT, weights_BT, how):
    run = _on_mesh(_value_and_gradients, hidden_BTD, how, with_gradients=True)
    total, d_hidden_BTD, d_head = run(hidden_BTD, head, targets_BT, weights_BT)
    # Kept until the backward pass: with a head of a large vocabulary its type matters.
    return total, (d_hidden_BTD, d_head.astype(head.dtype))


def _backward_rule(how, gradients, factor):
    # The gradients are those of the sum; what is differentiated depends on the sum by one factor alone.
    del how
    d_hidden_BTD, d_head = gradients
    d_hidden_BTD = factor.astype(d_hidden_BTD.dtype) * d_hidden_BTD
    return d_hidden_BTD, factor.astype(d_head.dtype) * d_head, None, None


_loss_sum.defvjp(_forward_rule, _backward_rule)


def _on_mesh(function, hidden_BTD, how, *, with_gradients):
    """Maps `function` over each device's rows and vocabulary; over all of them without a mesh."""
    function = functools.partial(function, how=how)
    axes = dict.fromkeys(("batch", "embed", "vocab"), ())
    if math.prod(map(axis_parts, ("batch", "vocab"))) == 1 or hidden_BTD.shape[0] % axis_parts("batch"):
        return functools.partial(function, axes=axes)
    axes = {name: mesh_axes(name) for name in axes}
    of_hidden, of_rows = partition_spec(_AXES), partition_spec(_AXES[:2])
    of_head = partition_spec(("vocab", "embed") if how.vocab_first else ("embed", "vocab"))
    nothing = partition_spec(())
    return jax.shard_map(
        functools.partial(function, axes=axes),
        in_specs=(of_hidden, of_head, of_rows, of_rows),
        out_specs=(nothing, of_hidden, of_head) if with_gradients else nothing,
        check_vma=False,
    )


def _value(hidden_BTD, head, targets_BT, weights_BT, *, axes, how):
    """Returns the loss sum of this device's rows, added over all devices."""
    head = _gathered(head, hidden_BTD.dtype, axes, how.vocab_first)

    def add(total, chunk):
        hidden_RD, targets_R, weights_R = chunk
        losses_R, *_ = _losses(_logits(hidden_RD, head, how), targets_R, axes)
        return total + jnp.sum(losses_R * weights_R), None

    chunks = _chunks(hidden_BTD, targets_BT, weights_BT, how.chunk_rows)
    total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), chunks)
    return _sum(total, axes["batch"])


def _value_and_gradients(hidden_BTD, head, targets_BT, weights_BT, *, axes, how):
    """Returns the same, with the gradients of the hidden states and of this device's part of the head."""
    (batch, length, width), dtype = hidden_BTD.shape, hidden_BTD.dtype
    head = _gathered(head, dtype, axes, how.vocab_first)

    def add(totals, chunk):
        hidden_RD, targets_R, weights_R = chunk
        logits_RV = _logits(hidden_RD, head, how)
        losses_R, is_target_RV, normaliser_R = _losses(logits_RV, targets_R, axes)
        # softmax - target, times what the loss counts for; the softcap's slope is read off its result.
        d_logits_RV = (jnp.exp(logits_RV - normaliser_R[:, None]) - is_target_RV) * weights_R[:, None]
        if how.softcap is not None:
            d_logits_RV *= softcap_slope(logits_RV, how.softcap)
        d_logits_RV = d_logits_RV.astype(dtype)
        to_hidden = "RV,VD->RD" if how.vocab_first else "RV,DV->RD"
        d_hidden_RD = _product(to_hidden, d_logits_RV, head, how.precision)
        # The factor whose axis comes first in the head is the left one: nothing of its size is transposed.
        d_head = (
            _product("RV,RD->VD", d_logits_RV, hidden_RD, how.precision)
            if how.vocab_first
            else _product("RD,RV->DV", hidden_RD, d_logits_RV, how.precision)
        )
        total, head_total = totals
        totals = total + jnp.sum(losses_R * weights_R), head_total + d_head
        return totals, d_hidden_RD.astype(dtype)

    zeros = jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32)
    chunks = _chunks(hidden_BTD, targets_BT, weights_BT, how.chunk_rows)
    (total, d_head), d_hidden = jax.lax.scan(add, zeros, chunks)
    # [chunks, R, D] -> [chunks R, D] -> [B T, D], without the rows added -> [B, T, D]. Each device saw its
    # own part of the vocabulary: a row's gradient is the sum over them.
    d_hidden_BTD = d_hidden.reshape(-1, width)[: batch * length].reshape(batch, length, width)
    d_hidden_BTD = _sum(d_hidden_BTD, axes["vocab"])
    return _sum(total, axes["batch"]), d_hidden_BTD, _scattered(d_head, axes, how.vocab_first)


def _chunks(hidden_BTD, targets_BT, weights_BT, chunk_rows):
    """Splits [B, T, ...] into [chunks, R, ...]; the rows added at the end have weight 0."""
    rows = targets_BT.size
    chunk_rows = min(chunk_rows, rows)
    chunks = -(-rows // chunk_rows)

    def split(array):
        array = array.reshape(rows, *array.shape[2:])
        array = jnp.pad(array, [(0, chunks * chunk_rows - rows)] + [(0, 0)] * (array.ndim - 1))
        return array.reshape(chunks, chunk_rows, *array.shape[1:])

    return split(hidden_BTD), split(targets_BT), split(weights_BT)


def _logits(hidden_RD, head, how):
    equation = "RD,VD->RV" if how.vocab_first else "RD,DV->RV"
    return softcapped(_product(equation, hidden_RD, head, how.precision), how.softcap)


def _losses(logits_RV, targets_R, axes):
    """Returns negative log-likelihoods in nats [R], target marks [R, V] bool, and log-normalisers [R]."""
    # The target's logit is picked by comparison, not by index: each device looks in its own part of the
    # vocabulary, and finds the target or adds zero.
    size = logits_RV.shape[1]
    first = size * jax.lax.axis_index(axes["vocab"]) if axes["vocab"] else 0
    is_target_RV = first + jnp.arange(size, dtype=targets_R.dtype) == targets_R[:, None]
    largest_R = jnp.max(logits_RV, axis=1)
    largest_R = jax.lax.pmax(largest_R, axes["vocab"]) if axes["vocab"] else largest_R
    total_R = _sum(jnp.sum(jnp.exp(logits_RV - largest_R[:, None]), axis=1), axes["vocab"])
    chosen_R = _sum(jnp.sum(jnp.where(is_target_RV, logits_RV, 0.0), axis=1), axes["vocab"])
    normaliser_R = largest_R + jnp.log(total_R)
    return normaliser_R - chosen_R, is_target_RV, normaliser_R


def _gathered(head, dtype, axes, vocab_first):
    """Returns this device's part of the vocabulary, whole along the model width."""
    head = head.astype(dtype)
    return (
        jax.lax.all_gather(head, axes["embed"], axis=int(vocab_first), tiled=True) if axes["embed"] else head
    )


def _scattered(d_head, axes, vocab_first):
    """Returns the sum over all devices' rows, each device keeping its part of the model width."""
    # Mesh axes that split the width scatter the sum; over the others that split the batch it is whole.
    if axes["embed"]:
        d_head = jax.lax.psum_scatter(d_head, axes["embed"], scatter_dimension=int(vocab_first), tiled=True)
    return _sum(d_head, tuple(axis for axis in axes["batch"] if axis not in axes["embed"]))


def _sum(array, axes):
    return jax.lax.psum(array, axes) if axes else array


def _product(equation, a, b, precision):
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
