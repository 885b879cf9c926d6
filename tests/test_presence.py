"""A lost process is noticed by the end of its connection, one that says goodbye is no loss."""

import socket
import threading

import jax
import pytest

from a3_jax.errors import EXIT_FAILED, EXIT_PREEMPTED, InputError, RunError
from a3_jax.training import presence
from a3_jax.training.processes import PeerLost


@pytest.fixture
def watched(monkeypatch):
    """(a presence that watches a peer, the peer's end, what it told, `() -> (it ended, its statuses)`)."""
    told, left, ended = [], [], threading.Event()
    monkeypatch.setattr(presence, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(presence, "leave", left.append)
    ours, theirs = socket.socketpair()
    one = presence.Presence(told.append)
    one._peers = {1: ours}

    def watch():
        one._watch()
        ended.set()

    threading.Thread(target=watch, daemon=True).start()
    yield one, theirs, told, lambda: (ended.wait(10), list(left))
    theirs.close()
    ours.close()


def test_a_connection_that_ends_is_a_loss(watched):
    _, peer, told, ended = watched
    peer.close()
    assert ended() == (True, [EXIT_PREEMPTED])
    assert isinstance(told[0], PeerLost) and "process 1 is gone" in str(told[0])


def test_goodbye_is_no_loss(watched):
    _, peer, told, ended = watched
    presence.Presence._say_goodbye(_with_peer(peer))
    peer.close()
    assert ended() == (True, []) and not told


@pytest.mark.parametrize(
    ("error", "says_goodbye"),
    [
        (RunError(EXIT_PREEMPTED, "told to stop"), True),
        (InputError("they differ"), True),
        (PeerLost(EXIT_PREEMPTED, "another is gone"), False),
        (RunError(EXIT_FAILED, "alone"), False),
        (RuntimeError("alone"), False),
        (None, False),
    ],
)
def test_who_leaves_for_a_reason_that_all_have_says_so(error, says_goodbye):
    ours, theirs = socket.socketpair()
    _with_peer(ours).last_word(error)
    ours.close()
    assert theirs.recv(1) == (b"." if says_goodbye else b"")
    theirs.close()


def test_who_does_not_know_the_token_is_none_of_the_run(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(presence, "coordinator_host", lambda: "127.0.0.1")
    listener = presence._listen()
    port = listener.getsockname()[1]
    stranger = socket.create_connection(("127.0.0.1", port))
    stranger.sendall(b"x" * 40)
    process_1 = presence._connect(port, "0" * 32)
    peers = presence._accept(listener, "0" * 32)
    assert list(peers) == [1]
    process_1.sendall(b"!")
    assert peers[1].recv(1) == b"!" and peers[1].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    for connection in (stranger, process_1, peers[1]):
        connection.close()


def _with_peer(connection):
    one = presence.Presence(lambda _: None)
    one._peers = {0: connection}
    return one
