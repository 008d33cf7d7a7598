"""The bodies of POST /v1/rerank and POST /v1/score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo_client.wire_rerank import RerankRequest, ScoreRequest
from octavo_server.protocol.body import BODY_CONFIG, refuse_unsupported

_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "rank_fields": (["text"],),
    "max_chunks_per_doc": (1,),
    "max_tokens_per_doc": (),
    "instruction": ("",),
}
"""Fields of Cohere and vLLM that change scores, with the values that mean nothing."""


class RerankBody(RerankRequest):
    """The wire's model; unknown fields are ignored."""

    model_config = BODY_CONFIG

    def check(self) -> None:
        """Refuse what is not done here.

        Raises:
            InvalidRequest: names the field.
        """
        refuse_unsupported(self, _UNSUPPORTED)


class ScoreBody(ScoreRequest):
    """The wire's model; unknown fields are ignored."""

    model_config = BODY_CONFIG

    def check(self) -> None:
        """Refuse what is not done here.

        Raises:
            InvalidRequest: names the field.
        """
        refuse_unsupported(self, _UNSUPPORTED)
