"""The checkpoints of a training run, written in the background by orbax, from the devices."""

import contextlib
import dataclasses
import itertools
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from a3_jax.checkpoints.a3_format import (
    Meta,
    handlers,
    is_finished_step,
    latest_step,
    list_steps,
    make_manifest,
    named_leaves,
    portable,
    save_items,
    step_directories,
    with_manifest,
    without_numpy_scalars,
)
from a3_jax.checkpoints.fingerprint import start_fingerprints
from a3_jax.checkpoints.manifest import (
    MANIFEST_FILE,
    PARAMS,
    TRAIN,
    DamagedCheckpoint,
    File,
    list_files,
    raise_damage,
    read_checksums,
    read_manifest,
    write_manifest,
)
from a3_jax.checkpoints.stored_arrays import (
    check_same_dtypes,
    check_same_tree,
    one_line,
    restore_items,
    shape_and_dtype,
)
from a3_jax.errors import EXIT_STORAGE, InputError, RunError
from a3_jax.paths import absolute
from a3_jax.runtime.coordination import TIMEOUT_SECONDS, barrier, gather_and_decide, run_on_process_zero
from a3_jax.tokenizer import Tokenizer


class SaveFailed(Exception):
    """A step that could not be written; it does not exist."""


class StepWriter:
    """The checkpoints of a training run: `directory/STEP/`, written in the background, kept by a limit.

    A step is written in place and begins to exist with its manifest. Every process of the run makes the
    same calls. A context manager that waits at its end.
    """

    def __init__(
        self,
        directory,
        keep: int | None = None,
        on_event: Callable[..., None] | None = None,
        may_write: Callable[[], None] = lambda: None,
    ):
        """Opens (and makes) a run's `checkpoints` directory.

        Args:
          directory: what an interrupted writer left there is cleared away by the next save.
          keep: how many steps stay; None: all.
          on_event: called in process 0 with a name and fields: "saved" (step, seconds, bytes) and
            "save_failed" (step, problem), both from a background thread; "damaged" (step, problem).
          may_write: called in process 0 right before a step comes to exist or goes; an `InputError` says no.
        """
        self.directory = absolute(directory)
        if self.directory.exists() and not self.directory.is_dir():
            raise InputError("exists and is a file, checkpoints are to be written there", file=self.directory)
        if jax.process_index() == 0:
            _make_directory(self.directory)
        logging.getLogger("absl").addFilter(_is_news)
        self._keep, self._on_event = keep, on_event or (lambda *_, **__: None)
        self._may_write, self._warned = may_write, False
        self._writes: list[Any] = []
        self._checkpointer = ocp.AsyncCheckpointer(
            _remember_writes(ocp.CompositeCheckpointHandler(handler_registry=handlers()), self._writes),
            async_options=ocp.AsyncOptions(timeout_secs=TIMEOUT_SECONDS, barrier_sync_fn=self._barrier),
            temporary_path_class=ocp.path.atomicity.CommitFileTemporaryPath,
        )
        self._barriers = 0
        self._thread: threading.Thread | None = None
        self._failure: SaveFailed | None = None

    def save(self, step: int, params, train_state, meta: Meta, tokenizer: Tokenizer | None = None) -> bool:
        """Begins to write a step; returns when the arrays may be reused, not when they are on disk.

        Args:
          step: a number; what an interrupted writer left of it is removed.
          params: the parameter tree.
          train_state: any tree of arrays and numbers: optimiser state, counters.
          meta: its `step` is set to `step`.

        Returns:
          False where that step is there already: nothing is written.

        Raises:
          SaveFailed: the *previous* save failed, and nobody has asked for that yet.
        """
        started = time.monotonic()
        self.wait()  # one save at a time, and its failure must not be lost
        step_directory = self.directory / str(step)
        if self._run_on_process_zero("save", lambda: _make_room(step_directory)):
            return False
        described, sums, problem = {}, {}, None
        self._barriers = 0
        self._writes.clear()
        try:
            params, train_state = portable(params), portable(train_state)
            leaves = named_leaves(params, train_state)
            described = {name: shape_and_dtype(leaf) for name, leaf in leaves.items()}
            sums = start_fingerprints(leaves)  # before the next step may take the arrays
            args = save_items(params, dataclasses.replace(meta, step=step), tokenizer, train_state)
            self._checkpointer.save(step_directory, args=args)
        except Exception as error:  # what fails at once is reported like what fails later
            problem = error
        arguments = (step, started, described, sums, problem)
        self._thread = threading.Thread(target=self._finish, args=arguments, name="a3_save")
        self._thread.start()
        return True

    def failure(self) -> SaveFailed | None:
        """Returns the failure of the last save, once: as soon as it is known, without waiting for it."""
        failure, self._failure = self._failure, None
        return failure

    def wait(self) -> None:
        """Returns when all is on disk.

        Raises:
          SaveFailed: the last save failed, and `failure` has not said so yet. That step does not exist.
        """
        self._join()
        failure = self.failure()
        if failure is not None:
            raise failure

    def latest_step(self) -> int | None:
        """Returns the newest finished step, or None. A step that is still being written doesn't count."""
        return latest_step(self.directory)

    def restore(self, step: int, params, train_state):
        """Reads the parameters and training state of a step.

        Args:
          step: one that exists.
          params, train_state: the trees that `save` was given, of arrays or `ShapeDtypeStruct`s;
            shapes, dtypes and shardings of the result are theirs.

        Returns:
          (params, train_state)

        Raises:
          DamagedCheckpoint: the step is not what was written.
          InputError: the step is absent, or its tree, shapes or dtypes are others.
        """
        step_directory = self.directory / str(step)
        if not step_directory.is_dir():
            raise InputError("no checkpoint", file=step_directory)
        wanted = {PARAMS: without_numpy_scalars(params), TRAIN: without_numpy_scalars(train_state)}

        def targets(manifest):
            for item, tree in wanted.items():
                check_same_tree(manifest.item(item), tree, step_directory / item)
                check_same_dtypes(manifest.item(item), tree, step_directory / item)
            return wanted

        restored = restore_items(step_directory, targets, alone=False)
        return restored[PARAMS], restored[TRAIN]

    def restore_newest(self, params, train_state, at_most: int | None = None):
        """Reads the newest step that is intact, as `restore` does.

        Damaged steps that are newer than it are renamed `STEP.damaged` and reported. If no step
        is intact all stay where they are: a run that began anew would hide what was lost.

        Args:
          at_most: newer steps are passed over.

        Returns:
          (step, params, train_state), None where there is no step.

        Raises:
          DamagedCheckpoint: of the newest step, if all are damaged.
          InputError: tree, shapes or dtypes are others.
        """
        self._join()
        damages = []
        for step in run_on_process_zero("steps", lambda: with_manifest(self.directory)):
            if at_most is not None and step > at_most:
                continue
            try:
                restored = self.restore(step, params, train_state)
            except DamagedCheckpoint as damage:
                damages.append((step, damage))
                continue
            self._run_on_process_zero("aside", lambda: [self._set_aside(*damaged) for damaged in damages])
            return step, *restored
        if damages:
            raise damages[0][1]
        return None

    def discard_after(self, step: int) -> None:
        """Removes the steps after one that the run goes back to, so that they can be saved again."""
        self._join()

        def discard():
            for newer in step_directories(self.directory):
                if newer > step:
                    _remove(self.directory / str(newer))

        self._run_on_process_zero("discard", discard)

    def close(self) -> None:
        """Waits, then ends the background threads."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run_on_process_zero(self, what: str, action: Callable[[], Any]) -> Any:
        """Runs `action`, which changes the directory, in process 0."""

        def checked():
            self._may_write()
            return action()

        return run_on_process_zero(what, checked)

    def _barrier(self, **_) -> None:
        """Waits for all processes; orbax calls it twice per save, after writing and after finalising."""
        self._barriers += 1
        barrier("barrier")

    def _finish(self, step, started, described, sums, problem) -> None:
        """Waits for orbax in the background; then process 0 writes the manifest, if all is well."""
        step_directory, files = self.directory / str(step), {}
        try:
            if problem is None:
                self._checkpointer.wait_until_finished()
                share = list_files(step_directory)[jax.process_index() :: jax.process_count()]
                files = read_checksums(step_directory, share)
        except Exception as error:
            problem = error
        try:
            while self._barriers < 2:  # others wait there
                self._barrier()
            for write in self._writes if problem else ():  # nothing may go on writing
                with contextlib.suppress(Exception):
                    write.result()
            mine = {
                "problem": [not isinstance(problem, OSError), one_line(problem)] if problem else None,
                "files": {name: dataclasses.astuple(file) for name, file in files.items()},
            }
            failure = gather_and_decide(
                "saved", mine, lambda all_: self._commit(step, started, described, sums, all_)
            )
        except Exception as error:  # another process is gone
            problem, failure = error, one_line(error)
        if failure is not None:
            self._failure = SaveFailed(f"step {step} could not be saved: {failure}")
            self._failure.__cause__ = problem

    def _commit(self, step, started, described, sums, reports) -> str | None:
        """Makes the step exist and removes old ones, in process 0; returns what went wrong, storage first."""
        step_directory, finished = self.directory / str(step), False
        try:
            _, problem = min((one["problem"] for one in reports if one["problem"]), default=(False, None))
            if problem is None:
                files = {name: File(*file) for one in reports for name, file in one["files"].items()}
                files |= read_checksums(step_directory, set(list_files(step_directory)) - files.keys())
                self._may_write()  # last: checksums take a while
                write_manifest(step_directory, make_manifest(files, described, sums))
                finished = True
                size = sum(file.bytes for file in files.values())
                self._tell("saved", step=step, seconds=time.monotonic() - started, bytes=size)
                self._prune()
        except Exception as error:
            problem = one_line(error)
        if problem is not None:
            with contextlib.suppress(Exception):
                self._may_write()  # or else neither the directory nor the events are ours
                self._tell("save_failed", step=step, problem=problem)
                if not finished:
                    step_directory.rmtree()
        return problem

    def _tell(self, name: str, **fields) -> None:
        with contextlib.suppress(Exception):  # a full disk takes no events either
            self._on_event(name, **fields)

    def _prune(self) -> None:
        """Removes what is older than the newest steps, if the newest is intact, and what is unfinished."""
        steps = list_steps(self.directory)
        for step in set(step_directories(self.directory)) - set(with_manifest(self.directory)):
            self._discard(step)
        old = steps[: -self._keep] if self._keep else []
        if old:
            newest = self.directory / str(steps[-1])
            try:
                raise_damage(newest, read_manifest(newest), deep=True)
            except RunError as error:  # of storage: it says nothing of the step, and no step has to go now
                return self._warn(f"no old step is removed: {error}")
        for step in old:
            self._discard(step)

    def _discard(self, step: int) -> None:
        """Removes a step that is no longer needed; that it can't be makes the new one no worse."""
        self._may_write()
        try:
            _remove(self.directory / str(step))
        except Exception as error:  # of storage, which has no common type
            self._warn(f"step {step} can't be removed: {one_line(error)}")

    def _warn(self, message: str) -> None:
        """Prints a warning, the first time."""
        if not self._warned:
            print(f"a3: warning: {message}", file=sys.stderr)
        self._warned = True

    def _set_aside(self, step, damage) -> None:
        names = itertools.chain([f"{step}.damaged"], (f"{step}.damaged-{n}" for n in itertools.count(2)))
        aside = next(path for name in names if not (path := self.directory / name).exists())
        try:
            (self.directory / str(step)).rename(aside)
        except OSError as error:  # left where it is, it would pass for saved later
            problem = f"{damage}; it can't be set aside: {error.strerror or error}"
            raise RunError(EXIT_STORAGE, problem) from error
        print(f"a3: {damage}; an earlier step is used, this one is now {aside.name}", file=sys.stderr)
        self._tell("damaged", step=step, problem=str(damage))


def _remember_writes(handler, writes: list[Any]):
    """Returns `handler`, which now lists the writes of a save: if one fails, orbax forgets the others."""
    begin = handler.async_save

    async def async_save(*args, **kwargs):
        writes[:] = await begin(*args, **kwargs) or []
        return list(writes)

    handler.async_save = async_save
    return handler


def _is_news(record) -> bool:
    """Returns False for orbax's traceback of a failed save, which `SaveFailed` reports."""
    return "in background save thread" not in record.getMessage()


def _make_directory(path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't be made: {error.strerror or error}", file=path) from error


def _make_room(step_directory) -> bool:
    """Returns whether a step exists; whatever else has its place is removed."""
    if is_finished_step(step_directory):
        return True
    if step_directory.exists():
        _remove(step_directory)
    return False


def _remove(step_directory) -> None:
    (step_directory / MANIFEST_FILE).unlink(missing_ok=True)  # no step any more, should the rest fail
    step_directory.rmtree()
