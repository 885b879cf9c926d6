"""Whether the other processes of a run are still there, told by the kernels of their machines.

Each process holds a connection to process 0, which ends when a process does, whatever ended it. Without it
a process that waits for the others outside of a collective hears by the heartbeat alone, after a minute; so
it still does where a whole host is gone, which ends no connection.
"""

import contextlib
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable

import jax

from a3_jax.checkpoints.agreement import agree
from a3_jax.errors import EXIT_PREEMPTED, InputError, RunError
from a3_jax.training.processes import PeerLost, coordinator_host, leave
from a3_jax.training.watchdog import briefly

GRACE_SECONDS = 5.0  # in which a process may find the loss out by itself, with more to say of it
_CONNECT_SECONDS = 30.0
_GOODBYE = b"."
_TOKEN_BYTES = 16
_GREETING_BYTES = 2 * _TOKEN_BYTES + 8  # the token and the number of a process
# A connection that says nothing for ten minutes is forgotten by the firewalls of a cloud's network.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 120, "TCP_KEEPINTVL": 30, "TCP_KEEPCNT": 4}


class Presence(contextlib.AbstractContextManager):
    """Ends this process (status 75) once another one is gone without a goodbye; a context manager.

    Its end says goodbye. A run of one process has nobody to lose.
    """

    def __init__(self, before_leaving: Callable[[BaseException], None]):
        """`before_leaving` is called with a `PeerLost`, in a thread; it isn't waited for longer than 2 s."""
        self._before_leaving = before_leaving
        self._peers: dict[int, socket.socket] = {}
        self._is_over = False

    def __enter__(self) -> "Presence":
        """Connects; every process of the run must come here."""
        if jax.process_count() == 1:
            return self
        first, token = jax.process_index() == 0, secrets.token_hex(_TOKEN_BYTES)
        listener = _listen() if first else None
        port = listener.getsockname()[1] if listener else 0
        port, token = agree("presence", [port, token], lambda every: every[0])
        problem = None
        try:
            self._peers = _accept(listener, token) if listener else {0: _connect(port, token)}
        except OSError as error:
            problem = f"process {jax.process_index()}: {error}"
        problem = agree("connected", problem, lambda problems: next(filter(None, problems), None))
        if problem:  # between none, lest one that has a connection takes its end for a loss
            self._peers = {}
            if first:
                print(f"warning: lost processes will be noticed late: {problem}", file=sys.stderr)
        else:
            threading.Thread(target=self._watch, name="a3 presence", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._say_goodbye()

    def last_word(self, error: BaseException | None) -> None:
        """Says goodbye where the others leave for the same reason: then this process is no loss to them."""
        told_to_stop = isinstance(error, RunError) and error.status == EXIT_PREEMPTED
        if isinstance(error, InputError) or (told_to_stop and not isinstance(error, PeerLost)):
            self._say_goodbye()

    def _say_goodbye(self):
        self._is_over = True
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(_GOODBYE)

    def _watch(self):
        with selectors.DefaultSelector() as selector:
            for process, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, process)
            while selector.get_map():
                for key, _ in selector.select():
                    selector.unregister(key.fileobj)
                    if _is_gone(key.fileobj):
                        self._leave_after(key.data)

    def _leave_after(self, process):
        time.sleep(GRACE_SECONDS)
        lost = PeerLost(EXIT_PREEMPTED, f"process {process} is gone")
        if not self._is_over:
            print(f"a3: {lost}", file=sys.stderr, flush=True)
            briefly(2.0, lambda: self._before_leaving(lost))
        leave(EXIT_PREEMPTED)


def _is_gone(peer) -> bool:
    try:
        return peer.recv(1) != _GOODBYE
    except OSError:
        return True


def _listen() -> socket.socket:
    host = coordinator_host()
    try:
        return socket.create_server((host, 0))
    except OSError:  # a name that other hosts alone know this one by
        return socket.create_server(("", 0))


def _accept(listener, token) -> dict[int, socket.socket]:
    """The connections of all other processes; what doesn't know the token is none of them."""
    peers: dict[int, socket.socket] = {}
    end = time.monotonic() + _CONNECT_SECONDS
    with listener:
        while len(peers) < jax.process_count() - 1:
            listener.settimeout(max(0.1, end - time.monotonic()))
            connection, _ = listener.accept()
            connection.settimeout(max(0.1, end - time.monotonic()))
            greeting = b""
            with contextlib.suppress(OSError):
                greeting = connection.recv(_GREETING_BYTES, socket.MSG_WAITALL)
            if secrets.compare_digest(greeting[: len(token)], token.encode()):
                peers[int(greeting[len(token) :])] = _lasting(connection)
            else:
                connection.close()
    return peers


def _connect(port, token) -> socket.socket:
    connection = socket.create_connection((coordinator_host(), port), timeout=_CONNECT_SECONDS)
    connection.sendall(f"{token}{jax.process_index():8d}".encode())
    return _lasting(connection)


def _lasting(connection) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEP_ALIVE.items():
        if hasattr(socket, option):  # on Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return connection
