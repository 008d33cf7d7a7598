"""The body of POST /generate, /generate_stream and /: text-generation-inference's fields."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from octavo_engine.errors import InvalidRequest
from octavo_engine.structured.params import StructuredOutputsParams
from octavo_engine.types import SamplingParams
from octavo_server.protocol.body import BODY_CONFIG
from octavo_server.protocol.generation import MAX_INT32, MAX_LOGPROBS, MAX_STOP_STRINGS
from octavo_server.protocol.violations import summarise

DEFAULT_MAX_NEW_TOKENS = 100
_INT64 = 2**63


class Grammar(BaseModel):
    """What the text must look like."""

    model_config = BODY_CONFIG

    type: Literal["json", "json_schema", "regex"]
    value: Any = None

    def constraint(self) -> StructuredOutputsParams:
        """Return it as the engine knows it.

        Raises:
            InvalidRequest: if it is no schema or no expression.
        """
        if self.type == "regex":
            return StructuredOutputsParams(regex=self.value)
        value = self.value
        if self.type == "json_schema":
            value = value.get("schema") if isinstance(value, dict) else None
        if not isinstance(value, dict | str):
            raise InvalidRequest(
                f"parameters.grammar.value must hold a JSON Schema, got {summarise(self.value)}",
                param="parameters.grammar",
            )
        return StructuredOutputsParams(json=value)


class Parameters(BaseModel):
    """How to generate. Without `do_sample` and anything that shapes a draw the likeliest tokens are taken."""

    model_config = BODY_CONFIG

    adapter_id: str | None = None
    best_of: int | None = Field(default=None, ge=1, le=MAX_INT32)
    decoder_input_details: bool | None = None
    details: bool | None = None
    do_sample: bool | None = None
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    grammar: Grammar | None = None
    max_new_tokens: int | None = Field(default=None, ge=1, le=MAX_INT32)
    repetition_penalty: float | None = Field(default=None, gt=0.0, le=10.0)
    return_full_text: bool | None = None
    seed: int | None = Field(default=None, ge=0, lt=2 * _INT64)
    stop: list[str] | None = Field(default=None, max_length=MAX_STOP_STRINGS)
    temperature: float | None = Field(default=None, gt=0.0, le=100.0)
    top_k: int | None = Field(default=None, ge=0, le=MAX_INT32)
    top_n_tokens: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    truncate: int | None = Field(default=None, ge=1, le=MAX_INT32)
    typical_p: float | None = Field(default=None, gt=0.0, le=1.0)
    watermark: bool | None = None

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        shaped = self.temperature not in (None, 1.0) or bool(self.top_k)
        return bool(self.do_sample) or shaped or any(p not in (None, 1.0) for p in (self.top_p, self.typical_p))

    @property
    def num_samples(self) -> int:
        """Texts of which the likeliest is returned."""
        return self.best_of or 1

    def sampling(self, *, reports: bool) -> SamplingParams:
        """Return the engine's parameters.

        Args:
            reports: whether the answer tells of tokens.

        Raises:
            InvalidRequest: if a value is out of range.
        """
        wants_logprobs = reports or self.num_samples > 1
        seed = self.seed
        return SamplingParams(
            n=self.num_samples,
            temperature=(self.temperature or 1.0) if self.samples else 0.0,
            top_k=self.top_k or 0,
            top_p=self.top_p or 1.0,
            typical_p=self.typical_p or 1.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            seed=seed if seed is None or seed < _INT64 else seed - 2 * _INT64,
            max_tokens=self.max_new_tokens or DEFAULT_MAX_NEW_TOKENS,
            stop=tuple(self.stop or ()),
            include_stop_str_in_output=True,  # TGI shows what ended a text
            logprobs=(self.top_n_tokens or 0) if wants_logprobs else None,
            prompt_logprobs=0 if self.decoder_input_details else None,
            truncate_prompt_tokens=self.truncate,
            structured_outputs=None if self.grammar is None else self.grammar.constraint(),
        )

    def check(self, *, stream: bool, max_n: int) -> None:
        """Check what concerns several fields.

        Raises:
            InvalidRequest: names the field.
        """
        if self.watermark:
            _refuse("watermark", "is not supported by this server; leave it out")
        if self.adapter_id is not None:
            _refuse("adapter_id", "is not supported by this server; leave it out")
        if self.num_samples > max_n:
            _refuse("best_of", f"must be between 1 and {max_n}, got {self.best_of}")
        if self.num_samples > 1 and stream:
            _refuse("best_of", "is not known before the end: it does not go with a stream; leave it out")
        if self.num_samples > 1 and not self.samples:
            _refuse("best_of", "needs texts that differ; set do_sample")
        if self.decoder_input_details and stream:
            _refuse("decoder_input_details", "does not go with a stream; leave it out")


class GenerateBody(BaseModel):
    """A text to go on from."""

    model_config = BODY_CONFIG

    inputs: str = Field(min_length=1)
    parameters: Parameters | None = None
    stream: bool | None = None

    @property
    def options(self) -> Parameters:
        """The parameters, those of a body without any too."""
        return self.parameters or Parameters()


def _refuse(name: str, why: str) -> None:
    raise InvalidRequest(f"parameters.{name} {why}", param=f"parameters.{name}")
