"""SIGTERM as a request to save and leave."""

import contextlib
import signal
import socket
import sys
import threading
from collections.abc import Callable

from a3_jax.errors import EXIT_PREEMPTED
from a3_jax.runtime.distributed import leave
from a3_jax.runtime.watchdog import briefly


class StopRequest(contextlib.AbstractContextManager):
    """True once this process was told to stop; a context manager that listens for SIGTERM.

    The first SIGTERM is a request: the run saves at the end of its step and leaves. If a restart would lose
    nothing (`anything_to_save` is false: opening, restoring, compiling), the process leaves at once, as it
    does at the second SIGTERM. A thread receives the signals, so that this also works while the main thread
    is inside a compiler or waits for a device.

    Attributes:
      anything_to_save: set by the training loop once a step has begun.
      received: number of SIGTERMs so far.
    """

    def __init__(self, before_leaving: Callable[[], None] = lambda: None):
        """`before_leaving` is called, in the thread, before this process leaves at once."""
        self.anything_to_save, self.received = False, 0
        self._before_leaving = before_leaving
        self._ours, self._systems = socket.socketpair()
        self._listens = False

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # no other thread may listen for signals
            self._systems.setblocking(False)
            self._wakeup = signal.set_wakeup_fd(self._systems.fileno(), warn_on_full_buffer=False)
            self._handler = signal.signal(signal.SIGTERM, lambda *_: None)  # second, so that none is lost
            threading.Thread(target=self._listen, name="a3 stop request", daemon=True).start()
            self._listens = True
        return self

    def __exit__(self, *_):
        if self._listens:
            signal.signal(signal.SIGTERM, self._handler)
            signal.set_wakeup_fd(self._wakeup)
            self._listens = False
        self._systems.close()  # ends the thread, if there is one

    def __bool__(self):
        return self.received > 0

    def _listen(self):
        while received := self._ours.recv(64):
            terms = received.count(signal.SIGTERM)
            if not terms:
                continue
            self.received += terms
            if self.received > 1 or not self.anything_to_save:
                why = "a second time, at once" if self.received > 1 else "with nothing new to save"
                print(f"a3: stopped by SIGTERM {why}", file=sys.stderr)
                briefly(5.0, self._before_leaving)
                leave(EXIT_PREEMPTED)
            print("a3: SIGTERM: saving after this step, then leaving", file=sys.stderr)
        self._ours.close()
