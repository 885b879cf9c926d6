"""`a3 train`: a config file, overrides on the command line, and the run."""

from a3_jax.errors import EXIT_OK

EPILOG = """examples:
  a3 train --config=configs/tiny.py --workdir=runs/tiny
  a3 train --config=configs/tiny.py --workdir=runs/tiny2 --config.seed=1 --config.stages[0].steps=50
  a3 train --config=configs/a3_llama32_1b.py --workdir=gs://bucket/a3-1b --config.init_from=Llama-3.2-1B

The same command again continues where the run stopped.
"""


def add_train(subparsers) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a model through a curriculum of orders",
        description="Trains a model through a curriculum of orders; run again, it goes on where it stopped.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE.py", help="file with get_config(), e.g. configs/tiny.py"
    )
    parser.add_argument(
        "--workdir", required=True, metavar="DIR", help="checkpoints, metrics and config.json go here"
    )
    parser.set_defaults(run=main, takes_config_flags=True)


def main(args) -> int:
    """Runs `a3 train`; `args.config_flags` holds the `--config.FIELD=VALUE` arguments."""
    from a3_jax.training.config import read_run_config

    config = read_run_config(args.config, args.config_flags)
    from a3_jax.runtime.distributed import join, shutdown
    from a3_jax.runtime.preemption import StopRequest
    from a3_jax.training.train import train

    with StopRequest():  # while it waits for the others too
        join()
    train(config, args.workdir)
    shutdown()
    return EXIT_OK


def default_fields() -> dict:
    """Returns the fields of a run's config that have defaults."""
    from a3_jax.training.config import default_fields

    return default_fields()
