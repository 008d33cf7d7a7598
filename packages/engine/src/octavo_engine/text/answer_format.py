"""AnswerFormat: how a model writes what it thinks and which functions it calls, and the parsers that find it."""

from __future__ import annotations

from dataclasses import dataclass

from octavo_engine.text.parsers import harmony
from octavo_engine.text.parsers.base import AnswerParser
from octavo_engine.text.parsers.formats import (
    AUTO,
    HARMONY,
    REASONING_FORMATS,
    TOOL_FORMATS,
    ReasoningFormat,
    ToolFormat,
    reasoning_format_of,
    tool_format_of,
)
from octavo_engine.text.parsers.named_call import NamedCallParser
from octavo_engine.text.parsers.parser import OutputParser
from octavo_engine.text.tool_use import ToolUse


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """The formats of one model.

    Attributes:
        tools: of calls; None where the whole answer is in the harmony format.
        reasoning: of reasoning; None if it has no marks, or is in the harmony format.
        template_has_tools: whether the chat template tells the model of functions; if not, the prompt must.
    """

    tools: ToolFormat | None
    reasoning: ReasoningFormat | None
    template_has_tools: bool = False

    @classmethod
    def of(cls, template: str, tool_parser: str = AUTO, reasoning_parser: str = AUTO) -> AnswerFormat:
        """Return the formats that the names stand for, those of a model with this chat template for `auto`."""
        has_tools = "tools" in template
        if tool_parser == HARMONY or (tool_parser == AUTO and harmony.HINT in template):
            return cls(None, None, has_tools)
        tools = tool_format_of(template) if tool_parser == AUTO else TOOL_FORMATS[tool_parser]
        reasoning = (
            reasoning_format_of(template) if reasoning_parser == AUTO else REASONING_FORMATS.get(reasoning_parser)
        )
        return cls(tools, reasoning, has_tools)

    @property
    def marks(self) -> tuple[str, ...]:
        """The marks that its parsers look for; some may be special tokens of the model."""
        if self.tools is None:
            return harmony.MARKS
        marks = (*self.tools.begins, *self.tools.separators, *self.tools.ends)
        return marks if self.reasoning is None else (*marks, self.reasoning.begin, self.reasoning.end)

    def parses(self, use: ToolUse | None) -> bool:
        """Return whether an answer may hold more than content."""
        return use is not None or self.tools is None or self.reasoning is not None

    def parser(self, use: ToolUse | None, *, starts_in_reasoning: bool = False) -> AnswerParser:
        """Return a parser of one answer.

        Args:
            use: the functions that may be called; None if there are none.
            starts_in_reasoning: whether the prompt has ended with the mark that begins reasoning.
        """
        if use is not None and use.choice == "named":
            assert use.name is not None
            return NamedCallParser(use.name)
        if use is not None and use.choice == "required":
            return OutputParser(TOOL_FORMATS["json"], names=use.names, max_num_calls=use.max_num_calls)
        most = None if use is None else use.max_num_calls
        if self.tools is None:
            return harmony.HarmonyParser(max_num_calls=most)
        return OutputParser(
            None if use is None else self.tools,
            self.reasoning,
            names=() if use is None else use.names,
            starts_in_reasoning=starts_in_reasoning,
            max_num_calls=most,
        )
