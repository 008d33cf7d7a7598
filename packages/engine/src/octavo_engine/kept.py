"""KeptSequences: sequences that have ended and can still be forked: their tokens and, while there is room, blocks."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from octavo_engine.branch import KnownTokens, Parent
from octavo_engine.sequence import Sequence
from octavo_kvcache import CacheManager


@dataclass(slots=True)
class _Kept:
    known: KnownTokens
    num_computed_tokens: int
    has_blocks: bool


class KeptSequences:
    """The ended sequences of requests with `keep`. Only the scheduler writes it.

    There are at most `max_num_kept`; the one not used for longest is dropped first. When blocks run out, theirs are
    given up before anything that runs is preempted, again the least recently used first: a fork is then computed from
    the tokens, as far as the prefix cache does not have them.

    Args:
        cache: the block manager.
        max_num_kept: the most sequences that are kept.
    """

    def __init__(self, cache: CacheManager, max_num_kept: int) -> None:
        self._cache = cache
        self._max_num_kept = max_num_kept
        self._kept: OrderedDict[Parent, _Kept] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, sequence: Sequence) -> None:
        """Keep a sequence that is about to leave; its blocks, if it has any, are held under an id of their own."""
        parent = Parent(sequence.request.request_id, sequence.index)
        if parent in self._kept or not self._max_num_kept:
            return
        request = sequence.request
        known = KnownTokens(tuple(sequence.token_ids), sequence.num_prompt_tokens, request.salt, sequence.adapter)
        kept = self._kept[parent] = _Kept(known, num_computed_tokens=0, has_blocks=sequence.row is not None)
        if kept.has_blocks:  # it is not preempted
            # What the last steps computed beyond the last token that counts is nobody's.
            kept.num_computed_tokens = min(self._cache.num_committed(sequence.seq_id), len(sequence.token_ids))
            self._cache.fork(sequence.seq_id, _cache_id(parent), num_tokens=kept.num_computed_tokens)
        while len(self._kept) > self._max_num_kept:
            oldest, dropped = self._kept.popitem(last=False)
            self._free(oldest, dropped)

    def known_tokens(self, parent: Parent) -> KnownTokens | None:
        """Return a kept sequence's tokens; None if it is not kept."""
        kept = self._kept.get(parent)
        return None if kept is None else kept.known

    def blocks(self, parent: Parent) -> tuple[str, int] | None:
        """Return under which id the cache has a kept sequence's blocks, and of how many tokens; None if it has not."""
        kept = self._kept.get(parent)
        if kept is None or not kept.has_blocks:
            return None
        self._kept.move_to_end(parent)
        return _cache_id(parent), kept.num_computed_tokens

    def release(self, request_id: str) -> bool:
        """Drop what is kept of a request, and free its blocks at once; False if nothing is."""
        own = [parent for parent in self._kept if parent.request_id == request_id]
        for parent in own:
            self._free(parent, self._kept.pop(parent))
        return bool(own)

    def give_up_blocks(self) -> bool:
        """Free the blocks of the least recently used sequence that has any; False if none has."""
        for parent, kept in self._kept.items():
            if kept.has_blocks:
                self._free(parent, kept)
                return True
        return False

    def _free(self, parent: Parent, kept: _Kept) -> None:
        if kept.has_blocks:
            kept.has_blocks = False
            self._cache.free(_cache_id(parent), token_ids=kept.known.token_ids)


def _cache_id(parent: Parent) -> str:
    return f"kept {parent.index} {parent.request_id}"
