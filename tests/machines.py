"""Machines: two of them as network namespaces with addresses of their own and a link that can be cut.

Namespaces need root on Linux, and `ip`. Where they are not permitted, two loopback addresses of this machine serve:
whatever runs on several machines still runs, but there is no link to cut.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_NUMBERS = itertools.count()
_NOBODY = "02:00:00:00:0f:ff"  # a hardware address that no interface has
_END_SECONDS = 20


@dataclass
class Program:
    """A process on a machine, in a group of its own with whatever it starts; its output is kept in a file."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        """What it has written so far."""
        return self.log.read_text(errors="replace")

    def await_output(self, text: str, seconds: float, *, count: int = 1) -> None:
        """Wait until a text has come so often."""
        until = time.monotonic() + seconds
        while self.output.count(text) < count:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output}"
            assert time.monotonic() < until, f"no {text!r} within {seconds} s:\n{self.output}"
            time.sleep(0.05)

    def end(self) -> None:
        """End it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Machine:
    """A place where programs run, with an address that the other one reaches; `namespace` is empty on loopback."""

    address: str
    namespace: str
    folder: Path
    programs: list[Program] = field(default_factory=list)

    def start(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> Program:
        """Start a program that runs until the test ends it."""
        log = self.folder / f"{Path(command[0]).name}-{self.address}-{len(self.programs)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*self._prefix, *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(environment or {})},
                start_new_session=True,
            )
        self.programs.append(Program(process, log))
        return self.programs[-1]

    @property
    def _prefix(self) -> list[str]:
        return ["ip", "netns", "exec", self.namespace] if self.namespace else []

    def ip(self, *arguments: str) -> None:
        """Change this machine's network."""
        _ip("-n", self.namespace, *arguments)


class Network:
    """Two machines and what is between them.

    Args:
        folder: for the programs' output.
        why_not: why there are no namespaces; empty if there are.
    """

    def __init__(self, folder: Path, why_not: str) -> None:
        self.why_not = why_not
        self._interfaces: list[str] = []
        if why_not:
            self.machines = [Machine(f"127.0.0.{2 + index}", "", folder) for index in range(2)]
            return
        name = f"oct{os.getpid()}x{next(_NUMBERS)}"
        self.machines = [Machine(f"10.123.0.{1 + index}", f"{name}{index}", folder) for index in range(2)]
        self._interfaces = [f"v{machine.namespace}"[-15:] for machine in self.machines]
        for machine in self.machines:
            _ip("netns", "add", machine.namespace)
        _ip("link", "add", self._interfaces[0], "type", "veth", "peer", "name", self._interfaces[1])
        for machine, interface in zip(self.machines, self._interfaces, strict=True):
            _ip("link", "set", interface, "netns", machine.namespace)
            machine.ip("addr", "add", f"{machine.address}/24", "dev", interface)
            machine.ip("link", "set", "lo", "up")
            machine.ip("link", "set", interface, "up")

    def cut(self, how: str) -> None:
        """Cut the link: `down` takes it down at one machine, `drop` loses all packets on the way, unnoticed."""
        if how == "down":
            self.machines[1].ip("link", "set", self._interfaces[1], "down")
            return
        for machine, interface, other in zip(self.machines, self._interfaces, self.machines[::-1], strict=True):
            machine.ip("neigh", "replace", other.address, "lladdr", _NOBODY, "nud", "permanent", "dev", interface)

    def restore(self, how: str) -> None:
        """Undo a cut."""
        if how == "down":
            self.machines[1].ip("link", "set", self._interfaces[1], "up")
            return
        for machine, interface, other in zip(self.machines, self._interfaces, self.machines[::-1], strict=True):
            machine.ip("neigh", "del", other.address, "dev", interface)

    def close(self) -> None:
        """End all programs, then the machines; what they wrote is printed."""
        for machine in self.machines:
            for program in reversed(machine.programs):
                program.end()
                print(f"---- {program.log.name}\n{program.output[-6000:]}")
            if machine.namespace:
                _ip("netns", "delete", machine.namespace)


@contextlib.contextmanager
def make_network(folder: Path) -> Iterator[Network]:
    """Make two machines and end all that runs on them afterwards."""
    network = Network(folder, why_no_namespaces())
    try:
        yield network
    finally:
        network.close()


def why_no_namespaces() -> str:
    """Say why network namespaces cannot be made here; empty if they can."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "network namespaces need Linux and the program ip"
    name = f"oct{os.getpid()}probe"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"network namespaces are not permitted here: {done.stderr.strip()}"
    _ip("netns", "delete", name)
    return ""


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert not done.returncode, f"ip {' '.join(arguments)}: {done.stderr}"
