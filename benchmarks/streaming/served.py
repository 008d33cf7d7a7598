"""Servers for the streaming benchmark, in this process: the real model, or a fake one that keeps a pace."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from octavo_engine import AsyncEngine, EngineConfig
from octavo_engine.api import EngineInfo
from octavo_engine.batch import ModelOutput, ScheduledBatch
from octavo_engine.engine import Engine
from octavo_engine.scheduler import Scheduler
from octavo_engine.text.processor import TextProcessor
from octavo_engine.types import SequenceUpdate
from octavo_kvcache import CacheManager
from octavo_server import ServerSettings, create_app
from octavo_server.loading import load_engine
from octavo_server.serving import listen, make_server

READER = Path(__file__).with_name("reader.py")
MAX_MODEL_LEN = 2048


@dataclass(frozen=True, slots=True)
class _Step:
    output: ModelOutput
    due: float

    def result(self) -> ModelOutput:
        time.sleep(max(self.due - time.monotonic(), 0.0))
        return self.output


@dataclass(slots=True)
class PacedExecutor:
    """Says the same token to every row, a step every `seconds`, without a model or memory."""

    seconds: float
    token_id: int
    max_in_flight: int = 1
    _due: float = 0.0

    def submit(self, batch: ScheduledBatch) -> _Step:
        """Return an answer that is there when the next step is due."""
        now = time.monotonic()
        self._due = self._due + self.seconds if now < self._due + self.seconds else now + self.seconds
        rows = (*batch.new, *batch.cached)
        token_ids = tuple((self.token_id,) if row.samples else () for row in rows)
        return _Step(ModelOutput(token_ids=token_ids), self._due)

    def close(self) -> None:
        """Hold nothing."""


@dataclass
class StepClock:
    """When each step of an engine ended, with the number of tokens that it brought; stands in for its `step`."""

    engine: Engine
    ends: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._step = self.engine.step
        self.engine.step = self.step  # type: ignore[method-assign]

    def step(self) -> list[SequenceUpdate]:
        updates = self._step()
        self.ends.append((time.monotonic(), len(updates)))
        return updates

    def intervals(self, num_rows: int) -> list[float]:
        """Return the seconds between steps that brought so many rows a token, and forget all steps."""
        ends, self.ends = self.ends, []
        pairs = pairwise(ends)
        return [later - earlier for (earlier, before), (later, after) in pairs if before == after == num_rows]


def real_engine(**options: Any) -> AsyncEngine:
    """Load the demo model as `octavo serve` does: later collections of garbage pass over what is there now."""
    config = EngineConfig(max_model_len=MAX_MODEL_LEN, **options)
    return load_engine(config, Console(stderr=True, quiet=True))


def paced_engine(text: TextProcessor, info: EngineInfo, *, tokens_per_s: float, num_streams: int) -> AsyncEngine:
    """Make an engine without a model that brings every stream so many tokens a second, with another's text side."""
    scheduler = Scheduler(
        CacheManager(num_streams * MAX_MODEL_LEN // 16 + 1, 16),
        max_num_seqs=num_streams,
        max_num_batched_tokens=1024,
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=[],
    )
    (token_id,) = text.encode_prompt(" the", add_special_tokens=False)
    return AsyncEngine(Engine(scheduler, PacedExecutor(1 / tokens_per_s, token_id)), text, info)


@contextmanager
def served(engine: AsyncEngine) -> Iterator[int]:
    """Serve an engine as `octavo serve` does, in a thread; yield the port."""
    with listen("127.0.0.1", 0) as listening:
        server = make_server(create_app(engine, ServerSettings()))
        gc.freeze()  # as `octavo serve` does
        server.capture_signals = nullcontext  # type: ignore[method-assign, assignment]  # a thread takes no signals
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def read_streams(
    port: int, body: dict[str, Any], *, num_streams: int, stagger: float, rest: float = 0.0
) -> dict[str, Any]:
    """Run the reader in a process of its own; return what it saw."""
    plan: dict[str, Any] = {"port": port, "path": "/v1/completions", "body": body}
    plan |= {"num_streams": num_streams, "stagger": stagger, "rest": rest}
    done = subprocess.run(
        [sys.executable, "-S", str(READER)], input=json.dumps(plan), capture_output=True, text=True, check=True
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
