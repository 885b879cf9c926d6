"""`a3 bench guards`: what being safe costs a step.

Each step asks the watchdog, the other processes, the last save and the lease, and writes its event; each
save computes a fingerprint of every leaf on the device.
"""

import tempfile

import jax

from a3_jax.benchmarks.measurement import Row, alternate, note
from a3_jax.benchmarks.settings import Settings, draw_rows, sort_rows
from a3_jax.benchmarks.steps import Steps
from a3_jax.checkpoints.fingerprint import fingerprints
from a3_jax.model.sharding import make_mesh
from a3_jax.runtime.distributed import ProcessFlags
from a3_jax.runtime.lease import Lease
from a3_jax.runtime.watchdog import Limits, Watchdog
from a3_jax.training.records import Events

SAVE_EVERY = 100  # steps, as the paper's configs do
_CALLS = 200


def measure(settings: Settings) -> list[Row]:
    """Seconds of a step, of its guards and of the fingerprints, and their share of the time."""
    return [row for length in settings.lengths for row in _measure_length(settings, length)]


def _measure_length(settings, length):
    setting = settings.describe(length) | {"save_every": SAVE_EVERY}
    steps = Steps(settings, settings.model(length))
    note(f"guards: length {length}: compiling")
    step = steps.compile(
        sort_rows(draw_rows(settings, length, settings.batch_at(length), "any_order")), "any_order"
    )
    with tempfile.TemporaryDirectory() as workdir, Lease(workdir) as lease:
        events = Events(f"{workdir}/events.jsonl")
        with Watchdog(workdir, 0, Limits()) as watchdog:
            votes = ProcessFlags(make_mesh(devices=jax.devices()[:1]))

            def guards():
                for number in range(_CALLS):
                    watchdog.enter("data")
                    watchdog.enter("step")
                    votes.any(False, False)
                    lease.check()
                    events.write("step", step=number, seconds=1.0, data_seconds=0.0, tokens=length)

            contenders = {
                "step": step,
                "guards": guards,
                "fingerprints": lambda: fingerprints(steps.leaves()),
            }
            seconds = alternate(contenders, settings.repeats, f"guards: length {length}")
        events.close()
    of_guards = [value / _CALLS for value in seconds["guards"]]
    share = [
        (guard + fingerprint / SAVE_EVERY) / one_step
        for guard, fingerprint, one_step in zip(
            of_guards, seconds["fingerprints"], seconds["step"], strict=True
        )
    ]
    return [
        Row("step_time", "s", setting, seconds["step"]),
        Row("guards_time", "s", setting, of_guards),
        Row("fingerprints_time", "s", setting, seconds["fingerprints"]),
        Row("guards_and_fingerprints_over_step", "ratio", setting, share),
    ]
