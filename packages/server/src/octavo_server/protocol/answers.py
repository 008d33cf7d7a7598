"""The answers of OpenAI's and Anthropic's routes where they are not OpenAI's own types, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from openai.types import Batch, FileObject
from pydantic import BaseModel, RootModel


class Error(BaseModel):
    """What is wrong; all four members are always there."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is an error, outside Anthropic's routes."""

    error: Error


class MessagesError(BaseModel):
    """What is wrong, in Anthropic's words."""

    type: str
    message: str


class MessagesErrorBody(BaseModel):
    """Every answer of Anthropic's routes that is an error."""

    type: Literal["error"]
    error: MessagesError


class Usage(BaseModel):
    """Tokens of an answer; `prompt_tokens_details` where something is generated."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int | None = None
    prompt_tokens_details: dict[str, int] | None = None


class TextLogprobs(BaseModel):
    """Four lists of equal length; the first token of an echoed prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(BaseModel):
    """The answer of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class Embedding(BaseModel):
    """One vector: numbers, or float32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    """The answer of POST /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class ModelCard(BaseModel):
    """One name under which a model is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    parent: str | None = None


class ModelList(BaseModel):
    """The answer of GET /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class MessageUsage(BaseModel):
    """Tokens of a message; those from the cache are counted apart."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class Message(BaseModel):
    """The answer of POST /v1/messages; a block's other members depend on its type."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(BaseModel):
    """The answer of POST /v1/messages/count_tokens."""

    input_tokens: int


class OpenApi(BaseModel):
    """The answer of GET /openapi.json."""

    openapi: str
    info: dict[str, str]
    paths: dict[str, Any]
    components: dict[str, Any]


class InputTokens(BaseModel):
    """The answer of POST /v1/responses/input_tokens."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class Deleted(BaseModel):
    """The answer of DELETE."""

    id: str
    object: str
    deleted: Literal[True]


class Listing(BaseModel):
    """A part of a list."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class File(FileObject):
    """An uploaded file; more purposes are taken than the SDK's answer knows."""

    purpose: str  # type: ignore[assignment]


class FileList(Listing):
    """The answer of GET /v1/files."""

    data: list[File]  # type: ignore[assignment]


class BatchList(Listing):
    """The answer of GET /v1/batches."""

    data: list[Batch]  # type: ignore[assignment]


class Generated(BaseModel):
    """The answer of POST /generate."""

    generated_text: str
    details: dict[str, Any] | None = None


class GeneratedList(RootModel[list[Generated]]):
    """The answer of POST /: one text, in a list."""


class GenerateErrorBody(BaseModel):
    """An error in the shape of text-generation-inference."""

    error: str
    error_type: str


class GenerateInfo(BaseModel):
    """The answer of GET /info."""

    model_id: str
    max_input_length: int
    max_total_tokens: int
    version: str
