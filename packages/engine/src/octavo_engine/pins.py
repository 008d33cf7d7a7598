"""Pins: prefixes that the engine holds in its cache for later requests, and who may know of them."""

from __future__ import annotations

from dataclasses import dataclass

from octavo_engine.errors import InvalidRequest, PinLimitReached, RequestFailed, UnknownPin
from octavo_engine.sequence import Sequence
from octavo_engine.types import FinishReason, Request
from octavo_kvcache import CacheManager, PinLimit


@dataclass(frozen=True, slots=True)
class Pin:
    """A prefix that stays in the cache until it is unpinned or the prefix cache is reset.

    Attributes:
        pin_id: names it.
        num_tokens: the prompt's tokens that are held, those of its full blocks.
        num_blocks: blocks that hold them.
    """

    pin_id: str
    num_tokens: int
    num_blocks: int


class Pins:
    """The pins of one engine. Only the scheduler writes it.

    Room for a pin is set aside before its prompt is queued, so that nothing fails once it has been computed. Pins may
    hold so much that the longest sequence fits beside them, whoever else is preempted: none waits for a pin for ever.

    Args:
        cache: the block manager.
    """

    def __init__(self, cache: CacheManager) -> None:
        self._cache = cache
        self._pins: dict[str, tuple[Pin, bytes]] = {}  # by id, with their salts
        self._reserved: set[str] = set()  # of prompts being computed

    def prepare(self, request: Request) -> None:
        """Check a request that computes a prompt into the cache; set room aside for the pin that it may make.

        Raises:
            PinLimitReached: pins would hold more than they may.
            InvalidRequest: the prompt is too short to pin, or there is no prefix cache.
        """
        if not self._cache.prefix_cache:
            raise InvalidRequest("the prefix cache is switched off; start the engine with prefix_cache")
        if request.pin:
            self._reserve(request)

    def _reserve(self, request: Request) -> None:
        num_tokens, block_size = len(request.prompt_token_ids), self._cache.block_size
        if num_tokens < block_size:
            raise InvalidRequest(
                f"the prompt has {num_tokens} tokens, and whole blocks of {block_size} are pinned; pin a longer one",
                param="prompt",
            )
        try:
            self._cache.pins.reserve(request.request_id, num_tokens)
        except PinLimit as error:
            raise PinLimitReached(
                f"a prompt of {num_tokens} tokens takes {error.wanted} blocks, pins hold {error.held} and may hold "
                f"{error.limit}; unpin another, pin a shorter prompt, or raise max_pinned_share"
            ) from error
        self._reserved.add(request.request_id)

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        """Hold the blocks of a sequence that ends well; give up the room if it does not."""
        request, pin_id = sequence.request, sequence.request.request_id
        if pin_id not in self._reserved:  # a reset has dropped it
            return
        self._reserved.remove(pin_id)
        if reason is FinishReason.STOP:
            num_tokens = self._cache.pin(pin_id, sequence.seq_id)
            self._pins[pin_id] = Pin(pin_id, num_tokens, num_tokens // self._cache.block_size), request.salt
        else:
            self._cache.pins.drop(pin_id)

    def get(self, pin_id: str) -> Pin:
        """Return the pin that a request has made.

        Raises:
            RequestFailed: a reset has dropped it.
        """
        entry = self._pins.get(pin_id)
        if entry is None:
            raise RequestFailed("the prefix cache was reset while the prompt was computed; pin it again")
        return entry[0]

    def listed(self, salt: bytes | None = None) -> list[Pin]:
        """Return the pins of one salt, or of all, oldest first."""
        return [pin for pin, own in self._pins.values() if salt is None or salt == own]

    def drop(self, pin_id: str, salt: bytes | None = None) -> None:
        """Let go of a pin.

        Args:
            pin_id: which.
            salt: that of the pin, or None, for one who may drop any.

        Raises:
            UnknownPin: there is none of this id and salt.
        """
        entry = self._pins.get(pin_id)
        if entry is None or (salt is not None and entry[1] != salt):  # others must not learn that it exists
            raise UnknownPin(f"no pin has the id {pin_id!r}; it was never made, or dropped, or the cache was reset")
        del self._pins[pin_id]
        self._cache.pins.drop(pin_id)

    def cancel(self, pin_id: str) -> None:
        """Let go of a pin, or of the room for it, that nobody waits for any more; unknown ids are ignored."""
        if pin_id in self._pins or pin_id in self._reserved:
            self._pins.pop(pin_id, None)
            self._reserved.discard(pin_id)
            self._cache.pins.drop(pin_id)

    def reset(self, root: bytes | None = None) -> None:
        """Forget all cached content and all pins; with a `root`, what is cached from now on depends on it."""
        self._pins.clear()
        self._reserved.clear()
        self._cache.reset_prefix_cache(root)
