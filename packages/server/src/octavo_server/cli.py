"""The `octavo` command: serve, run, chat, version; what only one of them needs is imported by it."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from octavo_engine.config import EngineConfig
from octavo_engine.errors import EngineError, InvalidConfig
from octavo_engine.text.parsers.formats import REASONING_PARSERS, TOOL_PARSERS
from octavo_server.config import DRAIN_SECONDS, ServerSettings
from octavo_server.endpoint import Endpoint, tls_of
from octavo_server.keys import read_keys
from octavo_server.loading import engine_report, load_engine
from octavo_server.logs import LOG_FORMATS, REQUESTS, set_up_logging
from octavo_server.protocol.generation import GenerationBody
from octavo_server.protocol.violations import describe_violations
from octavo_server.store.store import Store, state_folder
from octavo_server.terminal import Conversation, stream_chat, stream_completion

_MODEL_HELP = "A GGUF file, a folder in Hugging Face layout, or a hub id. Default: the demo model."
_DTYPE_HELP = "Of activations and of the exact KV cache: auto, float32, bfloat16 or float16."
_MODE_HELP = "exact loses nothing; fast, on a CPU, rounds activations to 8 bits and keeps the KV cache in bfloat16."

ModelArgument = Annotated[str | None, typer.Argument(help=_MODEL_HELP, show_default=False)]
ModelOption = Annotated[str | None, typer.Option(help=_MODEL_HELP, show_default=False)]
Dtype = Annotated[str, typer.Option(help=_DTYPE_HELP)]
Mode = Annotated[str, typer.Option(help=_MODE_HELP)]
Device = Annotated[str, typer.Option(help="A torch device, or auto.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Limit on prompt and output together, in tokens.")]
Deterministic = Annotated[
    bool | None,
    typer.Option(
        "--deterministic/--no-deterministic",
        help="Answers do not depend on what else runs, bit for bit. Default: yes on a CPU; a GPU cannot.",
        show_default=False,
    ),
]
Threads = Annotated[int | None, typer.Option(help="Threads of the CPU kernels.")]
KVCacheGib = Annotated[float | None, typer.Option(help="Memory for the KV cache, in GiB.")]
KVCacheBytes = Annotated[int | None, typer.Option(help="Memory for the KV cache, in bytes.")]
HostKVGib = Annotated[
    float | None,
    typer.Option(
        help="Memory of the host for sequences that must wait, in GiB. Default: 0 on a CPU, up to 4 on a GPU."
    ),
]
HostKVBytes = Annotated[int | None, typer.Option(help="Memory of the host for sequences that must wait, in bytes.")]
_PREEMPTION_HELP = "Of sequences that lose their blocks: auto takes what costs less, else recompute or swap."
Preemption = Annotated[str, typer.Option(help=_PREEMPTION_HELP)]
MaxTokens = Annotated[int | None, typer.Option(help="The most tokens to generate. Default: what the context holds.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy. Default: the model's own.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the likeliest tokens of this total probability.")]
TopK = Annotated[int | None, typer.Option(help="Sample from this many of the likeliest tokens.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
System = Annotated[str | None, typer.Option(help="A system message to begin with.")]

app = typer.Typer(
    name="octavo",
    help="Serve and run language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def serve(
    model: ModelArgument = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name for requests to use; may be given several times.")
    ] = None,
    dtype: Dtype = "auto",
    mode: Mode = "exact",
    device: Device = "auto",
    deterministic: Deterministic = None,
    max_model_len: MaxModelLen = None,
    block_size: Annotated[int, typer.Option(help="Tokens in a block of the KV cache.")] = 16,
    num_blocks: Annotated[int | None, typer.Option(help="Blocks in the KV cache.")] = None,
    kv_cache_gib: KVCacheGib = None,
    kv_cache_bytes: KVCacheBytes = None,
    host_kv_gib: HostKVGib = None,
    host_kv_bytes: HostKVBytes = None,
    preemption_mode: Preemption = "auto",
    max_num_seqs: Annotated[int, typer.Option(help="Sequences that may run in one step.")] = 128,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Token budget of one step.")] = 1024,
    no_prefix_cache: Annotated[bool, typer.Option("--no-prefix-cache", help="Compute every prompt whole.")] = False,
    max_pinned_share: Annotated[float, typer.Option(help="Share of the KV cache that pins may hold.")] = 0.25,
    max_num_timelines: Annotated[
        int, typer.Option(help="Ended requests whose timelines are remembered; 0 notes nothing.")
    ] = 512,
    tool_parser: Annotated[
        str, typer.Option(help=f"How the model writes tool calls: {', '.join(TOOL_PARSERS)}.")
    ] = "auto",
    reasoning_parser: Annotated[
        str, typer.Option(help=f"How the model marks reasoning: {', '.join(REASONING_PARSERS)}.")
    ] = "auto",
    threads: Threads = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Key that requests must bring; may be given several times.", envvar="OCTAVO_API_KEY"),
    ] = None,
    api_keys_file: Annotated[
        Path | None, typer.Option(help="TOML file of keys with names and limits: a table [keys.NAME] each.")
    ] = None,
    admin_api_key: Annotated[
        str | None, typer.Option(help="Key that opens the admin routes.", envvar="OCTAVO_ADMIN_API_KEY")
    ] = None,
    allowed_origin: Annotated[
        list[str] | None, typer.Option(help="Web origin that browsers may call from; may be given several times.")
    ] = None,
    max_num_requests: Annotated[int, typer.Option(help="Requests that may run or wait at once.")] = 1024,
    max_body_bytes: Annotated[int, typer.Option(help="The largest request body, in bytes.")] = 8 << 20,
    state_dir: Annotated[
        str | None,
        typer.Option(help="Folder of stored responses, files and batches. Default: one per port; :memory: keeps none."),
    ] = None,
    max_num_background: Annotated[
        int, typer.Option(help="Lines of batches and background responses that run at once.")
    ] = 16,
    max_file_bytes: Annotated[int, typer.Option(help="The largest uploaded file, in bytes.")] = 512 << 20,
    max_stored_bytes: Annotated[int, typer.Option(help="Stored files take no more than about this.")] = 16 << 30,
    retention_days: Annotated[int, typer.Option(help="How long responses and ended batches are kept.")] = 30,
    request_timeout: Annotated[
        float | None, typer.Option(help="Seconds that a request may take. Default: no limit.")
    ] = None,
    watchdog_timeout: Annotated[
        float, typer.Option(help="Seconds that a step may take before /health is 503; 0 lets it take any time.", min=0)
    ] = 120.0,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds that requests have to end after SIGTERM.", min=0)
    ] = DRAIN_SECONDS,
    ssl_certfile: Annotated[Path | None, typer.Option(help="Certificate of the server, in PEM, for HTTPS.")] = None,
    ssl_keyfile: Annotated[
        Path | None, typer.Option(help="Private key of the certificate, if not in its file.")
    ] = None,
    ssl_ca_certs: Annotated[
        Path | None, typer.Option(help="Roots; clients must then show a certificate of one of them.")
    ] = None,
    uds: Annotated[Path | None, typer.Option(help="Unix socket to listen on in place of a host and port.")] = None,
    access_log: Annotated[
        bool, typer.Option("--access-log/--no-access-log", help="A line in the log for each HTTP request.")
    ] = True,
    log_format: Annotated[str, typer.Option(help=f"How the log is written: {' or '.join(LOG_FORMATS)}.")] = "text",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log.")] = False,
    otlp_traces_endpoint: Annotated[
        str | None, typer.Option(help="Collector for OpenTelemetry traces, such as http://localhost:4318/v1/traces.")
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve a model under OpenAI's HTTP interface."""
    console = Console(stderr=True)
    with _clear_errors(console):
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
        )
        config = EngineConfig(
            model=model,
            dtype=dtype,
            mode=mode,
            device=device,
            deterministic=deterministic,
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
            max_pinned_share=max_pinned_share,
            max_num_timelines=max_num_timelines,
            watchdog_timeout=watchdog_timeout or None,
            num_threads=threads,
            tool_parser=tool_parser,
            reasoning_parser=reasoning_parser,
        )
        folder = state_folder(state_dir, uds.name if uds else str(port) if port else None)
        _serve(config, settings, folder, console, endpoint, drain_timeout)


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
            console.print(engine_report(engine.info, engine.text.default_sampling))
            names = ", ".join(settings.served_model_names or (engine.info.model_name,))
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
            server = make_server(app, drain=app.state.server.drain, drain_seconds=drain_seconds, tls=endpoint.tls)
            gc.freeze()  # to walk all of what stays would hold every stream up
            server.run(sockets=[listening])
        finally:
            engine.close()
    console.print("stopped")


@app.command()
def run(
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads it from standard input.")],
    model: ModelOption = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Go on from the prompt, without the model's chat template.")
    ] = False,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stats: Annotated[bool, typer.Option("--stats", help="Say how fast the answer came, on standard error.")] = False,
    dtype: Dtype = "auto",
    mode: Mode = "exact",
    device: Device = "auto",
    deterministic: Deterministic = None,
    max_model_len: MaxModelLen = None,
    threads: Threads = None,
) -> None:
    """Answer one prompt in the terminal."""
    console = Console(stderr=True)
    with _clear_errors(console):
        set_up_logging("warning")
        options = _sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        if raw and system is not None:
            raise InvalidConfig("--system goes with the chat template, --raw came too; leave one out")
        text = sys.stdin.read() if prompt == "-" else prompt
        config = EngineConfig(
            model=model,
            dtype=dtype,
            mode=mode,
            device=device,
            deterministic=deterministic,
            max_model_len=max_model_len,
            max_num_seqs=1,
            num_threads=threads,
        )
        engine = load_engine(config, console)
        try:
            if raw:
                answer = asyncio.run(stream_completion(engine, text, options, _write))
            else:
                messages = [{"role": "system", "content": system}] if system else []
                messages.append({"role": "user", "content": text})
                answer = asyncio.run(stream_chat(engine, messages, options, _write))
        finally:
            engine.close()
        _write("\n")
        if stats:
            console.print(answer.speed, style="dim")


@app.command()
def chat(
    model: ModelOption = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    mode: Mode = "exact",
    device: Device = "auto",
    deterministic: Deterministic = None,
    max_model_len: MaxModelLen = None,
    threads: Threads = None,
) -> None:
    """Talk with a model in the terminal."""
    console = Console()
    with _clear_errors(Console(stderr=True)):
        set_up_logging("warning")
        options = _sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        config = EngineConfig(
            model=model,
            dtype=dtype,
            mode=mode,
            device=device,
            deterministic=deterministic,
            max_model_len=max_model_len,
            max_num_seqs=1,
            num_threads=threads,
        )
        engine = load_engine(config, console)
        try:
            console.print(engine_report(engine.info, engine.text.default_sampling))
            Conversation(engine, console, options, system).run()
        finally:
            engine.close()


@app.command()
def version() -> None:
    """Print the versions of Octavo's packages."""
    from octavo_server.routes.health import installed_versions

    for name, number in installed_versions().items():
        typer.echo(f"{name} {number}")


def main() -> None:
    """Run the command line."""
    app()


@contextmanager
def _clear_errors(console: Console) -> Generator[None, None, None]:
    """Turn a user's mistake into one line and exit code 2; anything else keeps its traceback."""
    try:
        yield
    except (EngineError, ValidationError) as error:
        message = describe_violations(error)[0] if isinstance(error, ValidationError) else str(error)
        console.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _bytes(option: str, gib: float | None, num_bytes: int | None) -> int | None:
    if gib is not None and num_bytes is not None:
        raise InvalidConfig(f"--{option}-gib and --{option}-bytes both came; give one")
    return num_bytes if gib is None else int(gib * 2**30)


def _sampling(**options: Any) -> dict[str, Any]:
    """Return the options that were given, checked before a model is loaded for them."""
    given = {name: value for name, value in options.items() if value is not None}
    GenerationBody.model_validate(given)
    return given


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
