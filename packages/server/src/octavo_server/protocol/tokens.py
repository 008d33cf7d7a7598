"""The bodies of POST /tokenize and POST /detokenize."""

from __future__ import annotations

from octavo_client.wire import DetokenizeRequest, TokenizeRequest
from octavo_server.protocol.body import BODY_CONFIG, refuse_unsupported


class TokenizeBody(TokenizeRequest):
    """The wire's model; unknown fields are ignored."""

    model_config = BODY_CONFIG

    def check(self) -> None:
        """Refuse what is not done here.

        Raises:
            InvalidRequest: names the field.
        """
        refuse_unsupported(self, {"chat_template": (), "mm_processor_kwargs": ({},)})


class DetokenizeBody(DetokenizeRequest):
    """The wire's model; unknown fields are ignored."""

    model_config = BODY_CONFIG
