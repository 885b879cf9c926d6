"""`a3 launch xpk`: a spec becomes the arguments of `xpk workload create`, a checked manifest, and a job.

xpk has an environment of its own; it is started, never imported.
"""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import yaml

from a3_jax import paths
from a3_jax.errors import EXIT_FAILED, EXIT_HUNG, EXIT_OK, EXIT_PREEMPTED, EXIT_STORAGE, InputError
from a3_jax.pods.spec import Spec, check_config, read_spec

PREFLIGHT_CACHE = pathlib.Path("~/.cache/a3_jax/preflight")


def xpk_arguments(spec: Spec) -> list[str]:
    """Returns the arguments of xpk that create the workload of a spec."""
    return [
        "workload", "create", f"--workload={spec.name}", f"--cluster={spec.cluster}",
        f"--project={spec.project}", f"--zone={spec.zone}", f"--tpu-type={spec.slice.tpu_type}",
        f"--num-slices={spec.slices}", f"--docker-image={spec.image}", f"--max-restarts={spec.max_restarts}",
        f"--restart-on-exit-codes={','.join(map(str, RESTART_CODES))}",
        f"--termination-grace-period-seconds={spec.grace_seconds}", f"--command={shlex.join(spec.command)}",
    ]  # fmt: skip


def preflight_passed(config_hash: str, directory=PREFLIGHT_CACHE) -> bool:
    """Returns whether `DIRECTORY/HASH.json` says `{"passed": true}` of a `spec.config_hash`."""
    try:
        return (
            json.loads((pathlib.Path(directory).expanduser() / f"{config_hash}.json").read_text())["passed"]
            is True
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def run_xpk(args) -> int:
    """Runs `a3 launch xpk`."""
    spec = read_spec(args.spec)
    if not spec.cluster:
        raise InputError("is missing", file=args.spec, field="cluster")
    config_hash = check_config(spec, args.spec)
    print(shlex.join(["xpk", *xpk_arguments(spec)]))
    if args.submit and not preflight_passed(config_hash):
        raise InputError(f"not sent: no preflight has passed for config {config_hash[:12]}", file=args.spec)
    xpk = shutil.which(args.xpk)
    if xpk is None:
        if args.submit:
            raise InputError(f"not sent: there is no {args.xpk}", field="--xpk")
        print(f"no manifest was written: there is no {args.xpk} (--xpk=PATH)", file=sys.stderr)
        return EXIT_OK
    manifest = args.manifest or f"{spec.name}.jobset.yaml"
    pathlib.Path(manifest).unlink(missing_ok=True)  # what is checked is what xpk writes now
    dry = [xpk, *xpk_arguments(spec), "--dry-run", "--skip-validation", f"--output-manifest-file={manifest}"]
    quiet = {**os.environ, "TELEMETRY_ENABLED": "false"}  # a dry run tells nobody
    done = subprocess.run(dry, capture_output=True, text=True, check=False, env=quiet)
    if done.returncode:
        print(f"{done.stdout[-2000:]}{done.stderr[-2000:]}", file=sys.stderr)
        return EXIT_FAILED
    check_manifest(read_manifest(manifest), spec, manifest)
    print(f"{manifest}: as the spec says", file=sys.stderr)
    if not args.submit:
        return EXIT_OK
    return EXIT_FAILED if subprocess.run([xpk, *xpk_arguments(spec)], check=False).returncode else EXIT_OK


RESTART_CODES = (EXIT_PREEMPTED, EXIT_HUNG, EXIT_STORAGE)
_LABELS = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}  # of nodes
_SCHEMA = pathlib.Path(__file__).parent / "jobset.schema.json"


def read_manifest(path) -> dict:
    """Returns the JobSet in a YAML file, checked against the schema."""
    import jsonschema

    try:
        manifest = yaml.safe_load(paths.read_text(path))
    except yaml.YAMLError as error:
        raise InputError(f"not YAML: {error}", file=path) from error
    validator = jsonschema.Draft202012Validator(json.loads(_SCHEMA.read_text()))
    for error in sorted(validator.iter_errors(manifest), key=lambda error: list(map(str, error.path))):
        raise InputError(
            error.message[:300], file=path, field=".".join(map(str, error.absolute_path)) or None
        )
    return manifest


def check_manifest(manifest: dict, spec: Spec, path=None) -> None:
    """Refuses a JobSet that isn't what the spec says."""
    job = manifest["spec"]["replicatedJobs"][0]
    pods = job["template"]["spec"]
    pod = pods["template"]["spec"]
    rule = pods["podFailurePolicy"]["rules"][0]["onExitCodes"]
    container = pod["containers"][0]
    kind, shape = spec.slice.name.split(":")
    wanted = {
        "metadata.name": (manifest["metadata"]["name"], spec.name),
        "replicas": (job["replicas"], spec.slices),
        "parallelism": (pods["parallelism"], spec.slice.hosts),
        "completions": (pods["completions"], spec.slice.hosts),
        "maxRestarts": (manifest["spec"]["failurePolicy"]["maxRestarts"], spec.max_restarts),
        "terminationGracePeriodSeconds": (pod["terminationGracePeriodSeconds"], spec.grace_seconds),
        "image": (container["image"], spec.image),
        "containerName": (rule["containerName"], container["name"]),
        "accelerator": (pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"], _LABELS[kind]),
        "topology": (pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"], shape),
        "tpu": (container["resources"]["limits"]["google.com/tpu"], spec.slice.chips // spec.slice.hosts),
    }
    for field, (found, expected) in wanted.items():
        if found != expected:
            raise InputError(f"is {found!r}, the spec says {expected!r}", file=path, field=field)
    if missing := set(RESTART_CODES) - set(rule["values"]):
        raise InputError(f"exit codes {sorted(missing)} don't restart", file=path, field="podFailurePolicy")
    if stops := {1, 2, 78, 79} & set(rule["values"]):
        raise InputError(f"exit codes {sorted(stops)} restart", file=path, field="podFailurePolicy")
    _check_command(container["command"][-1], spec, path)


def _check_command(script, spec, path):
    """xpk's script starts the command in the background and passes SIGTERM on to it, and to nothing below."""
    command = shlex.join(spec.command)
    for needed in ("trap _sigterm SIGTERM", f"({command}) &", "exit $EXIT_CODE"):
        if needed not in script:
            message = f"SIGTERM or the exit status would not come through: no {needed!r}"
            raise InputError(message, file=path, field="command")
