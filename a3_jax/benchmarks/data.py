"""`a3 bench data`: text to shards against the tokenizer alone, and batches against what a step takes.

The text is made up: words of a Zipf law, documents of log-normal length. Needs TensorFlow and seqio.
"""

import dataclasses
import functools
import json
import os
import pathlib
import resource
import tempfile
import time
from typing import Any

import numpy as np

from a3_jax.benchmarks.measurement import Row, alternate, note, ratio
from a3_jax.benchmarks.settings import Settings
from a3_jax.data.batches import stream
from a3_jax.data.manifest import TRAIN, read_manifest
from a3_jax.data.prepare import Options, prepare
from a3_jax.data.shard_writer import write_shard
from a3_jax.data.shards import ShardTable
from a3_jax.data.table import Table
from a3_jax.model.accelerators import ACCELERATORS
from a3_jax.model.config import PRESETS
from a3_jax.model.flops import train_step_flops
from a3_jax.ordering.curriculum import Order, Stage

DOCUMENTS, WORDS, MEDIAN_WORDS, SIGMA = 20_000, 30_000, 330, 1.0  # some 400 tokens a document
MERGES_VOCABULARY = 8_192
TEXTS_AT_ONCE = 512
WARM_STEPS, FAR_STEP = 8, 100_000
MILLION_ROWS, SHORT_ROWS, SHORT_LENGTH = 1 << 20, 1 << 13, 256
FLAT_STEPS, FLAT_BATCH = 10_000, 8
HOST_CHIPS, NEED_MODEL, NEED_CHIP = 8, "llama-3.2-1b", "v5e"


def measure(settings: Settings) -> list[Row]:
    """Rates of preparing and of batches, the first batch far into a large set, memory over many batches."""
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        note("data: making text and a tokenizer")
        text, tokenizer = make_text(root, settings.seed)
        rows = _measure_prepare(settings, root, text, tokenizer)
        rows += _measure_batches(settings, root / "prepared-0")
        large = make_large(root / "large", settings.seed)
        return rows + _measure_first_batch(settings, large) + _measure_memory(settings, large)


def make_text(root: pathlib.Path, seed: int) -> tuple[pathlib.Path, Any]:
    """A JSONL file of made-up documents, and a byte-level BPE tokenizer trained on some of them."""
    import tokenizers

    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(letters[rng.integers(0, 26, rng.integers(2, 11))]) for _ in range(WORDS)]
    chance = 1.0 / np.arange(1, WORDS + 1)
    lengths = np.maximum(rng.lognormal(np.log(MEDIAN_WORDS), SIGMA, DOCUMENTS), 1).astype(int)
    drawn = rng.choice(WORDS, lengths.sum(), p=chance / chance.sum())
    texts = [" ".join(words[word] for word in part) for part in np.split(drawn, np.cumsum(lengths)[:-1])]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=MERGES_VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts[:2000], trainer)
    file = root / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (root / "tokenizer.json").write_text(tokenizer.to_str())
    return file, tokenizer


def _measure_prepare(settings, root, text, tokenizer) -> list[Row]:
    """The whole of `a3 data prepare` in turn with `tokenizers` alone on the texts in memory."""
    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    numbers = iter(range(1000))

    def tokenise():
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            tokenizer.encode_batch_fast(texts[first : first + TEXTS_AT_ONCE], add_special_tokens=False)

    def write():
        prepare([str(text)], str(root / f"prepared-{next(numbers)}"), options)

    options = Options(tokenizer=str(root / "tokenizer.json"), seq_len=settings.lengths[0])
    calls = {"tokenizers": tokenise, "prepare": write}
    seconds = alternate(calls, settings.repeats, "data: prepare", warm_ups=1)
    manifest = read_manifest(root / "prepared-0")
    tokens, padding = manifest.counts["tokens"], manifest.counts["padding"]
    setting = {"length": settings.lengths[0], "documents": len(texts), "tokens": tokens}
    return [
        Row("tokenizers_rate", "tokens/s", setting, [tokens / s for s in seconds["tokenizers"]]),
        Row("prepare_rate", "tokens/s", setting, [tokens / s for s in seconds["prepare"]]),
        ratio("prepare_time_over_tokenizers", seconds["prepare"], seconds["tokenizers"], setting),
        Row("padding", "share", setting, [padding / (tokens + padding)]),
    ]


def _measure_batches(settings, directory) -> list[Row]:
    """Sorted batches of random groups as training takes them, against a host of chips at their peak."""
    length, batch = settings.lengths[0], settings.batch or 64
    table = ShardTable(directory, read_manifest(directory), TRAIN)
    stage = Stage("bench", steps=10**9, orders=(Order("random", (settings.group_size,)),))
    batches = stream(table, (stage,), settings.seed, batch)
    for _ in range(WARM_STEPS):
        next(batches)
    rates = []
    for number in range(settings.repeats):
        start, steps = time.perf_counter(), 32
        for _ in range(steps):
            next(batches)
        rates.append(steps * batch * length / (time.perf_counter() - start))
        note(f"data: batches: {number + 1} of {settings.repeats}: {rates[-1]:,.0f} tokens/s")
    batches.close()
    need = host_need(length)
    setting = {"length": length, "batch": batch, "order": "random", "group_size": settings.group_size}
    of_need = setting | {"model": NEED_MODEL, "chips": f"{HOST_CHIPS} {NEED_CHIP} at their peak"}
    return [
        Row("batches_rate", "tokens/s", setting, rates),
        Row("host_need", "tokens/s", of_need, [need]),
        Row("batches_speedup_over_need", "ratio", of_need, [rate / need for rate in rates]),
    ]


def host_need(length: int) -> float:
    """Tokens a second that a host's chips could train on at their peak, by formula: no step reaches it."""
    chip = next(chip for chip in ACCELERATORS if chip.name == NEED_CHIP)
    flops_a_token = train_step_flops(PRESETS[NEED_MODEL], length).total / length
    return HOST_CHIPS * chip.peak_flops / flops_a_token


def make_large(directory: pathlib.Path, seed: int) -> ShardTable:
    """A million short rows: one shard under as many names as it takes."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 1 << 15, (SHORT_ROWS, SHORT_LENGTH), dtype=np.int32)
    positions = np.tile(np.arange(SHORT_LENGTH, dtype=np.int32), (SHORT_ROWS, 1))
    directory.mkdir()
    table = Table(tokens, positions, np.ones_like(tokens))
    info = write_shard(directory / "0", table, tokens="uint16", segments="uint16")
    for number in range(1, MILLION_ROWS // SHORT_ROWS):
        os.link(directory / "0", directory / str(number))
    shards = [dataclasses.replace(info, file=str(n)) for n in range(MILLION_ROWS // SHORT_ROWS)]
    prepared = read_manifest(directory.parent / "prepared-0")
    manifest = dataclasses.replace(
        prepared, seq_len=SHORT_LENGTH, token_dtype="uint16", segment_dtype="uint16", splits={TRAIN: shards}
    )
    return ShardTable(directory, manifest, TRAIN)


def _measure_first_batch(settings, table) -> list[Row]:
    """From opening the stream to its first batch, at the beginning and far into it."""
    stage = Stage("bench", steps=10**9, orders=(Order("random", (settings.group_size,)),))

    def first(step):
        batches = stream(table, (stage,), settings.seed, 64, first_step=step)
        next(batches)
        batches.close()

    calls = {f"step_{step}": functools.partial(first, step) for step in (0, FAR_STEP)}
    seconds = alternate(calls, settings.repeats, "data: first batch", warm_ups=1)
    setting = {"rows": table.num_rows, "length": SHORT_LENGTH, "batch": 64}
    return [Row(f"first_batch_at_{name}", "s", setting, times) for name, times in seconds.items()]


def _measure_memory(settings, table) -> list[Row]:
    """How much the process grows over many batches, its first tenth aside."""
    stage = Stage("bench", steps=10**9, orders=(Order("random", (settings.group_size,)),))
    batches = stream(table, (stage,), settings.seed, FLAT_BATCH)
    peaks = []
    for number in range(FLAT_STEPS):
        next(batches)
        if number in (FLAT_STEPS // 10, FLAT_STEPS - 1):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            note(f"data: {number + 1} batches: {peaks[-1] / 2**20:,.0f} MiB")
    batches.close()
    setting = {"rows": table.num_rows, "length": SHORT_LENGTH, "batch": FLAT_BATCH, "batches": FLAT_STEPS}
    return [
        Row("memory_peak", "bytes", setting, [peaks[1]]),
        Row("memory_growth", "bytes", setting, [peaks[1] - peaks[0]]),
    ]
