"""What a parser finds in a model's text, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of what the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call of a function begins; its arguments follow. Calls come one after the other."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A part of the JSON text of the latest call's arguments."""

    text: str


Event = Content | Reasoning | CallBegin | CallArguments
