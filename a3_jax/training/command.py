"""`a3 train`: a config file, overrides on the command line, and the run."""

import os
import re
import sys

from a3_jax.errors import EXIT_OK, InputError, nearest

EPILOG = """examples:
  a3 train --config=configs/tiny.py --workdir=runs/tiny
  a3 train --config=configs/tiny.py --workdir=runs/tiny2 --config.seed=1 --config.stages[0].steps=50
  a3 train --config=configs/a3_llama32_1b.py --workdir=gs://bucket/a3-1b --config.init_from=Llama-3.2-1B

The same command again goes on where the run stopped.
"""


def add_train(subparsers) -> None:
    import argparse

    parser = subparsers.add_parser(
        "train",
        help="train a model through a curriculum of orders",
        description="Trains a model through a curriculum of orders; run again, it goes on where it stopped.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
    config = read_config(args.config, args.config_flags)
    from a3_jax.training.preemption import StopRequest
    from a3_jax.training.processes import join, part
    from a3_jax.training.run import train

    with StopRequest():  # while it waits for the others too
        join()
    train(config, args.workdir)
    part()
    return EXIT_OK


def read_config(path: str, overrides: list[str]):
    """The config of a file with overrides, through `ml_collections.config_flags`.

    Args:
      path: Python file with `get_config()`, local or in a bucket.
      overrides: `--config.FIELD=VALUE`, or `--config.FIELD` followed by `VALUE`; fields of stages as
        `--config.stages[1].steps=9`.

    Returns:
      A locked `ConfigDict`.

    Raises:
      InputError: the file can't be read, an argument is no override, a field or value is wrong.
    """
    for argument in overrides:
        if argument.startswith("-") and not _is_override(argument) and not _is_number(argument):
            flag = argument.split("=")[0]
            raise InputError(
                f"unknown argument {argument!r}{nearest(flag, ('--config', '--workdir'))}", file="a3 train"
            )
    config = _with_defaults(_read_file(os.path.expanduser(path)))
    for argument in overrides:
        if _is_override(argument):
            _check_field(config, argument.split("=")[0].split(".", 1)[1])
    return _override(config, overrides)


def _read_file(path):
    from a3_jax.paths import local_copy, read_beginning, refuse_pointer

    if "://" not in path:
        file = path.partition(":")[0]
        if os.path.isfile(file):
            refuse_pointer(read_beginning(file), file)
        return _load(path, path)
    scheme, _, rest = path.partition("://")
    file, colon, argument = rest.partition(":")  # a string behind a colon is get_config's
    with local_copy(f"{scheme}://{file}") as copy:
        return _load(copy + colon + argument, path)


def _load(file, path):
    """The config of a file on this machine; `path` is its name for messages."""
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    sys.modules.pop("config_config", None)  # its name there: a second file would see the first one's names
    arguments = ["a3 train", f"--config={file}"]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments, lock_config=False)
    try:
        values(arguments)
        values.config.keys()  # a file that could not be read complains here
    except Exception as error:  # the file is the user's own code: it may raise anything
        raise _file_error(path, error) from error
    if not isinstance(values.config, ConfigDict):
        raise InputError("get_config() returned no ConfigDict", file=path)
    return values.config


def _with_defaults(config):
    """The config with the fields that its file leaves out, so that they can be overridden as well."""
    import dataclasses

    from ml_collections import ConfigDict

    from a3_jax.training.config import RunConfig

    for field in dataclasses.fields(RunConfig):
        if field.name in config:
            continue
        if field.default is not dataclasses.MISSING:
            config[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            config[field.name] = ConfigDict(field.default_factory())
    return config


def _override(config, overrides):
    from absl import flags
    from ml_collections import config_flags

    arguments = ["a3 train", *overrides]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
        rest = values(arguments)[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(str(error), file="a3 train") from error
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}", file="a3 train")
    return values.config


def _is_override(argument):
    return argument.startswith(("--config.", "-config.", "--noconfig."))


def _is_number(argument):
    try:
        float(argument)
    except ValueError:
        return False
    return True


def _file_error(path, error):
    """What is wrong with the config file itself."""
    cause = error.__cause__ or error
    if isinstance(error, InputError):
        return error
    if isinstance(cause, OSError):
        return InputError("no such config file, or it can't be read", file=path)
    if isinstance(error, SyntaxError):
        return InputError(f"not Python: {error.msg}", file=path, line=error.lineno)
    if isinstance(error, AttributeError) and "get_config" in str(error):
        return InputError("has no function get_config()", file=path)
    if isinstance(error, AttributeError) and "keys" in str(error):
        return InputError("get_config() returned no ConfigDict", file=path)
    return InputError(f"failed: {type(error).__name__}: {str(error).strip().splitlines()[-1]}", file=path)


def _check_field(config, name):
    """That a config has the field `a.b[1].c`."""
    value = config
    for part in re.findall(r"[^.\[\]]+", name):
        if hasattr(value, "keys"):
            if part not in value:
                raise InputError(
                    f"no such field: {part!r}{nearest(part, value.keys())}", field=f"--config.{name}"
                )
            value = value[part]
        elif isinstance(value, tuple | list):
            if not part.isdigit() or int(part) >= len(value):
                raise InputError(f"{part!r} is no index below {len(value)}", field=f"--config.{name}")
            value = value[int(part)]
        else:
            raise InputError(f"a {type(value).__name__} has no field {part!r}", field=f"--config.{name}")
