"""Timelines: what happened to requests on their way through the engine, and why they waited."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal, TypeVar

from octavo_engine.sequence import Sequence
from octavo_engine.types import NOTHING_CACHED, CachedTokens, FinishReason, Request

_MAX_NUM_EVENTS = 256  # of a kind, of one request

T = TypeVar("T")


class WaitReason(StrEnum):
    """What kept the queue's first sequence, and so all behind it, from running."""

    STEP = "step"
    ROWS = "rows"
    BLOCKS = "blocks"
    ADAPTERS = "adapters"  # slots for another adapter
    TOKEN_BUDGET = "token_budget"  # tokens of text


PreemptionKind = Literal["recompute", "swap"]


@dataclass(frozen=True, slots=True)
class Wait:
    """A sequence's stay in the queue, in seconds since the request came; `reasons` divides it.

    It goes on if `ended` is false.
    """

    index: int
    start: float
    seconds: float
    reasons: Mapping[WaitReason, float]
    ended: bool = True


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Tokens that one step computed at once, when it was submitted, and how long until its answer came.

    They are the prompt's, or, for a sequence that resumes, also those generated before. `seconds` is None in flight.
    """

    index: int
    start: float
    seconds: float | None
    num_tokens: int
    resumes: bool


@dataclass(frozen=True, slots=True)
class Preemption:
    """When a sequence lost its row and its blocks, and whether they were kept on the host."""

    index: int
    start: float
    kind: PreemptionKind


@dataclass(frozen=True, slots=True)
class ChoiceTimes:
    """A choice's first token and end, None if they have not come."""

    index: int
    first_token: float | None
    finished: float | None
    finish_reason: FinishReason | None
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimeline:
    """What has happened to a request so far; times are in seconds since it came, but for `arrival`, which is Unix time.

    Attributes:
        request_id: of the request.
        tenant: whom it came from, None if that did not matter.
        state: where it stands.
        arrival: when it came to the engine.
        grammar_seconds: what compiling its grammar took before.
        num_prompt_tokens: of its prompt.
        cached: those of them that were not computed when it was first admitted.
        num_waiting_before: sequences in the queue when it came.
        waits: its stays in the queue: at first, and after each preemption.
        chunks: what was computed of its prompt, or again.
        preemptions: how often it had to make room, and how.
        choices: of those that have a token or an end.
        num_omitted: waits, chunks and preemptions that are not listed, as there were too many.
    """

    request_id: str
    tenant: str | None = None
    state: Literal["waiting", "running", "finished"]
    arrival: float
    grammar_seconds: float
    num_prompt_tokens: int
    cached: CachedTokens
    num_waiting_before: int
    waits: tuple[Wait, ...]
    chunks: tuple[PromptChunk, ...]
    preemptions: tuple[Preemption, ...]
    choices: tuple[ChoiceTimes, ...]
    num_omitted: int = 0


class QueueClock:
    """How long something has waited since the start, divided by what the queue's first sequence waited for.

    So what a request waits for costs nothing per step: it is the difference of two readings.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seconds = dict.fromkeys(WaitReason, 0.0)
        self._reason = WaitReason.STEP
        self._since = clock()

    def read(self) -> tuple[float, dict[WaitReason, float]]:
        """Return the time, and the seconds up to now."""
        now = self._clock()
        self._seconds[self._reason] += now - self._since
        self._since = now
        return now, self._seconds.copy()

    def hold(self, reason: WaitReason) -> None:
        """Count what comes under another reason."""
        if reason is not self._reason:
            self.read()
            self._reason = reason


@dataclass(frozen=True, slots=True)
class _OpenWait:
    index: int
    start: float
    seconds: dict[WaitReason, float]  # of the queue's clock


@dataclass(slots=True)
class _Log:
    """What is noted of a live request, in times of the engine's clock."""

    request: Request
    arrival: float
    num_prompt_tokens: int
    num_waiting_before: int
    cached: CachedTokens = NOTHING_CACHED
    open_waits: dict[int, _OpenWait] = field(default_factory=dict)  # by sequence id
    waits: list[Wait] = field(default_factory=list)
    chunks: list[PromptChunk] = field(default_factory=list)
    preemptions: list[Preemption] = field(default_factory=list)
    ends: list[ChoiceTimes] = field(default_factory=list)
    num_omitted: int = 0

    def note(self, events: list[T], event: T) -> None:
        if len(events) < _MAX_NUM_EVENTS:
            events.append(event)
        else:
            self.num_omitted += 1

    def since(self, moment: float) -> float:
        return max(0.0, moment - self.request.arrival_time)


class Timelines:
    """The timelines of the requests that live, and of the last that have ended. Only the scheduler writes it.

    Steps that decode alone are not noted, and cost nothing.

    Args:
        max_num_ended: how many ended requests are remembered; 0 notes nothing at all.
        clock: seconds, monotonic, the same as of requests' arrival times.

    Attributes:
        steps: of those in flight that compute parts of prompts: their number, when they began, and the parts' places.
    """

    def __init__(self, max_num_ended: int, clock: Callable[[], float]) -> None:
        self._max_num_ended = max_num_ended
        self._clock = clock
        self._queue = QueueClock(clock)
        self._live: dict[str, _Log] = {}
        self._ended: OrderedDict[str, RequestTimeline] = OrderedDict()
        self.steps: deque[tuple[int, float, list[tuple[_Log, int]]]] = deque()

    # what happens

    def came(self, sequence: Sequence, num_waiting_before: int) -> None:
        """Note a request that is about to be queued, by its first sequence."""
        if self._max_num_ended:
            request = sequence.request
            arrival = time.time() - (self._clock() - request.arrival_time)
            log = _Log(request, arrival, sequence.num_prompt_tokens, num_waiting_before)
            self._live[request.request_id] = log
            self._begin_wait(log, sequence, num_waiting_before)

    def held_up(self, reason: WaitReason) -> None:
        """Note why nobody more of the queue took part in the step that was just made."""
        self._queue.hold(reason)

    def entered(self, sequence: Sequence) -> None:
        """Note that a sequence runs, if it waited."""
        log = self._live.get(sequence.request.request_id)
        if log is not None and sequence.seq_id in log.open_waits:
            self._end_wait(log, sequence)
            log.cached = sequence.cached

    def computes(self, sequence: Sequence, num_tokens: int, step_id: int, *, resumes: bool = False) -> None:
        """Note a part of a prompt, or of a sequence that resumes, in a step that is being made."""
        log = self._live.get(sequence.request.request_id)
        if log is None or len(log.chunks) >= _MAX_NUM_EVENTS:
            if log is not None:
                log.num_omitted += 1
            return
        if not self.steps or self.steps[-1][0] != step_id:
            self.steps.append((step_id, self._clock(), []))
        _, begun, places = self.steps[-1]
        places.append((log, len(log.chunks)))
        log.chunks.append(PromptChunk(sequence.index, log.since(begun), None, num_tokens, resumes))

    def end_step(self, step_id: int) -> None:
        """Note that the answer to a step has come."""
        if self.steps[0][0] == step_id:
            _, begun, places = self.steps.popleft()
            seconds = self._clock() - begun
            for log, place in places:
                log.chunks[place] = replace(log.chunks[place], seconds=seconds)

    def preempted(self, sequence: Sequence, kind: PreemptionKind, num_waiting_before: int) -> None:
        """Note that a sequence, or the leader of beams, waits again."""
        log = self._live.get(sequence.request.request_id)
        if log is not None:
            log.note(log.preemptions, Preemption(sequence.index, log.since(self._clock()), kind))
            self._begin_wait(log, sequence, num_waiting_before)

    def ended(self, sequence: Sequence, index: int, reason: FinishReason, num_tokens: int) -> None:
        """Note the end of a choice."""
        log = self._live.get(sequence.request.request_id)
        if log is not None:
            if sequence.seq_id in log.open_waits:
                self._end_wait(log, sequence)
            first = sequence.first_token_time
            first_token = None if first is None else log.since(first)
            log.ends.append(ChoiceTimes(index, first_token, log.since(self._clock()), reason, num_tokens))

    def left(self, request_id: str) -> None:
        """Note that nothing of a request lives; the oldest of those that have ended is forgotten for it."""
        log = self._live.pop(request_id, None)
        if log is not None:
            self._ended[request_id] = self._timeline(log, "finished", ())
            self._ended.move_to_end(request_id)
            while len(self._ended) > self._max_num_ended:
                self._ended.popitem(last=False)

    # what is known

    def get(self, request_id: str, sequences: Iterable[Sequence]) -> RequestTimeline | None:
        """Return what is known of a request, given its live sequences; None if nothing is, or no longer."""
        log = self._live.get(request_id)
        if log is None:
            return self._ended.get(request_id)
        live = list(sequences)
        state: Literal["waiting", "running"] = "running" if any(s.row is not None for s in live) else "waiting"
        return self._timeline(log, state, live)

    def _timeline(
        self, log: _Log, state: Literal["waiting", "running", "finished"], live: Iterable[Sequence]
    ) -> RequestTimeline:
        now, seconds = self._queue.read()
        waits = [*log.waits, *(_wait(log, own, now, seconds, ended=False) for own in log.open_waits.values())]
        choices = [
            ChoiceTimes(s.index, log.since(s.first_token_time), None, None, len(s.token_ids) - s.num_prompt_tokens)
            for s in live
            if s.first_token_time is not None
        ]
        return RequestTimeline(
            request_id=log.request.request_id,
            tenant=None if log.request.tenant is None else log.request.tenant.name,
            state=state,
            arrival=log.arrival,
            grammar_seconds=log.request.grammar_seconds,
            num_prompt_tokens=log.num_prompt_tokens,
            cached=log.cached,
            num_waiting_before=log.num_waiting_before,
            waits=tuple(waits),
            chunks=tuple(log.chunks),
            preemptions=tuple(log.preemptions),
            choices=tuple(sorted([*log.ends, *choices], key=lambda choice: choice.index)),
            num_omitted=log.num_omitted,
        )

    def _begin_wait(self, log: _Log, sequence: Sequence, num_waiting_before: int) -> None:
        if not num_waiting_before:  # nobody has been told yet what it waits for but the next step
            self._queue.hold(WaitReason.STEP)
        log.open_waits[sequence.seq_id] = _OpenWait(sequence.index, *self._queue.read())

    def _end_wait(self, log: _Log, sequence: Sequence) -> None:
        log.note(log.waits, _wait(log, log.open_waits.pop(sequence.seq_id), *self._queue.read()))


def _wait(log: _Log, own: _OpenWait, now: float, after: Mapping[WaitReason, float], *, ended: bool = True) -> Wait:
    spent = {reason: after[reason] - own.seconds[reason] for reason in WaitReason}
    reasons = {reason: seconds for reason, seconds in spent.items() if seconds > 0}
    return Wait(own.index, log.since(own.start), now - own.start, reasons, ended)
