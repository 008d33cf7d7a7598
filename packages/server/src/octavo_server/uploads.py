"""Reads an upload: a multipart form whose file goes to the disk as it comes, and never whole into memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from octavo_engine.errors import InvalidRequest
from octavo_server.errors import ApiError
from octavo_server.protocol.violations import summarise

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FORM_BYTES = 64 << 10
"""What a form may have beside its file."""

_MAX_FIELD_BYTES = 4096
_MAX_FIELDS = 16
_WRITE_BYTES = 1 << 20


@dataclass(slots=True)
class Upload:
    """A form that has been read; the bytes of its file are on the disk.

    Attributes:
        filename: the file's name by the client; None if no file came.
        num_bytes: its size.
        fields: the form's other fields.
    """

    filename: str | None = None
    num_bytes: int = 0
    fields: dict[str, str] = field(default_factory=dict)


async def read_upload(request: Request, path: Path, *, max_bytes: int) -> Upload:
    """Read a form and write its file to a path, which is removed again if anything goes wrong.

    Args:
        request: what brings it; how fast it must come is the door's to say.
        path: where the file goes.
        max_bytes: the largest file that is taken.

    Raises:
        ApiError: 415 if it is no form, 413 if the file is too large.
        InvalidRequest: if the form is broken, or has no file or several.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise ApiError(
            415,
            f"content-type must be multipart/form-data with a boundary, got {summarise(kind.decode('latin-1'))}",
            code="unsupported_media_type",
        )
    form = _Form(boundary, max_bytes)
    try:
        with path.open("wb") as file:
            await _read(request, form, file)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return form.upload


async def _read(request: Request, form: _Form, file: BinaryIO) -> None:
    async for chunk in request.stream():
        form.push(chunk)
        if form.num_waiting >= _WRITE_BYTES:
            await asyncio.to_thread(form.write_to, file)
    form.finish()
    await asyncio.to_thread(form.write_to, file)


class _Form:
    """Takes a form apart as it comes; bytes of its file wait here until they are written."""

    def __init__(self, boundary: bytes, max_bytes: int) -> None:
        self.upload = Upload()
        self.num_waiting = 0
        self._max_bytes = max_bytes
        self._waiting: list[bytes] = []
        self._header = [b"", b""]
        self._disposition = b""
        self._name: str | None = None  # of the field that comes; None while it is the file
        self._value = b""
        self._complete = False
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin,
            "on_header_field": self._collect(0),
            "on_header_value": self._collect(1),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError as error:
            raise _broken(error) from error

    def push(self, chunk: bytes) -> None:
        """Take in the next bytes of the form."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _broken(error) from error

    def finish(self) -> None:
        """Check that the form is whole."""
        if not self._complete:
            raise InvalidRequest("the form ends before its last boundary")
        if self.upload.filename is None:
            raise InvalidRequest("file is required, as a part with a filename", param="file")

    def write_to(self, file: BinaryIO) -> None:
        """Write what has come of the file."""
        waiting, self._waiting, self.num_waiting = self._waiting, [], 0
        file.writelines(waiting)

    def _begin(self) -> None:
        self._header, self._disposition, self._name, self._value = [b"", b""], b"", None, b""

    def _collect(self, side: int) -> Callable[[bytes, int, int], None]:
        def collect(data: bytes, start: int, end: int) -> None:
            self._header[side] += data[start:end]

        return collect

    def _end_header(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = value
        self._header = [b"", b""]

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename")
        if filename is None:
            self._name = name
            if len(self.upload.fields) >= _MAX_FIELDS:
                raise InvalidRequest(f"the form has more than {_MAX_FIELDS} fields; leave some out")
        elif name != "file" or self.upload.filename is not None:
            raise InvalidRequest("the form must have one file, named file", param=name or None)
        else:
            self.upload.filename = filename.decode("utf-8", "replace") or "upload"

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name is not None:
            self._value += data[start:end]
            if len(self._value) > _MAX_FIELD_BYTES:
                raise InvalidRequest(f"{summarise(self._name)} is longer than {_MAX_FIELD_BYTES} bytes")
            return
        self._waiting.append(data[start:end])
        self.num_waiting += end - start
        self.upload.num_bytes += end - start
        if self.upload.num_bytes > self._max_bytes:
            raise _too_large(self._max_bytes)

    def _end_part(self) -> None:
        if self._name is not None:
            self.upload.fields[self._name] = self._value.decode("utf-8", "replace")

    def _end(self) -> None:
        self._complete = True


def _broken(error: FormParserError) -> InvalidRequest:
    return InvalidRequest(f"the form is no valid multipart/form-data: {error}")


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"a file may have {max_bytes} bytes, and more came; send less, or raise --max-file-bytes",
        param="file",
        code="file_too_large",
        headers={"connection": "close"},
    )
