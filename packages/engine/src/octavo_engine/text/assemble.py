"""Assembler: makes of a request's deltas what it asked for: all so far, finished choices alone, the best of several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from octavo_engine.sampling_params import SamplingParams
from octavo_engine.types import CompletionDelta, TokenLogprobs


def make_assembler(sampling: SamplingParams) -> Assembler | None:
    """Return what a request's deltas go through; None if they are wanted as they are."""
    if sampling.output_kind == "delta" and not sampling.ranks:
        return None
    return Assembler(sampling)


def best_first(logprob_sums: Sequence[float], num_best: int) -> list[int]:
    """Return the places of the largest sums, the largest first; of equals the lower place first."""
    return sorted(range(len(logprob_sums)), key=lambda place: (-logprob_sums[place], place))[:num_best]


@dataclass(slots=True)
class _Choice:
    """All of one sequence so far."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    last: CompletionDelta | None = None

    def add(self, delta: CompletionDelta) -> None:
        self.text.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.last = delta

    @property
    def logprob_sum(self) -> float:
        return sum(entry.logprob for entry in self.logprobs)

    def whole(self, index: int, *, with_logprobs: bool) -> CompletionDelta:
        """Return all of it as one delta."""
        assert self.last is not None
        return self.last._replace(
            index=index,
            text="".join(self.text),
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs) if with_logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
        )


class Assembler:
    """Takes in the deltas of one request and gives back what is to be shown of them now.

    With more sequences than choices, nothing is shown until all have ended; then the n whose log-probabilities have the
    largest sums are, numbered from the best.
    """

    def __init__(self, sampling: SamplingParams) -> None:
        self._sampling = sampling
        self._choices = [_Choice() for _ in range(sampling.num_sequences)]
        self._num_open = sampling.num_sequences

    def take(self, deltas: Iterable[CompletionDelta]) -> list[CompletionDelta]:
        """Take in deltas; return what can be shown."""
        shown = []
        for delta in deltas:
            self._choices[delta.index].add(delta)
            self._num_open -= delta.finish_reason is not None
            if self._sampling.output_kind == "cumulative" or (
                not self._sampling.ranks and delta.finish_reason is not None
            ):
                shown.append(self._whole(delta.index, delta.index))
        if self._sampling.ranks and not self._num_open:
            best = best_first([choice.logprob_sum for choice in self._choices], self._sampling.n)
            shown = [self._whole(place, index) for index, place in enumerate(best)]
            if shown:  # what concerns the prompt came with the first sequence, which need not be among the best
                shown[0] = shown[0]._replace(prompt_logprobs=self._choices[0].prompt_logprobs)
        return shown

    def _whole(self, place: int, index: int) -> CompletionDelta:
        return self._choices[place].whole(index, with_logprobs=self._sampling.reports_logprobs)
