"""API keys: whose they are, what they may take, and how one that came is recognised."""

from __future__ import annotations

import hashlib
import hmac
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo_engine.errors import InvalidConfig

_ADMIN = "admin"
_LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrent_requests")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """Who calls, by a key of which only the digest is kept.

    Attributes:
        name: what logs and metrics call its holder.
        digest: SHA-256 of the key.
        requests_per_minute: HTTP requests; None does not limit them, and so on.
        tokens_per_minute: of prompts and of answers.
        max_concurrent_requests: HTTP requests in progress.
        share: how much of a busy engine its requests get, beside those of other keys.

    Raises:
        InvalidConfig: if a limit is not positive.
    """

    name: str
    digest: bytes = field(repr=False)
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent_requests: int | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        for name in _LIMITS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InvalidConfig(f"{name} of key {self.name!r} must be a whole number above 0, got {value!r}")
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share < 1e6:
            raise InvalidConfig(f"share of key {self.name!r} must be a number above 0, got {self.share!r}")

    @classmethod
    def of(cls, name: str, key: str, **limits: Any) -> ApiKey:
        """Return the key that a caller sends as `key`."""
        return cls(name=name, digest=_digest(key.encode()), **limits)


class KeyRing:
    """All keys of a server.

    Args:
        keys: those that open every route but the admin routes.
        admin_key: the one that opens every route; None if there is none.

    Raises:
        InvalidConfig: if two keys have one name, or are the same.
    """

    def __init__(self, keys: Iterable[ApiKey], admin_key: str | None = None) -> None:
        self._keys = list(keys)
        self.needed = bool(self._keys)
        self.admin = None if admin_key is None else ApiKey.of(_ADMIN, admin_key)
        if self.admin is not None:
            self._keys.append(self.admin)
        for what in ("name", "digest"):
            first: dict[Any, ApiKey] = {}
            for key in self._keys:
                if (other := first.setdefault(getattr(key, what), key)) is not key:
                    raise InvalidConfig(
                        f"the API keys {other.name!r} and {key.name!r} have the same {what}; change one"
                    )

    def __iter__(self) -> Iterator[ApiKey]:
        return iter(self._keys)

    def find(self, given: str) -> ApiKey | None:
        """Return the key that a header's value is; None if it is none of them.

        All keys are compared, so that the time taken tells nothing about which one is close.
        """
        digest = _digest(given.encode("latin-1"))
        found = None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Read keys from a TOML file: a table `[keys.NAME]` each, with `key` or `key_sha256` and the limits.

    Raises:
        InvalidConfig: if the file cannot be read or says something unknown; names the key.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidConfig(f"cannot read API keys from {path}: {error}") from error
    tables = content.get("keys")
    if set(content) != {"keys"} or not isinstance(tables, dict) or not tables:
        raise InvalidConfig(f"{path} must hold a table [keys.NAME] for each key, and nothing else")
    return tuple(_read_key(name, table) for name, table in tables.items())


def _read_key(name: str, table: Any) -> ApiKey:
    known = ("key", "key_sha256", "share", *_LIMITS)
    if not isinstance(table, dict) or not set(table) <= set(known):
        raise InvalidConfig(f"key {name!r} must be a table of {', '.join(known)}, got {table!r:.200}")
    secrets = {field: table[field] for field in ("key", "key_sha256") if field in table}
    limits = {field: value for field, value in table.items() if field not in secrets}
    if len(secrets) != 1 or not all(isinstance(secret, str) and secret for secret in secrets.values()):
        raise InvalidConfig(f"key {name!r} needs either key or key_sha256, a string that is not empty")
    if "key" in secrets:
        return ApiKey.of(name, secrets["key"], **limits)
    try:
        digest = bytes.fromhex(secrets["key_sha256"])
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise InvalidConfig(f"key_sha256 of key {name!r} must be 64 hexadecimal digits")
    return ApiKey(name=name, digest=digest, **limits)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
