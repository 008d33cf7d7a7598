"""The fields that completions and chat completions share, beyond Octavo's own extras."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field

from octavo_client.wire import Extras
from octavo_engine.errors import InvalidRequest
from octavo_engine.structured.params import StructuredOutputsParams
from octavo_server.protocol.body import BODY_CONFIG, refuse_unsupported
from octavo_server.protocol.constraints import constraint_of
from octavo_server.protocol.schemas import FormatField, StopField
from octavo_server.protocol.violations import summarise

MAX_STOP_STRINGS = 4
MAX_LOGPROBS = 20
MAX_INT32 = 2**31 - 1
_MAX_ID_DIGITS = 10

Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
"""Fields of OpenAI and vLLM that change the answer and are not implemented, with the values that mean nothing."""


class StreamOptions(BaseModel):
    """What a stream carries besides the choices."""

    model_config = BODY_CONFIG

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(Extras):
    """OpenAI's sampling and streaming fields, and Octavo's extras."""

    model_config = BODY_CONFIG

    model: str | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_INT32)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    logit_bias: dict[str, float] | None = None
    stop: StopField = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    response_format: FormatField = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings in either form they may be given in.

        Raises:
            InvalidRequest: if there are more than four, or one is empty or no string.
        """
        stops = [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
            raise InvalidRequest("stop must be a non-empty string or a list of such", param="stop")
        if len(stops) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(stops)}", param="stop")
        return tuple(stops)

    @property
    def constraint(self) -> StructuredOutputsParams | None:
        """What the text must look like, from `response_format` or `structured_outputs`; None if anything goes.

        Raises:
            InvalidRequest: names the field that is wrong.
        """
        return constraint_of(self.response_format, self.structured_outputs)

    @property
    def constraint_field(self) -> str:
        """The name of the field that the constraint comes from."""
        return "response_format" if self.structured_outputs is None else "structured_outputs"

    @property
    def biases(self) -> dict[int, float]:
        """What is added to the logits of token ids, which JSON has as strings.

        Raises:
            InvalidRequest: if one is no token id.
        """
        biases = {}
        for token_id, bias in (self.logit_bias or {}).items():
            if not token_id.isascii() or not token_id.isdigit() or len(token_id) > _MAX_ID_DIGITS:
                raise InvalidRequest(
                    f"logit_bias must map token ids to numbers, got {summarise(token_id)}", param="logit_bias"
                )
            biases[int(token_id)] = bias
        return biases

    def check(self) -> None:
        """Check what concerns several fields.

        Raises:
            InvalidRequest: names the field.
        """
        refuse_unsupported(self, UNSUPPORTED)
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options goes with stream true; leave it out", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("prompt_logprobs are not there in a stream; set stream false", param="prompt_logprobs")
