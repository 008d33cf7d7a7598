"""The command `octavo serve`: makes a model and settings of its options, and serves until it is told to stop."""

from __future__ import annotations

import gc
import logging
import os
import signal
from pathlib import Path

from rich.console import Console

from octavo_engine.config import EngineConfig
from octavo_engine.errors import InvalidConfig
from octavo_engine.parallel.torchrun import TorchrunRank
from octavo_server import options
from octavo_server.adapters import parse_modules
from octavo_server.config import DRAIN_SECONDS, ServerSettings
from octavo_server.endpoint import Endpoint, tls_of
from octavo_server.keys import read_keys
from octavo_server.loading import engine_report, load_adapters, load_engine
from octavo_server.logs import REQUESTS, set_up_logging
from octavo_server.store.store import Store, state_folder


def serve(
    model: options.ModelArgument = None,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    served_model_name: options.ServedModelName = None,
    dtype: options.Dtype = "auto",
    mode: options.Mode = "exact",
    quantization: options.Quantization = None,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    device: options.Device = "auto",
    deterministic: options.Deterministic = None,
    tensor_parallel_size: options.TensorParallelSize = 1,
    expert_parallel: options.ExpertParallel = False,
    pipeline_parallel_size: options.PipelineParallelSize = 1,
    enable_dbo: options.EnableDBO = False,
    dbo_token_threshold: options.DBOTokenThreshold = 32,
    max_model_len: options.MaxModelLen = None,
    block_size: options.BlockSize = 16,
    num_blocks: options.NumBlocks = None,
    kv_cache_gib: options.KVCacheGib = None,
    kv_cache_bytes: options.KVCacheBytes = None,
    host_kv_gib: options.HostKVGib = None,
    host_kv_bytes: options.HostKVBytes = None,
    preemption_mode: options.Preemption = "auto",
    max_num_seqs: options.MaxNumSeqs = 128,
    max_num_batched_tokens: options.MaxNumBatchedTokens = 1024,
    no_prefix_cache: options.NoPrefixCache = False,
    enforce_eager: options.EnforceEager = False,
    max_num_graphs: options.MaxNumGraphs = 40,
    max_num_mixed_graphs: options.MaxNumMixedGraphs = 24,
    max_pinned_share: options.MaxPinnedShare = 0.25,
    max_num_timelines: options.MaxNumTimelines = 512,
    enable_lora: options.EnableLora = False,
    lora_modules: options.LoraModules = None,
    lora_dir: options.LoraDir = None,
    max_loras: options.MaxLoras = 8,
    max_lora_rank: options.MaxLoraRank = 16,
    max_cpu_loras: options.MaxCpuLoras = None,
    lora_dtype: options.LoraDtype = "auto",
    tool_parser: options.ToolParser = "auto",
    reasoning_parser: options.ReasoningParser = "auto",
    threads: options.Threads = None,
    api_key: options.ApiKey = None,
    api_keys_file: options.ApiKeysFile = None,
    admin_api_key: options.AdminApiKey = None,
    allowed_origin: options.AllowedOrigin = None,
    max_num_requests: options.MaxNumRequests = 1024,
    max_body_bytes: options.MaxBodyBytes = 8 << 20,
    state_dir: options.StateDir = None,
    max_num_background: options.MaxNumBackground = 16,
    max_file_bytes: options.MaxFileBytes = 512 << 20,
    max_stored_bytes: options.MaxStoredBytes = 16 << 30,
    retention_days: options.RetentionDays = 30,
    request_timeout: options.RequestTimeout = None,
    watchdog_timeout: options.WatchdogTimeout = 120.0,
    executor: options.Executor = "processes",
    ray_address: options.RayAddress = None,
    ray_placement: options.RayPlacement = "pack",
    rank_timeout: options.RankTimeout = 6.0,
    drain_timeout: options.DrainTimeout = DRAIN_SECONDS,
    ssl_certfile: options.SslCertfile = None,
    ssl_keyfile: options.SslKeyfile = None,
    ssl_ca_certs: options.SslCaCerts = None,
    uds: options.Uds = None,
    access_log: options.AccessLog = True,
    log_format: options.LogFormat = "text",
    log_prompts: options.LogPrompts = False,
    otlp_traces_endpoint: options.OtlpTracesEndpoint = None,
    log_level: options.LogLevel = "info",
) -> None:
    """Serve a model under OpenAI's HTTP interface."""
    console = Console(stderr=True)
    set_up_logging(log_level, log_format)
    logging.getLogger(REQUESTS).setLevel(logging.NOTSET if access_log else logging.WARNING)
    tls = tls_of(ssl_certfile, ssl_keyfile, ssl_ca_certs)
    endpoint = Endpoint(host=host, port=port, uds=uds, tls=tls)
    settings = ServerSettings(
        served_model_names=tuple(served_model_name or ()),
        api_keys=tuple(api_key or ()),
        named_keys=read_keys(api_keys_file) if api_keys_file else (),
        admin_api_key=admin_api_key or None,
        local_only=endpoint.is_local,
        request_timeout=request_timeout,
        max_num_requests=max_num_requests,
        max_body_bytes=max_body_bytes,
        max_num_background=max_num_background,
        max_file_bytes=max_file_bytes,
        max_stored_bytes=max_stored_bytes,
        retention_days=retention_days,
        allowed_origins=tuple(allowed_origin or ()),
        log_prompts=log_prompts,
        otlp_traces_endpoint=otlp_traces_endpoint,
        lora_dir=lora_dir,
        lora_modules=parse_modules(lora_modules or ()),
    )
    config = EngineConfig(
        model=model,
        dtype=dtype,
        mode=mode,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        device=device,
        deterministic=deterministic,
        tensor_parallel_size=tensor_parallel_size,
        expert_parallel=expert_parallel,
        pipeline_parallel_size=pipeline_parallel_size,
        enable_dbo=enable_dbo,
        dbo_token_threshold=dbo_token_threshold,
        max_model_len=max_model_len,
        block_size=block_size,
        num_blocks=num_blocks,
        kv_cache_bytes=_bytes("kv-cache", kv_cache_gib, kv_cache_bytes),
        host_kv_bytes=_bytes("host-kv", host_kv_gib, host_kv_bytes),
        preemption_mode=preemption_mode,
        queue_policy="fair" if settings.has_keys else "arrival",
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        prefix_cache=not no_prefix_cache,
        enforce_eager=enforce_eager,
        max_num_graphs=max_num_graphs,
        max_num_mixed_graphs=max_num_mixed_graphs,
        max_pinned_share=max_pinned_share,
        max_num_timelines=max_num_timelines,
        watchdog_timeout=watchdog_timeout or None,
        executor=executor,
        ray_address=ray_address,
        ray_placement=ray_placement,
        rank_timeout=rank_timeout,
        enable_lora=enable_lora or bool(lora_modules) or lora_dir is not None,
        max_loras=max_loras,
        max_lora_rank=max_lora_rank,
        max_cpu_loras=max_cpu_loras,
        lora_dtype=lora_dtype,
        num_threads=threads,
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
    )
    if _follows(config):
        return
    folder = state_folder(state_dir, uds.name if uds else str(port) if port else None)
    _serve(config, settings, folder, console, endpoint, drain_timeout)


def _follows(config: EngineConfig) -> bool:
    """Be a rank that computes for another, if torchrun has started this process as one; return True at its end."""
    started = TorchrunRank.of(os.environ)
    if started is None:
        return False
    started.check_size(config.tensor_parallel_size, config.pipeline_parallel_size)
    if started.rank == 0:
        return False
    from octavo_engine.parallel.follower import follow
    from octavo_engine.parallel.team import JOIN_SECONDS

    # torchrun sends signals to all ranks at once: this one ends when rank 0 has let its requests end, or is gone.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    follow(
        started.host,
        started.port,
        started.rank,
        join_seconds=JOIN_SECONDS,
        local_rank=started.local_rank,
        in_lobby=True,
        ends_process=True,
    )
    return True


def _serve(
    config: EngineConfig,
    settings: ServerSettings,
    folder: Path | None,
    console: Console,
    endpoint: Endpoint,
    drain_seconds: float,
) -> None:
    from octavo_server.app import create_app
    from octavo_server.serving import allow_many_connections, listen_on, make_server

    allow_many_connections()
    # The socket and the store come first: a port or a folder in use is found before the model is loaded.
    with listen_on(endpoint) as listening, Store(folder) as store:
        engine = load_engine(config, console)
        try:
            adapters = load_adapters(engine, settings)
            console.print(engine_report(engine.info, engine.text.default_sampling))
            names = ", ".join([*(settings.served_model_names or (engine.info.model_name,)), *adapters])
            url = endpoint.url(None if endpoint.uds else listening.getsockname()[1])
            console.print(
                f"serving {names} at {url}" + (" with API keys" if settings.has_keys else ""),
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            console.print(
                f"responses, files and batches are kept in {folder or 'memory'}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            app = create_app(engine, settings, store)
            check = None if TorchrunRank.of(os.environ) is None else engine.check_health  # it starts rank 0 again
            drain = app.state.server.drain
            server = make_server(app, drain=drain, drain_seconds=drain_seconds, tls=endpoint.tls, check=check)
            gc.freeze()  # to walk all of what stays would hold every stream up
            server.run(sockets=[listening])
            if check is not None:
                check()
        finally:
            engine.close()
    console.print("stopped")


def _bytes(option: str, gib: float | None, num_bytes: int | None) -> int | None:
    if gib is not None and num_bytes is not None:
        raise InvalidConfig(f"--{option}-gib and --{option}-bytes both came; give one")
    return num_bytes if gib is None else int(gib * 2**30)
