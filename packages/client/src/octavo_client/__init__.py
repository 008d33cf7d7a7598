"""A typed Python client for Octavo: the openai SDK with Octavo's extra fields and resources."""

from octavo_client.wire import Extras

__all__ = ["Extras"]
