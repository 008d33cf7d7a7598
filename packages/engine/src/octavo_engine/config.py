"""How an engine is set up: one frozen configuration, validated once, free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from octavo_engine.config_checks import check_config


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What a user may choose; each part of the engine is given the values it uses, never the whole.

    Attributes:
        model: a GGUF file, a folder in Hugging Face layout, a hub id, or None for the demo model.
        dtype: of activations; `auto` is float32 on a CPU, the checkpoint's own on a GPU. Where products are native (on
            a CPU, with float32) weights stay as they are stored, elsewhere they are converted to it.
        mode: `exact` loses nothing: stored weights as they are, activations and KV cache in `dtype`. `fast` is for
            CPUs: activations are rounded to 8 bits per group of 32 before products by weights in GGUF's block formats
            (products by dense weights stay in float32), and the KV cache is bfloat16.
        quantization: rounds the linears of a model that is not quantised as it is read: `int8` to 8 bits with a scale
            per group of 32 inputs, `int4` to 4 bits with a scale and a least value, for CPUs with native kernels and
            GPUs with Triton; `fp8` to e4m3 with a scale per output, for one process. None leaves them as they are
            stored.
        kv_cache_dtype: of keys and values in the KV cache; `auto` is what `mode` says. `int8` and `fp8` (e4m3, on GPUs
            of compute capability 8.9 or newer) take about a quarter of float32's memory: each cached vector is rounded
            by a scale of its own, whatever else runs, or by the checkpoint's where it has some for a KV cache.
        device: a torch device; `auto` is `cuda` when there is one, else `cpu`.
        deterministic: whether tokens and log-probabilities of a request are the same, bit for bit, whatever else runs,
            however prompts are cut, cached, shared or preempted. None: True on a CPU, False elsewhere, where it cannot
            be had. With native kernels it costs nothing; where torch multiplies, rows are filled up for it. Where it
            holds, requests that compute the same prompt at once end up with one copy of its blocks.
        max_model_len: limit on prompt and output together, in tokens; None is the model's own, or what the KV cache
            can hold if that is less.
        block_size: tokens in a block of the KV cache.
        num_blocks: blocks in the KV cache; None sizes it from `kv_cache_bytes`.
        kv_cache_bytes: memory for the KV cache; None lets the engine choose, and it says what it chose.
        host_kv_bytes: memory of the host where sequences that must wait can keep their blocks; 0 computes them again.
            None is 0 on a CPU, whose KV cache is in the same memory, and up to 4 GiB on a GPU.
        preemption_mode: of sequences that lose their blocks: `auto` swaps them to the host where that takes less time
            than to compute them again, `swap` whenever there is room, `recompute` never.
        queue_policy: who is served next among those that wait: `arrival` goes by priority and arrival; `fair` takes the
            tenant that was served least, in tokens, and its requests by priority and arrival.
        max_num_seqs: sequences that may run in one step.
        max_num_batched_tokens: token budget of one step; longer prompts are computed in chunks.
        prefix_cache: whether finished blocks are kept for prompts that begin alike.
        max_pinned_share: share of the KV cache that pins may hold; less if the longest sequence would not fit beside.
        max_num_kept: ended sequences that are kept for forks, of requests that ask for it.
        max_num_timelines: ended requests of which is remembered what happened to them; 0 notes nothing.
        watchdog_timeout: seconds that a step may take before the engine counts as stuck; None lets it take any time.
            Where layers are shared out among stages, a stage that takes as long is replaced (after a day, with None).
        enable_lora: whether requests may name adapters (LoRA).
        max_loras: adapters that sequences may run with at once; memory for so many of the highest rank is set aside.
        max_lora_rank: the highest rank that an adapter may have.
        max_cpu_loras: adapters that are kept in the host's memory; None is `max_loras`. The others are read again when
            a request names them.
        lora_dtype: of adapters' matrices; `auto` is that of activations. With bfloat16 they take half the memory and
            time of float32; products are summed in float32 in any case.
        num_threads: of the CPU kernels; None is torch's choice. Each rank has as many, None shares torch's among them.
        tensor_parallel_size: ranks that the model is split over, each with its part of the weights and the KV cache:
            this process, and others that it, or torchrun, starts. On GPUs each takes one. A model's heads must come
            out even; what is refused says which sizes work.
        expert_parallel: whether a rank has whole experts of a mixture, `num_experts / tensor_parallel_size` of them,
            instead of a part of each.
        pipeline_parallel_size: stages that the model's layers are shared out among, each of `tensor_parallel_size`
            ranks; as many steps are computed at once. No more than there are layers.
        executor: what runs the other ranks: `processes` of this machine, or those that torchrun has started; or `ray`,
            actors of a Ray cluster that this machine is a node of (extra `ray`).
        ray_address: of the cluster's head, as host:port; None is RAY_ADDRESS, or else the cluster that this machine is
            a node of.
        ray_placement: of ranks on its nodes, as Ray's placement groups have it: `pack`, `spread`, `strict_pack` or
            `strict_spread`. Rank 0 is this process, on its own node. A rank takes one GPU, or as many CPUs as it has
            threads.
        rank_timeout: seconds that the machine of a rank may be out of reach before the rank counts as lost; the
            operating systems of both machines find out, so that a busy one is not mistaken for a lost one.
        enable_dbo: whether steps of many tokens are computed as two halves (dual batch overlap), each while the ranks
            add up their parts of the other. It pays where sums take long.
        dbo_token_threshold: tokens from which on a step is halved then.
        enforce_eager: whether a GPU runs every step op by op. Otherwise steps of up to 512 tokens are captured as
            graphs, one for each of some sizes as they first occur, and replayed; memory is set aside for them.
        max_num_graphs: how many such graphs of decode steps there may be; fewer take less memory and fill steps up with
            more rows.
        max_num_mixed_graphs: how many of steps in which a sequence computes several tokens; 0 runs those op by op.
        tool_parser: how the model writes tool calls; `auto` goes by its chat template.
        reasoning_parser: how it marks reasoning; `auto` goes by its chat template, `none` leaves it in the text.

    Raises:
        InvalidConfig: if a value is out of range; names it, what was expected and what came.
    """

    model: str | None = None
    dtype: str = "auto"
    mode: str = "exact"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    device: str = "auto"
    deterministic: bool | None = None
    max_model_len: int | None = None
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_bytes: int | None = None
    host_kv_bytes: int | None = None
    preemption_mode: str = "auto"
    queue_policy: str = "arrival"
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 1024
    prefix_cache: bool = True
    max_pinned_share: float = 0.25
    max_num_kept: int = 64
    max_num_timelines: int = 512
    watchdog_timeout: float | None = 120.0
    enable_lora: bool = False
    max_loras: int = 8
    max_lora_rank: int = 16
    max_cpu_loras: int | None = None
    lora_dtype: str = "auto"
    num_threads: int | None = None
    tensor_parallel_size: int = 1
    expert_parallel: bool = False
    pipeline_parallel_size: int = 1
    executor: str = "processes"
    ray_address: str | None = None
    ray_placement: str = "pack"
    rank_timeout: float = 6.0
    enable_dbo: bool = False
    dbo_token_threshold: int = 32
    enforce_eager: bool = False
    max_num_graphs: int = 40
    max_num_mixed_graphs: int = 24
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"

    def __post_init__(self) -> None:
        check_config(self)

    @property
    def num_ranks(self) -> int:
        """Processes that run the model together."""
        return self.tensor_parallel_size * self.pipeline_parallel_size
