"""A run of seconds, for drills: two stages, both objectives' streams, checkpoints and evaluations often."""

import logging

import ml_collections

from tests.drills import harness, sabotage


def tell_of_programs():
    """A line in the log for each program that was kept and found, or wasn't."""
    logger, handler = logging.getLogger("jax._src.compiler"), logging.StreamHandler()
    handler.addFilter(lambda record: "compilation cache" in record.getMessage().lower())
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)


def get_config():
    sabotage.put_in_place()
    tell_of_programs()
    return ml_collections.ConfigDict({
        "seed": 3,
        "model": {"d_model": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_size": 16,
                  "mlp_size": 48},
        "holdout": 8,
        "seq_len": harness.TOKENS,
        "batch_size": 8,
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "eval_batches": 1,
        "checkpoint_every": 4,
        "log_every": 1,
        "stages": (
            {"name": "l2r", "steps": harness.LAST_STEP // 2},
            {"name": "random", "steps": harness.LAST_STEP // 2, "reset_optimizer": True,
             "orders": ({"order": "random", "group_sizes": (2,)},)},
        ),
    })  # fmt: skip
