"""docs/sampling.md holds every field of SamplingParams, with its default."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path

from octavo_engine import SamplingParams

TABLE = (Path(__file__).parent.parent / "docs" / "sampling.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| (.+) \| (.*) \| (.*) ?\|$", TABLE, flags=re.MULTILINE)
IN_WORDS = {"dry_sequence_breakers"}


def test_the_table_has_every_field_once_and_no_other() -> None:
    assert sorted(name for name, *_ in ROWS) == sorted(field.name for field in fields(SamplingParams))


def test_the_table_has_the_defaults() -> None:
    defaults = {
        field.name: field.default if field.default is not MISSING else field.default_factory()
        for field in fields(SamplingParams)
    }
    told = {name: default for name, _, default, _ in ROWS if name not in IN_WORDS}
    expected = {name: repr(value).replace("'", '"') for name, value in defaults.items() if name not in IN_WORDS}
    assert {name: default.strip("`") for name, default in told.items()} == expected
