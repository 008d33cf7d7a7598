"""Store: what a server keeps for later, in one folder or in memory."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path
from types import TracebackType
from typing import Self

from octavo_engine.errors import InvalidConfig
from octavo_server.store.batches import BatchStore
from octavo_server.store.database import Database
from octavo_server.store.files import FileStore
from octavo_server.store.responses import ResponseStore

IN_MEMORY = ":memory:"
"""In place of a folder: keep nothing after the end."""


class Store:
    """Responses, files and batches. The caller closes it, or uses it as a context manager.

    Args:
        folder: is made if it is not there, and locked; None keeps all but the bytes of files in memory, and those in a
            temporary folder.

    Raises:
        InvalidConfig: if the folder cannot be used, or another server uses it.

    Example:
        >>> with Store(Path("/var/lib/octavo")) as store:  # doctest: +SKIP
        ...     uvicorn.run(create_app(engine, settings, store), port=8000)
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._database = Database(folder)
        if folder is None:
            files = Path(tempfile.mkdtemp(prefix="octavo-files-"))
            weakref.finalize(self, shutil.rmtree, files, ignore_errors=True)
        else:
            files = folder / "files"
        try:
            self.files = FileStore(self._database, files)
        except OSError as error:
            self._database.close()
            raise InvalidConfig(f"cannot keep files in {files}: {error}; choose another --state-dir") from error
        self.responses = ResponseStore(self._database)
        self.batches = BatchStore(self._database)

    def close(self) -> None:
        """Write what is left, and let others have the folder."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def state_folder(given: str | None, server: str | None) -> Path | None:
    """Return where a server keeps its state; None is in memory.

    Args:
        given: the operator's choice, a folder or `:memory:`; None is a folder of the server's own in the user's state
            directory (XDG_STATE_HOME).
        server: what tells it from others of this user, its port or the name of its socket; None if nothing does.
    """
    if given == IN_MEMORY or (given is None and server is None):
        return None
    if given is not None:
        return Path(given).expanduser()
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "octavo" / (server or "")
