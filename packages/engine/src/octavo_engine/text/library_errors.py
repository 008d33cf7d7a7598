"""corrupt_if_refused: turns whatever the tokenizers library raises for a damaged vocabulary into CorruptModelFile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from octavo_engine.errors import CorruptModelFile, EngineError

# A panic in the library's Rust code; derives from BaseException and cannot be imported.
_PANIC = "PanicException"


@contextmanager
def corrupt_if_refused(message: str) -> Iterator[None]:
    """Raise CorruptModelFile with `message` and the library's own words if the body fails; our own errors pass.

    The library raises plain Exception for what it cannot parse, so that no narrower type can be named.
    """
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        raise CorruptModelFile(f"{message}: {error}") from error
    except BaseException as error:
        if type(error).__name__ != _PANIC:
            raise
        raise CorruptModelFile(f"{message}: {error}") from error
