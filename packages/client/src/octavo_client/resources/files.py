"""Files: the SDK's resource, and files of JSON lines, which are what batches read and write.

`create`, `list`, `retrieve`, `content` and `delete` are the SDK's.
"""

import json
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Any

from openai.resources.files import AsyncFiles as SdkAsyncFiles
from openai.resources.files import Files as SdkFiles
from openai.types import FileObject, FilePurpose

__all__ = ["AsyncFiles", "Files"]

_NAME = "lines.jsonl"


class Files(SdkFiles):
    """/v1/files; every method raises `openai.APIError` if a request failed.

    Example:
        >>> client = Octavo()
        >>> file = client.files.create_lines([{"a": 1}, {"a": 2}], purpose="user_data")
        >>> [line["a"] for line in client.files.lines(file.id)]
    """

    def create_lines(
        self, lines: Iterable[Mapping[str, object]], *, purpose: FilePurpose = "batch", filename: str = _NAME
    ) -> FileObject:
        """Upload objects as a file of JSON lines.

        Raises:
            TypeError: a line holds what JSON cannot.
        """
        return self.create(file=(filename, _jsonl(lines)), purpose=purpose)

    def lines(self, file_id: str) -> Iterator[dict[str, Any]]:
        """Return the objects of a file of JSON lines, read as they come."""
        with self.with_streaming_response.content(file_id) as response:
            for line in response.iter_lines():
                if line.strip():
                    yield json.loads(line)


class AsyncFiles(SdkAsyncFiles):
    """/v1/files, awaited; errors as in `Files`."""

    async def create_lines(
        self, lines: Iterable[Mapping[str, object]], *, purpose: FilePurpose = "batch", filename: str = _NAME
    ) -> FileObject:
        """Upload objects as a file of JSON lines; see `Files.create_lines`."""
        return await self.create(file=(filename, _jsonl(lines)), purpose=purpose)

    async def lines(self, file_id: str) -> AsyncIterator[dict[str, Any]]:
        """Return the objects of a file of JSON lines, read as they come."""
        async with self.with_streaming_response.content(file_id) as response:
            async for line in response.iter_lines():
                if line.strip():
                    yield json.loads(line)


def _jsonl(lines: Iterable[Mapping[str, object]]) -> bytes:
    return b"".join(json.dumps(dict(line)).encode() + b"\n" for line in lines)
