"""The other side of a hand-over, as nobody should be. A process of its own: it may be killed.

python -m tests.chaos.hostile taker|giver MODE PATH

A taker connects to PATH, a giver listens there; both say "ready" first and end by themselves.
"""

from __future__ import annotations

import array
import os
import secrets
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import Sequence

from fastmesh._ext.engine import STATE_VERSION
from fastmesh.handover import wire

LIFE_S = 25
MOST = 1 << 16


def send(sock: socket.socket, record: wire.Record | bytes, fds: Sequence[int] = ()) -> None:
    data = record if isinstance(record, bytes) else wire.encode(record)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], ancillary)


def receive(sock: socket.socket) -> wire.Record | None:
    """The next record, without its descriptors; None at the end."""
    data, fds, _, _ = socket.recv_fds(sock, MOST, 253)
    for fd in fds:
        os.close(fd)
    return wire.decode(data) if data else None


def wait_for_the_end(sock: socket.socket) -> None:
    try:
        while sock.recv(MOST):
            pass
    except OSError:
        pass


# --- a taker --------------------------------------------------------------------------------------


def hello(**more: object) -> wire.Hello:
    fields: dict[str, object] = {
        "state_versions": wire.state_versions(),
        "build": "hostile",
        "pid": os.getpid(),
        "nonce": secrets.token_hex(wire.NONCE_CHARS // 2),
        "mode": "move",
        "nofile": 1 << 20,
        "threads": 1,
        "stdio": False,
    }
    return wire.Hello(**{**fields, **more})  # type: ignore[arg-type]


def taker(mode: str, path: str) -> None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(path)
    print("ready", flush=True)
    pidfd = os.pidfd_open(os.getpid())
    if mode == "silent":
        pass
    elif mode == "garbage":
        send(sock, secrets.token_bytes(3000))
    elif mode == "no_pidfd":
        with tempfile.TemporaryFile() as file:
            send(sock, hello(), [file.fileno()])
    elif mode == "another_pid":
        # Whoever believed this would kill its own parent.
        send(sock, hello(pid=os.getppid()), [os.pidfd_open(os.getppid())])
    elif mode == "too_many":
        send(sock, hello(), [pidfd] * 200)
    elif mode == "bad_version":
        send(sock, hello(state_versions=(STATE_VERSION + 2, STATE_VERSION + 3)), [pidfd])
    elif mode == "leaves":
        send(sock, hello(), [pidfd])
        receive(sock)
        return
    else:
        send(sock, hello(), [pidfd])
        while not isinstance(receive(sock), wire.Process):
            pass
        send(sock, wire.Prepared())
        if mode == "never_acks":
            # (reads nothing more)
            signal.pause()
        elif mode == "lies":
            send(sock, wire.Acked(7, 5000))
            send(sock, wire.Ready())
        elif mode == "garbage_late":
            receive(sock)
            send(sock, b"{" * 2000)
        else:
            assert mode == "never_commits"
            while not isinstance(record := receive(sock), wire.End):
                if isinstance(record, wire.Conns):
                    send(sock, wire.Acked(record.thread, record.first + record.count))
    wait_for_the_end(sock)


# --- a giver --------------------------------------------------------------------------------------


def giver(mode: str, path: str) -> None:
    door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.umask(0o177)
    door.bind(path)
    door.listen(1)
    print("ready", flush=True)
    sock, _ = door.accept()
    asked = receive(sock)
    assert isinstance(asked, wire.Hello)
    pidfd = os.pidfd_open(os.getpid())
    ack = wire.Ack(
        mode="move",
        state_version=STATE_VERSION,
        build="hostile",
        pid=os.getpid(),
        nonce=asked.nonce,
        connections=1,
        descriptors=1,
        fence=True,
    )
    with tempfile.TemporaryFile() as file, socket.socket() as tcp:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen(1)
        port = tcp.getsockname()[1]
        one = wire.Listener("rpc", "engine", f"127.0.0.1:{port}", None)
        if mode == "silent":
            pass
        elif mode == "garbage":
            send(sock, struct.pack("<I", 0xFFFFFFFF) * 500)
        elif mode == "another_nonce":
            send(
                sock,
                wire.encode(ack).replace(asked.nonce.encode(), b"0" * len(asked.nonce)),
                [pidfd],
            )
        elif mode == "no_pidfd":
            send(sock, ack, [file.fileno()])
        else:
            send(sock, ack, [pidfd])
        if mode == "short":
            send(
                sock, wire.Listeners((one,) * 2, last=True, lock=False, stdio=False), [tcp.fileno()]
            )
        elif mode == "too_many":
            fds = [tcp.fileno()] * 240
            send(sock, wire.Listeners((one,), last=True, lock=False, stdio=False), fds)
        elif mode == "a_file":
            send(sock, wire.Listeners((one,), last=True, lock=False, stdio=False), [file.fileno()])
            send(sock, wire.Process(10, "0" * 64), [file.fileno()])
        elif mode == "forever":
            try:
                while True:
                    record = wire.Listeners((one,), last=False, lock=False, stdio=False)
                    send(sock, record, [tcp.fileno()])
            except OSError:
                return
        elif mode == "stops_there":
            send(sock, wire.Listeners((one,), last=True, lock=False, stdio=False), [tcp.fileno()])
        wait_for_the_end(sock)


if __name__ == "__main__":
    signal.alarm(LIFE_S)
    {"taker": taker, "giver": giver}[sys.argv[1]](sys.argv[2], sys.argv[3])
