"""Metadata: the few short texts that a caller attaches to a response or a batch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

_Key = Annotated[str, StringConstraints(max_length=64)]
_Value = Annotated[str, StringConstraints(max_length=512)]

Metadata = Annotated[dict[_Key, _Value], Field(max_length=16)]
"""OpenAI's limits: 16 pairs of at most 64 and 512 characters."""
