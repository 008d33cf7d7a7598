"""Rules: which settings hold for which modules, by the regular expressions of a configuration."""

from __future__ import annotations

import re

from octavo_engine.errors import CorruptModelFile

_MAX_PATTERN = 1000


def compiled(pattern: str, where: str) -> re.Pattern[str]:
    """Compile a configuration's regular expression.

    Raises:
        CorruptModelFile: if it is none, or longer than 1000 characters.
    """
    if len(pattern) > _MAX_PATTERN:
        raise CorruptModelFile(
            f"{where}: expected a pattern of at most {_MAX_PATTERN} characters, found {len(pattern)}"
        )
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise CorruptModelFile(f"{where}: expected a regular expression, found {pattern!r}: {error}") from error
