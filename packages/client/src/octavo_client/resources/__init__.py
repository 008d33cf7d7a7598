"""The resources that an Octavo server offers beside OpenAI's, and those that do more than the SDK's, one file each."""

from octavo_client.resources.cache import AsyncCache, Cache
from octavo_client.resources.server import AsyncServer, Server
from octavo_client.resources.tokens import AsyncTokens, Tokens

__all__ = ["AsyncCache", "AsyncServer", "AsyncTokens", "Cache", "Server", "Tokens"]
