"""Connections between workers of whom some may crash, hang or send anything: one TCP connection for each pair.

A thread moves the bytes while the worker computes. What a faulty peer can cost an honest worker:

- a peer whose connection ends, or whose message is not exactly a vector of the expected type and length for a later step
  than its last one, is dropped: from then on it costs nothing;
- a silent peer costs one timeout. It is not waited for again, though used when it is in time. The clock of a step starts
  when n - f vectors are there, and is cut to a quarter once f + 1 peers are a step ahead: somebody honest has gone on. So a
  peer that is silent to a few workers does not make these late for the others (for n > 3 f);
- nobody can fill the memory: two vectors are held for each peer, no further ones are read, and of what a peer does not take
  the oldest is discarded when four are waiting.

A worker that falls behind takes the oldest vector held that is not older than its step, and skips to the step of the
(f + 1)-th peer. Peers are not authenticated and nothing is encrypted: the network has to see to that (a private one, a VPN).
A connection that ended is not made again.
"""

from __future__ import annotations

import atexit
import contextlib
import selectors
import socket
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from polyak.core import checks
from polyak.optim.monna.transport import Lost, Patience, Received

MAGIC = b"plk1"
HELLO = struct.Struct("!4sII")  # magic, rank, size
HEADER = struct.Struct("!4sBqq")  # magic, type, step, elements
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HELD, BACKLOG, CHUNK = 2, 4, 1 << 20
PREFIX = "polyak/monna/"
PAUSE = 0.05  # seconds between two looks for addresses
Find = Callable[[int], tuple[str, int] | None]
LINGER = 5.0  # seconds that close() waits for peers to take what was sent to them


def _bytes(vector: Tensor) -> memoryview:
    return memoryview(vector.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


class _Peer:
    """One connection and what is under way on it."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.out: deque[list[memoryview]] = deque()  # messages, each the parts not yet sent
        self.begun = False  # whether the first has been sent in part
        self.header, self.filled = bytearray(HEADER.size), 0
        self.body: Tensor | None = None
        self.view: memoryview | None = None
        self.step = -1  # of the message that is being received, or was last
        self.held: deque[tuple[int, Tensor]] = deque()
        self.late = False  # was silent for a whole timeout: not waited for any more
        self.gone = False

    @property
    def newest(self) -> int:
        return self.held[-1][0] if self.held else -1


class Peers:
    """A full mesh of TCP connections (see the module's text), made by :meth:`connect`; ``with`` or :meth:`close` ends it.

    Args:
        rank, size: of this worker, and of all. listener: a socket that listens for the workers of higher rank.
        find: rank -> (host, port) where that worker listens, or None as long as this is not known.
        timeout: seconds for all connections to be made; who is not there by then is taken for dead.
    """

    @checks.arguments(
        rank=checks.Integer(0), size=checks.Integer(1), listener=checks.Instance(socket.socket, words="a socket"),
        find=checks.Function("a function of the rank", 1), timeout=checks.positive,
    )  # fmt: skip
    def __init__(self, rank: int, size: int, listener: socket.socket, find: Find, *, timeout: float = 30.0) -> None:
        self.size, self.rank = size, checks.integer("rank", rank, least=0, most=size - 1)
        end = time.monotonic() + timeout
        self.step = 0
        self._expected: tuple[int, int] | None = None  # type and elements
        self._changed = threading.Condition()
        self._free: list[Tensor] = []
        self._used: list[Tensor] = []  # what the last exchange returned
        self._closing = self._closed = False
        self._peers = {r: _Peer(s) for r, s in _mesh(rank, size, listener, find, end).items()}
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="polyak-monna-peers", daemon=True)
        self._thread.start()
        atexit.register(_close, weakref.ref(self))

    @classmethod
    def connect(
        cls,
        store: Any = None,
        rank: int | None = None,
        size: int | None = None,
        *,
        host: str | None = None,
        timeout: float = 30.0,
    ) -> Peers:
        """Find the other workers through a store of torch.distributed, which is not needed afterwards, and connect to them.

        Args:
            store: a ``torch.distributed.Store``; None takes that of ``env://``, as set up by torchrun, with rank and size.
            host: the address under which the others reach this worker; None takes the name of this machine.
            timeout: seconds to wait for all workers; those who are not there by then are taken for dead.

        Raises:
            ValueError: a store without rank and size.
        """
        if store is None:
            store, rank, size = next(iter(dist.rendezvous("env://")))
        if rank is None or size is None:
            raise ValueError(
                f"rank and size must be given with a store, got {checks.shown(rank)} and {checks.shown(size)}"
            )
        listener = socket.create_server((host or "", 0), backlog=2 * size)
        store.set(f"{PREFIX}{rank}", f"{host or socket.gethostname()} {listener.getsockname()[1]}")

        def find(other: int) -> tuple[str, int] | None:
            if not store.check([f"{PREFIX}{other}"]):
                return None
            name, port = store.get(f"{PREFIX}{other}").decode().split(" ")
            return name, int(port)

        return cls(rank, size, listener, find, timeout=timeout)

    def __copy__(self) -> Peers:
        return self  # connections are shared, as a process group is

    def __deepcopy__(self, memo: dict[int, Any]) -> Peers:
        return self

    def __reduce__(self) -> Any:
        return Lost, (self.rank, self.size)

    @property
    def alive(self) -> list[int]:
        """The ranks whose connections stand, one's own among them."""
        with self._changed:
            return sorted([self.rank, *(r for r, p in self._peers.items() if not p.gone)])

    @property
    def late(self) -> list[int]:
        """The ranks that were silent for a whole timeout, or are gone, and are not waited for any more."""
        with self._changed:
            return sorted(
                set(range(self.size)) - {self.rank} - {r for r, p in self._peers.items() if not (p.late or p.gone)}
            )

    # -- exchanges ---------------------------------------------------------------------------------------------------------

    def exchange(self, vector: Tensor, patience: Patience) -> Received:
        """Send a vector (d,) to all and collect theirs; what is returned stays as it is until the next exchange.

        Raises:
            RuntimeError: fewer than ``patience.need`` vectors can come, or came within ``f + 2`` timeouts.
        """
        with self._round(vector) as message:
            self._post(message, self._peers)
            return self._placed(vector, self._collect(patience), self.size - patience.need)

    def serve(self, vector: Tensor, patience: Patience, server: int, mix: Callable[[Received], Tensor]) -> Tensor:
        """Send a vector to one rank, which mixes those of all and sends the result back. Raises as :meth:`exchange`."""
        with self._round(vector) as message:
            if self.rank == server:
                step, faulty = self.step, self.size - patience.need
                result = mix(self._placed(vector, self._collect(patience), faulty))
                self._post(_message(step, result.cpu()), self._peers)
                return result
            self._post(message, [r for r in self._peers if r == server])
            limit = time.monotonic() + (self.size - patience.need + 2) * patience.timeout
            peer = self._peers.get(server)
            while peer is not None and not peer.held and not peer.gone and limit > time.monotonic():
                self._changed.wait(limit - time.monotonic())
            if peer is None or not peer.held:
                raise RuntimeError(f"the server, rank {server}, does not answer at step {self.step}")
            step, result = peer.held[-1]
            self.step = max(self.step, step)
            return result.to(vector.device, copy=True)

    @contextlib.contextmanager
    def _round(self, vector: Tensor) -> Iterator[list[memoryview]]:
        if vector.ndim != 1 or vector.dtype not in TYPES:
            raise ValueError(f"a vector (d,) of one of {TYPES} is needed, got {tuple(vector.shape)}, {vector.dtype}")
        expected = (TYPES.index(vector.dtype), len(vector))
        with self._changed:
            if self._closing:
                raise RuntimeError("these connections are closed")
            if self._expected is None:
                self._expected = expected
            elif expected != self._expected:
                raise ValueError(f"all vectors must be alike: {self._expected} (type, length) before, now {expected}")
            self._free += self._used
            self._used = []
            for peer in self._peers.values():
                self._forget(peer)
            self._wake()  # there is room for more
            try:
                yield _message(self.step, vector.detach().cpu())
            finally:
                self.step += 1
                self._wake()

    def _post(self, message: list[memoryview], ranks: Any) -> None:
        for peer in (self._peers[r] for r in ranks):
            if peer.gone:
                continue
            if len(peer.out) >= BACKLOG:
                del peer.out[1 if peer.begun else 0]
            peer.out.append(list(message))
        self._wake()

    def _collect(self, patience: Patience) -> list[int]:
        """Wait for the others' vectors; returns the ranks of those that are there."""
        faulty = self.size - patience.need
        limit = time.monotonic() + (faulty + 2) * patience.timeout
        deadline = shortened = None
        while True:
            here = [r for r, p in self._peers.items() if p.held]
            missing = [p for p in self._peers.values() if not p.held and not p.gone]
            awaited = [p for p in missing if not p.late]
            now = time.monotonic()
            if len(here) + 1 >= patience.need:
                if not patience.everyone or not awaited:
                    break
                if deadline is None:
                    deadline = now + patience.timeout
                if shortened is None and sum(p.newest > self.step for p in self._peers.values()) > faulty:
                    deadline = shortened = min(deadline, now + patience.timeout / 4)
                if now >= deadline:
                    for peer in awaited:
                        peer.late = True
                    break
            elif (possible := len(here) + 1 + len(missing)) < patience.need or now >= limit:
                raise RuntimeError(
                    f"only {len(here) + 1 if now >= limit else possible} of {self.size} workers answer at step "
                    f"{self.step}, and {patience.need} are needed: more than {faulty} are faulty"
                )
            self._changed.wait((limit if deadline is None else deadline) - now)
        return here

    def _placed(self, vector: Tensor, here: Sequence[int], faulty: int) -> list[Tensor | None]:
        received: list[Tensor | None] = [None] * self.size
        received[self.rank] = vector
        newest = sorted((p.newest for p in self._peers.values()), reverse=True)
        self.step = max([self.step, *(step - 1 for step in newest[faulty : faulty + 1])])
        for r in here:
            held = self._peers[r].held
            received[r] = held[0][1].to(vector.device)
            if held[0][0] <= self.step:  # else it is of a later step, and will be used again
                self._used.append(held.popleft()[1])
        return received

    def _forget(self, peer: _Peer) -> None:
        while peer.held and peer.held[0][0] < self.step:
            self._free.append(peer.held.popleft()[1])

    # -- the thread --------------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            self._waker.send(b"\0")

    def _run(self) -> None:
        while not self._closed:
            with self._changed:
                for peer in self._peers.values():
                    self._watch(peer)
            for key, events in self._selector.select():
                if key.data is None:
                    with contextlib.suppress(BlockingIOError):
                        self._woken.recv(4096)
                    continue
                with self._changed:
                    try:
                        if events & selectors.EVENT_WRITE and not key.data.gone:
                            self._write(key.data)
                        if events & selectors.EVENT_READ and not key.data.gone:
                            self._read(key.data)
                    except BlockingIOError:
                        pass
                    except (OSError, _Malformed):
                        self._drop(key.data)

    def _watch(self, peer: _Peer) -> None:
        """Tell the selector what this connection is waiting for."""
        events = 0
        if not peer.gone:
            room = self._expected is not None and len(peer.held) < HELD
            events = (selectors.EVENT_READ if room or self._closing else 0) | (selectors.EVENT_WRITE if peer.out else 0)
        known = self._selector.get_map().get(peer.socket) if peer.socket.fileno() >= 0 else None
        if known is None:
            if events:
                self._selector.register(peer.socket, events, peer)
        elif not events:
            self._selector.unregister(peer.socket)
        elif events != known.events:
            self._selector.modify(peer.socket, events, peer)

    def _write(self, peer: _Peer) -> None:
        parts = peer.out[0]
        sent = peer.socket.send(parts[0][:CHUNK])
        peer.begun = True
        parts[0] = parts[0][sent:]
        if not parts[0]:
            del parts[0]
        if not parts:
            peer.out.popleft()
            peer.begun = False
            if not peer.out and self._closing:
                peer.socket.shutdown(socket.SHUT_WR)
            self._changed.notify_all()

    def _read(self, peer: _Peer) -> None:
        if (
            self._closing
        ):  # what still comes is of no use, but must be taken: the peer's last data would be lost with a reset
            if not peer.socket.recv(CHUNK):
                self._drop(peer)
            return
        if peer.view is None:
            got = peer.socket.recv_into(memoryview(peer.header)[peer.filled :])
            peer.filled += got
            if not got:
                raise _Malformed
            if peer.filled == HEADER.size:
                self._begin(peer)
            return
        got = peer.socket.recv_into(peer.view[:CHUNK])
        if not got:
            raise _Malformed
        peer.view = peer.view[got:]
        if not peer.view:
            self._finish(peer)

    def _begin(self, peer: _Peer) -> None:
        assert self._expected is not None
        magic, kind, step, count = HEADER.unpack(peer.header)
        if magic != MAGIC or (kind, count) != self._expected or step <= peer.step:
            raise _Malformed
        peer.step, peer.filled = step, 0
        peer.body = self._free.pop() if self._free else torch.empty(count, dtype=TYPES[kind])
        peer.view = _bytes(peer.body)
        if not peer.view:
            self._finish(peer)

    def _finish(self, peer: _Peer) -> None:
        assert peer.body is not None
        peer.held.append((peer.step, peer.body))
        peer.body = peer.view = None
        self._forget(peer)  # if it is too old by now
        self._changed.notify_all()

    def _drop(self, peer: _Peer) -> None:
        peer.gone = True
        peer.out.clear()
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(peer.socket)
        peer.socket.close()
        self._changed.notify_all()

    # -- the end -----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End all connections, once the peers have taken what was sent to them or five seconds have passed."""
        end = time.monotonic() + LINGER
        with self._changed:
            if self._closed:
                return
            self._closing = True
            for peer in self._peers.values():
                if not peer.gone and not peer.out:
                    with contextlib.suppress(OSError):
                        peer.socket.shutdown(socket.SHUT_WR)
            self._wake()
            while any(not p.gone for p in self._peers.values()) and time.monotonic() < end:
                self._changed.wait(end - time.monotonic())
            self._closed = True
            self._wake()
        self._thread.join()
        for peer in self._peers.values():
            peer.socket.close()
        self._selector.close()
        self._waker.close()
        self._woken.close()

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Malformed(Exception):
    """What a peer sent is not a message, or its end."""


def _close(reference: weakref.ref[Peers]) -> None:
    if (peers := reference()) is not None:
        peers.close()


def _message(step: int, vector: Tensor) -> list[memoryview]:
    header = HEADER.pack(MAGIC, TYPES.index(vector.dtype), step, len(vector))
    return [memoryview(header), *([_bytes(vector.contiguous())] if len(vector) else [])]


def _mesh(rank: int, size: int, listener: socket.socket, find: Find, end: float) -> dict[int, socket.socket]:
    """Connect to all lower ranks and be connected to by the higher ones, until ``end``; who is not there is left out."""
    found: dict[int, socket.socket] = {}
    lower, higher = set(range(rank)), set(range(rank + 1, size))
    strangers: dict[socket.socket, bytearray] = {}
    listener.setblocking(False)
    with selectors.DefaultSelector() as selector, listener:
        selector.register(listener, selectors.EVENT_READ)
        while (lower or higher) and (left := end - time.monotonic()) > 0:
            for other in sorted(lower):
                if (address := find(other)) is not None:
                    lower.discard(other)
                    with contextlib.suppress(OSError):  # it listened before its address was known: it is dead
                        found[other] = socket.create_connection(address, timeout=left)
                        found[other].sendall(HELLO.pack(MAGIC, rank, size))
            for key, _ in selector.select(min(left, PAUSE) if lower else left if higher else 0):
                if key.fileobj is listener:
                    with contextlib.suppress(OSError):
                        connection, _ = listener.accept()
                        connection.setblocking(False)
                        strangers[connection] = bytearray()
                        selector.register(connection, selectors.EVENT_READ)
                    continue
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                said, got = strangers[connection], b""
                with contextlib.suppress(OSError):
                    got = connection.recv(HELLO.size - len(said))
                said += got
                if got and len(said) < HELLO.size:
                    continue
                selector.unregister(connection)
                del strangers[connection]
                magic, other, theirs = HELLO.unpack(said) if len(said) == HELLO.size else (b"", -1, 0)
                if magic == MAGIC and theirs == size and other in higher:
                    higher.discard(other)
                    found[other] = connection
                else:
                    connection.close()
    for connection in strangers:
        connection.close()
    for connection in found.values():
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found
