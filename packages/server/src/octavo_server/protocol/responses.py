"""The body of POST /v1/responses, as the body of a chat and as the response that answers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from octavo_client.wire import Extras
from octavo_engine.errors import InvalidRequest
from octavo_server.protocol.body import BODY_CONFIG, refuse_unsupported
from octavo_server.protocol.chat import ChatBody
from octavo_server.protocol.generation import MAX_INT32, MAX_LOGPROBS, Penalty
from octavo_server.protocol.metadata import Metadata
from octavo_server.protocol.response_items import Item, chat_messages
from octavo_server.protocol.violations import summarise

LOGPROBS = "message.output_text.logprobs"

_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "conversation": (),
    "prompt": (),
    "context_management": ([],),
    "moderation": (),
}
_OF_FUNCTIONS = ("name", "description", "parameters", "strict")
_FORMATS = ("text", "json_object", "json_schema")
_SAME = (
    "model",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "parallel_tool_calls",
    "user",
)
_NOT_SHOWN = ("prompt_logprobs", "return_token_ids", "return_tokens_as_token_ids", "continue_final_message")


class ReasoningOptions(BaseModel):
    """How much a model thinks, as far as its template can be told."""

    model_config = BODY_CONFIG

    effort: str | None = None
    summary: str | None = None


class ResponsesBody(Extras):
    """OpenAI's fields of a response, and Octavo's extras."""

    model_config = BODY_CONFIG

    model: str | None = None
    input: Any = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, le=MAX_INT32)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    include: list[str] | None = None
    metadata: Metadata | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = Field(default=None, ge=1)
    text: dict[str, Any] | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None

    def check(self) -> None:
        """Check what concerns several fields.

        Raises:
            InvalidRequest: names the field.
        """
        refuse_unsupported(self, _UNSUPPORTED)
        for name in _NOT_SHOWN:
            if getattr(self, name):
                raise InvalidRequest(f"{name} goes with chat completions; leave it out", param=name)
        if self.background and self.store is False:
            raise InvalidRequest(
                "background needs store true: it is polled later; set it or leave it out", param="store"
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options goes with stream true; leave it out", param="stream_options")
        if self.top_logprobs and not self.wants_logprobs:
            raise InvalidRequest(
                f"top_logprobs goes with {LOGPROBS} in include; add it or leave top_logprobs out", param="top_logprobs"
            )

    @property
    def stores(self) -> bool:
        """Whether the response is kept; OpenAI keeps it unless told otherwise."""
        return self.store is not False

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are shown."""
        return LOGPROBS in (self.include or ())

    def chat(self, items: Sequence[Item]) -> ChatBody:
        """Return the same as a chat.

        Args:
            items: all that the response goes on from.

        Raises:
            InvalidRequest: names what cannot be taken.
        """
        messages = chat_messages(items)
        if self.instructions:
            messages.insert(0, {"role": "system", "content": self.instructions})
        if not messages:
            raise InvalidRequest("input holds no message; give at least one", param="input")
        names = (*Extras.model_fields, *_SAME)
        fields: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        fields |= {"messages": messages, "max_completion_tokens": self.max_output_tokens}
        if self.wants_logprobs:
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        fields |= _tools(self.tools, self.tool_choice)
        fields |= {"response_format": _response_format(self.text)}
        if template := self._template_kwargs():
            fields["chat_template_kwargs"] = template
        chat = ChatBody.model_validate(fields)
        chat.check()
        return chat

    def response(self, response_id: str, *, model: str, created_at: int) -> dict[str, Any]:
        """Return the response that answers this body, before anything is in it."""
        reasoning = self.reasoning or ReasoningOptions()
        return {
            "id": response_id,
            "object": "response",
            "created_at": created_at,
            "completed_at": None,
            "status": "queued" if self.background else "in_progress",
            "background": bool(self.background),
            "error": None,
            "incomplete_details": None,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": self.metadata or {},
            "model": model,
            "output": [],
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
            "safety_identifier": self.safety_identifier,
            "service_tier": "default",
            "store": self.stores,
            "temperature": self.temperature,
            "text": {"format": (self.text or {}).get("format") or {"type": "text"}},
            "tool_choice": "auto" if self.tool_choice is None else self.tool_choice,
            "tools": [{"strict": False, **tool} for tool in self.tools or ()],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": self.top_p,
            "truncation": self.truncation or "disabled",
            "usage": None,
            "user": self.user,
        }

    def _template_kwargs(self) -> dict[str, Any]:
        """Return what the model's chat template is told of reasoning, under the names that templates use."""
        effort = None if self.reasoning is None else self.reasoning.effort
        told = (
            {} if effort is None else {"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort}
        )
        return told | (self.chat_template_kwargs or {})


def _response_format(text: dict[str, Any] | None) -> dict[str, Any] | None:
    if (text or {}).get("verbosity") not in (None, "medium"):
        raise InvalidRequest("text.verbosity is not supported by this server; leave it out", param="text.verbosity")
    given = (text or {}).get("format")
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, dict) else None
    if kind not in _FORMATS:
        raise InvalidRequest(
            f"text.format.type must be one of {', '.join(_FORMATS)}, got {summarise(given if kind is None else kind)}",
            param="text.format",
        )
    if kind != "json_schema":
        return {"type": kind}
    return {"type": kind, "json_schema": {name: value for name, value in given.items() if name != "type"}}


def _tools(tools: Any, choice: Any) -> dict[str, Any]:
    """Return the functions and the choice among them as a chat has them."""
    if tools is None or tools == []:
        return {} if choice in (None, "none", "auto") else {"tool_choice": choice}
    if not isinstance(tools, list):
        raise InvalidRequest(f"tools must be a list, got {summarise(tools)}", param="tools")
    functions: list[dict[str, Any]] = []
    for place, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise InvalidRequest(
                f"tools[{place}] must be a function of the caller's own, got {summarise(tool)}", param=f"tools[{place}]"
            )
        function = {name: tool[name] for name in _OF_FUNCTIONS if tool.get(name) is not None}
        functions.append({"type": "function", "function": function})
    if isinstance(choice, dict) and choice.get("type") == "function":
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    elif isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("tools")
        if not isinstance(allowed, list) or choice.get("mode") not in ("auto", "required"):
            raise InvalidRequest(
                "tool_choice of type allowed_tools must have a list of tools, and the mode auto or required",
                param="tool_choice",
            )
        names = [tool.get("name") for tool in allowed if isinstance(tool, dict)]
        functions = [function for function in functions if function["function"].get("name") in names]
        choice = choice["mode"]
    return {"tools": functions, "tool_choice": choice}
