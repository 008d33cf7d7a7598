"""ShardPlan: what one of several ranks keeps of a model (tensor parallelism), and which numbers of ranks fit a model.

Megatron's cut (arXiv 1909.08053, section 3): the projections into heads and into the feed-forward block are cut by
rows, those out of them by columns, so that a rank computes whole heads and whole hidden units by itself, and the ranks
add up what comes out, twice a layer. Embedding and head are cut by rows of the vocabulary. Norms are kept whole.

    q_proj           rows      num_heads / size heads
    k_proj, v_proj   rows      num_kv_heads / size heads; with fewer KV heads than ranks, one that several ranks keep
    gate_proj, up_proj  rows   intermediate_size / size
    o_proj, down_proj   columns, the same spans; their bias belongs to rank 0
    embed_tokens, lm_head  rows  vocab_size / size, one more for the first ranks where that leaves a remainder

The experts of a mixture are each cut as a feed-forward block is, or, with expert parallelism, not at all: then a rank
has num_experts / size of them, one more or less where that leaves a remainder. Its router is kept whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

from octavo_engine.errors import InvalidConfig, UnsupportedModel
from octavo_engine.models.config import ModelConfig
from octavo_engine.weights.cut import Cut

_ARCHITECTURES = ("LlamaForCausalLM", "MixtralForCausalLM")
_EXPERT = re.compile(r"\.experts\.(\d+)\.(w[123])\.")
_MAX_SIZE = 1024
_NUM_EXAMPLES = 8  # sizes that work, named in an error

ColumnBlock = Callable[[str], int]
"""From a weight's name to how many of its columns are stored as one; they are cut between such blocks alone."""


class ShardPlan:
    """What rank `rank` of `size` keeps. It is the CutRule of its weights.

    Attributes:
        rank: from 0.
        size: of the group.
        config: of the model that this rank computes: its heads, its part of the feed-forward block and the vocabulary.
        first_token_id: the first of the vocabulary's rows that it keeps.
    """

    def __init__(self, config: ModelConfig, rank: int, size: int, *, expert_parallel: bool = False) -> None:
        self.rank = rank
        self.size = size
        self._experts = _even(config.num_experts, rank, size) if expert_parallel else range(config.num_experts)
        heads = _even(config.num_heads, rank, size)
        kv_heads = _shared(config.num_kv_heads, rank, size)
        hidden = range(config.intermediate_size) if expert_parallel else _even(config.intermediate_size, rank, size)
        vocabulary = vocabulary_part(config.vocab_size, rank, size)
        self.first_token_id = vocabulary.start
        self.config = replace(
            config,
            num_heads=len(heads),
            num_kv_heads=len(kv_heads),
            intermediate_size=len(hidden),
            vocab_size=len(vocabulary),
            own_experts=self._experts if expert_parallel else None,
        )
        queries = _cut(0, heads, config.num_heads, config.head_dim)
        keys = _cut(0, kv_heads, config.num_kv_heads, config.head_dim)
        gates, rows = _cut(0, hidden, config.intermediate_size), _cut(0, vocabulary, config.vocab_size)
        self._cuts = {
            "q_proj": queries,
            "k_proj": keys,
            "v_proj": keys,
            "gate_proj": gates,
            "up_proj": gates,
            "embed_tokens": rows,
            "lm_head": rows,
            "o_proj": queries._replace(axis=1),
            "down_proj": gates._replace(axis=1),
        }
        if not expert_parallel:
            self._cuts |= {"w1": gates, "w3": gates, "w2": gates._replace(axis=1)}

    def __call__(self, name: str) -> Cut | None:
        """Return which part of a tensor this rank keeps; None for the whole.

        Raises:
            UnsupportedModel: the tensor belongs to a matrix that is cut, and is neither its weight nor its bias.
        """
        cut, kind = self._find(name)
        if cut is None or (cut.axis == 1 and kind == "bias"):
            return None
        if kind not in ("weight", "bias"):
            raise UnsupportedModel(
                f"tensor {name!r}: weights that are stored like this cannot be split over ranks; use "
                "tensor_parallel_size 1, or another format of the model"
            )
        return cut

    def leaves_out(self, name: str) -> bool:
        """Return whether a tensor belongs to an expert of another rank."""
        match = _EXPERT.search(name)
        return match is not None and int(match[1]) not in self._experts

    def is_added_once(self, name: str) -> bool:
        """Return whether a tensor is the bias of products that the ranks add up, so that one of them alone has it."""
        cut, kind = self._find(name)
        return cut is not None and cut.axis == 1 and kind == "bias"

    def _find(self, name: str) -> tuple[Cut | None, str]:
        module, _, kind = name.rpartition(".")
        return self._cuts.get(module.rpartition(".")[2]), kind


def vocabulary_part(vocab_size: int, rank: int, size: int) -> range:
    """Return the token ids whose rows a rank keeps; the first ranks have one more where the size leaves a remainder."""
    share, rest = divmod(vocab_size, size)
    start = rank * share + min(rank, rest)
    return range(start, start + share + (rank < rest))


def check_size(
    config: ModelConfig, size: int, column_block: ColumnBlock, where: str, *, expert_parallel: bool = False
) -> None:
    """Refuse a number of ranks over which a model cannot be split evenly.

    Raises:
        InvalidConfig: says which numbers work.
        UnsupportedModel: the architecture cannot be split at all.
    """
    if config.architecture not in _ARCHITECTURES:
        raise UnsupportedModel(
            f"{where}: {config.architecture} cannot be split over ranks; these can: {', '.join(_ARCHITECTURES)}"
        )
    if expert_parallel and not config.num_experts:
        raise InvalidConfig(f"expert_parallel needs a mixture of experts, {where} has none; leave it out")
    column_block = cache(column_block)  # some sources read scales for it
    if fits(config, size, column_block, expert_parallel=expert_parallel):
        return
    most = min(config.num_heads, _MAX_SIZE)
    sizes = (n for n in range(1, most + 1) if fits(config, n, column_block, expert_parallel=expert_parallel))
    working = [str(n) for n in sizes][:_NUM_EXAMPLES]
    blocks = f"{config.intermediate_size} feed-forward columns, which must come out even, in whole blocks of codes"
    if expert_parallel:
        blocks = f"{config.num_experts} experts; heads must come out even, and every rank must have an expert"
    raise InvalidConfig(
        f"tensor_parallel_size {size} does not fit {where}: it has {config.num_heads} query heads, "
        f"{config.num_kv_heads} KV heads and {blocks}; use {' or '.join(working)}"
    )


def fits(config: ModelConfig, size: int, column_block: ColumnBlock, *, expert_parallel: bool = False) -> bool:
    """Return whether so many ranks can each have whole heads and whole blocks of columns, or whole experts."""
    if config.num_heads % size or config.vocab_size < size:
        return False
    if config.num_kv_heads % size and size % config.num_kv_heads:
        return False
    if config.num_experts < size if expert_parallel else config.intermediate_size % size:
        return False
    return not any(
        num_columns // size % column_block(f"model.layers.{layer}.{name}.weight")
        for layer in range(config.num_layers)
        for name, num_columns in _cut_by_columns(config, expert_parallel=expert_parallel)
    )


def _cut_by_columns(config: ModelConfig, *, expert_parallel: bool) -> Iterator[tuple[str, int]]:
    """Yield a layer's matrices whose columns are cut, with their number."""
    yield "self_attn.o_proj", config.num_heads * config.head_dim
    if not config.num_experts:
        yield "mlp.down_proj", config.intermediate_size
    for expert in range(0 if expert_parallel else config.num_experts):
        yield f"block_sparse_moe.experts.{expert}.w2", config.intermediate_size


def _even(count: int, rank: int, size: int) -> range:
    return range(rank * count // size, (rank + 1) * count // size)


def _shared(num_kv_heads: int, rank: int, size: int) -> range:
    """Return a rank's KV heads: its own ones, or the one that its query heads attend with."""
    start = rank * num_kv_heads // size
    return range(start, start + max(1, num_kv_heads // size))


def _cut(axis: int, part: range, total: int, width: int = 1) -> Cut:
    return Cut(axis, part.start * width, part.stop * width, total * width)
