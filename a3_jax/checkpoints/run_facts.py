"""What lies beside a run's checkpoint and belongs on its model card."""

import math
from typing import Any

from a3_jax.checkpoints.info import fingerprint
from a3_jax.checkpoints.loading import CHECKPOINTS
from a3_jax.checkpoints.manifest import PARAMS, read_manifest
from a3_jax.checkpoints.model_card import HELD_OUT, Facts
from a3_jax.errors import InputError
from a3_jax.paths import absolute, parse_json, read_text


def run_facts(directory, step: int | None) -> Facts:
    """The fingerprint of an A3 checkpoint and, of a run's, its data and last held-out losses.

    What can't be read is left out: a run goes on writing these files.

    Args:
      directory: the checkpoint, `WORKDIR/checkpoints/STEP` of a run.
      step: that it says to be of.

    Raises:
      DamagedCheckpoint: its manifest is not what was written.
    """
    directory = absolute(directory)
    found = fingerprint(read_manifest(directory).item(PARAMS))
    if step is None or directory.parent.name != CHECKPOINTS:
        return Facts(found)
    workdir = directory.parent.parent
    rows = [row for row in _json_lines(workdir / "eval.jsonl") if _step(row) <= step]
    last = max(rows, key=_step, default={})
    losses = {name: last[name] for name in HELD_OUT if _is_loss(last.get(name))}
    told = next(iter(_json_lines(workdir / "data.json", whole=True)), {})
    data = {name: crc32 for name, crc32 in told.items() if isinstance(crc32, int)}
    return Facts(found, losses, last["step"] if losses else None, data)


def _json_lines(path, whole: bool = False) -> list[dict[str, Any]]:
    """The objects in a file, one a line or one in all."""
    try:
        text = read_text(path)
    except InputError:
        return []
    rows = []
    for line in [text] if whole else text.splitlines():
        try:
            row = parse_json(line)
        except InputError:  # cut short
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _step(row) -> float:
    step = row.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) else math.inf


def _is_loss(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
