"""The authors' PyTorch release, strategy by strategy: six stages, each a run of its own.

Paper       A3, arXiv 2601.13228; github.com/PKU-ML/Any-order-Any-subset-AR, with the HF Trainer's defaults
Recipe      800 steps a stage, 50 of them warm-up, linear decay to zero, fresh AdamW (0.9, 0.999), clip 1.0;
            one order for a whole batch, one truncated document a row, no packing; rate 2e-5
Hardware    microbatches of 16 rows: one row a chip on v5e:4x4
Hours       not measured
Expect      losses as the release's; convert its checkpoints to compare (`residual` is recognised)

    a3 train --config=configs/release.py --workdir=runs/release \
      --config.init_from=Llama-3.2-1B --config.data='fineweb/*.jsonl'
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.init_from = "Llama-3.2-1B"
    config.start_stage = ""
    config.model = "llama-3.2-1b"
    config.data = "fineweb/*.jsonl"
    config.tokenizer = ""
    config.holdout = 1000
    config.seq_len = 2048
    config.packing = False
    config.batch_size = 16
    config.microbatches = 1

    config.stages = (
        stage("l2r", order("l2r", 1)),
        stage("contiguous2", order("contiguous", 2)),
        stage("contiguous4", order("contiguous", 4)),
        stage("random4", order("random", 4)),
        stage("random8", order("random", 8)),
        stage("mixed8", order("random", 8), order("contiguous", 8)),
    )
    config.learning_rate = 2e-5
    config.warmup_steps = 50
    config.schedule = "linear"
    config.optimizer = "adamw"
    config.weight_decay = 0.01
    config.b1 = 0.9
    config.b2 = 0.999
    config.eps = 1e-8
    config.clip = 1.0

    config.dtype = "bfloat16"
    config.remat = "block"
    config.mesh = ConfigDict({"data": 0, "fsdp": -1, "tensor": 1})
    config.checkpoint_every = 100
    config.keep = 2
    config.eval_every = 200
    config.eval_batches = 8
    config.sample_every = 0
    config.log_every = 10
    return config


def stage(name, *orders):
    own_run = {"restart_schedule": True, "reset_optimizer": True, "one_order_per_batch": True}
    return ConfigDict({"name": name, "steps": 800, "objective": "any_order", "orders": orders, **own_run})


def order(name, group_size):
    return ConfigDict({"order": name, "group_sizes": (group_size,), "weight": 1.0})
