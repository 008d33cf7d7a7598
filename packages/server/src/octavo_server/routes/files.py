"""POST and GET /v1/files, and what can be done with one of them."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response

from octavo_engine.errors import InvalidRequest
from octavo_server.durable import DAY, durable_of, not_found, owner_of
from octavo_server.errors import ApiError
from octavo_server.protocol.violations import summarise
from octavo_server.state import state_of
from octavo_server.store.files import StoredFile
from octavo_server.store.paging import Page, list_of
from octavo_server.streaming import json_response
from octavo_server.uploads import Upload, read_upload

router = APIRouter()

PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
_BATCH_DAYS = 30
_MIN_SECONDS, _MAX_SECONDS = 3600, 30 * DAY
_MAX_NAME_CHARS = 255


@router.post("/v1/files")
async def upload_file(request: Request) -> Response:
    """Take a file for later use."""
    settings, files = state_of(request).settings, durable_of(request).store.files
    if await files.num_bytes() >= settings.max_stored_bytes:
        raise ApiError(
            413,
            f"stored files have reached {settings.max_stored_bytes} bytes; delete some, or raise --max-stored-bytes",
            code="storage_full",
        )
    file_id = files.new_id()
    path = files.path(file_id)
    upload = await read_upload(request, path, max_bytes=settings.max_file_bytes)
    created_at = int(time.time())
    try:
        purpose = _purpose(upload.fields.get("purpose"))
        file = StoredFile(
            id=file_id,
            owner=owner_of(request),
            created_at=created_at,
            expires_at=_expires_at(upload, purpose, created_at),
            filename=(upload.filename or "")[-_MAX_NAME_CHARS:],
            purpose=purpose,
            num_bytes=upload.num_bytes,
        )
        await files.add(file)
    except Exception:
        path.unlink(missing_ok=True)
        raise
    return json_response(file.shown())


@router.get("/v1/files")
async def list_files(request: Request) -> Response:
    """List the caller's files."""
    page = Page.of(request.query_params, limit=10_000, max_limit=10_000)
    purpose = request.query_params.get("purpose")
    files, has_more = await durable_of(request).store.files.part(owner_of(request), page, purpose)
    return json_response(list_of([file.shown() for file in files], has_more=has_more))


@router.get("/v1/files/{file_id}")
async def retrieve_file(request: Request, file_id: str) -> Response:
    """Say what is known of a file."""
    return json_response((await _stored(request, file_id)).shown())


@router.get("/v1/files/{file_id}/content")
async def retrieve_content(request: Request, file_id: str) -> Response:
    """Return a file's bytes."""
    file = await _stored(request, file_id)
    path = durable_of(request).store.files.path(file.id)
    return FileResponse(path, media_type="application/octet-stream", filename=file.filename)


@router.delete("/v1/files/{file_id}")
async def delete_file(request: Request, file_id: str) -> Response:
    """Delete a file; one that a batch still reads is kept."""
    file = await _stored(request, file_id)
    if (reader := await durable_of(request).store.files.delete(file.id)) is not None:
        raise InvalidRequest(f"{reader} still reads this file; cancel the batch first", code="file_in_use")
    return json_response({"id": file.id, "object": "file", "deleted": True})


async def _stored(request: Request, file_id: str) -> StoredFile:
    file = await durable_of(request).store.files.get(file_id, owner_of(request))
    if file is None:
        raise not_found("file", file_id)
    return file


def _purpose(given: str | None) -> str:
    if given not in PURPOSES:
        raise InvalidRequest(f"purpose must be one of {', '.join(PURPOSES)}, got {summarise(given)}", param="purpose")
    return given


def _expires_at(upload: Upload, purpose: str, created_at: int) -> int | None:
    """Return when a file is to be deleted; without a wish those of batches in 30 days, as with OpenAI."""
    anchor, seconds = upload.fields.get("expires_after[anchor]"), upload.fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return created_at + _BATCH_DAYS * DAY if purpose == "batch" else None
    if anchor != "created_at":
        raise InvalidRequest(
            f"expires_after[anchor] must be created_at, got {summarise(anchor)}", param="expires_after"
        )
    if not seconds or not seconds.isascii() or not seconds.isdigit() or len(seconds) > 9:
        raise InvalidRequest(
            f"expires_after[seconds] must be a number, got {summarise(seconds)}", param="expires_after"
        )
    if not _MIN_SECONDS <= int(seconds) <= _MAX_SECONDS:
        raise InvalidRequest(
            f"expires_after[seconds] must be {_MIN_SECONDS} to {_MAX_SECONDS}, got {seconds}", param="expires_after"
        )
    return created_at + int(seconds)
