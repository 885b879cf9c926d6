"""The curriculum's ablation, the arm with it: next token, growing groups, any order (A3, table 3).

Paper       A3, arXiv 2601.13228: three stages, 2B tokens; which model is not stated. Its figures lie near
            those of the 3B, so that is our guess: this is the run of `a3_llama32_3b.py`
Recipe      learning rate 2e-5, weight decay 0.01; the paper states neither batch nor warm-up:
            256 x 2048 = 524,288 tokens a step, 4 x 954 x 524,288 = 2.0e9 tokens; groups grow in two steps
Hardware    v5e:8x8 (64 chips of 16 GiB), microbatches of 64 rows, 1 a chip: 10.1 GiB (compiled, not run)
Hours       not measured
Expect      `a3 reproduce table3`: TriviaQA 15.6, HellaSwag 49.3, PIQA 69.4; not reproduced yet

    a3 train --config=configs/a3_ablation_three_stages.py --workdir=runs/a3-three-stages \
      --config.init_from=Llama-3.2-3B --config.data='fineweb/*.jsonl'
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.init_from = "Llama-3.2-3B"
    config.start_stage = ""
    config.model = "llama-3.2-3b"
    config.data = "fineweb/*.jsonl"
    config.tokenizer = ""
    config.holdout = 1000
    config.seq_len = 2048
    config.packing = True
    config.batch_size = 256
    config.microbatches = 4

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
