"""`python -m a3_jax`: the same as `a3`."""

import sys

from a3_jax.cli import console

if __name__ == "__main__":
    sys.exit(console())
