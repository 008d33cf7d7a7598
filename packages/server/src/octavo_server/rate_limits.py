"""Rate limits: what is left of each key's requests and tokens for this minute, and what those beyond are told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from math import ceil

from octavo_server.errors import ApiError
from octavo_server.keys import ApiKey

_MINUTE = 60.0
_BUSY_SECONDS = 1.0  # when to come back if too many requests are in progress; nobody knows


class Bucket:
    """A budget that fills up evenly within a minute; what is not known before may take it below zero.

    Args:
        capacity: what there is in a minute.
        clock: seconds, monotonic.
    """

    def __init__(self, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.capacity = capacity
        self._clock = clock
        self._level = float(capacity)
        self._filled = clock()

    @property
    def level(self) -> float:
        """What is left."""
        now = self._clock()
        self._level = min(self._level + (now - self._filled) * self.capacity / _MINUTE, self.capacity)
        self._filled = now
        return self._level

    def take(self, amount: float) -> None:
        """Take some, whether it is there or not."""
        self._level = self.level - amount

    def seconds_until(self, amount: float) -> float:
        """Return when so much will be there; more than the whole is there when the whole is."""
        return max(min(amount, self.capacity) - self.level, 0.0) * _MINUTE / self.capacity


class KeyBudget:
    """What is left of one key's limits.

    Args:
        key: whose.
        on_refusal: called with the name of the limit at each refusal.
        clock: seconds, monotonic.
    """

    def __init__(
        self, key: ApiKey, on_refusal: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._key = key
        self._on_refusal = on_refusal
        self._num_running = 0
        self._requests = Bucket(key.requests_per_minute, clock) if key.requests_per_minute else None
        self._tokens = Bucket(key.tokens_per_minute, clock) if key.tokens_per_minute else None

    def enter(self) -> None:
        """Take one HTTP request in.

        Raises:
            ApiError: 429 if a limit is reached, with the seconds after which it will not be.
        """
        limit = self._key.max_concurrent_requests
        if limit is not None and self._num_running >= limit:
            raise self._refusal("max_concurrent_requests", f"may have {limit} requests in progress", _BUSY_SECONDS)
        if self._requests is not None and (wait := self._requests.seconds_until(1)):
            raise self._refusal("requests_per_minute", f"may make {self._requests.capacity} requests a minute", wait)
        self._check_tokens(1)
        if self._requests is not None:
            self._requests.take(1)
        self._num_running += 1

    def leave(self) -> None:
        """Take note that a request has been answered."""
        self._num_running -= 1

    def take_prompts(self, num_tokens: int) -> None:
        """Take the tokens of prompts that are about to be computed.

        Raises:
            ApiError: 429 if too few are left, with the seconds after which there will be enough.
        """
        self._check_tokens(num_tokens)
        self.take_tokens(num_tokens)

    def take_tokens(self, num_tokens: int) -> None:
        """Take tokens that were generated; nobody knew how many there would be, so that a debt may be left."""
        if self._tokens is not None:
            self._tokens.take(num_tokens)

    def headers(self) -> dict[str, str]:
        """Return what is left in the form that OpenAI's clients know."""
        headers = {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(bucket.capacity)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(int(bucket.level), 0))
                headers[f"x-ratelimit-reset-{name}"] = f"{bucket.seconds_until(bucket.capacity):.3f}s"
        return headers

    def _check_tokens(self, num_tokens: int) -> None:
        if self._tokens is not None and (wait := self._tokens.seconds_until(num_tokens)):
            allowed = f"may use {self._tokens.capacity} tokens a minute"
            raise self._refusal("tokens_per_minute", allowed, wait)

    def _refusal(self, limit: str, allowed: str, wait: float) -> ApiError:
        self._on_refusal(limit)
        return ApiError(
            429,
            f"the key {self._key.name!r} {allowed}, and has; try again in {wait:.3g} s",
            type="tokens" if limit == "tokens_per_minute" else "requests",
            code="rate_limit_exceeded",
            headers={"retry-after": str(ceil(wait)), "retry-after-ms": str(ceil(wait * 1000))} | self.headers(),
        )


def budgets_of(keys: Iterable[ApiKey], on_refusal: Callable[[str, str], None]) -> Mapping[str, KeyBudget]:
    """Return a budget for each key that has limits, by its name; refusals are told with name and limit."""

    def told(name: str) -> Callable[[str], None]:
        return lambda limit: on_refusal(name, limit)

    limited = (k for k in keys if k.requests_per_minute or k.tokens_per_minute or k.max_concurrent_requests)
    return {key.name: KeyBudget(key, told(key.name)) for key in limited}
