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

from a3_jax.errors import EXIT_FAILED, EXIT_OK, InputError
from a3_jax.pods.manifests import RESTART_CODES, check_manifest, read_manifest
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
