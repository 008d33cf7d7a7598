"""A model on two machines: it answers, a cut link ends in a clear error within seconds, a mended one brings it back."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterator
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
BACK_SECONDS = 60.0
MAX_LEN = 8192
OCTAVO = [sys.executable, "-c", "from octavo_server.cli import main; main()"]
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

    def tokens(self, num_tokens: int) -> str:
        """Return the text of so many tokens."""
        response = self.http.post("/v1/completions", json=body(num_tokens), timeout=20)
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
        options = ["--tensor-parallel-size", "2", "--uds", str(uds), "--served-model-name", "tiny", "--threads", "1"]
        options += ["--num-blocks", "600", "--state-dir", ":memory:"]
        programs.append(machine.start([*TORCHRUN, *agent, *OCTAVO, "serve", str(model), *options]))
    return programs


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
    torchrun(network, model, tmp_path / "octavo.sock")
    expected = client.await_tokens(40, BACK_SECONDS)
    cut_and_restore(network, client, how)
    restored_at = time.monotonic()
    assert client.await_tokens(40, BACK_SECONDS) == expected
    print(f"back after {time.monotonic() - restored_at:.1f} s")


def cut_and_restore(network: Network, client: Client, how: str) -> None:
    """Cut the link in the middle of an answer, which ends in an error, and restore it."""
    with client.stream(MAX_LEN - 100) as events:
        assert "error" not in next(events)
        cut_at = time.monotonic()
        network.cut(how)
        (error,) = [event["error"] for event in events if "error" in event]
    noticed = time.monotonic() - cut_at
    print(f"noticed after {noticed:.1f} s: {error}")
    assert noticed < NOTICE_SECONDS
    assert error["code"] == "request_lost"
    network.restore(how)
