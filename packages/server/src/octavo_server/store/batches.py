"""BatchStore: batches and their lines; what a line has come to is written once, with the batch's counts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from sqlite3 import Connection
from typing import Any

from octavo_server.store.database import Database
from octavo_server.store.files import StoredFile, insert_file
from octavo_server.store.paging import Page

KEEP = "keep_output_seconds"
"""The member of a batch that says how long its files are kept; the wire does not show it."""

_COLUMNS = "batch, owner, expires_at, outcome, num_lines, num_completed, num_failed"
_LINE_COLUMNS = "line, custom_id, start, num_bytes, has_succeeded, result"


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """A batch as it was last written.

    Attributes:
        batch: as the wire shows it, but for the counts.
        owner: whose it is.
        expires_at: when what is not done by then is given up; seconds since 1970.
        outcome: what it ends as, once that is clear and its files remain to be written; None before.
        num_lines: requests in it.
        num_completed: those that were answered.
        num_failed: those that were refused or failed.
    """

    batch: dict[str, Any]
    owner: str
    expires_at: int
    outcome: str | None
    num_lines: int
    num_completed: int
    num_failed: int

    @property
    def id(self) -> str:
        """The batch's id."""
        return str(self.batch["id"])

    def shown(self) -> dict[str, Any]:
        """Return it as OpenAI shows a batch."""
        counts = {"total": self.num_lines, "completed": self.num_completed, "failed": self.num_failed}
        return {name: value for name, value in self.batch.items() if name != KEEP} | {"request_counts": counts}


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A request of a batch: where it stands in the input file, and what has come of it.

    Attributes:
        line: its number in the file, from 1 on.
        custom_id: its name by the caller.
        start: where it begins in the file, in bytes.
        num_bytes: its length.
        has_succeeded: whether it was answered; None before its end.
        result: its line of the output or error file; None before its end.
    """

    line: int
    custom_id: str
    start: int
    num_bytes: int
    has_succeeded: bool | None = None
    result: str | None = None


class BatchStore:
    """Batches by their ids; each belongs to an owner, and others do not see it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, batch: Mapping[str, Any], owner: str, expires_at: int) -> None:
        """Add a batch."""
        sql = "INSERT INTO batches (id, owner, input_file_id, expires_at, batch) VALUES (?, ?, ?, ?, ?)"
        values = (batch["id"], owner, batch["input_file_id"], expires_at, json.dumps(batch))
        await self._database.run(lambda connection: connection.execute(sql, values).rowcount)

    async def get(self, batch_id: str, owner: str) -> StoredBatch | None:
        """Return a batch; None if its owner has none of this id."""
        found = await self._select("id = ? AND owner = ?", (batch_id, owner))
        return found[0] if found else None

    async def part(self, owner: str, page: Page) -> tuple[list[StoredBatch], bool]:
        """Return a part of an owner's batches, and whether there are more."""
        rows, has_more = await self._database.run(lambda c: page.rows(c, _COLUMNS, "batches", {"owner": owner}))
        return [_batch(row) for row in rows], has_more

    async def unfinished(self) -> list[StoredBatch]:
        """Return the batches that are not at their end, oldest first."""
        return await self._select("NOT is_ended", ())

    async def update(self, batch_id: str, *, outcome: str | None = None, **changes: Any) -> StoredBatch:
        """Change members of a batch that has not ended, and perhaps say what it ends as; return what it is now."""

        def update(connection: Connection) -> StoredBatch:
            _change(connection, batch_id, changes, outcome)
            return _get(connection, batch_id)

        return await self._database.run(update)

    async def cancel(self, batch_id: str, *, at: int) -> tuple[StoredBatch, bool]:
        """Say that a batch ends cancelled, unless it has an outcome; return what it is now, and whether that is new."""

        def cancel(connection: Connection) -> tuple[StoredBatch, bool]:
            sql = "UPDATE batches SET outcome = 'cancelled' WHERE id = ? AND outcome IS NULL AND NOT is_ended"
            has_changed = connection.execute(sql, (batch_id,)).rowcount > 0
            if has_changed:
                _change(connection, batch_id, {"status": "cancelling", "cancelling_at": at}, None)
            return _get(connection, batch_id), has_changed

        return await self._database.run(cancel)

    async def clear_lines(self, batch_id: str) -> None:
        """Forget the lines of a batch: its input is read again."""
        sql = "DELETE FROM batch_lines WHERE batch_id = ?"
        await self._database.run(lambda connection: connection.execute(sql, (batch_id,)).rowcount)

    async def add_lines(self, batch_id: str, lines: Iterable[BatchLine]) -> None:
        """Add lines that are to be computed."""
        sql = "INSERT INTO batch_lines (batch_id, line, custom_id, start, num_bytes) VALUES (?, ?, ?, ?, ?)"
        rows = [(batch_id, line.line, line.custom_id, line.start, line.num_bytes) for line in lines]
        await self._database.run(lambda connection: connection.executemany(sql, rows).rowcount)

    async def start(self, batch_id: str, **changes: Any) -> StoredBatch:
        """Count the lines of a batch, change its members, and return what it is now."""

        def start(connection: Connection) -> StoredBatch:
            count = "SELECT COUNT(*) FROM batch_lines WHERE batch_id = ?"
            (num_lines,) = connection.execute(count, (batch_id,)).fetchone()
            connection.execute("UPDATE batches SET num_lines = ? WHERE id = ?", (num_lines, batch_id))
            _change(connection, batch_id, changes, None)
            return _get(connection, batch_id)

        return await self._database.run(start)

    async def pending_lines(self, batch_id: str, *, after: int, limit: int) -> list[BatchLine]:
        """Return the next lines behind a number that have not been computed."""
        return await self._lines("has_succeeded IS NULL AND line > ?", (batch_id, after, limit))

    async def results(self, batch_id: str, *, succeeded: bool, after: int, limit: int) -> list[BatchLine]:
        """Return the next lines behind a number that were answered, or that were not."""
        return await self._lines("has_succeeded = ? AND line > ?", (batch_id, succeeded, after, limit))

    async def finish_line(self, batch_id: str, line: int, *, succeeded: bool, result: str) -> None:
        """Write what has come of a line, once."""

        def finish(connection: Connection) -> None:
            sql = (
                "UPDATE batch_lines SET has_succeeded = ?, result = ?"
                " WHERE batch_id = ? AND line = ? AND has_succeeded IS NULL"
            )
            if connection.execute(sql, (succeeded, result, batch_id, line)).rowcount:
                count = "num_completed" if succeeded else "num_failed"
                connection.execute(f"UPDATE batches SET {count} = {count} + 1 WHERE id = ?", (batch_id,))

        await self._database.run(finish)

    async def end(self, batch_id: str, files: Sequence[StoredFile] = (), **changes: Any) -> None:
        """Make a batch's files known, change its members and end it, once, and forget its lines."""

        def end(connection: Connection) -> None:
            sql = "SELECT 1 FROM batches WHERE id = ? AND NOT is_ended"
            if connection.execute(sql, (batch_id,)).fetchone() is None:
                return
            for file in files:
                insert_file(connection, file)
            _change(connection, batch_id, changes, None)
            connection.execute("UPDATE batches SET is_ended = 1 WHERE id = ?", (batch_id,))
            connection.execute("DELETE FROM batch_lines WHERE batch_id = ?", (batch_id,))

        await self._database.run(end)

    async def delete_older(self, expired_before: float) -> None:
        """Delete the ended batches whose window closed before a time."""
        sql = "DELETE FROM batches WHERE is_ended AND expires_at < ?"
        await self._database.run(lambda connection: connection.execute(sql, (expired_before,)).rowcount)

    async def _lines(self, condition: str, values: tuple[Any, ...]) -> list[BatchLine]:
        sql = f"SELECT {_LINE_COLUMNS} FROM batch_lines WHERE batch_id = ? AND {condition} ORDER BY line LIMIT ?"
        rows = await self._database.run(lambda connection: connection.execute(sql, values).fetchall())
        return [BatchLine(*row) for row in rows]

    async def _select(self, condition: str, values: tuple[Any, ...]) -> list[StoredBatch]:
        sql = f"SELECT {_COLUMNS} FROM batches WHERE {condition} ORDER BY place"
        rows = await self._database.run(lambda connection: connection.execute(sql, values).fetchall())
        return [_batch(row) for row in rows]


def _get(connection: Connection, batch_id: str) -> StoredBatch:
    return _batch(connection.execute(f"SELECT {_COLUMNS} FROM batches WHERE id = ?", (batch_id,)).fetchone())


def _batch(row: tuple[Any, ...]) -> StoredBatch:
    return StoredBatch(json.loads(row[0]), *row[1:])


def _change(connection: Connection, batch_id: str, changes: Mapping[str, Any], outcome: str | None) -> None:
    sql = "SELECT batch FROM batches WHERE id = ? AND NOT is_ended"
    if (row := connection.execute(sql, (batch_id,)).fetchone()) is None:
        return
    batch = json.dumps(json.loads(row[0]) | changes)
    sql = "UPDATE batches SET batch = ?, outcome = COALESCE(outcome, ?) WHERE id = ?"
    connection.execute(sql, (batch, outcome, batch_id))
