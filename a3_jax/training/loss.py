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
from a3_jax.model.sharding import axis_parts, mesh_axes, partition_spec, platform

# Rows of a device whose logits are alive at once. Each chunk reads and writes the head's gradient: larger
# ones pay where arithmetic is fast, smaller ones save memory where it is slow.
_CHUNK_ROWS = {"cpu": 512}
_CHUNK_ROWS_ELSEWHERE = 1024
_AXES = ("batch", "length", "embed_act")


def cross_entropy(
    hidden_BTD, head, targets_BT, weights_BT, *, vocab_first, softcap=None, precision=None, chunk_rows=None
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of negative log-likelihoods, and the sum of the weights.

    The mean is left to the caller: sums add up over microbatches and hosts, means don't.

    On a mesh (`jax.set_mesh`) every device takes its own examples and its own part of the vocabulary:
    maxima, sums and the target's logit travel, logits don't. The head is gathered once along `embed`,
    and its gradient scattered once.

    Args:
      hidden_BTD: final hidden states [B, T, D], any float dtype; the head is cast to it.
      head: [V, D] if `vocab_first` (a tied embedding table), else [D, V].
      targets_BT: int32 token ids in 0..V-1; where the weight is 0 any value will do.
      weights_BT: float32, 0 for rows that aren't predicted. No gradient flows to them.
      vocab_first: which of the two layouts `head` has.
      softcap: logits become cap * tanh(logits / cap) when given.
      precision: of the matrix products; they accumulate in float32.
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
    """What `cross_entropy` is told besides arrays."""

    vocab_first: bool
    softcap: float | None
    precision: Any
    chunk_rows: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss_sum(hidden, head, targets, weights, how):
    run = _on_mesh(_value, hidden, how, with_gradients=False)
    return run(hidden, head, targets, weights)


def _forward_rule(hidden, head, targets, weights, how):
    run = _on_mesh(_value_and_gradients, hidden, how, with_gradients=True)
    total, d_hidden, d_head = run(hidden, head, targets, weights)
    return total, (d_hidden, d_head.astype(head.dtype))


def _backward_rule(how, gradients, factor):
    del how
    d_hidden, d_head = gradients
    return factor.astype(d_hidden.dtype) * d_hidden, factor.astype(d_head.dtype) * d_head, None, None


_loss_sum.defvjp(_forward_rule, _backward_rule)


def _on_mesh(function, hidden, how, *, with_gradients):
    """`function` over each device's rows and vocabulary; over all of them without a mesh."""
    function = functools.partial(function, how=how)
    axes = dict.fromkeys(("batch", "embed", "vocab"), ())
    if math.prod(map(axis_parts, ("batch", "vocab"))) == 1 or hidden.shape[0] % axis_parts("batch"):
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


def _value(hidden, head, targets, weights, *, axes, how):
    """Returns the loss sum of this device's rows, added over all devices."""
    head = _gathered(head, hidden.dtype, axes, how.vocab_first)

    def add(total, chunk):
        hidden_RD, targets, weights = chunk
        logits = _logits(hidden_RD, head, how)
        losses, *_ = _losses(logits, targets, axes)
        return total + jnp.sum(losses * weights), None

    chunks = _chunks(hidden, targets, weights, how.chunk_rows)
    total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), chunks)
    return _sum(total, axes["batch"])


def _value_and_gradients(hidden, head, targets, weights, *, axes, how):
    """Returns the same, with the gradients of the hidden states and of this device's part of the head."""
    shape, head = hidden.shape, _gathered(head, hidden.dtype, axes, how.vocab_first)

    def add(totals, chunk):
        hidden_RD, targets, weights = chunk
        logits = _logits(hidden_RD, head, how)
        losses, is_target, normaliser = _losses(logits, targets, axes)
        d_logits = (jnp.exp(logits - normaliser[:, None]) - is_target) * weights[:, None]
        if how.softcap is not None:
            d_logits *= 1.0 - jnp.square(logits / how.softcap)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = _product("RV,VD->RD" if how.vocab_first else "RV,DV->RD", d_logits, head, how.precision)
        d_head = (
            _product("RV,RD->VD", d_logits, hidden_RD, how.precision)
            if how.vocab_first
            else _product("RD,RV->DV", hidden_RD, d_logits, how.precision)
        )
        total, head_total = totals
        return (total + jnp.sum(losses * weights), head_total + d_head), d_hidden.astype(hidden.dtype)

    zeros = jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32)
    chunks = _chunks(hidden, targets, weights, how.chunk_rows)
    (total, d_head), d_hidden = jax.lax.scan(add, zeros, chunks)
    d_hidden = _sum(d_hidden.reshape(-1, shape[-1])[: shape[0] * shape[1]].reshape(shape), axes["vocab"])
    return _sum(total, axes["batch"]), d_hidden, _scattered(d_head, axes, how.vocab_first)


def _chunks(hidden, targets, weights, chunk_rows):
    """[B, T, ...] -> [chunks, rows, ...]; the rows added at the end have weight 0."""
    rows = targets.size
    chunk_rows = min(chunk_rows, rows)
    chunks = -(-rows // chunk_rows)

    def split(array):
        array = array.reshape(rows, *array.shape[2:])
        array = jnp.pad(array, [(0, chunks * chunk_rows - rows)] + [(0, 0)] * (array.ndim - 1))
        return array.reshape(chunks, chunk_rows, *array.shape[1:])

    return split(hidden), split(targets), split(weights)


def _logits(hidden_RD, head, how):
    equation = "RD,VD->RV" if how.vocab_first else "RD,DV->RV"
    return softcapped(_product(equation, hidden_RD, head, how.precision), how.softcap)


def _losses(logits_RV, targets_R, axes):
    """Negative log-likelihoods in nats [R], where the target is [R, V] bool, log-normalisers [R].

    The target's logit is picked by comparison, not by index: each device looks in its own part of the
    vocabulary.
    """
    size = logits_RV.shape[1]
    first = size * jax.lax.axis_index(axes["vocab"]) if axes["vocab"] else 0
    is_target = first + jnp.arange(size, dtype=targets_R.dtype) == targets_R[:, None]
    largest = jnp.max(logits_RV, axis=1)
    largest = jax.lax.pmax(largest, axes["vocab"]) if axes["vocab"] else largest
    total = _sum(jnp.sum(jnp.exp(logits_RV - largest[:, None]), axis=1), axes["vocab"])
    chosen = _sum(jnp.sum(jnp.where(is_target, logits_RV, 0.0), axis=1), axes["vocab"])
    normaliser = largest + jnp.log(total)
    return normaliser - chosen, is_target, normaliser


def _gathered(head, dtype, axes, vocab_first):
    """This device's part of the vocabulary, whole along the model width."""
    head = head.astype(dtype)
    return (
        jax.lax.all_gather(head, axes["embed"], axis=int(vocab_first), tiled=True) if axes["embed"] else head
    )


def _scattered(d_head, axes, vocab_first):
    """Returns the sum over all devices' rows, each device keeping its part of the model width."""
    if axes["embed"]:
        d_head = jax.lax.psum_scatter(d_head, axes["embed"], scatter_dimension=int(vocab_first), tiled=True)
    return _sum(d_head, tuple(axis for axis in axes["batch"] if axis not in axes["embed"]))


def _sum(array, axes):
    return jax.lax.psum(array, axes) if axes else array


def _product(equation, a, b, precision):
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
