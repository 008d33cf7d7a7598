"""ToolUse: the functions that a model may call, whether it must, and what holds its answer to that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from octavo_engine.errors import InvalidRequest
from octavo_engine.structured.json_schema import SchemaTree, rebased
from octavo_engine.structured.params import StructuredOutputsParams
from octavo_engine.text.parsers.formats import ToolFormat

_DEFINITIONS = "#/$defs/{}"


@dataclass(frozen=True, slots=True)
class Function:
    """One function that may be called.

    Attributes:
        name: as the model calls it.
        parameters: a JSON Schema of an object: its arguments.
        strict: whether the arguments of a call that the model is free to make are held to the schema. Those of a call
            that it must make always are.
    """

    name: str
    parameters: Mapping[str, Any]
    strict: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What a request says about functions.

    Attributes:
        functions: those that may be called.
        definitions: the same as the caller wrote them, for the model's chat template.
        choice: `auto` leaves it to the model, `required` demands a call, `named` a call of the function `name`.
        name: with `named`, the function's.
        parallel: whether there may be several calls.
    """

    functions: tuple[Function, ...]
    definitions: tuple[Mapping[str, Any], ...]
    choice: Literal["auto", "required", "named"] = "auto"
    name: str | None = None
    parallel: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """The functions' names."""
        return tuple(function.name for function in self.functions)

    @property
    def max_num_calls(self) -> int | None:
        """The most calls that are taken; None takes all."""
        return None if self.parallel else 1

    def constraint(self, tool_format: ToolFormat | None) -> StructuredOutputsParams | None:
        """Return what the answer's text is held to; None if to nothing.

        Args:
            tool_format: how the model writes calls; None where only a demanded call can be held.

        Raises:
            InvalidRequest: if a function's schema is not supported, or a strict function's arguments cannot be held to
                it in this format.
        """
        held = [function for function in self.functions if self._holds(function)]
        for function in held:
            _check_schema(function)
        if self.choice == "named":
            return StructuredOutputsParams(json=held[0].parameters)
        if self.choice == "required":
            return StructuredOutputsParams(json=self._list_of_calls())
        if not held:
            return None
        if tool_format is None or tool_format.tag is None:
            raise InvalidRequest(
                "this model writes calls without a mark that a grammar could begin at, so strict functions need "
                "tool_choice required or a named function; or leave strict out",
                param="tools",
            )
        begin, end = tool_format.tag
        return StructuredOutputsParams(
            structural_tag={
                "triggers": [tool_format.begins[0]],
                "structures": [
                    {
                        "begin": begin.replace("NAME", function.name),
                        "schema": function.parameters if function.strict else {"type": "object"},
                        "end": end,
                    }
                    for function in self.functions
                ],
            }
        )

    def _holds(self, function: Function) -> bool:
        """Return whether the arguments of a function are held to its schema."""
        if self.choice == "named":
            return function.name == self.name
        return self.choice == "required" or function.strict

    def _list_of_calls(self) -> dict[str, Any]:
        """Return the schema of `[{"name": ..., "arguments": {...}}, ...]`, whatever the model's own format is."""
        calls, definitions = [], {}
        for index, function in enumerate(self.functions):
            key = f"function{index}"
            definitions[key] = rebased(function.parameters, _DEFINITIONS.format(key))
            calls.append(
                {
                    "type": "object",
                    "properties": {"name": {"const": function.name}, "arguments": {"$ref": _DEFINITIONS.format(key)}},
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
            )
        limit = {} if self.parallel else {"maxItems": 1}
        return {"type": "array", "minItems": 1, "items": {"anyOf": calls}, **limit, "$defs": definitions}


def _check_schema(function: Function) -> None:
    try:
        SchemaTree(function.parameters)
    except InvalidRequest as error:
        raise InvalidRequest(
            f"parameters of the function {function.name}: {error}", param="tools", code=error.code
        ) from error
