"""Page: which part of a list is asked for, and the list's shape on the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from sqlite3 import Connection
from typing import Any

from octavo_engine.errors import InvalidRequest
from octavo_server.protocol.violations import summarise


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A part of a list: at most `limit` things behind the one with the id `after`."""

    limit: int
    after: str | None = None
    ascending: bool = False

    @classmethod
    def of(cls, query: Mapping[str, str], *, limit: int, max_limit: int) -> Page:
        """Return what a query asks for.

        Raises:
            InvalidRequest: if `limit` or `order` is none.
        """
        given, order = query.get("limit", str(limit)), query.get("order", "desc")
        if not given.isascii() or not given.isdigit() or not 1 <= int(given[:9]) <= max_limit:
            raise InvalidRequest(f"limit must be 1 to {max_limit}, got {summarise(given)}", param="limit")
        if order not in ("asc", "desc"):
            raise InvalidRequest(f"order must be asc or desc, got {summarise(order)}", param="order")
        return cls(limit=int(given), after=query.get("after") or None, ascending=order == "asc")

    def rows(
        self, connection: Connection, columns: str, table: str, where: Mapping[str, Any]
    ) -> tuple[list[tuple[Any, ...]], bool]:
        """Return this part of the rows of a table with `id` and `place`, and whether there are more.

        Args:
            connection: to the database.
            columns: to return.
            table: its name.
            where: values that columns must have.

        Raises:
            InvalidRequest: if `after` is no row's id.
        """
        conditions = [f"{name} = ?" for name in where]
        values = list(where.values())
        if self.after is not None:
            sql = f"SELECT place FROM {table} WHERE {' AND '.join([*conditions, 'id = ?'])}"
            place = connection.execute(sql, (*values, self.after)).fetchone()
            if place is None:
                raise self._unknown()
            conditions.append(f"place {'>' if self.ascending else '<'} ?")
            values.append(place[0])
        sql = f"SELECT {columns} FROM {table} WHERE {' AND '.join(conditions)} ORDER BY place"
        sql += f"{'' if self.ascending else ' DESC'} LIMIT ?"
        rows = connection.execute(sql, (*values, self.limit + 1)).fetchall()
        return rows[: self.limit], len(rows) > self.limit

    def part(self, items: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], bool]:
        """Return this part of things that are at hand, oldest first, and whether there are more.

        Raises:
            InvalidRequest: if `after` is the id of none.
        """
        ordered = list(items if self.ascending else reversed(items))
        if self.after is not None:
            place = next((place for place, item in enumerate(ordered) if item["id"] == self.after), None)
            if place is None:
                raise self._unknown()
            ordered = ordered[place + 1 :]
        return ordered[: self.limit], len(ordered) > self.limit

    def _unknown(self) -> InvalidRequest:
        return InvalidRequest(f"after must be an id of this list, got {summarise(self.after)}", param="after")


def list_of(data: Sequence[Mapping[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """Return a part of a list as OpenAI shows it."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more}
