"""A typed Python client for Octavo: the openai SDK with Octavo's extra fields and resources.

Names load on first use, so that a program which needs `octavo_client.wire` alone loads neither the SDK nor an HTTP
library.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo_client.client import AsyncOctavo, Octavo
    from octavo_client.errors import ConfigurationError, InvalidAnswerError, OctavoError
    from octavo_client.wire import EmbeddingExtras, Extras, StructuredOutputs

__all__ = [
    "AsyncOctavo",
    "ConfigurationError",
    "EmbeddingExtras",
    "Extras",
    "InvalidAnswerError",
    "Octavo",
    "OctavoError",
    "StructuredOutputs",
]

_MODULES = {
    "AsyncOctavo": "client",
    "ConfigurationError": "errors",
    "EmbeddingExtras": "wire",
    "Extras": "wire",
    "InvalidAnswerError": "errors",
    "Octavo": "client",
    "OctavoError": "errors",
    "StructuredOutputs": "wire",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
