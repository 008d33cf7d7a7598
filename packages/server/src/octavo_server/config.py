"""How the HTTP server is set up, apart from its engine."""

from __future__ import annotations

from dataclasses import dataclass

from octavo_engine.errors import InvalidConfig

MAX_CHOICES_PER_PROMPT = 128
"""OpenAI's limit on `n`; an engine that runs fewer sequences lowers it."""

MAX_CHOICES = 2048
"""The most choices, over all prompts, that one HTTP request may ask for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What an operator may choose about the HTTP side.

    Attributes:
        served_model_names: names that requests may use for the model; the first is reported where none was given.
            Empty serves the engine's own name.
        api_keys: if not empty, every route but health, readiness, version and metrics needs one of them.
        max_num_requests: prompts that may run or wait at once; what comes beyond is answered with 503.
        max_body_bytes: the largest request body that is read.
        body_timeout: seconds within which a request's body must have come.
        allowed_origins: web origins that browsers may call from; empty allows none.
        keep_alive: seconds of silence in a stream after which a comment is sent, so that proxies keep it open.

    Raises:
        InvalidConfig: if a limit is not positive, or a name or key is empty.
    """

    served_model_names: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    max_num_requests: int = 1024
    max_body_bytes: int = 8 << 20
    body_timeout: float = 60.0
    allowed_origins: tuple[str, ...] = ()
    keep_alive: float = 15.0

    def __post_init__(self) -> None:
        for name in ("max_num_requests", "max_body_bytes", "body_timeout", "keep_alive"):
            if getattr(self, name) <= 0:
                raise InvalidConfig(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("served_model_names", "api_keys", "allowed_origins"):
            if not all(getattr(self, name)):
                raise InvalidConfig(f"{name} must not hold an empty string")
