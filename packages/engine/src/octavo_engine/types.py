"""What a caller hands in and gets back: sampling parameters, requests, deltas and outputs.

Everything here is frozen and free of torch, so that a process without a model can validate, send and receive it.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal, NamedTuple

from octavo_engine.errors import InvalidRequest

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
_SEED_MIN, _SEED_MAX = -(1 << 63), (1 << 63) - 1


class FinishReason(StrEnum):
    """Why a sequence ended; the wire's names, plus `abort` and `error`, which never reach an OpenAI client as such."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    Temperature 0 is greedy. With a seed, the tokens depend on the seed, the prompt and the parameters alone; an unset
    seed is drawn at submission. `top_k` 0 (or -1) and `max_tokens` None mean no limit of that kind: `max_tokens` None
    uses the room that is left in the context.

    Raises:
        InvalidRequest: if a value is out of range, not finite, or contradicts another one; names the parameter.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | SequenceABC[str] = ()
    stop_token_ids: SequenceABC[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        self._check_ranges()
        self._check_stops()

    def _check_ranges(self) -> None:
        _check_int("n", self.n, 1, None)
        _check_float("temperature", self.temperature, 0.0, 2.0)
        _check_float("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_int("top_k", self.top_k, 0, None)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 10.0, low_open=True)
        _check_int("seed", self.seed, _SEED_MIN, _SEED_MAX)
        _check_int("max_tokens", self.max_tokens, 1, None)
        _check_int("min_tokens", self.min_tokens, 0, None)
        _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}; lower min_tokens",
                param="min_tokens",
            )

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(
                f"stop has {len(self.stop)} strings, at most {MAX_STOP_STRINGS} are taken", param="stop"
            )
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidRequest(f"stop must hold non-empty strings, got {text!r}", param="stop")
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 0, None)

    @property
    def greedy(self) -> bool:
        """True if the arg-max is taken and no noise is drawn."""
        return self.temperature == 0.0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, whichever form they were given in."""
        return tuple(self.stop)


def _check_int(name: str, value: int | None, low: int, high: int | None) -> None:
    if value is None and name in {"seed", "max_tokens", "logprobs"}:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be an integer, got {value!r}", param=name)
    if value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidRequest(f"{name} must be {expected}, got {value}", param=name)


def _check_float(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequest(f"{name} must be a finite number, got {value!r}", param=name)
    if value < low or value > high or (low_open and value == low):
        expected = f"above {low:g} and at most {high:g}" if low_open else f"between {low:g} and {high:g}"
        raise InvalidRequest(f"{name} must be {expected}, got {value:g}", param=name)


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """A run of token ids in a request's input."""

    token_ids: tuple[int, ...]


Task = Literal["generate", "embed"]
Pooling = Literal["last", "mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One unit of work for the engine, in token ids.

    Lower `priority` runs first. Requests with different `salt` never share cached blocks. `pooling` matters for the
    task `embed` alone. `arrival_time` is in seconds of the monotonic clock. An unset seed is drawn here, so that every
    request can be repeated.
    """

    request_id: str
    inputs: tuple[TokenSpan, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    task: Task = "generate"
    pooling: Pooling = "last"
    priority: int = 0
    salt: bytes = b""
    arrival_time: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.sampling.seed is None:
            object.__setattr__(self, "sampling", replace(self.sampling, seed=secrets.randbits(63)))

    @property
    def seed(self) -> int:
        """The seed of the request's noise: the caller's, or the one drawn at submission."""
        assert self.sampling.seed is not None
        return self.sampling.seed

    @property
    def prompt_token_ids(self) -> list[int]:
        """The input as one list of token ids."""
        return [token_id for span in self.inputs for token_id in span.token_ids]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the raw distribution (before temperature, penalties and filters).

    `rank` of the chosen token is 1 for the most likely one. `top` holds (token id, logprob), most likely first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """When things happened to a sequence, in seconds of the monotonic clock; None if they did not."""

    arrival: float
    scheduled: float | None
    first_token: float | None
    finished: float
    num_preemptions: int = 0


class SequenceUpdate(NamedTuple):
    """What one step brought one sequence: the engine's own output, in token ids.

    A named tuple, since there is one per sequence in every step. `pooled` is the embedding of a request with task
    `embed`. `error` explains finish reason `error`. `times` comes with the last update of a sequence.
    """

    request_id: str
    index: int  # type: ignore[assignment]  # hides the method of tuples, which nobody calls here
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    pooled: tuple[float, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    times: RequestTimes | None = None


class CompletionDelta(NamedTuple):
    """What is new in one choice of a request, in text and tokens; a named tuple, as there is one for each token.

    `num_tokens` counts all tokens of the choice so far. `stop_reason` is the stop string or stop token id that ended
    it. Text lags behind tokens while it could still be half a character or the start of a stop string.
    """

    index: int  # type: ignore[assignment]  # hides the method of tuples, which nobody calls here
    text: str
    token_ids: tuple[int, ...]
    num_tokens: int
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    times: RequestTimes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One finished choice of a request."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A finished request: its prompt and its choices in index order.

    `seed` is the one that was used, drawn at submission if none was given: passing it again repeats the tokens.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    seed: int
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingOutput:
    """The pooled hidden state of a prompt, of unit length."""

    request_id: str
    prompt_token_ids: list[int]
    embedding: list[float]
