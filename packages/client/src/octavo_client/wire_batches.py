"""The pydantic models of a batch's files: the lines that ask, and the lines that answer."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

__all__ = ["BatchLineError", "BatchLineRequest", "BatchLineResponse", "BatchLineResult", "Endpoint"]

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
"""The routes that answer batches."""


class _Line(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class BatchLineRequest(_Line):
    """A line of a batch's input: one request.

    Raises:
        pydantic.ValidationError: a field is missing or wrong.
    """

    custom_id: str = Field(min_length=1, max_length=512, description="What to find its answer by; unique in a batch.")
    method: Literal["POST"] = "POST"
    url: Endpoint = Field(description="The route; the same for all lines of a batch.")
    body: dict[str, JsonValue] = Field(description="What would be posted to the route, without stream.")


class BatchLineResponse(_Line):
    """How a route answered a line."""

    status_code: int = Field(description="200, or the status of an error.")
    request_id: str = Field(description="The server's id of the request.")
    body: dict[str, JsonValue] = Field(description="What the route answered.")


class BatchLineError(_Line):
    """Why a line was not asked at all."""

    code: str = Field(description="batch_expired or batch_cancelled.")
    message: str = Field(description="The same for people.")


class BatchLineResult(_Line):
    """A line of a batch's output or error file: exactly one of `response` and `error` is there."""

    id: str = Field(description="The server's id of the line.")
    custom_id: str = Field(description="The request's.")
    response: BatchLineResponse | None = Field(default=None, description="What was answered; an error has its status.")
    error: BatchLineError | None = Field(default=None, description="Why nothing was.")

    @property
    def succeeded(self) -> bool:
        """Whether the request was answered with status 200."""
        return self.response is not None and self.response.status_code == 200
