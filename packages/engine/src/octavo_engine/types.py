"""What a caller hands in and gets back: requests, deltas and outputs.

Everything here is frozen and free of torch, so that a process without a model can validate, send and receive it.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal, NamedTuple

from octavo_engine.beam_params import BeamSearchParams
from octavo_engine.branch import Branch, Parent
from octavo_engine.sampling_params import SamplingParams as SamplingParams
from octavo_engine.stop_automaton import StopAutomaton


class FinishReason(StrEnum):
    """Why a sequence ended; the wire's names, plus `abort` and `error`, which never reach an OpenAI client as such."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """A run of token ids in a request's input."""

    token_ids: tuple[int, ...]


class Tenant(NamedTuple):
    """Whom requests come from, for a queue that gives each a fair share; `share` 2 gets twice what 1 gets."""

    name: str
    share: float = 1.0


Task = Literal["generate", "embed"]
Pooling = Literal["last", "mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One unit of work for the engine, in token ids.

    With a `parent` the blocks of another request are shared as far as the tokens are the same. With `keep` the
    sequences can be forked after their ends, until they are released. With `beams` the prompt is searched, and
    `sampling` is what the search has in common with sampling (`BeamSearchParams.sampling`), and `stops` are the
    stop strings by token ids; those of other requests are looked for where there is text. Lower `priority` runs
    first. Requests with different `salt` never share cached blocks. `adapter` names the one that the request runs with,
    in the version that it has when the request is added; None is the base model. `tenant` is whom it comes from, None
    if that does not matter. `pooling` matters for the task `embed` alone, and so does `pin`: the prompt's full blocks
    are held in the cache when it ends, under the request's id, if room was set aside for them. `arrival_time` is in
    seconds of the monotonic clock; `grammar_seconds` is what compiling its grammar took before. An unset seed is drawn
    here, so that every request can be repeated.
    """

    request_id: str
    inputs: tuple[TokenSpan, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    beams: BeamSearchParams | None = None
    stops: StopAutomaton | None = None
    parent: Parent | None = None
    keep: bool = False
    pin: bool = False
    task: Task = "generate"
    pooling: Pooling = "last"
    priority: int = 0
    salt: bytes = b""
    adapter: str | None = None
    tenant: Tenant | None = None
    arrival_time: float = field(default_factory=time.monotonic)
    grammar_seconds: float = 0.0

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
    """Log-probabilities at one position.

    They are of the model's own distribution, or, by `logprobs_mode`, of the one that was drawn from: after bans,
    biases, penalties, temperature and filters. `rank` of the chosen token is 1 for the most likely one. `top` holds
    (token id, logprob), most likely first; `given` those of the token ids that the request named.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()
    given: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """When things happened to a sequence, in seconds of the monotonic clock; None if they did not."""

    arrival: float
    scheduled: float | None
    first_token: float | None
    finished: float
    num_preemptions: int = 0


class CachedTokens(NamedTuple):
    """Tokens of a prompt that were not computed, by where their keys and values came from.

    `full` lay in whole blocks of the prefix cache, `partial` at the start of one more that was copied, and `fork` with
    the request's parent.
    """

    full: int = 0
    partial: int = 0
    fork: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.full + self.partial + self.fork


NOTHING_CACHED = CachedTokens()


class SequenceUpdate(NamedTuple):
    """What one step brought one sequence: the engine's own output, in token ids.

    A named tuple, since there is one per sequence in every step. `pooled` is the embedding of a request with task
    `embed`. `prompt_logprobs`, of the prompt's second token on, come with the first tokens of a request's first
    sequence. `error` explains finish reason `error`. `times` comes with the last update of a sequence, `score` with the
    hypothesis of a beam search, which also says how many there are (`num_choices`): there may be fewer than `n`.
    """

    request_id: str
    index: int  # type: ignore[assignment]  # hides the method of tuples, which nobody calls here
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    pooled: tuple[float, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    cached: CachedTokens = NOTHING_CACHED
    times: RequestTimes | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    score: float | None = None
    num_choices: int | None = None


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
    cached: CachedTokens = NOTHING_CACHED
    times: RequestTimes | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One finished choice of a request.

    `score` is that of a beam search: log-probabilities with the length penalty. `cumulative_logprob` is the sum over
    its tokens where log-probabilities were needed.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    score: float | None = None
    cumulative_logprob: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A finished request: its prompt and its choices in index order; of a beam search there may be fewer than `n`.

    `seed` is the one that was used, drawn at submission if none was given: passing it again repeats the tokens.
    `prompt_logprobs`, if asked for, has an entry per token of the prompt, None for the first. `cached` says how many
    tokens of the prompt were not computed when it was first admitted.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    seed: int
    cached: CachedTokens = NOTHING_CACHED
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt that were not computed."""
        return self.cached.total

    def branch(self, index: int = 0, *, at: int | None = None, continuation: str | tuple[int, ...] = "") -> Branch:
        """Return a point to fork this request at, if it is kept: after `at` tokens of a choice; None: at its end."""
        num_tokens = len(self.outputs[index].token_ids) if at is None else at
        return Branch(self.request_id, index, num_tokens, continuation)


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmOutput:
    """A prompt that was computed into the prefix cache.

    `cached` are the tokens that were there before; `num_warm_tokens` those of full blocks, which prompts that go on
    from here need not compute: nor the last few, as long as the block that they begin is not given to others.
    """

    prompt_token_ids: list[int]
    cached: CachedTokens
    num_warm_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingOutput:
    """The pooled hidden state of a prompt, of unit length."""

    request_id: str
    prompt_token_ids: list[int]
    embedding: list[float]
