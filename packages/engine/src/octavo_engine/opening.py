"""Opening: a model's source, and what threads make of it while the engine's modules and weights are loaded."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from octavo_engine.text.tokenizer import Tokenizer
from octavo_engine.weights.source import Source


class Opening(NamedTuple):
    """A source whose files are being hashed and whose tokenizer is being built; both raise as the source does."""

    source: Source
    digest: Future[bytes]
    tokenizer: Future[Tokenizer]


@contextmanager
def opening(source: Source) -> Generator[Opening]:
    """Hash a source and build its tokenizer in threads of their own, which end with the block.

    Reading and hashing release the interpreter lock; the tokenizer is built in what the caller leaves of it.
    """
    with ThreadPoolExecutor(2, thread_name_prefix="octavo-open") as pool:
        yield Opening(source, pool.submit(lambda: source.digest), pool.submit(source.tokenizer))
