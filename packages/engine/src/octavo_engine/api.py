"""The engine as a front end sees it, in this process or in another: what it is, how it does, how to ask it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from octavo_engine.adapters.info import AdapterInfo, AdapterStats
from octavo_engine.branch import Branch
from octavo_engine.expert_stats import ExpertStats
from octavo_engine.overlap import OverlapStats
from octavo_engine.pins import Pin
from octavo_engine.preemption import PreemptionStats
from octavo_engine.standby import MemoryReport, SleepMode
from octavo_engine.text.processor import TextProcessor
from octavo_engine.timeline import RequestTimeline
from octavo_engine.types import CachedTokens, CompletionDelta, EmbeddingOutput, Request, WarmOutput
from octavo_kvcache import CacheStats


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine serves and how it was set up; fixed for its lifetime, but for the weights.

    `dtype` is that of activations, `kv_dtype` that of the KV cache; `mode` is exact or fast, as in EngineConfig.
    `kernel_backend` names the backend, and for CPUs what it runs on: an instruction set, or torch. `deterministic` says
    whether answers are the same, bit for bit, in every company; see EngineConfig. `host_kv_bytes` is what sequences
    that must wait have in the host's memory, and `host_kv_reason` why. `weights_digest` stands for the contents of the
    model's files; it is another one after other weights were loaded. `tensor_parallel_size` counts the processes that
    each layer is split over, `pipeline_parallel_size` the stages that the layers are shared out among;
    `kv_cache_bytes` and `host_kv_bytes` are those of all processes.
    """

    model_name: str
    architecture: str
    dtype: str
    kv_dtype: str
    mode: str
    device: str
    kernel_backend: str
    deterministic: bool
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    kv_cache_bytes: int
    kv_cache_reason: str
    num_parameters: int
    load_seconds: float
    num_host_blocks: int = 0
    host_kv_bytes: int = 0
    host_kv_reason: str = ""
    weights_digest: str = ""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Gauges of the present and counters since the start, counted exactly by the engine.

    `mean_waste` is 1 - live unique tokens / (allocated blocks x block size), averaged over all steps so far.
    `num_held_up` counts the times a step left somebody waiting, by `WaitReason`. `num_lost_steps` counts steps in which
    a process that held a part of the model was lost, after which everything was computed again.
    `cached_prompt_tokens` are those of requests when they were first admitted; `cache` counts the look-ups of sequences
    that resume apart. `finished` counts sequences by finish reason. `fallbacks` names kernels that did not run on the
    wanted backend. `adapters` counts what adapters took, `overlap` the steps that were launched before earlier ones
    had been read, `experts` which experts of a mixture the tokens went to.
    """

    num_running: int
    num_waiting: int
    num_steps: int
    num_preemptions: int
    num_prompt_tokens: int
    cached_prompt_tokens: CachedTokens
    num_generation_tokens: int
    mean_waste: float
    cache: CacheStats
    preemption: PreemptionStats = field(default_factory=PreemptionStats)
    finished: Mapping[str, int] = field(default_factory=dict)
    num_held_up: Mapping[str, int] = field(default_factory=dict)
    num_lost_steps: int = 0
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    adapters: AdapterStats = field(default_factory=AdapterStats)
    overlap: OverlapStats = field(default_factory=OverlapStats)
    experts: ExpertStats = field(default_factory=ExpertStats)

    @property
    def num_cached_prompt_tokens(self) -> int:
        """Prompt tokens that were not computed."""
        return self.cached_prompt_tokens.total


class EngineClient(Protocol):
    """What the server needs of an engine."""

    @property
    def info(self) -> EngineInfo:
        """What is served."""
        ...

    @property
    def text(self) -> TextProcessor:
        """The model's tokenizer, chat template and limits, for making requests."""
        ...

    def generate(self, request: Request) -> AsyncGenerator[list[CompletionDelta]]:
        """Run a request; yield what is new as it comes, several choices at once if they moved together.

        Every choice ends with exactly one delta that has a finish reason. Closing the iterator early, or cancelling
        the task that reads it, aborts the request. One generator needs `aclosing` around it for that to be prompt.

        Raises:
            RequestFailed: if the engine could not compute this request.
            UnknownAdapter, InvalidAdapter: if its adapter is not served, or could not be read again.
            EngineDead: if the engine has stopped.
        """
        ...

    async def run(self, request: Request, take: Callable[[list[CompletionDelta]], None]) -> None:
        """Run a request to its end; `take` is called on this event loop with what is new as soon as it comes.

        It brings what `generate` would, and costs less: no task wakes for it. `take` must return at once. An exception
        that it raises aborts the request and is raised here; so does cancelling the caller's task. The same errors as
        `generate`.
        """
        ...

    async def embed(self, request: Request) -> EmbeddingOutput:
        """Run a request with task `embed`; same errors as `generate`."""
        ...

    async def branch_tokens(self, branch: Branch, salt: bytes = b"") -> list[int]:
        """Return the tokens that a branch of a running or kept request begins with.

        Raises:
            InvalidRequest: if the parent neither runs nor is kept, or has fewer tokens.
            EngineDead: if the engine has stopped.
        """
        ...

    async def warm(self, request: Request) -> WarmOutput:
        """Run a request of `warming.warm_request`: compute its prompt into the prefix cache; same errors as `generate`.

        Raises:
            InvalidRequest: if there is no prefix cache.
        """
        ...

    async def pin(self, request: Request) -> Pin:
        """Do as `warm` does, with a request that pins: its full blocks stay in the cache, under the request's id.

        A pin whose caller leaves before it is there is dropped.

        Raises:
            PinLimitReached: if pins would hold more than they may; nothing has been computed then.
            InvalidRequest: if the prompt is shorter than a block, or there is no prefix cache.
        """
        ...

    async def unpin(self, pin_id: str, salt: bytes | None = None) -> None:
        """Let go of a pin; with a salt, only if it is the pin's.

        Raises:
            UnknownPin: if there is none of this id and salt.
        """
        ...

    async def pins(self, salt: bytes | None = None) -> list[Pin]:
        """Return the pins of one salt, or of all, oldest first."""
        ...

    async def reset_prefix_cache(self) -> None:
        """Forget all cached content and drop all pins; requests that run go on."""
        ...

    async def timeline(self, request_id: str) -> RequestTimeline | None:
        """Return what has happened to a request; None if it is unknown, or ended too long ago.

        Raises:
            EngineDead: if the engine has stopped.
        """
        ...

    async def sleep(self, level: int = 1, mode: SleepMode | None = None) -> MemoryReport:
        """Let go of the weights and the KV cache; requests are refused with EngineAsleep until `wake_up`.

        Cached prefixes and pins are lost, kept answers keep their tokens.

        Args:
            level: 1 to serve the same model again, 2 to give its weights up; see `Standby`.
            mode: `wait` until the requests that run or wait have ended, taking no more; or `abort` them: their readers
                get EngineAsleep. None refuses to sleep while there are any.

        Raises:
            EngineInUse: requests run or wait, or the engine falls asleep, wakes or changes its weights already.
            InvalidRequest: there is no such level or mode.
        """
        ...

    async def wake_up(self, tags: Sequence[str] | None = None) -> MemoryReport:
        """Take the model into memory again; of an engine that is awake nothing changes.

        Args:
            tags: `weights` and `kv_cache` to wake in parts; None wakes what is missing.

        Raises:
            IncompatibleWeights: the files are others than those that went to sleep (level 1), or do not fit.
            ModelNotFound, CorruptModelFile, UnsupportedModel: they cannot be read any more.
            EngineInUse: as for `sleep`.
        """
        ...

    async def update_weights_from_disk(self, path: str, mode: SleepMode | None = None) -> MemoryReport:
        """Serve the weights of other files from now on; if anything fails, those that were served stay.

        Requests are refused with EngineAsleep meanwhile. Nothing that was cached is used any more.

        Args:
            path: a GGUF file, a folder in Hugging Face layout, or a hub id.
            mode: as for `sleep`.

        Raises:
            IncompatibleWeights: the model has another shape or tokenizer.
            ModelNotFound, CorruptModelFile, UnsupportedModel: it cannot be read.
            EngineInUse: as for `sleep`.
        """
        ...

    @property
    def sleep_level(self) -> int:
        """How deep the engine sleeps; 0 is awake."""
        ...

    async def load_adapter(self, name: str, path: str, *, in_place: bool = False) -> AdapterInfo:
        """Read an adapter (LoRA) and serve it under a name, which requests give as `Request.adapter`.

        Loaded in place it takes the place of the one of this name: requests that were added before keep the old one to
        their ends, those that come after get the new one, and no cached prefix of the one serves the other.

        Args:
            name: what requests are to call it.
            path: a folder in the layout of PEFT.
            in_place: whether it may take the place of another.

        Raises:
            InvalidAdapter: it cannot be read, or does not fit the model or its limits; nothing has changed.
            InvalidRequest: the name is taken or empty.
            UnknownAdapter: this engine serves none.
        """
        ...

    async def unload_adapter(self, name: str) -> None:
        """Serve an adapter no more; requests that were added before go on with it.

        Raises:
            UnknownAdapter: no adapter has this name.
        """
        ...

    def adapters(self) -> list[AdapterInfo]:
        """Return the adapters that are served, in the order in which their names came."""
        ...

    async def release(self, request_id: str) -> bool:
        """Drop what is kept of an ended request, whose blocks are then free; False if nothing is.

        Raises:
            EngineDead: if the engine has stopped.
        """
        ...

    def stats(self) -> EngineStats:
        """Return the present figures."""
        ...

    def check_health(self) -> None:
        """Return if the engine lives, awake or asleep; raise EngineDead or EngineStuck with the reason if not."""
        ...

    def check_ready(self) -> None:
        """Return if requests are taken.

        Raises:
            EngineDead: the engine has stopped.
            EngineAsleep: it sleeps, or is about to, or its weights are being replaced.
        """
        ...
