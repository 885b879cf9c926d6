"""Whether a JobSet does what a run needs: the schema of the fields relied on, then policies of our own."""

import json
import pathlib
import shlex

import yaml

from a3_jax import paths
from a3_jax.errors import EXIT_HUNG, EXIT_PREEMPTED, EXIT_STORAGE, InputError
from a3_jax.pods.spec import Spec

RESTART_CODES = (EXIT_PREEMPTED, EXIT_HUNG, EXIT_STORAGE)
_LABELS = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}  # of nodes
_SCHEMA = pathlib.Path(__file__).parent / "jobset.schema.json"


def read_manifest(path) -> dict:
    """Returns the JobSet in a YAML file, checked against the schema.

    Raises:
      InputError: not YAML, or not a JobSet; names the field.
    """
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
    """Refuses a JobSet that isn't what the spec says.

    Raises:
      InputError: hosts, chips, slices, image, grace period, restarts, exit codes or command differ.
    """
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
