"""MoNNA's connections: what peers may do, one thing after the other."""

import contextlib
import socket
import struct
import threading
import time
from dataclasses import replace

import monna_for_tests as helpers
import pytest
import torch
import torch.distributed as dist
from references_for_tests import assert_same, normal

from polyak.optim import MoNNA
from polyak.optim.monna import Peers, mixer
from polyak.optim.monna.peers import HEADER, HELLO, MAGIC, TYPES, _message
from polyak.optim.monna.transport import Patience

CLOSE = 1e-12
# Whoever waits for this without need does not end: no test asks how long something took.
LONG = 3000.0


def at_once(*calls):
    """The results of calls made at the same time; the first exception is raised."""
    results, errors = [None] * len(calls), []

    def call(i):
        try:
            results[i] = calls[i]()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(calls))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]
    return results


@pytest.fixture
def mesh():
    """Makes Peers of some ranks in this process, and raw sockets in the place of the others."""
    made = []

    def make(size, *, raw=()):
        store = dist.HashStore()
        sockets = {}
        for r in raw:  # the highest ranks: they only have to connect
            store.set(f"polyak/monna/{r}", "127.0.0.1 1")

        def intrude():
            for r in raw:
                sockets[r] = {}
                for honest in range(size - len(raw)):
                    store.wait([f"polyak/monna/{honest}"])
                    host, port = store.get(f"polyak/monna/{honest}").decode().split()
                    connection = socket.create_connection((host, int(port)))
                    connection.sendall(HELLO.pack(MAGIC, r, size))
                    sockets[r][honest] = connection

        thread = threading.Thread(target=intrude)
        thread.start()
        peers = helpers.connected(store, size, ranks=range(size - len(raw)))
        thread.join()
        made.extend(peers)
        assert all(p.alive == list(range(size)) for p in peers)
        return (peers, [sockets[r] for r in raw]) if raw else peers

    yield make
    at_once(*(p.close for p in made))


def exchange(peers, value, patience, dtype=torch.float64):
    vectors = [torch.full((7,), float(value + p.rank), dtype=dtype) for p in peers]
    return at_once(*(lambda p=p, v=v: p.exchange(v, patience) for p, v in zip(peers, vectors, strict=True)))


def firsts(received):
    return [None if v is None else v[0].item() for v in received]


@pytest.mark.parametrize("dtype", TYPES)
def test_everyone_gets_everything(mesh, dtype):
    peers, patience = mesh(4), Patience(need=3, everyone=True, timeout=LONG)
    for step in range(20):
        for received in exchange(peers, 4 * step, patience, dtype):
            assert firsts(received) == [4 * step + r for r in range(4)]
            assert all(v.dtype == dtype and v.shape == (7,) for v in received)


def test_large_vectors_and_empty_ones(mesh):
    patience = Patience(need=3, everyone=True, timeout=LONG)
    for count in (1_000_000, 0):
        peers = mesh(3)
        vectors = [normal((count,), r, torch.float32) for r in range(3)]
        for _ in range(2):
            found = at_once(*(lambda p=p, v=v: p.exchange(v, patience) for p, v in zip(peers, vectors, strict=True)))
            for received in found:
                assert_same(received, vectors)


def good(step, count=7, kind=0):
    return HEADER.pack(MAGIC, kind, step, count) + bytes(count * 8)


MALFORMED = {
    "another length": good(0, count=8),
    "an enormous length": HEADER.pack(MAGIC, 0, 0, 2**62),
    "a negative length": HEADER.pack(MAGIC, 0, 0, -7),
    "another type": good(0, kind=1),
    "no such type": good(0, kind=200),
    "a negative step": good(-1),
    "the same step again": good(0) + good(0),
    "noise": b"GET / HTTP/1.1\r\n\r\n" + b"\xff" * 100,
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_message_ends_its_connection_and_nothing_else(mesh, what):
    peers, (bad,) = mesh(5, raw=[4])
    patience = Patience(need=4, everyone=True, timeout=LONG)
    for connection in bad.values():
        connection.sendall(MALFORMED[what])
    for step in range(3):
        for received in exchange(peers, step, patience):
            assert firsts(received)[:4] == [step + r for r in range(4)]
            assert received[4] is None or what == "the same step again"
    assert all(p.alive == [0, 1, 2, 3] and p.late == [4] for p in peers)


def test_a_peer_that_dies_within_a_message_is_not_heard(mesh):
    peers, (bad,) = mesh(5, raw=[4])
    for connection in bad.values():
        connection.sendall(good(0)[:-3])
        connection.close()
    for received in exchange(peers, 0, Patience(need=4, everyone=True, timeout=LONG)):
        assert firsts(received) == [0, 1, 2, 3, None]


def test_silence_costs_one_timeout_and_is_forgiven_when_it_ends(mesh):
    peers, (quiet,) = mesh(5, raw=[4])
    timeout, patience = 3.0, Patience(need=4, everyone=True, timeout=LONG)
    start = time.monotonic()
    for step in range(4):
        for received in exchange(peers, step, patience if step else replace(patience, timeout=timeout)):
            assert firsts(received)[4] is None
        assert time.monotonic() - start >= 0.95 * timeout
    assert all(p.late == [4] and p.alive == [0, 1, 2, 3, 4] for p in peers)
    for connection in quiet.values():
        connection.sendall(good(4))
    while not all(p._peers[4].held for p in peers):
        time.sleep(0.01)
    for received in exchange(peers, 4, patience):
        assert firsts(received) == [4, 5, 6, 7, 0]


def test_silence_to_one_worker_does_not_make_it_late_for_the_others(mesh):
    """n = 7, f = 2: rank 6 answers all but rank 0, which waits for a quarter of the timeout only once the others go on."""
    peers, (sly,) = mesh(7, raw=[6])
    patience = Patience(need=5, everyone=True, timeout=24.0)
    for rank, connection in sly.items():
        if rank != 0:
            for step in range(4):
                connection.sendall(good(step))

    def steps(p):
        for step in range(4):
            received = p.exchange(torch.full((7,), float(step), dtype=torch.float64), patience)
            assert all(v is not None for v in received[:6])
            assert (received[6] is None) == (p.rank == 0)

    start = time.monotonic()
    at_once(*(lambda p=p: steps(p) for p in peers))
    assert time.monotonic() - start < patience.timeout
    assert peers[0].late == [6]
    assert all(p.late == [] for p in peers[1:])


def test_not_waiting_for_the_slowest(mesh):
    """Three of four go on while the fourth does nothing; it hears the others of its own step, or where they are."""
    *fast, slow = mesh(4)
    patience = Patience(need=3, everyone=False, timeout=LONG)

    def step(p):
        return firsts(p.exchange(torch.full((7,), float(p.step), dtype=torch.float64), patience))

    def three(p):
        return [step(p) for _ in range(3)]

    rows = [
        *at_once(*(lambda p=p: three(p) for p in fast)),
        [step(slow)],
        *at_once(*(lambda p=p: three(p) for p in fast)),
    ]
    assert [p.step for p in fast] == [6, 6, 6]
    rows.append([])
    while slow.step < 6:
        rows[-1].append(step(slow))
    assert all(sum(v is not None for v in row) >= 3 for part in rows for row in part)
    assert all(v is None or v >= row[3] for part in (rows[3], rows[-1]) for row in part for v in row)


def test_who_lags_skips_to_where_the_others_are(mesh):
    peers = mesh(4)
    patience = Patience(need=3, everyone=False, timeout=LONG)
    large = torch.zeros(500_000)  # thirty are more than the sockets' buffers: the oldest of what waits is discarded

    def steps(p, count):
        for _ in range(count):
            p.exchange(large.clone(), patience)

    at_once(*(lambda p=p: steps(p, 30) for p in peers[:3]))
    assert [p.step for p in peers[:3]] == [30, 30, 30]
    assert all(len(q.out) <= 4 for p in peers[:3] for q in p._peers.values())
    assert all(len(q.held) <= 2 for q in peers[3]._peers.values())
    taken = 0
    while peers[3].step < 30:
        peers[3].exchange(large.clone(), patience)
        taken += 1
    assert taken < 25


def test_a_flood_is_not_taken_in(mesh):
    peers, (bad,) = mesh(4, raw=[3])
    exchange(peers, 0, Patience(need=3, everyone=False, timeout=LONG))
    sent = 0
    for connection in bad.values():
        connection.settimeout(0.3)
        with contextlib.suppress(OSError):
            for step in range(100_000):
                connection.sendall(good(step) * 1)
                sent += 1
    assert all(len(p._peers[3].held) <= 2 for p in peers)
    for step in range(1, 4):
        for received in exchange(peers, step, Patience(need=3, everyone=True, timeout=20.0)):
            assert firsts(received)[:3] == [step, step + 1, step + 2]


def test_too_few_workers_are_an_error_and_not_a_hang(mesh):
    peers, (one, two) = mesh(5, raw=[3, 4])
    for connection in (*one.values(), *two.values()):
        connection.close()
    with pytest.raises(
        RuntimeError, match=r"only 3 of 5 workers answer at step 0, and 4 are needed: more than 1 are faulty"
    ):
        exchange(peers, 0, Patience(need=4, everyone=True, timeout=LONG))
    silent, _ = mesh(4, raw=[2, 3])
    with pytest.raises(RuntimeError, match="only 2 of 4 workers answer"):
        exchange(silent, 0, Patience(need=3, everyone=True, timeout=1.0))


def test_dead_from_the_start():
    store = dist.HashStore()
    peers = helpers.connected(store, 5, timeout=5.0, ranks=[0, 1, 3])
    assert all(p.alive == [0, 1, 3] and p.late == [2, 4] for p in peers)
    patience = Patience(need=3, everyone=True, timeout=LONG)
    for received in exchange(peers, 0, patience):
        assert firsts(received) == [0, 1, None, 3, None]
    at_once(*(p.close for p in peers))


def test_strangers_are_not_let_in():
    store, size = dist.HashStore(), 3
    listening, came = [], threading.Event()

    def intrude():
        store.wait(["polyak/monna/0"])
        host, port = store.get("polyak/monna/0").decode().split()
        for hello in (
            b"x" * 50,
            HELLO.pack(MAGIC, 0, size),
            HELLO.pack(MAGIC, 7, size),
            HELLO.pack(MAGIC, 1, 4),
            b"plk",
        ):
            connection = socket.create_connection((host, int(port)))
            connection.sendall(hello)
            listening.append(connection)
        came.set()

    peers = []

    def honest():
        came.wait()
        peers.extend(helpers.connected(store, size, ranks=[1, 2]))

    first, *_ = at_once(lambda: helpers.connected(store, size, ranks=[0])[0], intrude, honest)
    for received in exchange([first, *peers], 0, Patience(need=3, everyone=True, timeout=LONG)):
        assert firsts(received) == [0, 1, 2]
    at_once(*(p.close for p in (first, *peers)))


def test_closing_delivers_what_was_sent(mesh):
    peers = mesh(3)
    large = [normal((1_000_000,), r) for r in range(3)]
    patience = Patience(need=3, everyone=True, timeout=LONG)

    def last(p):
        received = [v.clone() for v in p.exchange(large[p.rank], patience)]
        p.close()
        return received

    for received in at_once(*(lambda p=p: last(p) for p in peers)):
        assert_same(received, large)
    with pytest.raises(RuntimeError, match="closed"):
        peers[0].exchange(large[0], patience)


def test_a_server_mixes_for_all(mesh):
    peers, patience = mesh(4), Patience(need=3, everyone=True, timeout=LONG)

    def mix(received):
        return torch.stack([v for v in received if v is not None]).sum(0)

    for step in range(10):
        vectors = [torch.full((7,), float(step + r)) for r in range(4)]
        found = at_once(*(lambda p=p, v=vectors: p.serve(v[p.rank], patience, 2, mix) for p in peers))
        assert_same(found, [torch.full((7,), 4.0 * step + 6)] * 4)
    peers[2].close()
    with pytest.raises(RuntimeError, match="the server, rank 2, does not answer at step 10"):
        peers[0].serve(torch.zeros(7), patience, 2, mix)


def test_bad_connections(mesh):
    with pytest.raises(ValueError, match="rank and size must be given with a store"):
        Peers.connect(dist.HashStore())
    with pytest.raises(ValueError, match="rank must be at most 2, got 3"):
        Peers.connect(dist.HashStore(), 3, 3, host="127.0.0.1")
    with pytest.raises(ValueError, match="timeout must be > 0"):
        Peers.connect(dist.HashStore(), 0, 1, host="127.0.0.1", timeout=0.0)
    peers, patience = mesh(2), Patience(need=2, everyone=True, timeout=LONG)
    exchange(peers, 0, patience)
    with pytest.raises(ValueError, match="all vectors must be alike"):
        peers[0].exchange(torch.zeros(8, dtype=torch.float64), patience)
    with pytest.raises(ValueError, match="a vector"):
        peers[0].exchange(torch.zeros(2, 2), patience)


@pytest.mark.parametrize("server", [None, 1])
@pytest.mark.parametrize("rule", ["nna", "trimmed_mean", mixer("self_centered_clip", tau=0.5)])
def test_optimizers_over_peers_are_the_loop_written_out(mesh, rule, server):
    peers, c = mesh(4), normal((4, 6), 0)
    params = [torch.nn.Parameter(torch.zeros(6, dtype=torch.float64)) for _ in range(4)]
    made = mixer(rule)

    def train(p):
        x = params[p.rank]
        optimizer = MoNNA([x], lr=0.25, momentum=0.5, f=1, mixer=rule, group=p, server=server, timeout=LONG)
        for _ in range(8):
            x.grad = x.detach() - c[p.rank]
            optimizer.step()

    at_once(*(lambda p=p: train(p) for p in peers))
    x, m = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(4, 6, dtype=torch.float64)
    for _ in range(8):
        m = 0.5 * m + 0.5 * (x - c)
        half = x - 0.25 * m
        mixed = [
            made.mix(half[i], [half[j] for j in range(4) if j != i or not made.centred], 1)
            for i in ([server] * 4 if server is not None else range(4))
        ]
        x = torch.stack(mixed)
    assert_same(params, x, atol=CLOSE)


def test_the_header_has_no_gaps():
    assert HEADER.size == 4 + 1 + 8 + 8
    header, body = _message(3, torch.ones(2))
    assert bytes(header) == struct.pack("!4sBqq", b"plk1", 1, 3, 2)
    assert bytes(body) == struct.pack("=2f", 1.0, 1.0)
