"""The tiny run, and the variations of it that the quickstart needs."""

import dataclasses

from ml_collections import ConfigDict

# Two layers are what filling a blank from the right takes: the first tells from the neighbours what
# kind of word is missing, the second fetches it from where it comes up again. Eight heads learn that
# from every seed tried, four left one kind of word out now and then.
WORD_MODEL = {
    "d_model": 64, "num_layers": 2, "num_heads": 8, "num_kv_heads": 8, "head_size": 8, "mlp_size": 192,
}  # fmt: skip
BYTE_MODEL = {
    "d_model": 96, "num_layers": 3, "num_heads": 4, "num_kv_heads": 4, "head_size": 24, "mlp_size": 256,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Steps:
    """Optimiser steps of each stage: the source model's, then the curriculum's."""

    ar: int
    l2r: int
    contiguous2: int
    contiguous4: int
    random: int


WORD_STEPS = Steps(ar=200, l2r=100, contiguous2=50, contiguous4=50, random=400)
TINY_STEPS = Steps(ar=100, l2r=50, contiguous2=25, contiguous4=25, random=200)
BYTE_STEPS = Steps(ar=600, l2r=100, contiguous2=50, contiguous4=50, random=400)
SMOKE_STEPS = Steps(ar=4, l2r=2, contiguous2=1, contiguous4=1, random=4)


def tiny_run(steps: Steps = WORD_STEPS) -> ConfigDict:
    """AR training and the paper's three kinds of stages on the embedded stories, as one run.

    A story is a row of at most 32 words. Filling a blank from the right is learnt in the last stage,
    all of a sudden and one kind of word after the other; so it begins at the full learning rate again.
    Its groups come in three sizes: with groups of 4 alone, blanks of several words are filled less well.
    """
    config = ConfigDict()
    config.seed = 0
    config.init_from = ""
    config.start_stage = ""
    config.model = ConfigDict(WORD_MODEL)
    config.data = ""
    config.tokenizer = ""
    config.holdout = 0.05
    config.seq_len = 32
    config.packing = True
    config.batch_size = 64
    config.microbatches = 1

    config.stages = (
        _stage("ar", steps.ar, objective="ar", learning_rate=5e-3),
        _stage("l2r", steps.l2r, _order("l2r", 1), restart_schedule=True, reset_optimizer=True),
        _stage("contiguous2", steps.contiguous2, _order("contiguous", 2)),
        _stage("contiguous4", steps.contiguous4, _order("contiguous", 4)),
        _stage("random", steps.random, _order("random", 1, 2, 4), restart_schedule=True),
    )
    config.learning_rate = 4e-3
    config.warmup_steps = 20
    config.schedule = "cosine"
    config.weight_decay = 0.01
    config.b1 = 0.9
    config.b2 = 0.99
    config.eps = 1e-8
    config.clip = 1.0

    config.dtype = "float32"
    config.remat = "none"
    config.mesh = ConfigDict({"data": 0, "fsdp": -1, "tensor": 1})
    config.checkpoint_every = 0
    config.keep = 2
    config.eval_every = 100
    config.eval_batches = 4
    config.sample_every = 0
    config.log_every = 50
    return config


def text_run(path: str, steps: Steps = BYTE_STEPS) -> ConfigDict:
    """Returns the same on the user's own text, byte by byte."""
    config = tiny_run(steps)
    config.data = path
    config.tokenizer = "bytes"
    config.model = ConfigDict(BYTE_MODEL)
    config.seq_len = 128
    config.batch_size = 16
    return config


def _stage(name: str, steps: int, *orders: ConfigDict, **fields) -> ConfigDict:
    stage = ConfigDict({"name": name, "steps": steps, "objective": "any_order"} | fields)
    if orders:
        stage.orders = orders
    return stage


def _order(order: str, *group_sizes: int) -> ConfigDict:
    return ConfigDict({"order": order, "group_sizes": group_sizes})
