"""The `octavo` command: serve, run, chat, quantize, version; what only one of them needs is imported by it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Generator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import typer
from pydantic import ValidationError
from rich.console import Console

from octavo_engine.config import EngineConfig
from octavo_engine.errors import EngineError, InvalidConfig
from octavo_server import options
from octavo_server.loading import engine_report, load_engine
from octavo_server.logs import set_up_logging
from octavo_server.protocol.generation import GenerationBody
from octavo_server.protocol.violations import describe_violations
from octavo_server.quantizing import quantize as quantize_model
from octavo_server.serve_command import serve as serve_model
from octavo_server.terminal import Conversation, stream_chat, stream_completion

app = typer.Typer(
    name="octavo",
    help="Serve and run language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
@wraps(serve_model)
def serve(**values: Any) -> None:
    """Run the command, which is in its own module, as its options are."""
    with _clear_errors(Console(stderr=True)):
        serve_model(**values)


@app.command()
def run(
    prompt: options.Prompt,
    model: options.ModelOption = None,
    raw: options.Raw = False,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    stats: options.Stats = False,
    dtype: options.Dtype = "auto",
    mode: options.Mode = "exact",
    quantization: options.Quantization = None,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    device: options.Device = "auto",
    deterministic: options.Deterministic = None,
    max_model_len: options.MaxModelLen = None,
    threads: options.Threads = None,
) -> None:
    """Answer one prompt in the terminal."""
    console = Console(stderr=True)
    with _clear_errors(console):
        set_up_logging("warning")
        sampling = _sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        if raw and system is not None:
            raise InvalidConfig("--system goes with the chat template, --raw came too; leave one out")
        text = sys.stdin.read() if prompt == "-" else prompt
        config = EngineConfig(
            model=model,
            dtype=dtype,
            mode=mode,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            device=device,
            deterministic=deterministic,
            max_model_len=max_model_len,
            max_num_seqs=1,
            num_threads=threads,
        )
        engine = load_engine(config, console)
        try:
            if raw:
                answer = asyncio.run(stream_completion(engine, text, sampling, _write))
            else:
                messages = [{"role": "system", "content": system}] if system else []
                messages.append({"role": "user", "content": text})
                answer = asyncio.run(stream_chat(engine, messages, sampling, _write))
        finally:
            engine.close()
        _write("\n")
        if stats:
            console.print(answer.speed, style="dim")


@app.command()
def chat(
    model: options.ModelOption = None,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    dtype: options.Dtype = "auto",
    mode: options.Mode = "exact",
    quantization: options.Quantization = None,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    device: options.Device = "auto",
    deterministic: options.Deterministic = None,
    max_model_len: options.MaxModelLen = None,
    threads: options.Threads = None,
) -> None:
    """Talk with a model in the terminal."""
    console = Console()
    with _clear_errors(Console(stderr=True)):
        set_up_logging("warning")
        sampling = _sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        config = EngineConfig(
            model=model,
            dtype=dtype,
            mode=mode,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            device=device,
            deterministic=deterministic,
            max_model_len=max_model_len,
            max_num_seqs=1,
            num_threads=threads,
        )
        engine = load_engine(config, console)
        try:
            console.print(engine_report(engine.info, engine.text.default_sampling))
            Conversation(engine, console, sampling, system).run()
        finally:
            engine.close()


@app.command()
@wraps(quantize_model)
def quantize(**values: Any) -> None:
    """Run the command, whose options are in its own module."""
    with _clear_errors(Console(stderr=True)):
        set_up_logging("warning")
        quantize_model(**values)


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


def _sampling(**wanted: Any) -> dict[str, Any]:
    """Return the parameters that were given, checked before a model is loaded for them."""
    given = {name: value for name, value in wanted.items() if value is not None}
    GenerationBody.model_validate(given)
    return given


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
