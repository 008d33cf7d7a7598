"""The tables of the store, as the statements that lead from each version of them to the next."""

from __future__ import annotations

from sqlite3 import Connection

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        # The output of a response, like its input, is in items; the rest of it is JSON.
        """CREATE TABLE responses (
            id TEXT PRIMARY KEY,
            owner TEXT NOT NULL,
            created_at INTEGER NOT NULL,
            previous_id TEXT,
            status TEXT NOT NULL,
            background INTEGER NOT NULL,
            streams INTEGER NOT NULL,
            num_runs INTEGER NOT NULL DEFAULT 0,
            request TEXT,
            response TEXT NOT NULL
        )""",
        "CREATE INDEX responses_by_status ON responses (status)",
        "CREATE INDEX responses_by_time ON responses (created_at)",
        "CREATE INDEX responses_by_previous ON responses (previous_id)",
        """CREATE TABLE items (
            response_id TEXT NOT NULL REFERENCES responses (id) ON DELETE CASCADE,
            is_output INTEGER NOT NULL,
            place INTEGER NOT NULL,
            id TEXT NOT NULL,
            item TEXT NOT NULL,
            PRIMARY KEY (response_id, is_output, place)
        )""",
        "CREATE INDEX items_by_id ON items (id)",
        """CREATE TABLE events (
            response_id TEXT NOT NULL REFERENCES responses (id) ON DELETE CASCADE,
            sequence_number INTEGER NOT NULL,
            event BLOB NOT NULL,
            PRIMARY KEY (response_id, sequence_number)
        )""",
        """CREATE TABLE files (
            place INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            owner TEXT NOT NULL,
            created_at INTEGER NOT NULL,
            expires_at INTEGER,
            filename TEXT NOT NULL,
            purpose TEXT NOT NULL,
            num_bytes INTEGER NOT NULL
        )""",
        """CREATE TABLE batches (
            place INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            owner TEXT NOT NULL,
            input_file_id TEXT NOT NULL,
            expires_at INTEGER NOT NULL,
            is_ended INTEGER NOT NULL DEFAULT 0,
            outcome TEXT,
            num_lines INTEGER NOT NULL DEFAULT 0,
            num_completed INTEGER NOT NULL DEFAULT 0,
            num_failed INTEGER NOT NULL DEFAULT 0,
            batch TEXT NOT NULL
        )""",
        # A line of the input file by its place there; has_succeeded and result come with its end.
        """CREATE TABLE batch_lines (
            batch_id TEXT NOT NULL REFERENCES batches (id) ON DELETE CASCADE,
            line INTEGER NOT NULL,
            custom_id TEXT NOT NULL,
            start INTEGER NOT NULL,
            num_bytes INTEGER NOT NULL,
            has_succeeded INTEGER,
            result TEXT,
            PRIMARY KEY (batch_id, line)
        )""",
    ),
)
"""Statements by the version that they lead to, from 1 on. Those of a release are never changed."""


def migrate(connection: Connection) -> None:
    """Bring the tables of a database to the newest version, each step in a transaction of its own.

    Raises:
        ValueError: if they are newer than this server knows.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise ValueError(f"its version is {version}, and this server knows those up to {len(MIGRATIONS)}")
    for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
        connection.execute("BEGIN IMMEDIATE")
        for statement in statements:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {number}")
        connection.execute("COMMIT")
