"""DemoEngines: engines of all shapes on one copy of the demo model's weights."""

from __future__ import annotations

from dataclasses import dataclass

from octavo_engine import EngineConfig
from octavo_engine.assembly import BuiltEngine
from octavo_engine.build import build_engine
from octavo_engine.engine import Engine
from octavo_engine.executor.inline import InlineExecutor
from octavo_engine.preemption import PreemptionPolicy, TransferCost
from octavo_engine.runner.model_runner import ModelRunner
from octavo_engine.scheduler import Scheduler
from octavo_kvcache import CacheManager
from octavo_kvcache.storage import KVStorage

MAX_MODEL_LEN = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """How an engine cuts its work up; with host blocks it swaps what it preempts while they last."""

    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 1024
    prefix_cache: bool = True
    num_host_blocks: int = 0


class DemoEngines:
    """Builds the demo model once, as `build_engine` does, and makes more engines on its weights.

    Args:
        options: of EngineConfig, beside the shape.

    Attributes:
        built: the engine that came with the weights: roomy, without a prefix cache.
    """

    def __init__(self, **options: str | bool) -> None:
        roomy = EngineConfig(
            max_model_len=MAX_MODEL_LEN, num_blocks=200, max_num_seqs=16, prefix_cache=False, host_kv_bytes=0, **options
        )
        self.built: BuiltEngine = build_engine(roomy)
        self._runner = runner_of(self.built.engine)

    def make(self, shape: Shape) -> Engine:
        """Return an engine of another shape."""
        runner = self._runner
        specs = runner.model.kv_cache_specs(runner.storage.layer(0)[0].dtype)
        own = ModelRunner(
            runner.model,
            KVStorage(specs, shape.num_blocks, shape.block_size, num_host_blocks=shape.num_host_blocks),
            max_num_seqs=shape.max_num_seqs,
            max_num_batched_tokens=shape.max_num_batched_tokens,
            max_model_len=MAX_MODEL_LEN,
            grammars=self.built.text._grammars,
        )
        cache = CacheManager(
            shape.num_blocks,
            shape.block_size,
            prefix_cache=shape.prefix_cache,
            deduplicate=self.built.info.deterministic,
            num_host_blocks=shape.num_host_blocks,
        )
        eos_token_ids = self.built.engine.scheduler._eos_token_ids
        scheduler = Scheduler(
            cache,
            max_num_seqs=shape.max_num_seqs,
            max_num_batched_tokens=shape.max_num_batched_tokens,
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=eos_token_ids,
            preemption=_swaps(shape) if shape.num_host_blocks else None,
        )
        return Engine(scheduler, InlineExecutor(own))


def _swaps(shape: Shape) -> PreemptionPolicy:
    """Return what swaps whenever the host has room."""
    return PreemptionPolicy(TransferCost(bytes_per_block=1, bytes_per_second=1.0), shape.block_size, mode="swap")


def runner_of(engine: Engine) -> ModelRunner:
    """Return what runs an engine's steps."""
    executor = engine._executor
    assert isinstance(executor, InlineExecutor)
    assert isinstance(executor._runner, ModelRunner)
    return executor._runner
