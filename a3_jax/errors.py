"""What can go wrong, and the exit status that says so."""

import difflib

EXIT_OK = 0
EXIT_FAILED = 1  # the run itself failed
EXIT_BAD_INPUT = 2  # bad input or usage: one line on standard error
EXIT_DOES_NOT_FIT = 3  # preflight: the run won't fit the chips
EXIT_PREEMPTED = 75  # preempted, or a peer was lost: start again
EXIT_HUNG = 76  # no step ended in time: start again
EXIT_STORAGE = 77  # saving failed: start again
EXIT_NO_PROGRESS = 78  # several restarts without a new step
EXIT_NUMERICS = 79  # the loss is no number any more


class InputError(Exception):
    """Something the user gave can't be used.

    Attributes:
      message: what is wrong, with the offending value.
      file, line, field: where, as far as it is known (`line` counts from 1).
    """

    def __init__(self, message, *, file=None, line=None, field=None):
        super().__init__(message)
        self.message, self.file, self.line, self.field = message, file, line, field

    def __str__(self):
        where = "" if self.file is None else str(self.file)
        if self.line is not None:
            where += f":{self.line}" if where else f"line {self.line}"
        parts = [where, "" if self.field is None else str(self.field), self.message]
        return " ".join(": ".join(part for part in parts if part).split())


class DamagedCheckpoint(InputError):
    """A checkpoint whose bytes are not those that were written.

    Attributes:
      step: the run's step; None outside of a run, or if it isn't known.
      leaf: `params/...` or `train/...`; None if a file is meant.
    """

    def __init__(self, message, *, file, leaf: str | None = None, step: int | None = None):
        super().__init__(message, file=file, field=leaf)
        self.leaf, self.step = leaf, step


class RunError(Exception):
    """A run that ends with a status of its own, without a traceback: what happened is no fault of the code.

    Attributes:
      status: one of the exit statuses above.
      message: what happened, in one line.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


def nearest(name, choices) -> str:
    """`; did you mean 'x'?` for the choice that looks most like `name`, or an empty string."""
    match = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
