"""BeamSearchParams: how one request is searched with beams."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from typing import Literal

from octavo_engine.errors import InvalidRequest
from octavo_engine.sampling_checks import check_float, check_int
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.structured.params import StructuredOutputsParams

EarlyStopping = bool | Literal["never"]
MAX_BEAM_STOP_TOKENS = 16
MAX_BEAM_LOGPROBS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """How the likeliest continuations of one prompt are searched for; the rules are those of Transformers' `generate`.

    A hypothesis scores the sum of its tokens' log-probabilities divided by its number of tokens (the end token counts)
    to the power of `length_penalty`: 0 favours short ones, above 0 long ones.

    Attributes:
        beam_width: beams that are kept from step to step, and hypotheses that are kept of those that have ended.
        max_tokens: where every beam ends; None uses the room that is left in the context.
        length_penalty: see above.
        early_stopping: when to stop once there are `beam_width` hypotheses: True at once; False when the best beam
            scores no better than the worst of them; "never" when it cannot by any further tokens.
        num_return_sequences: hypotheses that are returned, best first; None returns them all.
        stop_token_ids: tokens that end a hypothesis, besides the model's own end tokens.
        ignore_eos: the model's own end tokens do not end a hypothesis.
        logprobs: how many of the likeliest tokens are reported for each token; None reports none.
        skip_special_tokens: leave special tokens out of the text.
        structured_outputs: what every hypothesis is held to; scores are those of the model without it.

    Raises:
        InvalidRequest: if a value is out of range or contradicts another one; names the parameter.
    """

    beam_width: int
    max_tokens: int | None = None
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    num_return_sequences: int | None = None
    stop_token_ids: SequenceABC[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
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
        if len(self.stop_token_ids) > MAX_BEAM_STOP_TOKENS:
            raise InvalidRequest(
                f"stop_token_ids has {len(self.stop_token_ids)} ids, with beams at most {MAX_BEAM_STOP_TOKENS} go",
                param="stop_token_ids",
            )
        choice = None if self.structured_outputs is None else self.structured_outputs.choice
        if choice is not None and self.num_returned > len(set(choice)):
            raise InvalidRequest(
                f"{self.num_returned} hypotheses are asked for, of {len(set(choice))} choices; lower"
                " num_return_sequences",
                param="num_return_sequences",
            )
        self.sampling()  # checks what both have in common

    @property
    def num_returned(self) -> int:
        """Hypotheses that are returned."""
        return self.beam_width if self.num_return_sequences is None else self.num_return_sequences

    def sampling(self) -> SamplingParams:
        """Return what a request needs besides the search: its choices, its limit, its ends."""
        return SamplingParams(
            n=self.num_returned,
            temperature=0,
            seed=0,  # no noise is drawn
            max_tokens=self.max_tokens,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
            skip_special_tokens=self.skip_special_tokens,
            structured_outputs=self.structured_outputs,
        )
