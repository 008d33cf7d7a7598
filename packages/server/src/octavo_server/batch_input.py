"""Reads a batch's input file: where its requests stand, and what is wrong with its lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octavo_server.protocol.batches import LineError, custom_id_of
from octavo_server.store.batches import BatchLine

MAX_LINES = 50_000
"""OpenAI's limit."""

_MAX_ERRORS = 100


class BatchInput:
    """One reading of an input file; blank lines are passed over.

    Args:
        path: of the file.
        endpoint: that every line must name.
        max_line_bytes: the longest line.

    Attributes:
        errors: what was wrong, as OpenAI shows it, by the end of the reading; the first hundred.
    """

    def __init__(self, path: Path, endpoint: str, max_line_bytes: int) -> None:
        self._path = path
        self._endpoint = endpoint
        self._max_line_bytes = max_line_bytes
        self._num_lines = 0
        self._custom_ids: set[str] = set()
        self.errors: list[dict[str, Any]] = []

    def lines(self, size: int) -> Iterator[list[BatchLine]]:
        """Read the file and return its sound lines, `size` at a time, as long as nothing is wrong."""
        found: list[BatchLine] = []
        with self._path.open("rb") as file:
            number = start = 0
            while raw := file.readline(self._max_line_bytes + 1):
                number += 1
                if len(raw) > self._max_line_bytes:
                    self._refuse(number, LineError("line_too_long", f"a line may have {self._max_line_bytes} bytes"))
                    return  # what follows is the rest of it
                if raw.strip() and (line := self._read(number, start, raw)) is not None:
                    found.append(line)
                start += len(raw)
                if len(self.errors) >= _MAX_ERRORS:
                    return
                if len(found) >= size and not self.errors:
                    yield found
                    found = []
        if not self._num_lines and not self.errors:
            self._refuse(None, LineError("empty_file", "the input file holds no request; give at least one line"))
        if found and not self.errors:
            yield found

    def _read(self, number: int, start: int, raw: bytes) -> BatchLine | None:
        self._num_lines += 1
        custom_id = custom_id_of(raw, self._endpoint)
        if isinstance(custom_id, LineError):
            self._refuse(number, custom_id)
        elif custom_id in self._custom_ids:
            message = "this custom_id is that of a line before; each needs its own"
            self._refuse(number, LineError("duplicate_custom_id", message, "custom_id"))
        elif self._num_lines > MAX_LINES:
            self._refuse(number, LineError("too_many_lines", f"a batch may have {MAX_LINES} requests; make several"))
        else:
            self._custom_ids.add(custom_id)
            return BatchLine(number, custom_id, start, len(raw))
        return None

    def _refuse(self, number: int | None, error: LineError) -> None:
        self.errors.append({"code": error.code, "line": number, "message": error.message, "param": error.param})
