"""Database: one SQLite file that this process alone has open, used by one thread so that nobody waits for a disk."""

from __future__ import annotations

import asyncio
import sqlite3
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from sqlite3 import Connection
from typing import TypeVar

from octavo_engine.errors import InvalidConfig
from octavo_server.store.schema import migrate

_FILE, _LOCK = "octavo.sqlite3", "lock"

T = TypeVar("T")


class StoreFailed(Exception):
    """The disk or the database did not do what was asked: it is full, read-only or damaged."""


class Database:
    """Runs work in transactions, one after the other.

    A transaction that has ended is there after a crash of the process; after one of the machine the last ones may be
    missing, whole.

    Args:
        folder: holds the database and its lock; None keeps it in memory.

    Raises:
        InvalidConfig: if the folder cannot be used, another process uses it, or a newer server has written it.
    """

    def __init__(self, folder: Path | None) -> None:
        with ExitStack() as stack:
            if folder is not None:
                stack.callback(_lock(folder))
            self._connection = _connect(":memory:" if folder is None else str(folder / _FILE), folder)
            stack.callback(self._connection.close)
            self._close = weakref.finalize(self, stack.pop_all().close)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="octavo-store")

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Do work in a transaction; what it raises undoes it. Once given, it is done even if the caller is cancelled.

        Raises:
            StoreFailed: if the database could not do it.
        """
        done = asyncio.get_running_loop().run_in_executor(self._thread, self.run_now, work)
        return await asyncio.shield(done)

    def run_now(self, work: Callable[[Connection], T]) -> T:
        """Do work in a transaction, in the thread of the caller: before the event loop runs."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                result = work(self._connection)
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise StoreFailed(f"{type(error).__name__}: {error}") from error
        return result

    def close(self) -> None:
        """Wait for what has been given, then close the file and let others have it."""
        self._thread.shutdown()
        self._close()


def _connect(name: str, folder: Path | None) -> Connection:
    try:
        connection = sqlite3.connect(name, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise _unusable(folder, error) from error
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        migrate(connection)
    except (sqlite3.Error, ValueError) as error:
        connection.close()
        raise _unusable(folder, error) from error
    return connection


def _lock(folder: Path) -> Callable[[], None]:
    """Lock a folder, made if it is not there, and return what unlocks it; the end of the process does so too."""
    import fcntl  # POSIX alone; a store in memory needs none

    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("w")
    except OSError as error:
        raise _unusable(folder, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise InvalidConfig(
            f"the state folder {folder} is in use by another server; give each its own --state-dir"
        ) from error
    return lock.close


def _unusable(folder: Path | None, error: Exception) -> InvalidConfig:
    return InvalidConfig(f"cannot keep state in {folder}: {error}; choose another --state-dir, or :memory:")
