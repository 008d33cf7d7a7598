"""The pydantic models of what a server says of itself: that it lives, that it takes requests, and its versions."""

from typing import Literal

from pydantic import Field

from octavo_client.wire import _Answer

__all__ = ["Health", "Ready", "Version"]


class Health(_Answer):
    """The answer of GET /health when the engine makes progress; else the status is 503 with OpenAI's error body."""

    status: Literal["ok"] = "ok"


class Ready(_Answer):
    """The answer of GET /ready when requests are accepted; while loading or draining it is 503 with an error body."""

    status: Literal["ready"] = "ready"
    models: list[str] = Field(default_factory=list, description="The names of the models being served.")


class Version(_Answer):
    """The answer of GET /version."""

    version: str = Field(description="The version of the server.")
    packages: dict[str, str] = Field(
        default_factory=dict,
        description="The versions of the distributions behind it, by name, such as octavo-engine.",
    )
