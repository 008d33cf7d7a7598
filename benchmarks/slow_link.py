"""SlowLink: two network namespaces of this machine, and a link between them that delays every packet.

It stands for two machines. The link is made of two TUN devices, whose packets a thread of this process passes on when
they are due, as many at once as there are. It takes root.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import selectors
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
DEVICE = "octavo0"
_MTU = 65_000
_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000


class SlowLink:
    """A link between two namespaces, while `slow_link` is open.

    Attributes:
        names: of the namespaces, for `ip netns exec`; they have `ADDRESSES`, at the interface `DEVICE`.
        delay: seconds that a packet takes, either way; may be changed at any time.
    """

    def __init__(self, names: tuple[str, str]) -> None:
        self.names = names
        self.delay = 0.0
        self._devices = [_open_device(name) for name in names]
        self._on_their_way: list[deque[tuple[float, bytes]]] = [deque(), deque()]  # due, packet; to either device
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="slow-link", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, and the link with it."""
        self._ends = True
        self._thread.join()
        for device in self._devices:
            os.close(device)

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        for index, device in enumerate(self._devices):
            selector.register(device, selectors.EVENT_READ, 1 - index)
        while not self._ends:
            due = min((queue[0][0] for queue in self._on_their_way if queue), default=time.monotonic() + 0.1)
            for key, _ in selector.select(max(0.0, due - time.monotonic())):
                self._on_their_way[key.data].append((time.monotonic() + self.delay, os.read(key.fd, _MTU + 100)))
            for device, queue in zip(self._devices, self._on_their_way, strict=True):
                while queue and queue[0][0] <= time.monotonic():
                    with contextlib.suppress(OSError):  # the other end is not up yet: a packet that is lost
                        os.write(device, queue.popleft()[1])


@contextlib.contextmanager
def slow_link() -> Iterator[SlowLink]:
    """Make two namespaces and the link; both are gone when this ends."""
    first, second = (f"octavo-{os.getpid()}-{index}" for index in range(2))
    names = (first, second)
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        link = SlowLink(names)
        try:
            for name, address in zip(names, ADDRESSES, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
                _ip("-n", name, "link", "set", DEVICE, "mtu", str(_MTU), "up")
            yield link
        finally:
            link.close()
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _open_device(namespace: str) -> int:
    """Make a TUN device in a namespace; return what its packets are read from and written to."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/thread-self/ns/net").open() as here, Path("/run/netns", namespace).open() as there:
        try:
            _enter(libc, there.fileno())
            device = os.open("/dev/net/tun", os.O_RDWR)
            fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
        finally:
            _enter(libc, here.fileno())
    return device


def _enter(libc: ctypes.CDLL, namespace: int) -> None:
    if libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
