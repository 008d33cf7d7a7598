"""Offline use: a model in this process, prompts in, finished outputs out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypedDict

from tqdm import tqdm

from octavo_engine.api import EngineInfo, EngineStats
from octavo_engine.beam_params import BeamSearchParams
from octavo_engine.branch import Branch, Parent
from octavo_engine.build import build_engine
from octavo_engine.config import EngineConfig
from octavo_engine.errors import InvalidRequest, RequestFailed
from octavo_engine.offline_request import Choice, OfflineRequest
from octavo_engine.stats import collect_stats
from octavo_engine.types import (
    CompletionDelta,
    EmbeddingOutput,
    Pooling,
    RequestOutput,
    SamplingParams,
    SequenceUpdate,
)


class TokensPrompt(TypedDict):
    """A prompt that is token ids already."""

    prompt_token_ids: Sequence[int]


Prompt = str | TokensPrompt
Message = Mapping[str, Any]
_Params = SamplingParams | BeamSearchParams


class LLM:
    """A language model for offline batches; all prompts of a call run at once by continuous batching.

    Args:
        model: a GGUF file, a folder in Hugging Face layout, a hub id, or None for the demo model.
        show_progress: whether loading and generating draw a progress bar on the terminal.
        options: any other field of `EngineConfig`; an unknown one raises TypeError.

    Example:
        >>> from octavo_engine import LLM, SamplingParams
        >>> llm = LLM()
        >>> outputs = llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=8))
        >>> outputs[0].outputs[0].text  # doctest: +SKIP
        ' Paris. The city is located in'
    """

    def __init__(self, model: str | None = None, *, show_progress: bool = True, **options: Any) -> None:
        self._show_progress = show_progress
        with tqdm(desc="loading", unit="tensor", disable=not show_progress) as bar:

            def report(num_done: int, total: int) -> None:
                bar.total = total
                bar.update(num_done - bar.n)

            built = build_engine(EngineConfig(model=model, **options), progress=report)
        self._engine = built.engine
        self._text = built.text
        self._request_ids = itertools.count()
        self.info: EngineInfo = built.info

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        keep: bool = False,
    ) -> list[RequestOutput]:
        """Complete prompts; one output per prompt, in order.

        Args:
            prompts: one prompt or several: text, or `{"prompt_token_ids": [...]}`.
            sampling: for all prompts, or one for each; None uses the model's own defaults.
            keep: let the outputs be forked later, until they are released.

        Raises:
            InvalidRequest: if a prompt or its parameters cannot be run; nothing has been started then.
            RequestFailed: if the engine could not compute one of them; the others have run to their ends and are its
                `outputs`.
        """
        encoded = [(p if isinstance(p, str) else None, self._encode(p)) for p in _many(prompts)]
        return self._run(self._requests(encoded, sampling, keep=keep))

    def fork(
        self,
        branches: Branch | Sequence[Branch],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        keep: bool = False,
    ) -> list[RequestOutput]:
        """Go on from any token of outputs that were kept; one output per branch, in order.

        A branch shares the blocks of its parent up to where it begins, and all branches of a call run at once. The
        tokens that it takes over count as its prompt. Several branches may begin at one point, each with parameters
        and a seed of its own; `SamplingParams(n=...)` draws several samples of one.

        Args:
            branches: where to go on; `RequestOutput.branch` makes one.
            sampling: for all branches, or one for each; None uses the model's own defaults.
            keep: let the new outputs be forked too.

        Raises:
            InvalidRequest: if a parent is not kept or has fewer tokens, or a parameter cannot be run; nothing has been
                started then.
            RequestFailed: as `generate` does.

        Example:
            >>> drafts = llm.generate("Once", SamplingParams(n=4, max_tokens=8), keep=True)  # doctest: +SKIP
            >>> best = llm.fork(drafts[0].branch(2), SamplingParams(n=4, max_tokens=8))  # doctest: +SKIP
        """
        each = [branches] if isinstance(branches, Branch) else list(branches)
        encoded = [(None, self._engine.branch_tokens(b) + self._text.encode_continuation(b.continuation)) for b in each]
        parents = [Parent(branch.request_id, branch.index) for branch in each]
        return self._run(self._requests(encoded, sampling, parents=parents, keep=keep))

    def release(self, outputs: RequestOutput | Sequence[RequestOutput]) -> None:
        """Let go of outputs that were kept: what only they hold of the KV cache is free at once."""
        for output in [outputs] if isinstance(outputs, RequestOutput) else outputs:
            self._engine.release(output.request_id)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several at once; each is a list of `{"role": ..., "content": ...}`."""
        if not messages:
            raise InvalidRequest("messages is empty; give at least one message", param="messages")
        conversations: Any = [messages] if isinstance(messages[0], Mapping) else messages
        encoded = [(None, self._text.encode_chat(c, template_kwargs=template_kwargs)) for c in conversations]
        return self._run(self._requests(encoded, sampling))

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams | Sequence[BeamSearchParams]
    ) -> list[RequestOutput]:
        """Search for the likeliest continuations of prompts; the choices of an output are hypotheses, best first.

        The beams of a prompt share the blocks that they have in common, and all prompts of a call run at once.

        Args:
            prompts: one prompt or several: text, or `{"prompt_token_ids": [...]}`.
            params: for all prompts, or one for each.

        Raises:
            InvalidRequest: if a prompt or its parameters cannot be run; nothing has been started then.
            RequestFailed: if the engine could not compute one of them.
        """
        encoded = [(p if isinstance(p, str) else None, self._encode(p)) for p in _many(prompts)]
        return self._run(self._requests(encoded, params))

    def embed(self, prompts: Prompt | Sequence[Prompt], *, pooling: Pooling = "last") -> list[EmbeddingOutput]:
        """Return one unit vector per prompt: its last token's final hidden state, or the mean over its tokens."""
        requests = [
            self._text.make_request(
                self._encode(prompt), SamplingParams(), request_id=self._next_id(), task="embed", pooling=pooling
            )
            for prompt in _many(prompts)
        ]
        pooled: dict[str, tuple[float, ...]] = {}
        for request in requests:
            self._engine.add(request)
        for update in self._updates():
            if update.pooled is None:
                raise RequestFailed(update.error or "the engine returned no embedding")
            pooled[update.request_id] = update.pooled
        return [
            EmbeddingOutput(
                request_id=r.request_id, prompt_token_ids=r.prompt_token_ids, embedding=list(pooled[r.request_id])
            )
            for r in requests
        ]

    @property
    def default_sampling(self) -> Mapping[str, Any]:
        """The sampling parameters that the model's own generation_config.json sets; those without one are Octavo's."""
        return self._text.default_sampling

    def sampling_params(self, **explicit: Any) -> SamplingParams:
        """Return the model's default sampling parameters, with explicit ones in their place."""
        return SamplingParams(**{**self._text.default_sampling, **explicit})

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return self._text.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def stats(self) -> EngineStats:
        """Return the engine's counters: steps, tokens, KV waste and sharing, preemptions."""
        return collect_stats(self._engine.scheduler)

    def close(self) -> None:
        """Release the model's memory; the LLM cannot be used afterwards."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _encode(self, prompt: Prompt) -> list[int]:
        return self._text.encode_prompt(prompt if isinstance(prompt, str) else prompt["prompt_token_ids"])

    def _next_id(self) -> str:
        return str(next(self._request_ids))

    def _requests(
        self,
        encoded: Sequence[tuple[str | None, list[int]]],
        sampling: _Params | Sequence[_Params] | None,
        *,
        parents: Sequence[Parent] | None = None,
        keep: bool = False,
    ) -> list[OfflineRequest]:
        if sampling is None:
            sampling = self.sampling_params()
        if isinstance(sampling, SamplingParams | BeamSearchParams):
            sampling = [sampling] * len(encoded)
        each = list(sampling)
        if len(each) != len(encoded):
            raise InvalidRequest(
                f"there are {len(encoded)} prompts and {len(each)} parameters; give one, or one for each"
            )
        running = []
        for place, ((prompt, token_ids), own) in enumerate(zip(encoded, each, strict=True)):
            parent = None if parents is None else parents[place]
            request = self._text.make_request(token_ids, own, request_id=self._next_id(), parent=parent, keep=keep)
            choices = [Choice() for _ in range(request.sampling.num_sequences)]
            running.append(OfflineRequest(place, request, prompt, self._text.stream(request), choices))
        return running

    def _run(self, running: list[OfflineRequest]) -> list[RequestOutput]:
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
                        delta = self._take(own, update)
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
        outputs = [r.output() if r.error is None else None for r in running]
        return _all_or_raise(outputs, [r.error for r in running if r.error is not None])

    def _take(self, own: OfflineRequest, update: SequenceUpdate) -> CompletionDelta | None:
        """Take in an update; what fails one request leaves the others alone."""
        if own.error is not None:
            return None
        try:
            return own.take(update)
        except RequestFailed as error:
            own.error = str(error)
            self._engine.abort(update.request_id)
            return None

    def _updates(self) -> Iterator[SequenceUpdate]:
        while self._engine.has_work:
            yield from self._engine.step()


def _all_or_raise(outputs: list[RequestOutput | None], errors: list[str]) -> list[RequestOutput]:
    if errors:
        raise RequestFailed(f"{len(errors)} of {len(outputs)} requests failed, the first with: {errors[0]}", outputs)
    return [output for output in outputs if output is not None]


def _many(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping):
        return [prompts]
    return prompts
