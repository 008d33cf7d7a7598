"""The bodies of POST /v1/cache/warm and POST /v1/cache/pins."""

from __future__ import annotations

from typing import Any

from octavo_client.wire_cache import CachePinRequest, CacheWarmRequest
from octavo_engine.errors import InvalidRequest
from octavo_server.protocol.body import BODY_CONFIG
from octavo_server.protocol.completions import Prompt, parse_prompts


class CacheWarmBody(CacheWarmRequest):
    """The wire's model; unknown fields are ignored."""

    model_config = BODY_CONFIG

    prompt: Any = None

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, if there are no messages.

        Raises:
            InvalidRequest: if it is none of OpenAI's four forms, or nothing.
        """
        return parse_prompts(self.prompt, name="prompt")


class CachePinBody(CachePinRequest):
    """The wire's model; unknown fields are ignored."""

    model_config = BODY_CONFIG

    prompt: Any = None

    @property
    def prompts(self) -> list[Prompt]:
        """The one prompt, if there are no messages.

        Raises:
            InvalidRequest: if it is no prompt, or several.
        """
        prompts = parse_prompts(self.prompt, name="prompt")
        if len(prompts) > 1:
            raise InvalidRequest(
                f"one prompt at a time is pinned, got {len(prompts)}; send several requests", param="prompt"
            )
        return prompts
