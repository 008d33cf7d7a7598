"""A model on two machines: it answers, a cut link ends in a clear error within seconds, a mended one brings it back."""

from __future__ import annotations

import json
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from machines import Network, Program, make_network

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models

from octavo_engine.text.byte_alphabet import CHAR_OF_BYTE

NOTICE_SECONDS = 10.0
BACK_SECONDS = 180.0  # most of it starts processes, on a machine that may be busy
MAX_LEN = 8192
NOTICED = "cannot be reached at"
OCTAVO = [sys.executable, "-c", "from octavo_server.cli import main; main()"]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama that two ranks can share, with a long context."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(7)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=131, num_key_value_heads=2, max_position_embeddings=MAX_LEN, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {char: token_id for token_id, char in enumerate([*CHAR_OF_BYTE.values()][:131])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    with make_network(tmp_path) as network:
        yield network


class Client:
    """Talks to a server, whichever machine it is on: a Unix socket reaches into every namespace.

    Args:
        path: of the socket.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.http = httpx2.Client(transport=httpx2.HTTPTransport(uds=str(path)), base_url="http://octavo", timeout=60)

    def tokens(self, num_tokens: int, seconds: float = 20) -> str:
        """Return the text of so many tokens."""
        response = self.http.post("/v1/completions", json=body(num_tokens), timeout=seconds)
        response.raise_for_status()
        answer = response.json()
        assert answer["usage"]["completion_tokens"] == num_tokens
        return answer["choices"][0]["text"]

    def await_tokens(self, num_tokens: int, seconds: float) -> str:
        """Ask again and again until there is an answer."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self._accepts():
                with suppress(httpx2.HTTPError):
                    return self.tokens(num_tokens)
            time.sleep(0.2)
        raise AssertionError(f"no answer within {seconds} s")

    def await_waiting(self, num_requests: int) -> None:
        """Wait until so many requests wait for others to end."""
        name = "octavo_num_requests_waiting "
        until = time.monotonic() + 10
        while not any(
            line.startswith(name) and float(line.split()[1]) == num_requests
            for line in self.http.get("/metrics").text.splitlines()
        ):
            assert time.monotonic() < until, "nobody waits"
            time.sleep(0.05)

    def _accepts(self) -> bool:
        """Return whether somebody listens; httpx2 leaves a socket open where nobody does."""
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self._path)) == 0

    @contextmanager
    def stream(self, num_tokens: int) -> Iterator[Iterator[dict[str, Any]]]:
        """Stream so many tokens: the events as they come."""
        with self.http.stream("POST", "/v1/completions", json={**body(num_tokens), "stream": True}) as response:
            assert response.status_code == 200
            lines = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
            yield (json.loads(line) for line in lines if line != "[DONE]")


def body(num_tokens: int) -> dict[str, Any]:
    """Return a request for so many tokens."""
    prompt = {"model": "tiny", "prompt": [5, 6, 7, 8]}
    return {**prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    client = Client(tmp_path / "octavo.sock")
    with client.http:
        yield client


def torchrun(network: Network, model: Path, uds: Path) -> list[Program]:
    """Start a rank on each machine, as docs/parallel.md does; the second takes no part in serving."""
    endpoint = f"{network.machines[0].address}:29517"
    programs = []
    for index, machine in enumerate(network.machines):
        agent = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
        agent += ["--rdzv-conf", f"is_host={int(index == 0)}", "--local-addr", machine.address]
        agent += ["--max-restarts", "9", "--no-python"]
        programs.append(machine.start([*TORCHRUN, *agent, *OCTAVO, "serve", str(model), *serving(uds)]))
    return programs


def ray(network: Network, model: Path, uds: Path, folder: Path) -> list[Program]:
    """Start a node of a Ray cluster on each machine, kept running as a service would be, and a server on the first."""
    head, other = network.machines
    address = f"{head.address}:6379"
    common = ["--num-cpus", "1", "--object-store-memory", "80000000", "--disable-usage-stats", "--block"]
    first = ["--head", "--port", "6379", "--include-dashboard", "false", "--temp-dir", str(folder)]
    programs = []
    for machine, arguments in ((head, first), (other, ["--address", address])):
        start = [*RAY, "start", "--node-ip-address", machine.address, *arguments, *common]
        programs.append(machine.start(["sh", "-c", f"while true; do {shlex.join(start)}; sleep 1; done"]))
        programs[-1].await_output("Ray runtime started", BACK_SECONDS)
    options = ["--executor", "ray", "--ray-address", address, "--ray-placement", "strict_spread"]
    programs.append(head.start([*OCTAVO, "serve", str(model), *options, *serving(uds)]))
    return programs


def serving(uds: Path) -> list[str]:
    """Return the options of every server here."""
    options = ["--tensor-parallel-size", "2", "--uds", str(uds), "--served-model-name", "tiny", "--threads", "1"]
    return [*options, "--num-blocks", "600", "--max-num-seqs", "1", "--state-dir", ":memory:"]


PULSE = """
import socket, sys, time
from octavo_engine.parallel.pulse import Pulse
host, seconds = sys.argv[1], float(sys.argv[3])
if sys.argv[2] == "listen":
    with socket.create_server((host, 5117)) as listening:
        print("listening", flush=True)
        connection, _ = listening.accept()
else:
    connection = socket.create_connection((host, 5117))
Pulse({1: connection}, seconds, lambda loss: print(loss.error(), flush=True))
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["drop", "down"])
def test_both_ends_notice_a_cut_link_and_survive_a_short_one(network: Network, how: str) -> None:
    if network.why_not:
        pytest.skip(f"no link can be cut: {network.why_not}")
    here, there = network.machines
    command = [sys.executable, "-c", PULSE, here.address]
    ends = [here.start([*command, "listen", "2.5"])]
    ends[0].await_output("listening", 20)
    ends.append(there.start([*command, "connect", "2.5"]))
    for end in ends:
        end.await_output("ready", 20)
    network.cut(how)
    time.sleep(0.8)
    network.restore(how)
    time.sleep(2.5)
    assert not any(NOTICED in end.output for end in ends)
    network.cut(how)
    for end in ends:
        end.await_output(NOTICED, 5)


@pytest.mark.slow
def test_torchrun_serves_from_two_machines(network: Network, model: Path, tmp_path: Path, client: Client) -> None:
    if network.why_not:
        print(f"loopback addresses instead of machines: {network.why_not}")
    torchrun(network, model, tmp_path / "octavo.sock")
    assert len(client.await_tokens(20, BACK_SECONDS)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["drop", "down"])
def test_a_cut_link_ends_in_an_error_and_torchrun_brings_the_service_back(
    network: Network, model: Path, tmp_path: Path, client: Client, how: str
) -> None:
    if network.why_not:
        pytest.skip(f"no link can be cut: {network.why_not}")
    server, _ = torchrun(network, model, tmp_path / "octavo.sock")
    expected = client.await_tokens(40, BACK_SECONDS)
    cut_in_an_answer(network, client, how)
    await_service(network, client, how, expected)
    cut_when_idle(network, server, how)
    await_service(network, client, how, expected)


def cut_in_an_answer(network: Network, client: Client, how: str) -> None:
    """Cut the link in the middle of an answer, which ends in an error."""
    with client.stream(MAX_LEN - 100) as events:
        assert "error" not in next(events)
        cut_at = time.monotonic()
        network.cut(how)
        (error,) = [event["error"] for event in events if "error" in event]
    check_noticed(cut_at, error)


def check_noticed(cut_at: float, error: dict[str, Any]) -> None:
    """Check the error of a request that ran when the link was cut, and when it came."""
    noticed = time.monotonic() - cut_at
    print(f"noticed after {noticed:.1f} s: {error}")
    assert noticed < NOTICE_SECONDS
    assert error["code"] == "request_lost"


def cut_when_idle(network: Network, server: Program, how: str) -> None:
    """Cut the link while there is nothing to do, which the log says."""
    num_before = server.output.count(NOTICED)
    network.cut(how)
    server.await_output(NOTICED, NOTICE_SECONDS, count=num_before + 1)


def await_service(network: Network, client: Client, how: str, expected: str) -> None:
    """Restore the link; the service comes back by itself."""
    network.restore(how)
    restored_at = time.monotonic()
    assert client.await_tokens(40, BACK_SECONDS) == expected
    print(f"back after {time.monotonic() - restored_at:.1f} s")


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose name leaves room for those of Ray's sockets, which the system bounds."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["drop", "down"])
def test_ray_serves_from_two_machines_and_mends_itself(
    network: Network, model: Path, tmp_path: Path, short_folder: Path, client: Client, how: str
) -> None:
    """What runs when the link is cut ends in an error, what waits has its answer when the link is back."""
    pytest.importorskip("ray")
    *_, server = ray(network, model, tmp_path / "octavo.sock", short_folder)
    expected = client.await_tokens(40, BACK_SECONDS)
    if network.why_not:
        pytest.skip(f"it serves from two loopback addresses, and no link can be cut: {network.why_not}")
    with ThreadPoolExecutor(1) as pool:
        with client.stream(MAX_LEN - 100) as events:
            assert "error" not in next(events)
            waiting = pool.submit(client.tokens, 40, BACK_SECONDS)
            client.await_waiting(1)
            network.cut(how)
            cut_at = time.monotonic()
            (error,) = [event["error"] for event in events if "error" in event]
        check_noticed(cut_at, error)
        assert not waiting.done()
        network.restore(how)
        assert waiting.result() == expected
    cut_when_idle(network, server, how)
    await_service(network, client, how, expected)
