"""The method again, written to be obviously right: NumPy, float64, dense masks, Python loops.

Nothing here shares code with the package, but the layout of its parameter tree.
"""

import numpy as np


def two_stream_logits(params, config, tokens, positions, ranks, query_ranks=None, segment_ids=None):
    """Both streams' logits of one row.

    Args:
      params: the package's parameter tree.  config: its `ModelConfig`.
      tokens, positions, ranks: [T] int.
      query_ranks: [T] int, `ranks` unless given.
      segment_ids: [T] int, 0 = padding; one document unless given.

    Returns:
      (content, query): float64 [T, V] each, in the order given.
    """
    params = _float64(params)
    tokens, positions, ranks = (np.asarray(array) for array in (tokens, positions, ranks))
    query_ranks = ranks if query_ranks is None else np.asarray(query_ranks)
    segments = np.ones_like(tokens) if segment_ids is None else np.asarray(segment_ids)
    same = (segments[:, None] == segments[None, :]) & (segments[:, None] > 0)
    content_mask = same & (ranks[None, :] <= ranks[:, None])
    query_mask = same & (ranks[None, :] < query_ranks[:, None])

    content = params["embed"][tokens]
    query = np.tile(params["query_embed"], (len(tokens), 1))
    for layer in _layers(params, config):
        keys_from = _rms_norm(content, layer["attn_norm"], config)
        query = _block(query, keys_from, query_mask, positions, layer, config)
        content = _block(content, keys_from, content_mask, positions, layer, config)
    head = params["embed"].T if config.tie_embeddings else params["head"]
    return tuple(_rms_norm(stream, params["final_norm"], config) @ head for stream in (content, query))


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def any_order_logprobs(params, config, tokens, ranks, positions=None):
    """[T] float64: log p(token | tokens of lower rank)."""
    positions = np.arange(len(tokens)) if positions is None else positions
    _, query = two_stream_logits(params, config, tokens, positions, ranks)
    return log_softmax(query)[np.arange(len(tokens)), tokens]


def left_logprobs(params, config, tokens):
    """[T] float64: log p(token | tokens to its left); nan for the first."""
    reading = np.arange(len(tokens))
    content, _ = two_stream_logits(params, config, tokens, reading, reading)
    return np.r_[np.nan, log_softmax(content)[reading[:-1], np.asarray(tokens)[1:]]]


def next_distribution(params, config, tokens, filled, ranks, column):
    """[V] log p(token at `column` | filled columns, in the groups of `ranks`); the others are absent."""
    known = [c for c in range(len(tokens)) if filled[c]]
    rows = [*known, column]
    row_ranks = [ranks[c] for c in known] + [max([ranks[c] for c in known], default=0) + 1]
    row_tokens = [tokens[c] for c in known] + [0]
    _, query = two_stream_logits(params, config, row_tokens, rows, row_ranks)
    return log_softmax(query[-1])


def greedy_groupwise(params, config, tokens, ranks, flat=False):
    """Fills None tokens group by group, each with its likeliest token: (tokens, logprobs)."""
    tokens, filled = list(tokens), [token is not None for token in tokens]
    logprobs = [None] * len(tokens)
    while not all(filled):
        rank = min(ranks[c] for c in range(len(tokens)) if not filled[c])
        group = [c for c in range(len(tokens)) if not filled[c] and ranks[c] == rank]
        used = [0] * len(tokens) if flat else ranks
        laws = {c: next_distribution(params, config, tokens, filled, used, c) for c in group}
        for c, law in laws.items():
            tokens[c], filled[c], logprobs[c] = int(law.argmax()), True, law.max()
    return tokens, logprobs


def greedy_dynamic(params, config, tokens, score, step_size, flat=False):
    """Fills None tokens best first: (tokens, logprobs, commit ranks); `score` of [V] log-probabilities."""
    tokens, filled = list(tokens), [token is not None for token in tokens]
    ranks, logprobs, step = [0] * len(tokens), [None] * len(tokens), 1 if any(filled) else 0
    while not all(filled):
        blanks = [c for c in range(len(tokens)) if not filled[c]]
        used = [0] * len(tokens) if flat else ranks
        laws = {c: next_distribution(params, config, tokens, filled, used, c) for c in blanks}
        best = sorted(blanks, key=lambda c: (-score(laws[c]), c))[:step_size]
        for c in best:
            tokens[c], logprobs[c], ranks[c] = int(laws[c].argmax()), laws[c].max(), step
        for c in best:
            filled[c] = True
        step += 1
    return tokens, logprobs, ranks


def greedy_left(params, config, tokens):
    """Fills None tokens from the left with the plain left-to-right model: (tokens, logprobs)."""
    tokens, logprobs = list(tokens), [None] * len(tokens)
    for column, token in enumerate(tokens):
        if token is None:
            reading = np.arange(column)
            content, _ = two_stream_logits(params, config, tokens[:column], reading, reading)
            law = log_softmax(content[-1])
            tokens[column], logprobs[column] = int(law.argmax()), law.max()
    return tokens, logprobs


def _float64(tree):
    if isinstance(tree, dict):
        return {name: _float64(leaf) for name, leaf in tree.items()}
    return np.asarray(tree, np.float64)


def _layers(params, config):
    for layer in range(config.num_layers - 1):
        yield {name: leaf[layer] for name, leaf in params["layers"].items()}
    yield params["last_layer"]


def _rms_norm(x, scale, config):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps) * scale


def _block(x, normed_content, mask, positions, layer, config):
    """One pre-norm layer of one stream; keys and values come from the content stream."""
    attended = np.zeros_like(x)
    normed = _rms_norm(x, layer["attn_norm"], config)
    for head in range(config.num_heads):
        kv_head = head // (config.num_heads // config.num_kv_heads)
        q = _rotate(normed @ layer["q"][:, head], positions, config)
        k = _rotate(normed_content @ layer["k"][:, kv_head], positions, config)
        v = normed_content @ layer["v"][:, kv_head]
        scores = q @ k.T / np.sqrt(config.head_size)
        for row in range(len(x)):
            seen = mask[row]
            if seen.any():  # a row that sees nothing keeps an attention output of zero
                weights = np.exp(scores[row, seen] - scores[row, seen].max())
                attended[row] += (weights / weights.sum()) @ v[seen] @ layer["o"][head]
    x = x + attended
    normed = _rms_norm(x, layer["mlp_norm"], config)
    gate = normed @ layer["gate"]
    mlp = (gate / (1 + np.exp(-gate)) * (normed @ layer["up"])) @ layer["down"]
    return (normed if config.residual == "release" else x) + mlp


def _rotate(x, positions, config):
    """Rotary positions in the half-split layout."""
    half = config.head_size // 2
    frequencies = config.rope_theta ** (-np.arange(half) / half)
    if config.rope_scaling is not None:
        frequencies = np.array([_scaled(frequency, config.rope_scaling) for frequency in frequencies])
    angles = np.asarray(positions)[:, None] * frequencies
    first, second = x[:, :half], x[:, half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)


def _scaled(frequency, scaling):
    if scaling.kind == "linear":
        return frequency / scaling.factor
    wavelength = 2 * np.pi / frequency
    if wavelength < scaling.original_max_length / scaling.high_freq_factor:
        return frequency
    if wavelength > scaling.original_max_length / scaling.low_freq_factor:
        return frequency / scaling.factor
    blend = (scaling.original_max_length / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - blend) * frequency / scaling.factor + blend * frequency
