"""Offline use: a model in this process, prompts in, finished outputs out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from octavo_engine.adapters.info import AdapterInfo
from octavo_engine.api import EngineInfo, EngineStats
from octavo_engine.beam_params import BeamSearchParams
from octavo_engine.branch import Branch, Parent
from octavo_engine.build import build_engine
from octavo_engine.config import EngineConfig
from octavo_engine.errors import InvalidRequest
from octavo_engine.offline_runs import OfflineRuns
from octavo_engine.pins import Pin
from octavo_engine.prompts import EncodedPrompt, Prompt, encode_all, encode_salt
from octavo_engine.standby import Measurement, MemoryReport, check_level
from octavo_engine.stats import collect_stats
from octavo_engine.timeline import RequestTimeline
from octavo_engine.types import EmbeddingOutput, Pooling, Request, RequestOutput, SamplingParams, WarmOutput
from octavo_engine.warming import warm_output, warm_request

Message = Mapping[str, Any]


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
        with tqdm(desc="loading", unit="tensor", disable=not show_progress) as bar:

            def report(num_done: int, total: int) -> None:
                bar.total = total
                bar.update(num_done - bar.n)

            built = build_engine(EngineConfig(model=model, **options), progress=report)
        self._engine = built.engine
        self._text = built.text
        self._runs = OfflineRuns(built.engine, built.text, show_progress=show_progress)
        self.info: EngineInfo = built.info

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        keep: bool = False,
    ) -> list[RequestOutput]:
        """Complete prompts; one output per prompt, in order.

        Args:
            prompts: one prompt or several: text, `{"prompt": ...}`, or `{"prompt_token_ids": [...]}`. With a
                "cache_salt" in it cached prefixes are shared only with prompts of the same one.
            sampling: for all prompts, or one for each; None uses the model's own defaults.
            adapter: the name of an adapter that was loaded, for all prompts, or one for each; None is the base model.
            keep: let the outputs be forked later, until they are released.

        Raises:
            InvalidRequest: if a prompt or its parameters cannot be run; nothing has been started then.
            RequestFailed: if the engine could not compute one of them; the others have run to their ends and are its
                `outputs`.
        """
        encoded = encode_all(self._text, prompts)
        return self._runs.run(self._runs.requests(encoded, sampling, adapter=adapter, keep=keep))

    def fork(
        self,
        branches: Branch | Sequence[Branch],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        keep: bool = False,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Go on from any token of outputs that were kept; one output per branch, in order.

        A branch shares the blocks of its parent up to where it begins, and all branches of a call run at once. The
        tokens that it takes over count as its prompt. Several branches may begin at one point, each with parameters
        and a seed of its own; `SamplingParams(n=...)` draws several samples of one.

        Args:
            branches: where to go on; `RequestOutput.branch` makes one.
            sampling: for all branches, or one for each; None uses the model's own defaults.
            adapter: as for `generate`. A branch shares blocks with a parent that had the same one.
            keep: let the new outputs be forked too.
            cache_salt: that of the parents.

        Raises:
            InvalidRequest: if a parent is not kept or has fewer tokens, or a parameter cannot be run; nothing has been
                started then.
            RequestFailed: as `generate` does.

        Example:
            >>> drafts = llm.generate("Once", SamplingParams(n=4, max_tokens=8), keep=True)  # doctest: +SKIP
            >>> best = llm.fork(drafts[0].branch(2), SamplingParams(n=4, max_tokens=8))  # doctest: +SKIP
        """
        each = [branches] if isinstance(branches, Branch) else list(branches)
        salt = encode_salt(cache_salt)
        encoded = []
        for branch in each:
            continuation = self._text.encode_continuation(branch.continuation)
            encoded.append(EncodedPrompt(None, self._engine.branch_tokens(branch, salt) + continuation, salt))
        parents = [Parent(branch.request_id, branch.index) for branch in each]
        return self._runs.run(self._runs.requests(encoded, sampling, parents=parents, adapter=adapter, keep=keep))

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
        adapter: str | Sequence[str | None] | None = None,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several at once; each is a list of `{"role": ..., "content": ...}`.

        `adapter` is as for `generate`. Cached prefixes are shared only with requests of the same `cache_salt`.
        """
        if not messages:
            raise InvalidRequest("messages is empty; give at least one message", param="messages")
        conversations: Any = [messages] if isinstance(messages[0], Mapping) else messages
        salt = encode_salt(cache_salt)
        encoded = [
            EncodedPrompt(None, self._text.encode_chat(c, template_kwargs=template_kwargs), salt) for c in conversations
        ]
        return self._runs.run(self._runs.requests(encoded, sampling, adapter=adapter))

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams | Sequence[BeamSearchParams],
        *,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Search for the likeliest continuations of prompts; the choices of an output are hypotheses, best first.

        The beams of a prompt share the blocks that they have in common, and all prompts of a call run at once.

        Args:
            prompts: one prompt or several: text, `{"prompt": ...}`, or `{"prompt_token_ids": [...]}`. With a
                "cache_salt" in it cached prefixes are shared only with prompts of the same one.
            params: for all prompts, or one for each.
            adapter: as for `generate`.

        Raises:
            InvalidRequest: if a prompt or its parameters cannot be run; nothing has been started then.
            RequestFailed: if the engine could not compute one of them.
        """
        encoded = encode_all(self._text, prompts)
        return self._runs.run(self._runs.requests(encoded, params, adapter=adapter))

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Pooling = "last",
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[EmbeddingOutput]:
        """Return one unit vector per prompt: its last token's final hidden state, or the mean over its tokens.

        `adapter` is as for `generate`.
        """
        return self._runs.embed(encode_all(self._text, prompts), pooling, adapter)

    def warm(self, prompts: Prompt | Sequence[Prompt], *, adapter: str | None = None) -> list[WarmOutput]:
        """Compute prompts into the prefix cache and generate nothing; later prompts that begin alike are cheaper.

        What is warm is used like any cached prefix, and evicted like it; `pin` keeps it.

        Args:
            prompts: as for `generate`.
            adapter: whose prompts may hit it; None is the base model.

        Raises:
            InvalidRequest: if a prompt cannot be run, or the prefix cache is switched off; nothing has been started.
            RequestFailed: if the engine could not compute one of them.
        """
        requests = [self._warm_request(prompt, adapter) for prompt in encode_all(self._text, prompts)]
        updates = self._runs.run_pooled(requests)
        block_size = self.info.block_size
        return [warm_output(r, update, block_size) for r, update in zip(requests, updates, strict=True)]

    def pin(self, prompt: Prompt, *, adapter: str | None = None) -> Pin:
        """Compute a prompt into the prefix cache and hold its full blocks there, until `unpin`.

        `adapter` is as for `warm`.

        Raises:
            PinLimitReached: if pins would hold more than `max_pinned_share`; nothing has been computed then.
            InvalidRequest: if the prompt is shorter than a block or cannot be run, or there is no prefix cache.
            RequestFailed: if the engine could not compute it.

        Example:
            >>> pin = llm.pin("You are a helpful assistant. ...")  # doctest: +SKIP
            >>> llm.unpin(pin)  # doctest: +SKIP
        """
        (encoded,) = encode_all(self._text, [prompt])
        request = self._warm_request(encoded, adapter, pin=True)
        try:
            self._runs.run_pooled([request])
            return self._engine.pins.get(request.request_id)
        except BaseException:
            self._engine.pins.cancel(request.request_id)  # nobody will know its id
            raise

    def unpin(self, pin: Pin | str) -> None:
        """Let go of a pin, by itself or by its id; its blocks stay cached until they are evicted.

        Raises:
            UnknownPin: if there is no such pin.
        """
        self._engine.pins.drop(pin if isinstance(pin, str) else pin.pin_id)

    def pins(self) -> list[Pin]:
        """Return the pins that there are, oldest first."""
        return self._engine.pins.listed()

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes and drop all pins."""
        self._engine.pins.reset()

    def timeline(self, output: RequestOutput | str) -> RequestTimeline | None:
        """Return what happened to a request on its way: why it waited, its chunks, its preemptions.

        Args:
            output: of the request, or its id.

        Returns:
            None if it is unknown, or ended more than `max_num_timelines` requests ago.
        """
        return self._engine.scheduler.timeline(output if isinstance(output, str) else output.request_id)

    def load_adapter(self, name: str, path: str, *, in_place: bool = False) -> AdapterInfo:
        """Read an adapter (LoRA) and serve it under a name; `generate` and others take it as `adapter`.

        Args:
            name: what it is called.
            path: a folder in the layout of PEFT.
            in_place: whether it may take the place of another of this name.

        Raises:
            InvalidAdapter: if it cannot be read, or does not fit the model or its limits; nothing has changed.
            InvalidRequest: if the name is taken or empty.
            UnknownAdapter: if the engine was made without `enable_lora`.

        Example:
            >>> llm = LLM(enable_lora=True)  # doctest: +SKIP
            >>> llm.load_adapter("pirate", "/adapters/pirate")  # doctest: +SKIP
            >>> llm.generate("Hello", adapter="pirate")  # doctest: +SKIP
        """
        return self._engine.adapters.load(name, path, in_place=in_place)

    def unload_adapter(self, name: str) -> None:
        """Serve an adapter no more.

        Raises:
            UnknownAdapter: if no adapter has this name.
        """
        self._engine.adapters.unload(name)

    def adapters(self) -> list[AdapterInfo]:
        """Return the adapters that are served, in the order in which their names came."""
        return self._engine.adapters.listed() if self._engine.serves_adapters else []

    def sleep(self, level: int = 1) -> MemoryReport:
        """Let go of the weights and the KV cache, so that their memory is the system's until `wake_up`.

        Cached prefixes and pins are lost; outputs that were kept can be forked afterwards, from their tokens.

        Args:
            level: 1 to serve the same model again: `wake_up` restores it, and refuses files that are others by now. 2
                gives the weights up: `wake_up` takes what the files hold then.

        Raises:
            InvalidRequest: if there is no such level.

        Example:
            >>> report = llm.sleep()  # doctest: +SKIP
            >>> report.freed_bytes  # doctest: +SKIP
            412921856
            >>> llm.wake_up()  # doctest: +SKIP
        """
        check_level(level)
        standby = self._engine.standby
        begun = standby.measure()
        standby.sleep(level)
        return standby.report(begun)

    def wake_up(self, tags: Sequence[str] | None = None) -> MemoryReport:
        """Take the model into memory again; of an engine that is awake nothing changes.

        Args:
            tags: "weights" and "kv_cache" to wake in parts; None wakes what is missing.

        Raises:
            IncompatibleWeights: if the files are others than those that went to sleep (level 1), or do not fit.
            ModelNotFound, CorruptModelFile, UnsupportedModel: if they cannot be read any more.
        """
        standby = self._engine.standby
        begun, parts = standby.measure(), standby.needs(tags)
        standby.wake(parts, standby.read_weights() if "weights" in parts else None)
        return self._changed(begun)

    @property
    def is_sleeping(self) -> bool:
        """Whether `wake_up` must be called before anything can be generated."""
        return self._engine.standby.level > 0

    def update_weights_from_disk(self, path: str) -> MemoryReport:
        """Serve the weights of other files from now on, of the same shape and with the same tokenizer.

        They are read beside those that are served, which stay if anything fails; where there is no room for both,
        `sleep(level=2)` first. Nothing that was cached is used any more. The tokenizer, the chat template and the
        sampling defaults stay as they are.

        Args:
            path: a GGUF file, a folder in Hugging Face layout, or a hub id.

        Raises:
            IncompatibleWeights: if the model has another shape or tokenizer.
            ModelNotFound, CorruptModelFile, UnsupportedModel: if it cannot be read.
        """
        standby = self._engine.standby
        begun = standby.measure()
        standby.replace(standby.read_weights(path))
        return self._changed(begun)

    def _changed(self, begun: Measurement) -> MemoryReport:
        """Take note that there may be other weights; return what that took."""
        report = self._engine.standby.report(begun)
        self.info = replace(self.info, weights_digest=report.weights_digest)
        return report

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
        engine = self._engine
        return collect_stats(engine.scheduler, engine.adapter_stats, engine.overlap_stats, engine.expert_stats)

    def close(self) -> None:
        """Release the model's memory; the LLM cannot be used afterwards."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _warm_request(self, prompt: EncodedPrompt, adapter: str | None, *, pin: bool = False) -> Request:
        request = warm_request(
            self._text,
            prompt.token_ids,
            request_id=self._runs.next_id(),
            salt=prompt.salt,
            adapter=self._runs.adapters(adapter, 1)[0],
            pin=pin,
        )
        self._engine.pins.prepare(request)
        return request
