"""The curriculum's ablation, the arm without: random groups of four from the first step on (A3, table 3).

Paper       A3, arXiv 2601.13228: stages 1 and 2 skipped, 2B tokens; which model is not stated (our guess:
            the 3B, as in `a3_ablation_three_stages.py`)
Recipe      learning rate 2e-5, weight decay 0.01; the paper states neither batch nor warm-up:
            256 x 2048 = 524,288 tokens a step, 3816 x 524,288 = 2.0e9 tokens, all in random groups of 4
Hardware    v5e:8x8 (64 chips of 16 GiB), microbatches of 64 rows, 1 a chip: 10.1 GiB (compiled, not run)
Hours       not measured
Expect      `a3 reproduce table3`: TriviaQA 11.3, HellaSwag 44.2, PIQA 64.2; not reproduced yet

    a3 train --config=configs/a3_ablation_last_stage.py --workdir=runs/a3-last-stage \
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

    config.stages = (stage("random4", 3816, "random", 4),)
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
