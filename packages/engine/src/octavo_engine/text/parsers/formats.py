"""How families of models write reasoning and tool calls: one entry each, read by `OutputParser`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Form = Literal["json", "named", "python"]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes calls.

    Attributes:
        name: as users choose it.
        begins: markers behind which calls stand.
        separators: what may stand between calls, and between marker and call, besides white space.
        ends: what closes calls; text goes on behind it.
        form: of a call: `json` has name and arguments in one object, or several in a list; `named` a name before the
            object of the arguments; `python` a list of Python calls.
        call_name: for `named`: finds the name in what stands before the object.
        tag: what stands before and behind the arguments of a call of the function NAME, where a grammar can begin at
            the marker.
        bare: whether a text that begins like a call is one without any marker, if it names a function that there is.
        hint: what the chat template of such a model contains.
    """

    name: str
    begins: tuple[str, ...] = ()
    separators: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    form: Form = "json"
    call_name: re.Pattern[str] = re.compile(r"([\w.-]+)\s*\Z")
    tag: tuple[str, str] | None = None
    bare: bool = False
    hint: str | None = None


def _deepseek(mark: str) -> str:
    return f"<｜tool▁{mark}｜>"  # noqa: RUF001 - the bars are the model's own


TOOL_FORMATS = {
    tool_format.name: tool_format
    for tool_format in (
        ToolFormat(
            "hermes",
            begins=("<tool_call>",),
            ends=("</tool_call>",),
            tag=('<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>"),
            hint="<tool_call>",
        ),
        ToolFormat(
            "mistral",
            begins=("[TOOL_CALLS]",),
            form="named",
            call_name=re.compile(r"\A\s*([\w.-]+?)\s*(?:\[CALL_ID\].*)?(?:\[ARGS\])?\s*\Z", re.DOTALL),
            hint="[TOOL_CALLS]",
        ),
        ToolFormat(
            "deepseek",
            begins=(_deepseek("calls▁begin"),),
            separators=(_deepseek("call▁begin"), _deepseek("call▁end"), "```"),
            ends=(_deepseek("calls▁end"),),
            form="named",
            call_name=re.compile(rf"(?:\A\s*function{re.escape(_deepseek('sep'))}|\A)\s*([\w.-]+)"),
            hint=_deepseek("calls▁begin"),
        ),
        ToolFormat(
            "llama3_json",
            begins=("<|python_tag|>",),
            separators=(";", ","),
            ends=("<|eom_id|>",),
            bare=True,
            tag=('<|python_tag|>{"name": "NAME", "parameters": ', "}"),
            hint="<|python_tag|>",
        ),
        ToolFormat(
            "pythonic",
            begins=("<|python_start|>",),
            ends=("<|python_end|>",),
            form="python",
            bare=True,
            hint="<|python_start|>",
        ),
        ToolFormat("json", separators=(",", ";"), bare=True),
    )
}
"""By name; `gpt_oss` is a format of a whole answer, see `harmony`."""


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a family of models marks what it thinks.

    Attributes:
        name: as users choose it.
        begin: marker before it.
        end: marker behind it.
        hint: what the chat template of such a model contains.
    """

    name: str
    begin: str
    end: str
    hint: str


REASONING_FORMATS = {
    reasoning_format.name: reasoning_format
    for reasoning_format in (
        ReasoningFormat("think", "<think>", "</think>", "<think>"),
        ReasoningFormat("mistral", "[THINK]", "[/THINK]", "[THINK]"),
        ReasoningFormat("seed", "<seed:think>", "</seed:think>", "<seed:think>"),
    )
}
"""By name."""

AUTO, NONE, HARMONY = "auto", "none", "gpt_oss"

TOOL_PARSERS = (AUTO, HARMONY, *TOOL_FORMATS)
"""What users may choose."""

REASONING_PARSERS = (AUTO, NONE, *REASONING_FORMATS)
"""What users may choose."""


def tool_format_of(template: str) -> ToolFormat:
    """Return the format that a model's chat template teaches; `json` where it shows none."""
    return next((f for f in TOOL_FORMATS.values() if f.hint and f.hint in template), TOOL_FORMATS["json"])


def reasoning_format_of(template: str) -> ReasoningFormat | None:
    """Return how a model marks its reasoning, by its chat template; None where it shows no marker."""
    return next((f for f in REASONING_FORMATS.values() if f.hint in template), None)
