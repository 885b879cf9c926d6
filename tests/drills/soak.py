"""`python -m tests.drills.soak`: runs under random faults, which must all end as the undisturbed one does.

A run of two processes is done once in peace. Then, until the time is used up, the same run is begun in a
fresh directory, hurt, started again, hurt again, and let go in the end: the parameters must be equal bit
for bit, and every step must have one row with the same numbers. What is done to a run is drawn from its
number and the seed; when exactly it strikes is up to the machine.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

from a3_jax.checkpoints.manifest import find_damage, list_files, read_manifest
from a3_jax.errors import EXIT_BAD_INPUT, EXIT_HUNG, EXIT_PREEMPTED, InputError
from a3_jax.pods.run_records import checkpoint_steps
from tests.drills.harness import TIMEOUT, Run

PROCESSES, DEVICES = 2, 1
STEPS = 40  # of each of the two stages
OVERRIDES = (
    f"--config.stages[0].steps={STEPS}", f"--config.stages[1].steps={STEPS}", "--config.keep=3",
    "--config.checkpoint_every=5", "--config.eval_every=20", "--config.hang_seconds=8",
)  # fmt: skip
HURT_ATTEMPTS = 6  # of a run; then it is left in peace
OPENING = 8.0  # seconds that a start takes, or more
LEAVE = 30.0  # seconds in which the others leave when one has left; then they are ended, as a supervisor does

# What strikes while a run goes, and how often in comparison.
STRIKES = {"kill": 6, "kill all": 2, "term": 4, "term twice": 2, "pause": 2, "stop": 2, "stop, continue": 2}
# What is done to its files between two attempts.
DAMAGES = {"flip": 4, "truncate": 2, "delete": 2, "torn metrics.jsonl": 2, "torn events.jsonl": 2,
           "stray directory": 2, "flip in all": 1}  # fmt: skip


@dataclasses.dataclass
class Tally:
    """What happened, over all runs.

    Attributes:
      begun_anew: runs that were refused because nothing intact was left, as they should be.
      missed: strikes that came after the end.
      ended: processes that did not leave by themselves in time.
      mismatches: what must not be: (run, what).
    """

    faults: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    runs: int = 0
    attempts: int = 0
    restarts: int = 0
    begun_anew: int = 0
    set_aside: int = 0
    missed: int = 0
    ended: int = 0
    mismatches: list[tuple[int, str]] = dataclasses.field(default_factory=list)


class Disturbed:
    """One run under faults."""

    def __init__(
        self, number: int, run: Run, undisturbed: Run, draw: random.Random, tally: Tally, end: float
    ):
        """`end`: of `time.monotonic()`, from which on it is left in peace."""
        self._number, self._run, self._undisturbed, self._tally = number, run, undisturbed, tally
        self._draw, self._end = draw, end
        self._attempt = 0
        self._touched: set[int] = set()  # processes that were sent a signal in this attempt
        self._nothing_left = False  # every checkpoint was damaged

    def finish(self) -> None:
        """Starts it until it is through, and compares."""
        while True:
            self._attempt += 1
            self._tally.attempts += 1
            left = intact_steps(self._run.workdir)
            try:
                statuses = self._go()
            except AssertionError as error:  # of the harness: it hangs
                self._wrong(str(error).splitlines()[0])
                return
            finally:
                self._run.end()
            self._check_beginning(left)
            if self._nothing_left:
                self._check_refusal(statuses)
                self._count_set_aside()
                shutil.rmtree(self._run.workdir)
                self._nothing_left = False
            elif not any(statuses):
                break
            elif self._attempt < HURT_ATTEMPTS:
                self._damage()
            self._tally.restarts += 1
            if self._attempt > 3 * HURT_ATTEMPTS:
                self._wrong("comes to no end")
                return
        self._count_set_aside()
        for problem in differences(self._run, self._undisturbed):
            self._wrong(problem)

    def _go(self) -> list[int]:
        """One attempt; the exit statuses."""
        self._touched, run = set(), self._run
        peaceful = self._nothing_left or self._attempt > HURT_ATTEMPTS or time.monotonic() > self._end
        events = run.workdir / "events.jsonl"
        self._read_from = events.stat().st_size if events.exists() else 0
        began = time.monotonic()
        run.start(drill=self._draw.choice(["", "", "slow_save:0.4"]))
        while not peaceful and self._strike() == "pause":  # which ends nothing
            pass
        self._wait_for(lambda: any(child.poll() is not None for child in run.children), TIMEOUT)
        if not self._wait_for(self._all_left, LEAVE):
            self._tally.ended += sum(child.poll() is None for child in run.children)
            self._say("one doesn't leave by itself and is ended")
            for process, child in enumerate(run.children):
                if child.poll() is None:
                    self._touched.add(process)
                    child.send_signal(signal.SIGTERM)
            self._wait_for(self._all_left, 5.0)
            run.end()
        statuses = run.wait()
        self._say(f"statuses {statuses} after {time.monotonic() - began:.0f} s")
        self._check_statuses(statuses)
        return statuses

    def _strike(self) -> str:
        """Waits for a moment, and does something to a process: what; empty if it was too late."""
        draw = self._draw
        kind = draw.choices(list(STRIKES), list(STRIKES.values()))[0]
        victim, delay = draw.randrange(PROCESSES), draw.uniform(0.0, 0.4)
        moment, is_due = self._moment(only_steps=kind.startswith("stop"))
        self._wait_for(lambda: is_due() or self._any_left(), TIMEOUT)
        if self._any_left():
            self._tally.missed += 1
            self._say(f"{kind} at {moment}: too late")
            return ""
        time.sleep(delay)
        self._tally.faults[kind] += 1
        self._say(f"{kind}, process {victim} at {moment} + {delay:.2f} s")
        getattr(self, f"_{kind.replace(', ', '_').replace(' ', '_')}")(victim)
        return kind

    def _moment(self, only_steps: bool):
        """A step that is still to come, or seconds from the start on: what it is, whether it has come.

        Args:
          only_steps: a peer that is stopped while both open the run is noticed by its heartbeat alone,
            which takes a minute.
        """
        share, began = self._draw.random(), time.monotonic()
        if self._draw.random() < 0.25 and not only_steps:
            seconds = share * OPENING
            return f"{seconds:.1f} s", lambda: time.monotonic() - began >= seconds
        first = max(checkpoint_steps(self._run.workdir), default=0)
        step = min(first + 1 + int(share * (2 * STEPS - first)), 2 * STEPS - 1)
        return f"step {step}", lambda: self._newest_step() >= step

    def _kill(self, victim) -> None:
        self._send(victim, signal.SIGKILL)

    def _kill_all(self, victim) -> None:
        for process in (victim, 1 - victim):
            self._send(process, signal.SIGKILL)

    def _term(self, victim) -> None:
        self._send(victim, signal.SIGTERM)

    def _term_twice(self, victim) -> None:
        self._send(victim, signal.SIGTERM)
        time.sleep(self._draw.uniform(0.0, 0.3))
        self._send(victim, signal.SIGTERM)

    def _pause(self, victim) -> None:
        """Shorter than anything that counts as hung."""
        self._send(victim, signal.SIGSTOP)
        time.sleep(self._draw.uniform(0.2, 3.0))
        self._send(victim, signal.SIGCONT)

    def _stop(self, victim) -> None:
        self._send(victim, signal.SIGSTOP)
        self._wait_for(lambda: self._run.children[1 - victim].poll() is not None, TIMEOUT)
        self._send(victim, signal.SIGKILL)

    def _stop_continue(self, victim) -> None:
        """It goes on when the other has given up: it must not do harm."""
        self._send(victim, signal.SIGSTOP)
        self._wait_for(lambda: self._run.children[1 - victim].poll() is not None, TIMEOUT)
        self._send(victim, signal.SIGCONT)

    def _send(self, process, number) -> None:
        if self._run.children[process].poll() is None:
            self._touched.add(process)
            self._run.kill(process, number)

    def _damage(self) -> None:
        """Something, or nothing, to the files of a run that has stopped."""
        for _ in range(self._draw.choice([0, 1, 1, 2])):
            kind = self._draw.choices(list(DAMAGES), list(DAMAGES.values()))[0]
            steps = intact_steps(self._run.workdir)
            if kind.startswith("torn"):
                done = self._tear(kind.removeprefix("torn "))
            elif kind == "stray directory":
                done = self._stray(steps)
            elif kind == "flip in all":
                done = [self._hurt_file("flip", step) for step in steps]
                self._nothing_left |= bool(steps)
            else:  # one at least stays as it was
                done = self._hurt_file(kind, self._draw.choice(steps)) if len(steps) > 1 else None
            if done:
                self._tally.faults[kind] += 1
                self._say(f"{kind}: {done}")
            if self._nothing_left:
                return

    def _hurt_file(self, kind: str, step: int) -> str:
        directory = self._run.workdir / "checkpoints" / str(step)
        names = [*list_files(directory), "manifest.json"]
        name = self._draw.choice([name for name in names if (directory / name).stat().st_size])
        file = directory / name
        data = bytearray(file.read_bytes())
        place = self._draw.randrange(len(data))
        if kind == "delete":
            file.unlink()
            return f"{step}/{name}"
        if kind == "truncate":
            data = data[:place]
        else:
            data[place] ^= 1 << self._draw.randrange(8)
        file.write_bytes(data)
        return f"{step}/{name} at byte {place}"

    def _tear(self, name: str) -> str:
        """The beginning of one more line: what a death in the middle of writing leaves."""
        file = self._run.workdir / name
        lines = file.read_bytes().splitlines() if file.exists() else []
        if not lines or len(lines[-1]) < 3:
            return ""
        length = self._draw.randrange(1, len(lines[-1]) - 1)
        with open(file, "ab") as torn:
            torn.write(lines[-1][:length])
        return f"{length} bytes"

    def _stray(self, steps: list[int]) -> str:
        """An empty directory: of a step to come, or of none that there will be."""
        step = self._draw.choice([max(steps, default=0) + 5, 2 * STEPS, 2 * STEPS + 7])
        directory = self._run.workdir / "checkpoints" / str(step)
        if directory.exists():
            return ""
        directory.mkdir(parents=True)
        return str(step)

    def _count_set_aside(self) -> None:
        self._tally.set_aside += len(list((self._run.workdir / "checkpoints").glob("*.damaged*")))

    def _check_beginning(self, left: list[int]) -> None:
        """The newest step that was intact, and no other, is what it went on from."""
        for event in self._news():
            if event["event"] == "restore" and event["step"] != max(left, default=None):
                self._wrong(f"went on from step {event['step']}, intact were {left}")

    def _check_refusal(self, statuses: list[int]) -> None:
        last = self._run.log().read_text().splitlines()[-1]
        if statuses != [EXIT_BAD_INPUT] * PROCESSES or "checkpoints/" not in last:
            self._wrong(f"no checkpoint was intact, and yet: statuses {statuses}, {last!r}")
        self._tally.begun_anew += 1

    def _check_statuses(self, statuses: list[int]) -> None:
        fine = {0, EXIT_PREEMPTED, EXIT_HUNG} | ({EXIT_BAD_INPUT} if self._nothing_left else set())
        for process, status in enumerate(statuses):
            if status not in fine and not (process in self._touched and status < 0):
                self._wrong(f"process {process} ended with status {status}")

    def _news(self) -> list[dict]:
        """The events of this attempt."""
        file = self._run.workdir / "events.jsonl"
        if not file.exists():
            return []
        with open(file, "rb") as lines:
            lines.seek(self._read_from)
            return [json.loads(line) for line in lines.read().split(b"\n")[:-1] if line.endswith(b"}")]

    def _newest_step(self) -> int:
        return max((event["step"] for event in self._news() if event["event"] == "step"), default=0)

    def _any_left(self) -> bool:
        return any(child.poll() is not None for child in self._run.children)

    def _all_left(self) -> bool:
        return all(child.poll() is not None for child in self._run.children)

    def _wait_for(self, what, seconds) -> bool:
        end = time.monotonic() + seconds
        while not (done := what()) and time.monotonic() < end:
            time.sleep(0.05)
        return done

    def _say(self, text: str) -> None:
        print(f"run {self._number}, attempt {self._attempt}: {text}", flush=True)

    def _wrong(self, what: str) -> None:
        self._say(f"WRONG: {what}")
        self._tally.mismatches.append((self._number, what))


def intact_steps(workdir) -> list[int]:
    """The steps every byte of which is as it was written, oldest first."""

    def is_intact(directory):
        try:
            return not find_damage(directory, read_manifest(directory), deep=True)
        except InputError:
            return False

    return [step for step in checkpoint_steps(workdir) if is_intact(workdir / "checkpoints" / str(step))]


def differences(run: Run, undisturbed: Run) -> list[str]:
    """What is not as in the undisturbed run."""
    last = 2 * STEPS
    if last not in intact_steps(run.workdir):
        return [f"the last checkpoint, {last}, is not there or not intact"]
    found = []
    ours, theirs = (read_manifest(it.workdir / "checkpoints" / str(last)).leaves for it in (run, undisturbed))
    found += [f"{name} has other bits" for name in theirs if ours.get(name) != theirs[name]]
    for file, timed in (("metrics.jsonl", {"tokens_per_second", "mfu"}), ("eval.jsonl", set())):
        rows, wanted = (
            [{name: row[name] for name in row.keys() - timed} for row in it.rows(file)]
            for it in (run, undisturbed)
        )
        if [row["step"] for row in rows] != [row["step"] for row in wanted]:
            found.append(f"{file} has the steps {[row['step'] for row in rows]}")
        elif rows != wanted:
            step = next(row["step"] for row, other in zip(rows, wanted, strict=True) if row != other)
            found.append(f"{file} has other numbers from step {step} on")
    return found


def soak(workdir: pathlib.Path, minutes: float, seed: int, only: int | None) -> Tally:
    """Runs until the time is used up.

    Args:
      workdir: for the runs; those with a mismatch stay there.
      seed: of all faults. only: the number of the one run to do, to repeat it; None: from 1 on.
    """
    began, tally, cache = time.monotonic(), Tally(), workdir / "compiled"
    end = began + 60 * minutes
    options = {"processes": PROCESSES, "devices": DEVICES, "overrides": OVERRIDES}
    shutil.rmtree(workdir / "undisturbed", ignore_errors=True)
    undisturbed = Run(workdir / "undisturbed", cache, **options).finish()
    print(f"undisturbed: {time.monotonic() - began:.1f} s for {2 * STEPS} steps", flush=True)
    for number in itertools.count(1) if only is None else [only]:
        if time.monotonic() > end:
            break
        run, wrong = Run(workdir / f"run-{number}", cache, **options), len(tally.mismatches)
        shutil.rmtree(run.workdir, ignore_errors=True)
        draw = random.Random(f"{seed}, {number}")
        Disturbed(number, run, undisturbed, draw, tally, end).finish()
        tally.runs += 1
        if len(tally.mismatches) == wrong:
            shutil.rmtree(run.workdir)
        else:
            print(f"run {number} with --seed={seed} went wrong: {run.workdir}", flush=True)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.drills.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=pathlib.Path, help="default: a new temporary directory")
    parser.add_argument("--run", type=int, metavar="NUMBER", help="this one alone, to repeat it")
    args = parser.parse_args()
    workdir = args.workdir or pathlib.Path(tempfile.mkdtemp(prefix="a3-soak-"))
    began = time.monotonic()
    tally = soak(workdir, args.minutes, args.seed, args.run)
    summary = vars(tally) | {"seed": args.seed, "seconds": round(time.monotonic() - began)}
    print(json.dumps(summary | {"mismatches": len(tally.mismatches)}, indent=2))
    for number, what in tally.mismatches:
        print(f"--seed={args.seed} --run={number}: {what}")
    if not tally.mismatches and args.workdir is None:
        shutil.rmtree(workdir)
    return 1 if tally.mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
