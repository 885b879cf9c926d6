"""`a3 bench data`: text to shards against the tokenizer alone, and batches against what a step takes.

The text is made up: words by Zipf's law, documents of log-normal length. Needs TensorFlow and seqio.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import resource
import tempfile

import numpy as np
import tokenizers

from a3_jax.data.batches import BatchPlan
from a3_jax.data.feature_converter import stream
from a3_jax.data.prepare import Options, prepare
from a3_jax.data.prepared_manifest import TRAIN, read_manifest
from a3_jax.data.shards import ShardTable, write_shard
from a3_jax.data.table import Table
from a3_jax.model.accelerators import ACCELERATORS
from a3_jax.model.config import PRESETS
from a3_jax.model.flops import train_step_flops
from a3_jax.ordering.curriculum import Order, Stage
from benchmarks.measurement import Row, alternate, note, ratio
from benchmarks.settings import Settings

DOCUMENTS, WORDS, MEDIAN_WORDS, SIGMA = 20_000, 30_000, 330, 1.0  # about 400 tokens per document
MERGES_VOCABULARY, TEXTS_AT_ONCE = 8_192, 512
BATCH, TIMED_STEPS, FAR_STEP = 64, 32, 100_000
MILLION_ROWS, SHORT_ROWS, SHORT_LENGTH = 1 << 20, 1 << 13, 256
FLAT_STEPS, FLAT_BATCH = 10_000, 8
HOST_CHIPS, NEED_MODEL, NEED_CHIP = 8, "llama-3.2-1b", "v5e"


def measure(settings: Settings) -> list[Row]:
    """Measures rates of preparing and of batches, the first batch far into a large set, and memory."""
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        note("data: making text and a tokenizer")
        rows = _measure_prepare(settings, root, make_texts(root, settings.seed))
        rows += _measure_batches(settings, root / "prepared-0")
        return rows + _measure_large(settings, make_large(root / "large", root / "prepared-0", settings.seed))


def make_texts(root: pathlib.Path, seed: int) -> list[str]:
    """Writes text.jsonl and tokenizer.json, BPE trained on some of the texts; returns the texts."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(letters[rng.integers(0, 26, rng.integers(2, 11))]) for _ in range(WORDS)]
    chance = 1.0 / np.arange(1, WORDS + 1)
    lengths = np.maximum(rng.lognormal(np.log(MEDIAN_WORDS), SIGMA, DOCUMENTS), 1).astype(int)
    drawn = rng.choice(WORDS, lengths.sum(), p=chance / chance.sum())
    texts = [" ".join(words[word] for word in part) for part in np.split(drawn, np.cumsum(lengths)[:-1])]
    options = {"special_tokens": ["<s>", "</s>"], "show_progress": False}
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts[:2000], MERGES_VOCABULARY, **options)
    tokenizer.save(str(root / "tokenizer.json"))
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def make_large(directory: pathlib.Path, like: pathlib.Path, seed: int) -> ShardTable:
    """Makes a million short rows: one shard under as many names as it takes."""
    rng, names = np.random.default_rng(seed), [str(n) for n in range(MILLION_ROWS // SHORT_ROWS)]
    tokens = rng.integers(0, 1 << 15, (SHORT_ROWS, SHORT_LENGTH), dtype=np.int32)
    positions = np.tile(np.arange(SHORT_LENGTH, dtype=np.int32), (SHORT_ROWS, 1))
    directory.mkdir()
    table = Table(tokens, positions, np.ones_like(tokens))
    info = write_shard(directory / names[0], table, tokens="uint16", segments="uint16")
    for name in names[1:]:
        os.link(directory / names[0], directory / name)
    manifest = dataclasses.replace(
        read_manifest(like), seq_len=SHORT_LENGTH, token_dtype="uint16", segment_dtype="uint16",
        splits={TRAIN: [dataclasses.replace(info, file=name) for name in names]},
    )  # fmt: skip
    return ShardTable(directory, manifest, TRAIN)


def _measure_prepare(settings, root, texts) -> list[Row]:
    """Measures the whole of `a3 data prepare` in turn with `tokenizers` alone on the texts in memory."""
    file, numbers = str(root / "tokenizer.json"), iter(range(1000))
    tokenizer = tokenizers.Tokenizer.from_file(file)
    options = Options(tokenizer=file, seq_len=settings.lengths[0])

    def tokenise():
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            tokenizer.encode_batch_fast(texts[first : first + TEXTS_AT_ONCE], add_special_tokens=False)

    def write():
        prepare([str(root / "text.jsonl")], str(root / f"prepared-{next(numbers)}"), options)

    calls = {"tokenizers": tokenise, "prepare": write}
    seconds = alternate(calls, settings.repeats, "data: prepare", warm_ups=1)
    counts = read_manifest(root / "prepared-0").counts
    tokens, padding = counts["tokens"], counts["padding"]
    setting = {"length": settings.lengths[0], "documents": len(texts), "tokens": tokens}
    return [
        *(Row(f"{name}_rate", "tokens/s", setting, [tokens / s for s in seconds[name]]) for name in calls),
        ratio("prepare_time_over_tokenizers", seconds["prepare"], seconds["tokenizers"], setting),
        Row("padding", "share", setting, [padding / (tokens + padding)]),
    ]


def _batches(settings, table, batch: int, first_step: int = 0):
    """Opens the sorted batches of random groups, as training takes them; closes them on exit."""
    stage = Stage("bench", steps=10**9, orders=(Order("random", (settings.group_size,)),))
    return contextlib.closing(stream(BatchPlan(table, (stage,), settings.seed, batch), first_step))


def _measure_batches(settings, directory) -> list[Row]:
    """Measures the rate of batches against what a host's chips could train on at their peak."""
    length, batch = settings.lengths[0], settings.batch or BATCH
    with _batches(settings, ShardTable(directory, read_manifest(directory), TRAIN), batch) as batches:
        calls = {f"{TIMED_STEPS} batches": lambda: [next(batches) for _ in range(TIMED_STEPS)]}
        (seconds,) = alternate(calls, settings.repeats, "data", warm_ups=1).values()
    chip = next(chip for chip in ACCELERATORS if chip.name == NEED_CHIP)
    need = HOST_CHIPS * chip.peak_flops * length / train_step_flops(PRESETS[NEED_MODEL], length).total
    rates = [TIMED_STEPS * batch * length / s for s in seconds]
    setting = {"length": length, "batch": batch, "order": "random", "group_size": settings.group_size}
    of_need = setting | {"model": NEED_MODEL, "chips": f"{HOST_CHIPS} {NEED_CHIP} at their peak"}
    return [
        Row("batches_rate", "tokens/s", setting, rates),
        Row("host_need", "tokens/s", of_need, [need]),
        Row("batches_speedup_over_need", "ratio", of_need, [rate / need for rate in rates]),
    ]


def _measure_large(settings, table) -> list[Row]:
    """Measures seconds to a first batch, early and late, and growth over batches, their first tenth aside."""

    def first(step):
        with _batches(settings, table, BATCH, step) as batches:
            next(batches)

    calls = {f"step_{step}": functools.partial(first, step) for step in (0, FAR_STEP)}
    seconds = alternate(calls, settings.repeats, "data: first batch", warm_ups=1)
    setting, peaks = {"rows": table.num_rows, "length": SHORT_LENGTH, "batch": BATCH}, []
    rows = [Row(f"first_batch_at_{name}", "s", setting, times) for name, times in seconds.items()]
    with _batches(settings, table, FLAT_BATCH) as batches:
        for number in range(FLAT_STEPS):
            next(batches)
            if number in (FLAT_STEPS // 10, FLAT_STEPS - 1):
                peaks.append(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
                note(f"data: {number + 1} batches: {peaks[-1] / 2**20:,.0f} MiB")
    setting = setting | {"batch": FLAT_BATCH, "batches": FLAT_STEPS}
    growth = Row("memory_growth", "bytes", setting, [peaks[1] - peaks[0]])
    return [*rows, Row("memory_peak", "bytes", setting, peaks[1:]), growth]
