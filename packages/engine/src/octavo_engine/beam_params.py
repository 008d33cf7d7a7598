"""BeamSearchParams: how one request is searched with beams."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field, fields
from typing import Literal

from octavo_engine.errors import InvalidRequest
from octavo_engine.sampling_checks import check_float, check_int
from octavo_engine.sampling_params import DRY_SEQUENCE_BREAKERS, LogitsProcessor, SamplingParams
from octavo_engine.structured.params import StructuredOutputsParams

EarlyStopping = bool | Literal["never"]
MAX_BEAM_STOP_TOKENS = 16
MAX_BEAM_LOGPROBS = 256
MAX_BEAM_STOP_BYTES = 256
"""All stop strings of a search together, in UTF-8: what is made of them grows with the square of their lengths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """How the likeliest continuations of one prompt are searched for; the rules are those of Transformers' `generate`.

    A hypothesis scores the sum of its tokens' log-probabilities divided by its number of tokens (the end token counts)
    to the power of `length_penalty`: 0 favours short ones, above 0 long ones. A stop string ends a hypothesis with the
    token that completes it. Penalties, biases and bans change log-probabilities, and so scores, as
    Transformers' logits processors do; what shapes a random draw (temperature and filters) has no meaning here.

    Attributes:
        beam_width: beams that are kept from step to step, and hypotheses that are kept of those that have ended.
        max_tokens: where every beam ends; None uses the room that is left in the context.
        length_penalty: see above.
        early_stopping: when to stop once there are `beam_width` hypotheses: True at once; False when the best beam
            scores no better than the worst of them; "never" when it cannot by any further tokens.
        num_return_sequences: hypotheses that are returned, best first; None returns them all. There may be fewer, where
            grammars, bans or stop strings leave too few texts.
        structured_outputs: what every hypothesis is held to; scores are those of the model without it.
        logprobs: how many of the likeliest tokens are reported for each token; None reports none. They are those that
            scores are summed from.

    The other fields mean what they mean in SamplingParams.

    Raises:
        InvalidRequest: if a value is out of range or contradicts another one; names the parameter.
    """

    beam_width: int
    max_tokens: int | None = None
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    num_return_sequences: int | None = None
    structured_outputs: StructuredOutputsParams | None = None
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_sequence_breakers: SequenceABC[str] = DRY_SEQUENCE_BREAKERS
    dry_breaker_ids: SequenceABC[int] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: SequenceABC[int] | None = None
    bad_words: SequenceABC[str] = ()
    bad_words_ids: SequenceABC[SequenceABC[int]] = ()
    logits_processors: SequenceABC[LogitsProcessor] = ()
    min_tokens: int = 0
    stop: str | SequenceABC[str] = ()
    stop_token_ids: SequenceABC[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        check_int("beam_width", self.beam_width, 1, None)
        check_float("length_penalty", self.length_penalty, -10.0, 10.0)
        if self.early_stopping not in (True, False, "never") or not isinstance(self.early_stopping, bool | str):
            raise InvalidRequest(
                f"early_stopping must be true, false or 'never', got {self.early_stopping!r}", param="early_stopping"
            )
        if self.num_return_sequences is not None:
            check_int("num_return_sequences", self.num_return_sequences, 1, None)
            if self.num_return_sequences > self.beam_width:
                raise InvalidRequest(
                    f"num_return_sequences is {self.num_return_sequences}, beam_width is {self.beam_width}; a search "
                    "keeps beam_width hypotheses: raise beam_width or lower num_return_sequences",
                    param="num_return_sequences",
                )
        check_int("logprobs", self.logprobs, 0, MAX_BEAM_LOGPROBS, optional=True)
        shared = self.sampling()  # which checks it
        object.__setattr__(self, "stop_token_ids", shared.stop_token_ids)
        if len(shared.stop_token_ids) > MAX_BEAM_STOP_TOKENS:
            raise InvalidRequest(
                f"stop_token_ids has {len(shared.stop_token_ids)} ids, with beams at most {MAX_BEAM_STOP_TOKENS} go",
                param="stop_token_ids",
            )
        num_bytes = sum(len(stop.encode("utf-8", "surrogatepass")) for stop in shared.stop_strings)
        if num_bytes > MAX_BEAM_STOP_BYTES:
            raise InvalidRequest(
                f"stop has {num_bytes} bytes in all, with beams at most {MAX_BEAM_STOP_BYTES} go; shorten it",
                param="stop",
            )

    @property
    def num_returned(self) -> int:
        """Hypotheses that are returned, if there are as many."""
        return self.beam_width if self.num_return_sequences is None else self.num_return_sequences

    def sampling(self) -> SamplingParams:
        """Return what a request needs besides the search: its choices, its limit, its ends, its rules."""
        own = {f.name for f in fields(self)}
        shared = {f.name: getattr(self, f.name) for f in fields(SamplingParams) if f.name in own}
        return SamplingParams(n=self.num_returned, temperature=0, seed=0, **shared)  # no noise is drawn
