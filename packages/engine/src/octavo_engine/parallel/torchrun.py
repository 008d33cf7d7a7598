"""TorchrunRank: which rank of a model this process is, if torchrun has started it and the others, on any machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from octavo_engine.errors import InvalidConfig


@dataclass(frozen=True, slots=True)
class TorchrunRank:
    """What torchrun says of a process, in its environment.

    `host` and `port` are those of torchrun's own store, where the ranks meet, and which outlives them.
    """

    rank: int
    size: int
    local_rank: int
    host: str
    port: int

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> TorchrunRank | None:
        """Return what an environment says; None if torchrun has not made it."""
        if "TORCHELASTIC_RUN_ID" not in environ:
            return None
        return cls(
            rank=int(environ["RANK"]),
            size=int(environ["WORLD_SIZE"]),
            local_rank=int(environ["LOCAL_RANK"]),
            host=environ["MASTER_ADDR"],
            port=int(environ["MASTER_PORT"]),
        )

    def check_size(self, tensor_parallel_size: int, pipeline_parallel_size: int = 1) -> None:
        """Refuse another number of ranks than torchrun has started.

        Raises:
            InvalidConfig: says both.
        """
        num_ranks = tensor_parallel_size * pipeline_parallel_size
        if num_ranks == self.size:
            return
        if pipeline_parallel_size == 1:
            raise InvalidConfig(
                f"torchrun has started {self.size} processes, tensor_parallel_size is {tensor_parallel_size}; give "
                "both the same number"
            )
        sizes = describe_sizes(tensor_parallel_size, pipeline_parallel_size)
        raise InvalidConfig(f"torchrun has started {self.size} processes, {sizes} needs {num_ranks}; start as many")


def describe_sizes(tensor_parallel_size: int, pipeline_parallel_size: int) -> str:
    """Return the settings that make several ranks, for errors."""
    sizes = {"tensor_parallel_size": tensor_parallel_size, "pipeline_parallel_size": pipeline_parallel_size}
    given = {name: size for name, size in sizes.items() if size > 1} or {"tensor_parallel_size": 1}
    return " x ".join(f"{name} {size}" for name, size in given.items())
