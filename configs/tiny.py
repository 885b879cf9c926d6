"""All stages, the source model's and the curriculum's, on the embedded stories.

Paper       A3, arXiv 2601.13228: its three kinds of stages in small, in float32
Recipe      `a3_jax/quickstart/config.py`: 2 layers of width 64, 64 stories of at most 32 words a step
Hardware    2 CPU cores
Hours       about a minute and a half
Expect      held-out loss in random groups of 4 falls from about 7 nats a word to about 1.1

    a3 train --config=configs/tiny.py --workdir=runs/tiny
"""

from a3_jax.quickstart.config import TINY_STEPS, tiny_run


def get_config():
    return tiny_run(TINY_STEPS)
