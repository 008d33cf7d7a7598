"""OfflineRequest: a request of an offline batch, and what has come of it so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo_engine.text.assemble import best_first
from octavo_engine.text.request_stream import RequestStream
from octavo_engine.types import (
    NOTHING_CACHED,
    CachedTokens,
    CompletionDelta,
    CompletionOutput,
    FinishReason,
    Request,
    RequestOutput,
    SequenceUpdate,
    TokenLogprobs,
)


@dataclass(slots=True)
class Choice:
    """One sample of it; `held` are tokens, and their log-probabilities, that have not been made text yet."""

    held: list[int] = field(default_factory=list)
    held_logprobs: list[TokenLogprobs] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    score: float | None = None

    @property
    def logprob_sum(self) -> float:
        """Of the tokens that have been made text."""
        return sum(entry.logprob for entry in self.logprobs)


@dataclass(slots=True)
class OfflineRequest:
    """A request that an `LLM` runs; only its call writes it.

    Attributes:
        place: in the batch.
        request: what the engine was given.
        prompt: its text, None if it came as token ids.
        stream: makes text of tokens.
        choices: what has come, by index.
        error: why the request failed, if it did.
    """

    place: int
    request: Request
    prompt: str | None
    stream: RequestStream
    choices: list[Choice]
    cached: CachedTokens = NOTHING_CACHED
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    error: str | None = None

    def take(self, update: SequenceUpdate) -> CompletionDelta | None:
        """Take in an update; return what it adds, None if that is nothing yet.

        Without stop strings nobody needs text before the end, so that tokens are collected and made text at once.
        """
        choice = self.choices[update.index]
        self.prompt_logprobs = update.prompt_logprobs or self.prompt_logprobs
        if update.finish_reason is None and not self.request.sampling.stop_strings:
            choice.held += update.token_ids
            choice.held_logprobs += update.logprobs or ()
            return None
        if choice.held:
            logprobs = (*choice.held_logprobs, *(update.logprobs or ()))
            update = update._replace(token_ids=(*choice.held, *update.token_ids), logprobs=logprobs or None)
        delta = self.stream.push(update)
        if delta is not None:
            self._add(choice, delta)
        return delta

    def _add(self, choice: Choice, delta: CompletionDelta) -> None:
        choice.text.append(delta.text)
        choice.token_ids.extend(delta.token_ids)
        choice.logprobs.extend(delta.logprobs or ())
        choice.finish_reason = delta.finish_reason
        choice.stop_reason = delta.stop_reason
        choice.score = delta.score
        self.cached = delta.cached

    def output(self) -> RequestOutput:
        """Return the request, which has ended, as the user gets it."""
        sampling = self.request.sampling
        choices = self.choices
        if self.request.beams is not None:  # which may have found fewer than it was asked for
            choices = [choice for choice in choices if choice.finish_reason is not None]
        if sampling.ranks:
            best = best_first([choice.logprob_sum for choice in choices], sampling.n)
            choices = [choices[place] for place in best]
        outputs = []
        for index, choice in enumerate(choices):
            assert choice.finish_reason is not None
            outputs.append(
                CompletionOutput(
                    index=index,
                    text="".join(choice.text),
                    token_ids=choice.token_ids,
                    logprobs=choice.logprobs if sampling.reports_logprobs else None,
                    finish_reason=choice.finish_reason,
                    stop_reason=choice.stop_reason,
                    score=choice.score,
                    cumulative_logprob=choice.logprob_sum if sampling.wants_logprobs else None,
                )
            )
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            outputs=outputs,
            seed=self.request.seed,
            cached=self.cached,
            prompt_logprobs=None if sampling.prompt_logprobs is None else [None, *(self.prompt_logprobs or ())],
        )
