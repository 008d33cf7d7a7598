"""An OpenAI-compatible HTTP server and command line for the Octavo engine."""

from importlib import import_module
from typing import TYPE_CHECKING

from octavo_server.config import ServerSettings

if TYPE_CHECKING:
    from octavo_server.app import create_app
    from octavo_server.errors import ApiError

__all__ = ["ApiError", "ServerSettings", "create_app"]

_MODULES = {"ApiError": "octavo_server.errors", "create_app": "octavo_server.app"}


def __getattr__(name: str) -> object:
    """Load what needs the web framework when it is asked for: `octavo run` and `octavo chat` start without it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
