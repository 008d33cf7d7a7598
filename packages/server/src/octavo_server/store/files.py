"""FileStore: uploaded files and the outputs of batches: bytes in a folder, and what is known of them in a table."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection
from typing import Any

from octavo_server.store.database import Database
from octavo_server.store.paging import Page

_COLUMNS = "id, owner, created_at, expires_at, filename, purpose, num_bytes"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What is known of a file; times in seconds since 1970."""

    id: str
    owner: str
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    num_bytes: int

    def shown(self) -> dict[str, Any]:
        """Return it as OpenAI shows a file."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class FileStore:
    """Files by their ids; each belongs to an owner, and others do not see it.

    A file's bytes are written under its id before it is added, so that a file that is known is whole. What is in the
    folder and not known, after a crash, is removed at the start.
    """

    def __init__(self, database: Database, folder: Path) -> None:
        self._database = database
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        known = {name for (name,) in database.run_now(lambda c: c.execute("SELECT id FROM files").fetchall())}
        for path in folder.iterdir():
            if path.name not in known:
                path.unlink()

    @staticmethod
    def new_id() -> str:
        """Return an id for a file that is to be written."""
        return f"file-{uuid.uuid4().hex}"

    def path(self, file_id: str) -> Path:
        """Return where the bytes of a file are; `file_id` comes from this store."""
        return self._folder / file_id

    async def add(self, file: StoredFile) -> None:
        """Make a file known whose bytes have been written."""
        await self._database.run(lambda connection: insert_file(connection, file))

    async def get(self, file_id: str, owner: str) -> StoredFile | None:
        """Return a file; None if its owner has none of this id."""
        sql = f"SELECT {_COLUMNS} FROM files WHERE id = ? AND owner = ?"
        row = await self._database.run(lambda c: c.execute(sql, (file_id, owner)).fetchone())
        return None if row is None else StoredFile(*row)

    async def part(self, owner: str, page: Page, purpose: str | None) -> tuple[list[StoredFile], bool]:
        """Return a part of an owner's files, and whether there are more."""
        where = {"owner": owner} | ({} if purpose is None else {"purpose": purpose})
        rows, has_more = await self._database.run(lambda c: page.rows(c, _COLUMNS, "files", where))
        return [StoredFile(*row) for row in rows], has_more

    async def delete(self, file_id: str) -> str | None:
        """Forget a file and remove its bytes; return the id of a batch that still reads it, and then leave it."""

        def delete(connection: Connection) -> str | None:
            sql = "SELECT id FROM batches WHERE input_file_id = ? AND NOT is_ended"
            if (reader := connection.execute(sql, (file_id,)).fetchone()) is not None:
                return str(reader[0])
            connection.execute("DELETE FROM files WHERE id = ?", (file_id,))
            return None

        if (reader := await self._database.run(delete)) is None:
            self.path(file_id).unlink(missing_ok=True)
        return reader

    async def num_bytes(self) -> int:
        """Return the bytes of all files."""
        sql = "SELECT COALESCE(SUM(num_bytes), 0) FROM files"
        return int((await self._database.run(lambda c: c.execute(sql).fetchone()))[0])

    async def delete_expired(self, now: float) -> None:
        """Delete the files whose time has come and that no batch reads."""
        sql = "SELECT id FROM files WHERE expires_at <= ?"
        for (file_id,) in await self._database.run(lambda c: c.execute(sql, (now,)).fetchall()):
            await self.delete(file_id)


def insert_file(connection: Connection, file: StoredFile) -> None:
    """Add a file to the table."""
    connection.execute(
        f"INSERT INTO files ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (file.id, file.owner, file.created_at, file.expires_at, file.filename, file.purpose, file.num_bytes),
    )
