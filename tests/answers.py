"""Answer: everything that came of a request; `run_all` gets it of an engine step by step, `stream` over asyncio."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

from random_requests import Ask

from octavo_engine import AsyncEngine, Branch, CompletionDelta, FinishReason, RequestFailed, SamplingParams
from octavo_engine.branch import Parent
from octavo_engine.engine import Engine
from octavo_engine.text.assemble import make_assembler
from octavo_engine.text.processor import TextProcessor
from octavo_engine.types import Request, SequenceUpdate, TokenLogprobs


@dataclass(slots=True)
class Choice:
    """One choice; logprobs are empty where none were asked for."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    score: float | None = None


@dataclass(slots=True)
class Answer:
    """What a request brought; two are equal if no bit differs. `error` says why it failed, if it did."""

    choices: dict[int, Choice] = field(default_factory=dict)
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    embedding: tuple[float, ...] | None = None
    error: str | None = None

    def add(self, delta: CompletionDelta, *, whole: bool) -> None:
        """Take in a delta: what is new, or with `whole` all so far."""
        choice = self.choices.setdefault(delta.index, Choice())
        if whole:
            choice.text, choice.token_ids, choice.logprobs = "", (), ()
        choice.text += delta.text
        choice.token_ids += delta.token_ids
        choice.logprobs += delta.logprobs or ()
        choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
        choice.score = delta.score
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs


def make_request(text: TextProcessor, name: str, ask: Ask, parent: Parent | None = None) -> Request:
    """Make the request that an Ask is; it is kept if it has twigs."""
    return text.make_request(
        ask.prompt,
        ask.params or SamplingParams(),
        request_id=name,
        task="generate" if ask.params is not None else "embed",
        pooling=ask.pooling,
        priority=ask.priority,
        salt=ask.salt,
        parent=parent,
        keep=bool(ask.twigs),
    )


def grown(name: str, ask: Ask, answer: Answer) -> dict[str, tuple[Branch, Ask]]:
    """Return what follows an answer: each twig by name, as a branch, and as the request that brings the same."""
    if answer.error is not None or not ask.twigs:
        return {}
    output = answer.choices[ask.index].token_ids
    found = {}
    for number, twig in enumerate(ask.twigs):
        taken = output[: round(twig.share * len(output))]
        branch = Branch(name, ask.index, len(taken), twig.continuation)
        prompt = (*ask.prompt, *taken, *twig.continuation)
        found[f"{name}/{number}"] = branch, Ask(prompt, twig.params, salt=ask.salt, priority=ask.priority)
    return found


class _Reader:
    """Makes an Answer out of one request's updates, as AsyncEngine does."""

    def __init__(self, ask: Ask, request: Request, text: TextProcessor) -> None:
        self.ask = ask
        self.answer = Answer()
        self._stream = text.stream(request)
        self._assembler = make_assembler(request.sampling)

    def take(self, update: SequenceUpdate, engine: Engine) -> bool:
        """Take in an update; return whether the request has ended now."""
        if self.ask.params is None:
            self.answer.embedding = update.pooled
            return update.finish_reason is not None
        try:
            delta = self._stream.push(update)
        except RequestFailed as failure:
            self.answer = Answer(error=str(failure))
            engine.abort(update.request_id)
            return True
        if delta is None:
            return False
        if update.finish_reason is None and delta.finish_reason is not None:  # a stop string
            engine.abort(update.request_id, update.index)
        for part in [delta] if self._assembler is None else self._assembler.take([delta]):
            self.answer.add(part, whole=self._assembler is not None)
        return self._stream.finished


class _Company:
    """The requests that run together in one engine."""

    def __init__(self, engine: Engine, text: TextProcessor) -> None:
        self._engine = engine
        self._text = text
        self._readers: dict[str, _Reader] = {}
        self.ended: dict[str, Answer] = {}

    def submit(self, name: str, ask: Ask, parent: Parent | None = None) -> None:
        request = make_request(self._text, name, ask, parent)
        self._readers[name] = _Reader(ask, request, self._text)
        self._engine.add(request)

    def abort(self, name: str) -> None:
        if self._readers.pop(name, None) is not None:
            self._engine.abort(name)

    def step(self) -> None:
        for update in self._engine.step():
            name = update.request_id
            reader = self._readers.get(name)
            if reader is not None and reader.take(update, self._engine):
                self.ended[name] = self._readers.pop(name).answer
                self._grow(name, reader)

    def _grow(self, name: str, reader: _Reader) -> None:
        for twig_name, (branch, ask) in grown(name, reader.ask, reader.answer).items():
            tokens = self._engine.branch_tokens(branch, ask.salt)
            assert (*tokens, *branch.continuation) == ask.prompt
            self.submit(twig_name, ask, Parent(name, branch.index))


def run_all(
    engine: Engine,
    text: TextProcessor,
    asks: Mapping[str, Ask],
    arrivals: Mapping[str, int] | None = None,
    departures: Mapping[str, int] | None = None,
) -> dict[str, Answer]:
    """Run requests to their ends, and what follows them; return the answers of those that stayed.

    Args:
        engine: that runs nothing else.
        text: its text side.
        asks: the requests by name.
        arrivals: before which step each is submitted; those not named come at once.
        departures: before which step each is aborted; those not named stay.
    """
    arrivals, departures = arrivals or {}, departures or {}
    company = _Company(engine, text)
    waiting = sorted(asks, key=lambda name: arrivals.get(name, 0), reverse=True)
    step = 0
    while waiting or engine.has_work:
        while waiting and arrivals.get(waiting[-1], 0) <= step:
            name = waiting.pop()
            company.submit(name, asks[name])
        for name, last in departures.items():
            if last == step:
                company.abort(name)
        company.step()
        step += 1
    for name in asks:
        engine.release(name)
    return company.ended


async def stream(
    engine: AsyncEngine,
    name: str,
    ask: Ask,
    parent: Parent | None = None,
    watch: Callable[[Answer], None] = lambda _: None,
) -> Answer:
    """Run one request beside whatever else runs; whoever cancels it aborts it.

    `watch` is shown the answer whenever it has grown.
    """
    request = make_request(engine.text, name, ask, parent)
    if ask.params is None:
        return Answer(embedding=tuple((await engine.embed(request)).embedding))
    answer = Answer()
    whole = request.sampling.ranks or request.sampling.output_kind != "delta"
    try:
        async with aclosing(engine.generate(request)) as steps:
            async for deltas in steps:
                for delta in deltas:
                    answer.add(delta, whole=whole)
                watch(answer)
    except RequestFailed as failure:
        return Answer(error=str(failure))
    return answer
