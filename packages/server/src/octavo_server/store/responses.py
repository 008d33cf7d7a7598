"""ResponseStore: responses with what went into them and what came out, and the events of those in the background."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from sqlite3 import Connection
from typing import Any

from octavo_engine.errors import InvalidRequest
from octavo_server.protocol.violations import summarise
from octavo_server.store.database import Database

Item = dict[str, Any]

_UNFINISHED = "('queued', 'in_progress')"
# From a response back to the first of its conversation; depth counts from it.
_CHAIN = """WITH RECURSIVE chain (id, previous_id, depth) AS (
    SELECT id, previous_id, 0 FROM responses WHERE id = :id AND owner = :owner
    UNION ALL
    SELECT r.id, r.previous_id, depth + 1 FROM responses r JOIN chain ON r.id = chain.previous_id WHERE owner = :owner
) """


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response as it was last written.

    Attributes:
        response: as the wire shows it.
        owner: whose it is.
        background: whether it runs without a client.
        streams: whether its events are kept.
        num_runs: how often it has been begun.
        request: the body that asked for it; None unless it runs in the background.
    """

    response: dict[str, Any]
    owner: str
    background: bool
    streams: bool
    num_runs: int
    request: dict[str, Any] | None


class ResponseStore:
    """Responses by their ids; each belongs to an owner, and others do not see it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, stored: StoredResponse, inputs: Sequence[Item]) -> None:
        """Add a response that begins, with the items that its request brought."""

        def add(connection: Connection) -> None:
            response = stored.response
            connection.execute(
                "INSERT INTO responses (id, owner, created_at, previous_id, status, background, streams, request,"
                " response) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    response["id"],
                    stored.owner,
                    response["created_at"],
                    response["previous_response_id"],
                    response["status"],
                    stored.background,
                    stored.streams,
                    None if stored.request is None else json.dumps(stored.request),
                    json.dumps(response),
                ),
            )
            _write_items(connection, response["id"], inputs, is_output=False)

        await self._database.run(add)

    async def update(self, response: dict[str, Any], *, begins: bool = False) -> None:
        """Write what has become of a response; one that was deleted meanwhile stays so.

        Args:
            response: as the wire shows it.
            begins: whether it begins to run.
        """

        def update(connection: Connection) -> None:
            sql = "UPDATE responses SET status = ?, response = ?, num_runs = num_runs + ? WHERE id = ?"
            values = (response["status"], json.dumps(response | {"output": []}), begins, response["id"])
            if connection.execute(sql, values).rowcount:
                connection.execute("DELETE FROM items WHERE response_id = ? AND is_output", (response["id"],))
                _write_items(connection, response["id"], response["output"], is_output=True)

        await self._database.run(update)

    async def get(self, response_id: str, owner: str) -> StoredResponse | None:
        """Return a response; None if its owner has none of this id."""

        def get(connection: Connection) -> StoredResponse | None:
            found = _select(connection, "id = ? AND owner = ?", (response_id, owner))
            return found[0] if found else None

        return await self._database.run(get)

    async def unfinished(self) -> list[StoredResponse]:
        """Return the responses that are not at their end, oldest first."""
        return await self._database.run(lambda connection: _select(connection, f"status IN {_UNFINISHED}", ()))

    async def inputs(self, response_id: str, owner: str) -> list[Item]:
        """Return all that a response was made from, oldest first: the turns before it, and what its request brought."""
        sql = (
            _CHAIN
            + """SELECT item FROM chain JOIN items ON response_id = chain.id
            WHERE depth > 0 OR NOT is_output ORDER BY depth DESC, is_output, place"""
        )
        values = {"id": response_id, "owner": owner}
        rows = await self._database.run(lambda connection: connection.execute(sql, values).fetchall())
        return [json.loads(item) for (item,) in rows]

    async def conversation(self, response_id: str, owner: str) -> list[Item]:
        """Return what a response that follows this one goes on from: all inputs and outputs, oldest first.

        Raises:
            InvalidRequest: if it has not ended, or it or one before it is not there.
        """

        def read(connection: Connection) -> list[Item]:
            sql = f"SELECT 1 FROM responses WHERE id = ? AND owner = ? AND status IN {_UNFINISHED}"
            if connection.execute(sql, (response_id, owner)).fetchone():
                raise InvalidRequest(
                    f"previous_response_id: {response_id} has not ended; wait for it",
                    param="previous_response_id",
                    code="previous_response_not_ended",
                )
            values = {"id": response_id, "owner": owner}
            sql = _CHAIN + "SELECT id, previous_id, depth FROM chain ORDER BY depth DESC LIMIT 1"
            last = connection.execute(sql, values).fetchone()
            if last is None or last[1] is not None:
                missing = response_id if last is None else last[1]
                raise InvalidRequest(
                    f"previous_response_id: no response {summarise(missing)} is stored, or no longer; send the"
                    " conversation as input",
                    param="previous_response_id",
                    code="previous_response_not_found",
                )
            sql = (
                _CHAIN
                + """SELECT item FROM chain JOIN items ON response_id = chain.id
                ORDER BY depth DESC, is_output, place"""
            )
            return [json.loads(item) for (item,) in connection.execute(sql, values)]

        return await self._database.run(read)

    async def item(self, item_id: str, owner: str) -> Item | None:
        """Return an item of any of an owner's responses; None if there is none of this id."""
        sql = "SELECT item FROM items JOIN responses r ON response_id = r.id WHERE items.id = ? AND owner = ?"
        row = await self._database.run(lambda c: c.execute(sql, (item_id, owner)).fetchone())
        return None if row is None else json.loads(row[0])

    async def delete(self, response_id: str, owner: str) -> bool:
        """Delete a response; False if its owner has none of this id."""
        sql = "DELETE FROM responses WHERE id = ? AND owner = ?"
        return await self._database.run(lambda c: c.execute(sql, (response_id, owner)).rowcount > 0)

    async def add_events(self, response_id: str, events: Sequence[tuple[int, bytes]]) -> None:
        """Keep events of a response by their numbers; those of one that was deleted meanwhile are dropped."""

        def add(connection: Connection) -> None:
            if connection.execute("SELECT 1 FROM responses WHERE id = ?", (response_id,)).fetchone():
                rows = [(response_id, number, event) for number, event in events]
                connection.executemany("INSERT INTO events VALUES (?, ?, ?)", rows)

        await self._database.run(add)

    async def events(self, response_id: str, after: int) -> list[tuple[int, bytes]]:
        """Return the kept events of a response whose numbers are above `after`, in order."""
        sql = "SELECT sequence_number, event FROM events WHERE response_id = ? AND sequence_number > ? ORDER BY 1"
        return await self._database.run(lambda c: c.execute(sql, (response_id, after)).fetchall())

    async def last_event(self, response_id: str) -> int:
        """Return the number of the last event that is kept; -1 if none is."""
        sql = "SELECT COALESCE(MAX(sequence_number), -1) FROM events WHERE response_id = ?"
        return int((await self._database.run(lambda c: c.execute(sql, (response_id,)).fetchone()))[0])

    async def delete_older(self, created_before: float) -> None:
        """Delete the ended responses of before a time that no other response goes on from."""
        sql = (
            f"DELETE FROM responses WHERE created_at < ? AND status NOT IN {_UNFINISHED}"
            " AND NOT EXISTS (SELECT 1 FROM responses later WHERE later.previous_id = responses.id)"
        )
        await self._database.run(lambda connection: connection.execute(sql, (created_before,)).rowcount)


def _select(connection: Connection, condition: str, values: tuple[Any, ...]) -> list[StoredResponse]:
    sql = f"SELECT response, owner, background, streams, num_runs, request FROM responses WHERE {condition}"
    found = []
    for response, owner, background, streams, num_runs, request in connection.execute(
        f"{sql} ORDER BY created_at, rowid", values
    ).fetchall():
        shown = json.loads(response)
        outputs = "SELECT item FROM items WHERE response_id = ? AND is_output ORDER BY place"
        shown["output"] = [json.loads(item) for (item,) in connection.execute(outputs, (shown["id"],))]
        body = None if request is None else json.loads(request)
        found.append(StoredResponse(shown, owner, bool(background), bool(streams), num_runs, body))
    return found


def _write_items(connection: Connection, response_id: str, items: Sequence[Item], *, is_output: bool) -> None:
    rows = [(response_id, is_output, place, item["id"], json.dumps(item)) for place, item in enumerate(items)]
    connection.executemany("INSERT INTO items VALUES (?, ?, ?, ?, ?)", rows)
