"""Turns the body of a response, and the conversation that it goes on from, into the engine's request."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from octavo_engine.errors import InvalidRequest, PromptTooLong
from octavo_engine.text.processor import TextProcessor
from octavo_engine.types import Request
from octavo_server.mapping import chat_prompt, chat_request
from octavo_server.protocol.chat import ChatBody
from octavo_server.protocol.response_items import Item, input_items
from octavo_server.protocol.responses import ResponsesBody
from octavo_server.protocol.violations import summarise
from octavo_server.store.responses import ResponseStore

_FIELDS = {
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "prompt": "input",
    "response_format": "text.format",
}


async def read_items(body: ResponsesBody, responses: ResponseStore, owner: str) -> tuple[list[Item], list[Item]]:
    """Return the items of the turns before, and those that a body brings, with references looked up.

    Raises:
        InvalidRequest: if an item cannot be taken, or a response or item that is named is not stored.
    """
    own = []
    for item in input_items(body.input):
        if item["type"] != "item_reference":
            own.append(item)
        elif (found := await responses.item(item["id"], owner)) is not None:
            own.append(found)
        else:
            raise InvalidRequest(f"input: no item {summarise(item['id'])} is stored; send it whole", param="input")
    if body.previous_response_id is None:
        return [], own
    return await responses.conversation(body.previous_response_id, owner), own


async def response_request(
    body: ResponsesBody,
    items: Sequence[Item],
    text: TextProcessor,
    *,
    request_id: str,
    adapter: str | None = None,
) -> tuple[ChatBody, Request]:
    """Return a response's request, and the chat that it is the same as; `adapter` is what the model's name means.

    With `truncation` auto, the oldest messages of a conversation that does not fit are left out, instructions never.

    Raises:
        InvalidRequest: names the field that cannot be served; PromptTooLong if the context is too small.
    """
    with _named_as_in_responses():
        chat = body.chat(items)
        try:
            return chat, await chat_request(chat, text, request_id=request_id, max_n=1, adapter=adapter)
        except PromptTooLong:
            if body.truncation != "auto":
                raise
        chat = await _truncated(chat, text)
        return chat, await chat_request(chat, text, request_id=request_id, max_n=1, adapter=adapter)


async def count_tokens(body: ResponsesBody, items: Sequence[Item], text: TextProcessor) -> int:
    """Return how many tokens a response's request has as a prompt."""
    with _named_as_in_responses():
        return len(await chat_prompt(body.chat(items), text))


async def _truncated(chat: ChatBody, text: TextProcessor) -> ChatBody:
    """Return a chat without as many of its oldest messages as must go for the rest to fit."""
    kept = [message for message in chat.messages if message["role"] in ("system", "developer")]
    others = [message for message in chat.messages if message not in kept]
    # A turn begins with what the user says: a call's result without the call would make no sense.
    starts = [place for place, message in enumerate(others) if message["role"] == "user"]
    room = text.max_model_len - (chat.num_new_tokens or 1)
    low, high = 0, max(len(starts) - 1, 0)
    while low < high:  # the fewest turns to leave out; the last one stays
        middle = (low + high) // 2
        shorter = chat.model_copy(update={"messages": kept + others[starts[middle] :]})
        low, high = (low, middle) if len(await chat_prompt(shorter, text)) <= room else (middle + 1, high)
    return chat.model_copy(update={"messages": kept + others[starts[low] :] if starts else chat.messages})


@contextmanager
def _named_as_in_responses() -> Generator[None, None, None]:
    """Let errors about a chat's field name the field that says it in a response's body."""
    try:
        yield
    except InvalidRequest as error:
        name = (error.param or "").partition("[")[0]
        error.param = _FIELDS.get(name, error.param)
        raise
