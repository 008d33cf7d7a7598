"""Standby: whether an engine takes requests, and how its model leaves memory, comes back, or makes way for another."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from octavo_engine.errors import EngineAsleep, EngineInUse, InvalidRequest
from octavo_engine.scheduler import Scheduler

SleepMode = Literal["wait", "abort"]
"""What becomes of requests that run: they are waited for, or ended."""

Part = Literal["weights", "kv_cache"]
"""What an engine that sleeps has let go of; vLLM's words for the tags of `wake_up`."""

PARTS: tuple[Part, ...] = ("weights", "kv_cache")
LEVELS = (1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """What sleeping, waking or other weights have done to the memory of this process, or of its GPU.

    Attributes:
        sleep_level: of the engine now; 0 is awake.
        weights_digest: of the weights, configuration and tokenizer that it serves, or served before it slept.
        bytes_before: memory in use before, as the system counts it: resident pages on a CPU, what the driver has given
            out on a GPU. None where the system does not tell.
        bytes_after: the same afterwards.
        seconds: what it took.
    """

    sleep_level: int
    weights_digest: str
    bytes_before: int | None
    bytes_after: int | None
    seconds: float

    @property
    def freed_bytes(self) -> int | None:
        """Bytes that were given back; negative if they were taken."""
        if self.bytes_before is None or self.bytes_after is None:
            return None
        return self.bytes_before - self.bytes_after


class Measurement(NamedTuple):
    """The memory in use at some time, in seconds of the monotonic clock."""

    num_bytes: int | None
    time: float


@dataclass(frozen=True, slots=True, eq=False)
class Closing:
    """An operation that keeps requests out; `why` ends a sentence that begins with the engine."""

    why: str


class Weights(Protocol):
    """Weights in memory that may be served; `digest` stands for them and the tokenizer, `root` for their cached KV."""

    @property
    def digest(self) -> bytes:
        """32 bytes that are others when the files are."""
        ...

    @property
    def root(self) -> bytes:
        """What the hashes of the prefix cache begin with."""
        ...


WeightsT = TypeVar("WeightsT", bound=Weights)


class ModelHost(Protocol[WeightsT]):
    """Holds what a model takes in memory."""

    @property
    def weights(self) -> WeightsT | None:
        """The weights that are there."""
        ...

    def load(self, model: str | None, digest: bytes | None) -> WeightsT:
        """Read weights beside those that are there; from any thread.

        Args:
            model: the files; None for those that were read last.
            digest: what they must still be; None takes whatever is there now.

        Raises:
            IncompatibleWeights: they are of another model, or have another digest.
            ModelNotFound, CorruptModelFile, UnsupportedModel: they cannot be read.
        """
        ...

    def use(self, weights: WeightsT) -> None:
        """Run on these weights from now on, if the KV cache is there."""
        ...

    def allocate(self) -> None:
        """Take memory for the KV cache, if there is none, and run if there are weights."""
        ...

    def drop(self) -> None:
        """Let go of the weights and the KV cache, so that their memory is the system's again."""
        ...

    def bytes_in_use(self) -> int | None:
        """Return the memory in use, as the system counts it; None if it does not tell."""
        ...


class Standby:
    """Where an engine stands between awake and asleep; only the thread that steps the engine writes it.

    Level 1 is for serving the same model again: waking it restores what it had, and refuses files that are others by
    now. Level 2 gives the weights up: waking it takes what the files hold then. What is freed is the same, for weights
    come from files in either case. No cached prefix survives, nor a pin; kept answers keep their tokens.

    Args:
        scheduler: of the engine, which must be idle whenever the model changes.
        host: holds the model; None for an engine whose model cannot be put aside.

    Attributes:
        level: 0 if the engine is awake, else the level of its sleep.
    """

    def __init__(self, scheduler: Scheduler, host: ModelHost[Any] | None) -> None:
        self._scheduler = scheduler
        self._host = host
        self._missing: set[Part] = set()
        self._closing: Closing | None = None
        self._digest = b"" if host is None or host.weights is None else host.weights.digest
        self.level = 0

    @property
    def weights_digest(self) -> str:
        """The digest of the weights that are served, or were before the engine slept, in hexadecimal."""
        return self._digest.hex()

    def check(self) -> None:
        """Return if requests are taken; raise EngineAsleep with what to do if not."""
        if self._closing is not None:
            raise EngineAsleep(f"the engine {self._closing.why} and takes no requests meanwhile; try again in a moment")
        if self.level:
            missing = " and ".join(part for part in PARTS if part in self._missing)
            raise EngineAsleep(
                f"the engine sleeps (level {self.level}, without its {missing}); wake it by wake_up, or POST /wake_up, "
                "and send the request again"
            )

    def close(self, closing: Closing, *, only_if_idle: bool) -> None:
        """Take no more requests until `open`.

        Raises:
            EngineInUse: requests run or wait, if there must be none; or the engine is closed already.
        """
        self._model_host()
        if self._closing is not None:
            raise EngineInUse(f"the engine {self._closing.why}; try again when that has ended")
        if only_if_idle and self._scheduler.has_work:
            raise EngineInUse(
                f"{self._scheduler.num_running} sequences run and {self._scheduler.num_waiting} wait; try again when "
                'they have ended, or give mode "wait" or "abort"'
            )
        self._closing = closing

    def open(self, closing: Closing) -> None:
        """Take requests again, if it was this that kept them out and the engine does not sleep."""
        if self._closing is closing:
            self._closing = None

    def measure(self) -> Measurement:
        """Note the memory in use and the time, before a change; from any thread."""
        return Measurement(self._model_host().bytes_in_use(), time.monotonic())

    def report(self, before: Measurement) -> MemoryReport:
        """Return what has changed since."""
        return MemoryReport(
            sleep_level=self.level,
            weights_digest=self.weights_digest,
            bytes_before=before.num_bytes,
            bytes_after=self._model_host().bytes_in_use(),
            seconds=time.monotonic() - before.time,
        )

    def sleep(self, level: int) -> None:
        """Let go of weights and KV cache; an engine that sleeps can only sleep deeper."""
        assert not self._scheduler.has_work
        self._scheduler.forget_content()
        self._model_host().drop()
        self._missing = set(PARTS)
        self.level = max(self.level, level)

    def read_weights(self, model: str | None = None) -> Weights:
        """Read the weights of files, or those that `wake` needs; from any thread, and nothing else changes.

        Raises:
            IncompatibleWeights: they do not fit this engine, or are others than those that a sleep of level 1 promises.
            ModelNotFound, CorruptModelFile, UnsupportedModel: they cannot be read.
        """
        promised = self._digest if model is None and self.level == 1 else None
        weights: Weights = self._model_host().load(model, promised)
        return weights

    def needs(self, parts: Iterable[str] | None) -> set[Part]:
        """Return what of some parts, or of all, an engine that sleeps is without.

        Raises:
            InvalidRequest: there is no such part.
        """
        wanted = set(PARTS if parts is None else parts)
        if unknown := wanted.difference(PARTS):
            raise InvalidRequest(f"tags are {' and '.join(PARTS)}, got {min(unknown)[:40]!r}", param="tags")
        return self._missing & wanted

    def wake(self, parts: set[Part], weights: Weights | None) -> None:
        """Take parts into memory again; the engine is awake when none is missing."""
        if weights is not None:
            self.replace(weights)
        if "kv_cache" in parts:
            self._model_host().allocate()
            self._missing.discard("kv_cache")
        if not self._missing:
            self.level = 0

    def replace(self, weights: Weights) -> None:
        """Serve other weights from now on, or, while the engine sleeps, when it is woken."""
        assert not self._scheduler.has_work
        self._model_host().use(weights)
        self._digest = weights.digest
        self._missing.discard("weights")
        self._scheduler.forget_content(weights.root)

    def _model_host(self) -> ModelHost[Any]:
        if self._host is None:
            raise InvalidRequest("this engine cannot put its model aside; it was made without a host for it")
        return self._host


def check_level(level: int) -> None:
    """Refuse a level of sleep that there is not.

    Raises:
        InvalidRequest: names those there are.
    """
    if level not in LEVELS:
        raise InvalidRequest(
            f"level must be 1 (the same model is served again) or 2 (the weights are given up), got {level}",
            param="level",
        )
