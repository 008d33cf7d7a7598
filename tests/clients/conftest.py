"""One `octavo serve` with the demo model for the clients of others, each of which runs in an environment of its own.

The clients are strangers to each other: they ask for different versions of the same packages. `nox -s clients` makes
an environment for each and names the program that serves in OCTAVO_PROGRAM; without it nothing here is collected.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from urllib.error import URLError
from urllib.request import urlopen

import pytest

START_SECONDS = 120
OPTIONS = ("--max-model-len", "2048", "--kv-cache-gib", "0.25", "--log-level", "warning")

collect_ignore_glob = [] if "OCTAVO_PROGRAM" in os.environ else ["test_*.py"]


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server, without `/v1`."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    command = [os.environ["OCTAVO_PROGRAM"], "serve", "--port", str(port), "--served-model-name", "smollm2", *OPTIONS]
    with subprocess.Popen(command, cwd=tmp_path_factory.mktemp("server")) as process:
        try:
            _wait_until_ready(f"http://127.0.0.1:{port}", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended with exit code {process.returncode}"
        try:
            urlopen(f"{url}/ready").close()
            return
        except URLError:
            time.sleep(0.1)
    pytest.fail(f"the server was not ready after {START_SECONDS} s")
