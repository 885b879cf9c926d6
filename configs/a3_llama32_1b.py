"""The paper's adaptation of Llama-3.2-1B to any order.

Paper       A3, arXiv 2601.13228: Llama-3.2-1B, FineWeb, about 2B tokens, sequences of 2048, bfloat16
Recipe      learning rate 2e-5, weight decay 0.01; the paper states neither batch nor warm-up:
            256 x 2048 = 524,288 tokens a step, 954 steps a stage, 4 x 954 x 524,288 = 2.0e9 tokens
Hardware    v5e:4x4 (16 chips of 16 GiB), microbatches of 32 rows, 2 a chip: 10.7 GiB (compiled, not run)
Hours       not measured
Expect      the paper's tables (`paper_tables`): not reproduced yet

    a3 train --config=configs/a3_llama32_1b.py --workdir=runs/a3_llama32_1b \
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
    config.packing = True
    config.batch_size = 256
    config.microbatches = 8

    config.stages = (
        stage("l2r", 954, "l2r", 1),
        stage("contiguous2", 954, "contiguous", 2),
        stage("contiguous4", 954, "contiguous", 4),
        stage("random4", 954, "random", 4),
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
    config.remat = "dots"
    config.mesh = ConfigDict({"data": 0, "fsdp": -1, "tensor": 1})
    config.checkpoint_every = 100
    config.keep = 2
    config.eval_every = 200
    config.eval_batches = 8
    config.sample_every = 0
    config.log_every = 10
    return config


def stage(name, steps, order, group_size):
    orders = (ConfigDict({"order": order, "group_sizes": (group_size,)}),)
    return ConfigDict({"name": name, "steps": steps, "objective": "any_order", "orders": orders})
