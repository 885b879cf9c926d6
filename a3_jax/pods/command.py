"""`a3 preflight`, `a3 launch`, `a3 goodput` and `a3 status`: flags, and late imports."""

_LAUNCH_EPILOG = """examples:
  a3 launch local --processes=2 --devices=2 --config=configs/tiny.py --workdir=runs/tiny
  a3 launch local --help
"""

_PREFLIGHT_EPILOG = """\
Exit status 0: it fits; 3: it doesn't, with what would; 2: bad input. Weights and data that are not here are
not checked. A report is kept in ~/.cache/a3_jax/preflight and told again while config, topology and code are
the same; `a3 launch xpk --submit` wants one.

examples:
  a3 preflight --config=configs/a3_llama32_1b.py --topology=v5e:4x4
  a3 preflight --config=configs/a3_llama31_8b.py --topology=v5e:8x8 --config.remat=block --json
  a3 preflight --config=configs/a3_llama31_8b.py --topology=v5e:4x8 --search
  a3 preflight --spec=launch/v5e-16x2.yaml --programs=decode,fingerprint,restore
"""

_LOCAL_EPILOG = """\
Each process writes to DIR/logs/process-N.log; what process 0 writes is shown as well. All are started
again when one was preempted (75), hung (76), could not save (77) or was killed; any other failure ends the
launch with that status. After --max_restarts restarts in a row without a new checkpoint the status is 78,
and DIR/no_progress.json says which step and which examples were in flight.
SIGTERM and Ctrl-C are passed on: the run saves, and the same command goes on there.

examples:
  a3 launch local --config=configs/tiny.py --workdir=runs/tiny
  a3 launch local --processes=2 --devices=2 --config=configs/tiny.py --workdir=runs/tiny --config.seed=1
"""

_GOODPUT_EPILOG = """examples:
  a3 goodput runs/tiny
  a3 goodput gs://bucket/a3-1b --json
"""

_STATUS_EPILOG = """examples:
  a3 status runs/tiny
  a3 status runs/tiny --json | jq .state
"""


def add_launch(subparsers) -> None:
    """Adds `a3 launch`, with a command for each kind of machine."""
    parser = _parser(
        subparsers,
        "launch",
        "start a run and keep it going",
        "Starts a run and keeps it going.",
        _LAUNCH_EPILOG,
    )
    commands = parser.add_subparsers(dest="launch_command", metavar="COMMAND", required=True)
    for add in (_add_local, _add_xpk, _add_tpu_vm):
        add(commands)


def add_preflight(subparsers) -> None:
    """Adds `a3 preflight`."""
    description = "Compiles a run's real step for a TPU pod without having one: memory, traffic, a verdict."
    parser = _parser(subparsers, "preflight", "whether a run fits a TPU pod", description, _PREFLIGHT_EPILOG)
    parser.add_argument("--config", metavar="FILE.py", help="as of a3 train")
    parser.add_argument("--topology", metavar="NAME", help="of a slice, such as v5e:4x4 or v5p:4x4x4")
    parser.add_argument("--slices", type=int, metavar="N", help="how many (default: 1)")
    parser.add_argument("--spec", metavar="FILE.yaml", help="in place of these three, as of a3 launch")
    parser.add_argument(
        "--programs", default="", metavar="NAMES", help="compile these too: decode,fingerprint,restore"
    )
    parser.add_argument(
        "--search", action="store_true", help="find mesh, microbatches and remat that fit and are fastest"
    )
    parser.add_argument("--again", action="store_true", help="compile even what is known from before")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the tables")
    parser.set_defaults(run=_run_preflight, takes_config_flags=True)


def add_goodput(subparsers) -> None:
    description = "Says where the wall time of a run went, from its events.jsonl."
    parser = _parser(
        subparsers, "goodput", "which share of a run's time was training", description, _GOODPUT_EPILOG
    )
    _add_run_and_json(parser)
    parser.set_defaults(run=_run_goodput)


def add_status(subparsers) -> None:
    description = "Says how far a run is and whether it lives, from the files that it wrote."
    parser = _parser(subparsers, "status", "how a run is doing", description, _STATUS_EPILOG)
    _add_run_and_json(parser)
    parser.set_defaults(run=_run_status)


def _add_local(commands) -> None:
    description = "Runs `a3 train` in several processes on the CPUs of this machine, and starts them again."
    parser = _parser(commands, "local", "processes on this machine", description, _LOCAL_EPILOG)
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--devices",
        type=int,
        default=1,
        metavar="N",
        help="CPU devices of each process (default: %(default)s)",
    )
    parser.add_argument("--config", required=True, metavar="FILE.py", help="as of a3 train")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="as of a3 train; a local one")
    parser.add_argument(
        "--max_restarts", type=int, default=3, metavar="K",
        help="restarts in a row that may bring no new checkpoint (default: %(default)s)",
    )  # fmt: skip
    parser.set_defaults(run=_run_local, takes_config_flags=True)


def _add_xpk(commands) -> None:
    description = "Prints what xpk is asked for and checks the manifest it makes; --submit sends it."
    epilog = "examples:\n  a3 launch xpk --spec=launch/v5e-16.yaml --xpk=$HOME/xpk/bin/xpk\n"
    parser = _parser(commands, "xpk", "a GKE cluster, by xpk", description, epilog)
    parser.add_argument("--spec", required=True, metavar="FILE.yaml", help="what is launched where")
    parser.add_argument("--xpk", default="xpk", metavar="PATH", help="default: the one on PATH")
    parser.add_argument("--manifest", metavar="FILE", help="default: NAME.jobset.yaml")
    parser.add_argument("--submit", action="store_true", help="send it, once preflight has passed")
    parser.set_defaults(run=_run_xpk)


def _add_tpu_vm(commands) -> None:
    description = "Prints the gcloud commands of a run on TPU VMs: create, install, run, logs, delete."
    epilog = "examples:\n  a3 launch tpu-vm --spec=launch/v5e-16.yaml\n"
    parser = _parser(commands, "tpu-vm", "TPU VMs, by queued resources", description, epilog)
    parser.add_argument("--spec", required=True, metavar="FILE.yaml", help="what is launched where")
    parser.set_defaults(run=_run_tpu_vm)


def _parser(subparsers, name, help_line, description, epilog):
    return subparsers.add_parser(
        name,
        help=help_line,
        description=description,
        epilog=epilog,
    )


def _add_run_and_json(parser) -> None:
    parser.add_argument("run_directory", metavar="RUN", help="the --workdir of a run")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")


def _run_preflight(args) -> int:
    from a3_jax.pods.preflight import run_preflight

    return run_preflight(args)


def _run_local(args) -> int:
    from a3_jax.pods.local import run_local

    return run_local(args)


def _run_xpk(args) -> int:
    from a3_jax.pods.xpk import run_xpk

    return run_xpk(args)


def _run_tpu_vm(args) -> int:
    from a3_jax.pods.tpu_vm import run_tpu_vm

    return run_tpu_vm(args)


def _run_goodput(args) -> int:
    from a3_jax.pods.goodput import run_goodput

    return run_goodput(args)


def _run_status(args) -> int:
    from a3_jax.pods.status import run_status

    return run_status(args)
