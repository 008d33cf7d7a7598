"""Loads a model into an engine in this process, with a progress bar, and says what came of it."""

from __future__ import annotations

import asyncio
import atexit
import gc
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from octavo_engine.api import EngineInfo
from octavo_engine.async_engine import AsyncEngine
from octavo_engine.config import EngineConfig
from octavo_engine.errors import InvalidConfig
from octavo_server.config import ServerSettings


def load_engine(config: EngineConfig, console: Console) -> AsyncEngine:
    """Load a model and start its engine; the bar shows the weights loaded.

    Raises:
        InvalidConfig: if what runs models is not installed, or a setting does not fit.
        EngineError: if the model cannot be found, read or run.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with _without_collector(), bars as progress:
        bar = progress.add_task("loading weights", total=None)
        try:
            return AsyncEngine.from_config(
                config, progress=lambda num_done, total: progress.update(bar, completed=num_done, total=total)
            )
        except ModuleNotFoundError as error:
            raise InvalidConfig(
                f"running a model in this process needs {error.name}; install it: pip install 'octavo-server[local]'"
            ) from error


def load_adapters(engine: AsyncEngine, settings: ServerSettings) -> list[str]:
    """Load the adapters that are to be served from the start; return their names.

    Raises:
        InvalidConfig: an adapter has the name of the model itself.
        InvalidAdapter: one cannot be read, or does not fit.
    """
    taken = settings.served_model_names or (engine.info.model_name,)
    for name, path in settings.lora_modules:
        if name in taken:
            raise InvalidConfig(f"--lora-modules: {name!r} is the name of the model itself; use another")
        asyncio.run(engine.load_adapter(name, path))
    return [module.name for module in settings.lora_modules]


@contextmanager
def _without_collector() -> Generator[None]:
    """Keep the garbage collector still while modules and weights are loaded: it would look at all of them many times.

    What is there afterwards lives as long as the process, so that later collections pass over it; at the exit they see
    it again, since libraries complain of what nobody frees.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)
        gc.enable()


def engine_report(info: EngineInfo, default_sampling: Mapping[str, Any]) -> Table:
    """Return what was loaded, what was chosen for it, and what its authors advise, as a table of two columns."""
    num_slots = info.num_blocks * info.block_size
    rows = {
        "model": f"{info.model_name} ({info.architecture}, {info.num_parameters / 1e6:.0f} M parameters)",
        "compute": f"mode {info.mode}, {info.dtype} on {info.device}, kernels: {info.kernel_backend}"
        + (", deterministic" if info.deterministic else ""),
        "context": f"{info.max_model_len} tokens",
        "KV cache": f"{info.num_blocks} blocks of {info.block_size} tokens = {num_slots} tokens,"
        f" {info.kv_cache_bytes / 2**30:.2f} GiB of {info.kv_dtype}: {info.kv_cache_reason}",
        "batching": f"up to {info.max_num_seqs} sequences and {info.max_num_batched_tokens} tokens a step",
        "loaded in": f"{info.load_seconds:.1f} s",
    }
    num_ranks = info.tensor_parallel_size * info.pipeline_parallel_size
    if num_ranks > 1:
        rows["compute"] += f", split over {num_ranks} processes"
    if info.pipeline_parallel_size > 1:
        rows["compute"] += f" in {info.pipeline_parallel_size} stages"
    if info.num_host_blocks:
        size = f"{info.num_host_blocks} blocks, {info.host_kv_bytes / 2**30:.2f} GiB"
        rows["on the host"] = f"{size} for sequences that must wait: {info.host_kv_reason}"
    if default_sampling:
        advised = ", ".join(f"{name} {value}" for name, value in default_sampling.items())
        rows["sampling"] = f"{advised} by default, from the model's generation_config.json"
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", value.replace("[", r"\["))
    return table
