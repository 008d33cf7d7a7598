"""content_digest, sample_digest: one hash for the contents of a model's files, of all their bytes or of some."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

_DIGEST_BYTES = 32
_CHUNK_BYTES = 16 << 20
_FULL_HASH_BYTES = 4 << 30
_NUM_SAMPLES = 64
_SAMPLE_BYTES = 1 << 20
_NUM_FEW = 16
_FEW_BYTES = 64 << 10


def content_digest(paths: Sequence[Path]) -> bytes:
    """Return 32 bytes that stand for the contents of these files, in this order; their names do not count.

    Up to 4 GiB in all, every byte is hashed, in chunks of 16 MiB by several threads (about 0.1 s per 100 MB and core).
    Beyond that each file contributes its size, its time of change and 64 evenly spaced samples of 1 MiB, the first and
    the last included: any normal way to change a file changes this; writing single bytes into the middle of a large
    file and then setting its time back does not.
    """
    sizes = [path.stat().st_size for path in paths]
    whole = sum(sizes) <= _FULL_HASH_BYTES
    total = blake2b(b"whole" if whole else b"sampled", digest_size=_DIGEST_BYTES)
    for path, size in zip(paths, sizes, strict=True):
        total.update(size.to_bytes(8, "little"))
        if not whole:
            total.update(path.stat().st_mtime_ns.to_bytes(8, "little", signed=True))
        for part in _hash_spans(path, _chunks(size) if whole else _samples(size)):
            total.update(part)
    return total.digest()


def sample_digest(paths: Sequence[Path]) -> bytes:
    """Return 32 bytes by which processes see whether they read the same model; files' names do not count.

    Each file contributes its size and 16 evenly spaced samples of 64 KiB, the first and the last included: about 1 MiB
    is read of a file, however large it is. Other weights, another model or a cut-off download change it; single bytes
    that were written into the middle of a file may not.
    """
    total = blake2b(b"few", digest_size=_DIGEST_BYTES)
    for path in paths:
        size = path.stat().st_size
        total.update(size.to_bytes(8, "little"))
        for part in _hash_spans(path, _samples(size, _NUM_FEW, _FEW_BYTES)):
            total.update(part)
    return total.digest()


def _chunks(size: int) -> list[tuple[int, int]]:
    return [(start, min(_CHUNK_BYTES, size - start)) for start in range(0, size, _CHUNK_BYTES)]


def _samples(size: int, count: int = _NUM_SAMPLES, num_bytes: int = _SAMPLE_BYTES) -> list[tuple[int, int]]:
    if size <= count * num_bytes:
        return _chunks(size)
    last = size - num_bytes
    return [(last * i // (count - 1), num_bytes) for i in range(count)]


def _hash_spans(path: Path, spans: list[tuple[int, int]]) -> list[bytes]:
    """Hash each (start, length) of a file; reading and hashing both release the interpreter lock."""
    if not spans:
        return []

    def hash_span(span: tuple[int, int]) -> bytes:
        with path.open("rb") as file:
            file.seek(span[0])
            return blake2b(file.read(span[1]), digest_size=_DIGEST_BYTES).digest()

    with ThreadPoolExecutor(min(len(spans), os.cpu_count() or 1, 8)) as pool:
        return list(pool.map(hash_span, spans))
