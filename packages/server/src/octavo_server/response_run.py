"""ResponseRun: one response from its request to its end, told as the events of a stream and stored at its turns."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from octavo_engine.types import FinishReason
from octavo_engine.types import Request as EngineRequest
from octavo_server.admission import Ticket
from octavo_server.choices import Choice, pieces
from octavo_server.errors import ApiError, to_api_error
from octavo_server.event_log import NumberedEvent
from octavo_server.generation import Generation
from octavo_server.logprobs import TokenNames
from octavo_server.message_blocks import sse
from octavo_server.protocol.chat import ChatBody
from octavo_server.response_output import ResponseOutput
from octavo_server.state import ServerState
from octavo_server.store.responses import ResponseStore

ENDED = ("completed", "incomplete", "failed", "cancelled")


class ResponseRun:
    """Makes one response.

    Args:
        state: of the app.
        responses: where it is written; None if it is not stored.
        response: as the wire shows it, before anything is in it; grows.
        chat: what it answers, as a chat.
        request: the same for the engine.

    Attributes:
        error: why it failed; None if it did not.
    """

    def __init__(
        self,
        state: ServerState,
        responses: ResponseStore | None,
        response: dict[str, Any],
        chat: ChatBody,
        request: EngineRequest,
    ) -> None:
        self._state = state
        self._responses = responses
        self._request = request
        self._number = -1
        text = state.engine.text
        parser = text.answer_parser(chat.tool_use, request.prompt_token_ids)
        self._output = ResponseOutput(parser, TokenNames(text.tokenizer, as_ids=False))
        sampling = request.sampling
        response["temperature"] = getattr(sampling, "temperature", 0.0)  # a beam search draws nothing
        response["top_p"] = getattr(sampling, "top_p", 1.0)
        response["output"] = self._output.items
        self.response = response
        self.error: ApiError | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing will be added to the response any more."""
        return self.response["status"] in ENDED

    def created(self) -> list[NumberedEvent]:
        """Return the first events, once."""
        kinds = ["response.created"] + (["response.queued"] if self.response["status"] == "queued" else [])
        return [self._event(kind, response=self.response) for kind in kinds]

    async def events(self, ticket: Ticket) -> AsyncGenerator[NumberedEvent, None]:
        """Make the response and tell of it; a failure is its last event, and `error`.

        Closing this generator ends the work, and leaves the response as it is.
        """
        try:
            async with aclosing(self._made(ticket)) as events:
                async for event in events:
                    yield event
        except Exception as error:  # the boundary: what was begun is told of as failed
            self.error = to_api_error(error)
            yield await self.end("failed", error={"code": "server_error", "message": self.error.message})

    async def end(self, status: str, **members: Any) -> NumberedEvent:
        """Close the response with a status other than completed, store it, and return its last event."""
        self._output.break_off()
        self.response |= {"status": status, **members}
        await self._write()
        kind = "response.failed" if status == "failed" else "response.incomplete"
        return self._event(kind, response=self.response)

    async def _made(self, ticket: Ticket) -> AsyncGenerator[NumberedEvent, None]:
        engine = self._state.engine
        generation = Generation(engine, self._state.metrics, [self._request], ticket)
        if self.response["status"] == "queued":
            self.response["status"] = "in_progress"
            await self._write(begins=True)
        yield self._event("response.in_progress", response=self.response)
        choice = Choice(0, self._request.sampling, engine.text.tokenizer)
        async with aclosing(generation.deltas()) as batches:
            async for batch in batches:
                for piece in pieces([choice], batch):
                    for kind, members in self._output.push(piece):
                        yield self._event(kind, **members)
        self.response["usage"] = self._usage(generation)
        if self._output.finish_reason is FinishReason.LENGTH:
            yield await self.end("incomplete", incomplete_details={"reason": "max_output_tokens"})
            return
        self.response |= {"status": "completed", "completed_at": int(time.time())}
        await self._write()
        yield self._event("response.completed", response=self.response)

    async def _write(self, *, begins: bool = False) -> None:
        if self._responses is not None:
            await self._responses.update(self.response, begins=begins)

    def _event(self, kind: str, **members: Any) -> NumberedEvent:
        self._number += 1
        return self._number, sse(kind, sequence_number=self._number, **members)

    def _usage(self, generation: Generation) -> dict[str, Any]:
        usage = generation.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._output.num_reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }
