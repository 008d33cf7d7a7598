"""An OpenAI-compatible HTTP server and command line for the Octavo engine."""

from octavo_server.app import create_app
from octavo_server.config import ServerSettings
from octavo_server.errors import ApiError

__all__ = ["ApiError", "ServerSettings", "create_app"]
