"""The body of POST /v1/chat/completions, and its messages as chat templates take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from octavo_engine.errors import InvalidRequest
from octavo_engine.text.tool_use import ToolUse
from octavo_server.protocol.body import refuse_unsupported
from octavo_server.protocol.generation import MAX_INT32, MAX_LOGPROBS, GenerationBody
from octavo_server.protocol.schemas import ChatMessages, ToolChoiceField, ToolsField
from octavo_server.protocol.tools import tool_use_of
from octavo_server.protocol.violations import summarise

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_PASSED_ON = ("name", "tool_calls", "tool_call_id")

_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "functions": (),
    "function_call": (),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "store": (False,),
    "echo": (False,),
    "chat_template": (),
    "documents": ([],),
}


class ChatBody(GenerationBody):
    """OpenAI's fields of a chat completion, and Octavo's extras."""

    messages: ChatMessages = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_INT32)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_INT32)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: ToolsField = None
    tool_choice: ToolChoiceField = None
    parallel_tool_calls: bool | None = None

    def check(self) -> None:
        super().check()
        refuse_unsupported(self, _UNSUPPORTED)
        for name in ("parent_id", "parent_index", "branch_at"):
            if getattr(self, name) is not None:
                raise InvalidRequest(f"{name} goes with text completions, whose parent may be a chat", param=name)
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs goes with logprobs true; set it or leave both out", param="top_logprobs")

    @property
    def tool_use(self) -> ToolUse | None:
        """The functions that may be called; None if none may.

        Raises:
            InvalidRequest: names the field that is wrong.
        """
        return tool_use_of(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def num_new_tokens(self) -> int | None:
        """The most tokens to generate; None is what the context has room for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives asked for at each position; None if no log-probabilities are wanted."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def template_messages(self) -> list[dict[str, Any]]:
        """The messages as chat templates take them.

        Raises:
            InvalidRequest: names the message whose role or content is wrong.
        """
        return template_messages(self.messages)


def template_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with known roles and some content; fields that templates do not know are dropped.

    Raises:
        InvalidRequest: names the message whose role or content is wrong.
    """
    return [_template_message(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _template_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = message.get("role")
    if role not in _ROLES:
        raise InvalidRequest(
            f"{where}.role must be one of {', '.join(_ROLES)}, got {summarise(role)}", param=f"{where}.role"
        )
    if "content" not in message and role != "assistant":
        raise InvalidRequest(f"{where}.content is required", param=f"{where}.content")
    content = message.get("content")
    if not isinstance(content, str | list | None):
        raise InvalidRequest(
            f"{where}.content must be a string, null or a list of parts, got {summarise(content)}",
            param=f"{where}.content",
        )
    # Open models are trained on `system`; OpenAI's newer name means the same.
    plain = {"role": "system" if role == "developer" else role, "content": "" if content is None else content}
    return plain | {name: message[name] for name in _PASSED_ON if message.get(name) is not None}
