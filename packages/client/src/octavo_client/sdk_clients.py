"""The SDK's clients with Octavo's own responses, files and batches in the place of the SDK's, whose methods they have.

They load on first use, as the SDK's do: their types are many.
"""

from functools import cached_property
from typing import TYPE_CHECKING

import openai

if TYPE_CHECKING:
    from octavo_client.resources.batches import AsyncBatches, Batches
    from octavo_client.resources.files import AsyncFiles, Files
    from octavo_client.resources.responses import AsyncResponses, Responses


class SdkClient(openai.OpenAI):
    """`openai.OpenAI`, with more."""

    @cached_property
    def responses(self) -> "Responses":
        """Responses: made while one waits, streamed, or in the background; stored."""
        from octavo_client.resources.responses import Responses

        return Responses(self)

    @cached_property
    def files(self) -> "Files":
        """Files that batches read and write."""
        from octavo_client.resources.files import Files

        return Files(self)

    @cached_property
    def batches(self) -> "Batches":
        """Many requests that are answered when there is time."""
        from octavo_client.resources.batches import Batches

        return Batches(self)


class AsyncSdkClient(openai.AsyncOpenAI):
    """`openai.AsyncOpenAI`, with more."""

    @cached_property
    def responses(self) -> "AsyncResponses":
        """Responses: made while one waits, streamed, or in the background; stored."""
        from octavo_client.resources.responses import AsyncResponses

        return AsyncResponses(self)

    @cached_property
    def files(self) -> "AsyncFiles":
        """Files that batches read and write."""
        from octavo_client.resources.files import AsyncFiles

        return AsyncFiles(self)

    @cached_property
    def batches(self) -> "AsyncBatches":
        """Many requests that are answered when there is time."""
        from octavo_client.resources.batches import AsyncBatches

        return AsyncBatches(self)
