"""Pulses notice who ends, who is out of reach and who hangs, and take nobody that is only busy for one of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue

import pytest

pytest.importorskip("torch", reason="engines need the extra octavo-engine[local]")

import torch
from torch._C._distributed_c10d import TCPStore

from octavo_engine import WorkerLost
from octavo_engine.errors import RankUnreachable
from octavo_engine.parallel import pulse as module
from octavo_engine.parallel.group import Group
from octavo_engine.parallel.guard import Guard
from octavo_engine.parallel.meeting import meet
from octavo_engine.parallel.pulse import Loss, Pulse
from octavo_engine.parallel.rendezvous import Rendezvous

Losses = SimpleQueue[Loss]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a connection over TCP."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        near = socket.create_connection(listening.getsockname())
        far, _ = listening.accept()
    with near, far:
        yield near, far


def test_a_rank_that_closes_its_connection_is_lost_at_once(ends: tuple[socket.socket, socket.socket]) -> None:
    losses: Losses = SimpleQueue()
    pulse = Pulse({3: ends[0]}, 6, losses.put)
    assert ends[1].recv(1) == b"."
    ends[1].close()
    loss = losses.get(timeout=2)
    assert (loss.rank, loss.is_unreachable) == (3, False)
    assert str(loss.error()) == "rank 3 has closed its connection (127.0.0.1): its process ends"
    pulse.close(says_farewell=False)
    assert losses.empty()


def test_a_rank_that_says_farewell_is_not_missed(ends: tuple[socket.socket, socket.socket]) -> None:
    losses: Losses = SimpleQueue()
    here, there = (Pulse({rank: end}, 1, losses.put) for rank, end in enumerate(ends))
    there.close(says_farewell=True)
    time.sleep(0.3)
    here.close(says_farewell=True)
    assert losses.empty()


def test_a_rank_that_says_nothing_hangs_only_once_beats_are_expected(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    losses: Losses = SimpleQueue()
    pulse = Pulse({1: ends[0]}, 0.2, losses.put)
    with pytest.raises(Empty):
        losses.get(timeout=0.6)
    pulse.expect_beats(0.3)
    loss = losses.get(timeout=2)
    assert not loss.is_unreachable
    assert "can be reached: its process hangs" in loss.how
    pulse.close(says_farewell=False)


def test_whoever_was_held_up_itself_accuses_nobody(ends: tuple[socket.socket, socket.socket]) -> None:
    """After a pause of this process, what the other one sent meanwhile is read before it is judged."""
    pause, losses = [0.0], SimpleQueue[Loss]()
    pulse = Pulse({1: ends[0]}, 0.2, losses.put, clock=lambda: time.monotonic() + pause[0])
    pulse.expect_beats(0.7)
    time.sleep(0.1)
    pause[0] = 100.0
    with pytest.raises(Empty):
        losses.get(timeout=0.4)
    assert "says nothing for 1 s" in losses.get(timeout=2).how  # it has been silent since, too
    pulse.close(says_farewell=False)


BUSY = """
import json, socket, sys, threading
from octavo_engine.parallel.pulse import Pulse
connection = socket.create_connection(json.loads(sys.argv[1]))
pulse = Pulse({0: connection}, 1.0, lambda loss: print(loss, flush=True))
print("ready", flush=True)
sys.setswitchinterval(1e6)  # whoever computes keeps the interpreter's lock
while True:
    sum(range(10**6))
"""


def test_a_process_that_is_busy_or_stopped_can_be_reached() -> None:
    """The kernel acknowledges for a process that does not let its own threads run, and for one that is stopped."""
    losses: Losses = SimpleQueue()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        paths = os.pathsep.join(path for path in sys.path if path)
        command = [sys.executable, "-c", BUSY, json.dumps(listening.getsockname())]
        other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths})
        assert other.stdout is not None
        with other.stdout:
            try:
                connection, _ = listening.accept()
                pulse = Pulse({1: connection}, 1.0, losses.put)
                assert other.stdout.readline() == "ready\n"
                with pytest.raises(Empty):
                    losses.get(timeout=2.5)
                os.kill(other.pid, signal.SIGSTOP)
                with pytest.raises(Empty):
                    losses.get(timeout=2.5)
            finally:
                other.kill()
                other.wait()
    assert "its process ends" in losses.get(timeout=2).how
    pulse.close(says_farewell=False)


@pytest.fixture
def rendezvous() -> Rendezvous:
    """That of rank 0."""
    return Rendezvous("127.0.0.1", 0, serves=True, seconds=5)


def test_all_ranks_meet_each_other_and_no_strangers(rendezvous: Rendezvous) -> None:
    heard: SimpleQueue[tuple[int, Loss]] = SimpleQueue()
    pulses: dict[int, Pulse] = {}

    def join(rank: int) -> None:
        own = rendezvous if rank == 0 else Rendezvous(*rendezvous.address, serves=False, seconds=5)
        pulses[rank] = meet(own, rank, 3, lambda loss: heard.put((rank, loss)), seconds=1, wait=5)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    spy = Rendezvous(*rendezvous.address, serves=False, seconds=5)
    at = tuple(json.loads(spy.take("pulse/0")))
    strangers = [socket.create_connection(at) for _ in range(2)]
    strangers[0].sendall(f"{'0' * 32} 2".ljust(64).encode())  # another key
    strangers[1].sendall(b"GET / HTTP/1.1\r\n\r\n".ljust(63) + b"\xff")
    assert strangers[0].recv(1) == strangers[1].recv(1) == b""
    for stranger in strangers:
        stranger.close()
    join(2)
    for thread in threads:
        thread.join(5)
    pulses[1].close(says_farewell=False)
    assert {heard.get(timeout=2)[0], heard.get(timeout=2)[0]} == {0, 2}
    for rank in (0, 2):
        pulses[rank].close(says_farewell=True)


def test_a_rank_that_does_not_connect_or_cannot_be_reached_is_named(rendezvous: Rendezvous) -> None:
    with pytest.raises(WorkerLost, match="rank 1 did not connect in time"):
        meet(rendezvous, 0, 2, lambda loss: None, seconds=1, wait=0.2)
    with pytest.raises(WorkerLost, match=r"rank 1 cannot reach rank 0 at 127\.0\.0\.1 port \d+: .*GLOO_SOCKET_IFNAME"):
        meet(rendezvous, 1, 2, lambda loss: None, seconds=1, wait=0.2)


def test_a_guard_tells_the_cause_and_not_what_came_of_it() -> None:
    cuts: list[None] = []
    guard = Guard(0, lambda: cuts.append(None))
    guard._take(Loss(2, "has closed its connection", False))
    guard._take(Loss(1, "cannot be reached", True))
    with pytest.raises(RankUnreachable, match="rank 1 cannot be reached"):
        guard.check()
    assert len(cuts) == 2
    assert isinstance(guard.reason(WorkerLost("Connection closed by peer")), RankUnreachable)
    assert isinstance(guard.reason(MemoryError()), MemoryError)


def test_beats_are_fewer_than_the_timeout_allows(ends: tuple[socket.socket, socket.socket]) -> None:
    """A timeout below some beats would count a single lost packet."""
    pulse = Pulse({1: ends[0]}, 2.0, lambda loss: None)
    assert pulse._beat_seconds == 0.5
    assert module.BEAT_SECONDS == 1.0
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        assert ends[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 2000
    pulse.close(says_farewell=False)


def test_what_waits_for_other_ranks_fails_when_it_is_cut() -> None:
    """In whatever thread, however patient, and without a word from the others."""
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    groups = [Group(rank, 2) for rank in range(2)]

    def connect(rank: int) -> None:
        own = TCPStore("127.0.0.1", store.port, None, False, wait_for_workers=False)
        groups[rank].connect(own, torch.device("cpu"), seconds=30, message_seconds=30, host="127.0.0.1")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(connect, range(2)))
        waiting = pool.submit(groups[1].broadcast, torch.zeros(1), patient=True)
        receiving = pool.submit(groups[0].receive, torch.zeros(1), 1)
        time.sleep(0.2)
        assert not waiting.done()
        for group in groups:
            group.cut()
        for future in (waiting, receiving):
            with pytest.raises(WorkerLost, match="a rank has ended or does not answer"):
                future.result(5)
    with pytest.raises(WorkerLost):
        groups[0].sum(torch.zeros(1))
    for group in groups:
        group.disconnect()
