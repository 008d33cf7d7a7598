"""The bodies of POST /tokenize and POST /detokenize."""

from __future__ import annotations

from octavo_client.wire import DetokenizeRequest, TokenizeRequest
from octavo_server.protocol.body import BODY_CONFIG


class TokenizeBody(TokenizeRequest):
    """The wire's model; unknown fields are ignored."""

    model_config = BODY_CONFIG


class DetokenizeBody(DetokenizeRequest):
    """The wire's model; unknown fields are ignored."""

    model_config = BODY_CONFIG
