"""Stage: consecutive layers of a model that one rank, or one group of ranks, computes (pipeline parallelism).

The first stage has the embedding too, the last one the final norm and the head; where embedding and head are one
matrix, both have it. Layers are shared out so that the stage with the most bytes of weights has as few as possible, as
GPipe evens out costs (arXiv 1811.06965, section 2).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from octavo_engine.errors import InvalidConfig
from octavo_engine.models.config import ModelConfig

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EMBEDDING = "model.embed_tokens."
_HEAD = "lm_head."


@dataclass(frozen=True, slots=True)
class Stage:
    """The layers from `start` to `stop`, which is not one of them, of a model that has `num_layers`."""

    start: int
    stop: int
    num_layers: int

    @property
    def is_first(self) -> bool:
        """Whether it turns tokens into vectors."""
        return self.start == 0

    @property
    def is_last(self) -> bool:
        """Whether it makes logits."""
        return self.stop == self.num_layers

    def keeps(self, name: str, *, tied: bool) -> bool:
        """Return whether a tensor of the checkpoint is one of this stage's; `tied` if the head is the embedding.

        What belongs to no layer of the model is the last stage's, whose loader knows what to make of it.
        """
        layer = _LAYER.match(name)
        if layer is not None and int(layer[1]) < self.num_layers:
            return self.start <= int(layer[1]) < self.stop
        if name.startswith(_EMBEDDING):
            return self.is_first or (tied and self.is_last)
        return self.is_last and not (tied and name.startswith(_HEAD))


def plan_stages(config: ModelConfig, num_bytes: Mapping[str, int], size: int, where: str) -> tuple[Stage, ...]:
    """Share a model's layers out among stages by the bytes of their weights.

    Args:
        config: of the whole model.
        num_bytes: of each tensor of the checkpoint, by Hugging Face's name.
        size: stages.
        where: the model's name, for errors.

    Raises:
        InvalidConfig: there are more stages than layers; says which sizes work.
    """
    if size > config.num_layers:
        working = "1" if config.num_layers == 1 else f"1 to {config.num_layers}"
        raise InvalidConfig(
            f"pipeline_parallel_size {size} does not fit {where}: it has {config.num_layers} layers, and each stage "
            f"takes one at least; use {working}"
        )
    layers = [Stage(layer, layer + 1, config.num_layers) for layer in range(config.num_layers)]
    tied = config.tie_word_embeddings
    weights = [sum(n for name, n in num_bytes.items() if layer.keeps(name, tied=tied)) for layer in layers]
    return tuple(Stage(start, stop, config.num_layers) for start, stop in share_out(weights, size))


def share_out(weights: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Cut a sequence into `size` runs, none of them empty, the heaviest of which is as light as can be.

    Of several such cuts, the one with the least sum of squares is taken.

    Returns:
        (start, stop) of each run.
    """
    sums = [0, *accumulate(weights)]
    # best[stop]: the cost of the first `stop` weights in so many runs, (heaviest, sum of squares), and its cuts
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for num_runs in range(1, size + 1):
        longer: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for stop in range(num_runs, len(weights) - (size - num_runs) + 1):
            longer[stop] = min(
                (max(heaviest, sums[stop] - sums[start]), squares + (sums[stop] - sums[start]) ** 2, (*cuts, stop))
                for start, (heaviest, squares, cuts) in best.items()
                if start < stop
            )
        best = longer
    cuts = best[len(weights)][2]
    return list(zip((0, *cuts[:-1]), cuts, strict=True))
