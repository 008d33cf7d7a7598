"""The body of POST /v1/embeddings."""

from __future__ import annotations

from typing import Literal

from octavo_client.wire import EmbeddingExtras
from octavo_server.protocol.body import BODY_CONFIG, refuse_unsupported
from octavo_server.protocol.completions import Prompt, parse_prompts
from octavo_server.protocol.schemas import PromptField


class EmbeddingBody(EmbeddingExtras):
    """OpenAI's fields of an embeddings request, and Octavo's extras."""

    model_config = BODY_CONFIG

    model: str | None = None
    input: PromptField = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None

    def check(self) -> None:
        """Check what concerns several fields.

        Raises:
            InvalidRequest: names the field.
        """
        refuse_unsupported(self, {"dimensions": ()})

    @property
    def inputs(self) -> list[Prompt]:
        """The texts or token ids to embed.

        Raises:
            InvalidRequest: if it is none of OpenAI's four forms, or nothing.
        """
        return parse_prompts(self.input, name="input")
