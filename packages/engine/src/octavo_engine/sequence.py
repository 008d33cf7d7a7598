"""One sequence on its way through the engine: its tokens, how far they are computed, where it stands."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from octavo_engine.types import NOTHING_CACHED, CachedTokens, FinishReason, Request

if TYPE_CHECKING:
    from octavo_engine.beam_group import BeamGroup


class SequenceStatus(Enum):
    """Where a sequence stands; preemption takes it from running back to waiting."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and the tokens drawn for it so far. Only the scheduler writes it.

    There are no phases: a step computes some of the tokens between `num_computed_tokens` and `num_tokens`. Tokens of
    steps in flight count as placeholders: they exist for the scheduler before their ids are known.

        token_ids          [ prompt ............ | output ...... ]
        num_tokens         [ prompt ............ | output ...... | placeholders ]
        num_computed_tokens  ----------------------------->  (optimistic: includes steps in flight)
    """

    seq_id: int
    request: Request
    index: int
    token_ids: list[int]
    num_prompt_tokens: int
    max_num_output_tokens: int
    stop_token_ids: frozenset[int]
    status: SequenceStatus = SequenceStatus.WAITING
    row: int | None = None
    num_computed_tokens: int = 0
    num_placeholders: int = 0
    num_forks_wanted: int = 0
    cached: CachedTokens = NOTHING_CACHED  # when it was first admitted
    num_preemptions: int = 0
    num_losses: int = 0  # steps in which the keys and values of all tokens were lost
    epoch: int = 0  # rises at preemption, so that a late answer is not taken for the new computation
    sampler_state: float | None = None  # what the next draw depends on beside the tokens
    last_step_id: int | None = None  # the last step that it takes part in
    moved_by: int | None = None  # the step that copies its blocks, if they last came from the host or are there
    beams: BeamGroup | None = None  # of which it is a member
    adapter: bytes = b""  # the version of its adapter; empty for the base model
    adapter_slot: int | None = None  # where the runner has it, while it runs
    finish_reason: FinishReason | None = None
    scheduled_time: float | None = None
    first_token_time: float | None = None
    order: tuple[int, float, int] = field(init=False)
    max_num_tokens: int = field(init=False)  # prompt and output
    first_stop_position: int = field(init=False)  # stop tokens before it do not end the sequence

    def __post_init__(self) -> None:
        self.order = (self.request.priority, self.request.arrival_time, self.seq_id)
        self.max_num_tokens = self.num_prompt_tokens + self.max_num_output_tokens
        self.first_stop_position = self.num_prompt_tokens + self.request.sampling.min_tokens

    def __lt__(self, other: Sequence) -> bool:
        return self.order < other.order

    @property
    def num_tokens(self) -> int:
        """Tokens known or in flight."""
        return len(self.token_ids) + self.num_placeholders

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that a step could compute now; 0 while the last ones it may draw are in flight."""
        num_tokens = len(self.token_ids) + self.num_placeholders
        return num_tokens - self.num_computed_tokens if num_tokens < self.max_num_tokens else 0

    @property
    def needs_whole_prompt(self) -> bool:
        """True if cached blocks of the prompt are of no use: each token's hidden state is wanted."""
        request = self.request
        if request.task == "embed":
            return request.pooling == "mean"
        return request.sampling.prompt_logprobs is not None and len(self.token_ids) == self.num_prompt_tokens

    @property
    def num_tokens_to_enter(self) -> int:
        """Tokens that may be computed when it enters: the last one of several beams waits for the others."""
        return self.num_tokens - (self.beams is not None and len(self.beams.members) > 1)

    @property
    def num_rows(self) -> int:
        """Rows it takes in the runner, counting the forks it will have."""
        return 1 + self.num_forks_wanted


def num_common(one: SequenceABC[int], other: SequenceABC[int]) -> int:
    """Count the tokens with which both begin."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
