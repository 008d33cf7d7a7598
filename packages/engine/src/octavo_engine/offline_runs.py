"""OfflineRuns: the requests of offline calls, made, run to their ends and put together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tqdm import tqdm

from octavo_engine.beam_params import BeamSearchParams
from octavo_engine.branch import Parent
from octavo_engine.engine import Engine
from octavo_engine.errors import InvalidRequest, RequestFailed, request_error
from octavo_engine.offline_request import Choice, OfflineRequest
from octavo_engine.prompts import EncodedPrompt
from octavo_engine.text.processor import TextProcessor
from octavo_engine.types import (
    CompletionDelta,
    EmbeddingOutput,
    Pooling,
    Request,
    RequestOutput,
    SamplingParams,
    SequenceUpdate,
)

_Params = SamplingParams | BeamSearchParams


class OfflineRuns:
    """Runs what the calls of an `LLM` ask for, one call after the other.

    Args:
        engine: of the model.
        text: between text and tokens.
        show_progress: whether generating draws a progress bar on the terminal.
    """

    def __init__(self, engine: Engine, text: TextProcessor, *, show_progress: bool) -> None:
        self._engine = engine
        self._text = text
        self._show_progress = show_progress
        self._ids = itertools.count()

    def next_id(self) -> str:
        """Return an id that no request had."""
        return str(next(self._ids))

    def requests(
        self,
        encoded: Sequence[EncodedPrompt],
        sampling: _Params | Sequence[_Params] | None,
        *,
        parents: Sequence[Parent] | None = None,
        adapter: str | Sequence[str | None] | None = None,
        keep: bool = False,
    ) -> list[OfflineRequest]:
        """Make the requests of a call: of prompts, or of branches of parents.

        Args:
            encoded: prompts.
            sampling: for all of them, or one for each; None uses the model's own defaults.
            parents: what each goes on from; None if nothing.
            adapter: names the adapter of all of them, or of each; None is the base model.
            keep: let the outputs be forked later.

        Raises:
            InvalidRequest: one of them cannot be run.
        """
        if sampling is None:
            sampling = SamplingParams(**self._text.default_sampling)
        if isinstance(sampling, SamplingParams | BeamSearchParams):
            sampling = [sampling] * len(encoded)
        each = list(sampling)
        if len(each) != len(encoded):
            raise InvalidRequest(
                f"there are {len(encoded)} prompts and {len(each)} parameters; give one, or one for each"
            )
        adapters = self.adapters(adapter, len(encoded))
        running = []
        for place, ((prompt, token_ids, salt), own) in enumerate(zip(encoded, each, strict=True)):
            parent = None if parents is None else parents[place]
            request = self._text.make_request(
                token_ids,
                own,
                request_id=self.next_id(),
                salt=salt,
                adapter=adapters[place],
                parent=parent,
                keep=keep,
            )
            choices = [Choice() for _ in range(request.sampling.num_sequences)]
            running.append(OfflineRequest(place, request, prompt, self._text.stream(request), choices))
        return running

    def embed(
        self, encoded: Sequence[EncodedPrompt], pooling: Pooling, adapter: str | Sequence[str | None] | None
    ) -> list[EmbeddingOutput]:
        """Run prompts whose hidden states are wanted; one vector each, in order."""
        requests = [
            self._text.make_request(
                token_ids,
                SamplingParams(),
                request_id=self.next_id(),
                task="embed",
                pooling=pooling,
                salt=salt,
                adapter=own,
            )
            for (_, token_ids, salt), own in zip(encoded, self.adapters(adapter, len(encoded)), strict=True)
        ]
        return [
            EmbeddingOutput(
                request_id=r.request_id, prompt_token_ids=r.prompt_token_ids, embedding=list(update.pooled or ())
            )
            for r, update in zip(requests, self.run_pooled(requests), strict=True)
        ]

    def adapters(self, adapter: str | Sequence[str | None] | None, num_prompts: int) -> list[str | None]:
        """Return the adapter of each prompt; all of them are served.

        Raises:
            UnknownAdapter: one is not.
            InvalidAdapter: one had to be read again and could not be.
            InvalidRequest: there are more or fewer of them than prompts.
        """
        each = [adapter] * num_prompts if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(each) != num_prompts:
            raise InvalidRequest(f"there are {num_prompts} prompts and {len(each)} adapters; give one, or one for each")
        for name in {name for name in each if name is not None}:
            self._engine.adapters.bind(name)
        return each

    def run(self, running: Sequence[OfflineRequest]) -> list[RequestOutput]:
        """Run requests to their ends; one output each, in order.

        Raises:
            RequestFailed: the engine could not compute one of them.
        """
        by_id = {r.request.request_id: r for r in running}
        num_tokens = 0
        try:
            with tqdm(desc="generating", unit="request", total=len(running), disable=not self._show_progress) as bar:
                for r in running:
                    self._engine.add(r.request)
                while self._engine.has_work:
                    num_ended = 0
                    for update in self._engine.step():
                        own = by_id[update.request_id]
                        delta = self.take(own, update)
                        num_tokens += len(update.token_ids)
                        if delta is None:
                            continue
                        num_ended += own.stream.finished
                        if update.finish_reason is None and delta.finish_reason is not None:
                            self._engine.abort(update.request_id, update.index)  # a stop string ended it
                    bar.set_postfix_str(f"{num_tokens} tokens", refresh=False)
                    bar.update(num_ended)
        finally:
            for request_id in by_id:
                self._engine.abort(request_id)  # after an error or an interrupt nothing goes on unseen
            self._engine.drain()
        outputs = [r.output() if r.error is None else None for r in running]
        return _all_or_raise(outputs, [r.error for r in running if r.error is not None])

    def take(self, own: OfflineRequest, update: SequenceUpdate) -> CompletionDelta | None:
        """Take in an update; what fails one request leaves the others alone."""
        if own.error is not None:
            return None
        try:
            return own.take(update)
        except RequestFailed as error:
            own.error = str(error)
            self._engine.abort(update.request_id)
            return None

    def run_pooled(self, requests: Sequence[Request]) -> list[SequenceUpdate]:
        """Run requests of task `embed`; return the update of each that has its vector."""
        by_id: dict[str, SequenceUpdate] = {}
        try:
            for request in requests:
                self._engine.add(request)
            while self._engine.has_work:
                for update in self._engine.step():
                    if update.pooled is None:
                        raise request_error(update.error, "the engine returned no embedding")
                    by_id[update.request_id] = update
        finally:
            for request in requests:
                self._engine.abort(request.request_id)  # after an error or an interrupt nothing goes on unseen
            self._engine.drain()
        return [by_id[request.request_id] for request in requests]


def _all_or_raise(outputs: list[RequestOutput | None], errors: list[str]) -> list[RequestOutput]:
    if errors:
        raise RequestFailed(f"{len(errors)} of {len(outputs)} requests failed, the first with: {errors[0]}", outputs)
    return [output for output in outputs if output is not None]
