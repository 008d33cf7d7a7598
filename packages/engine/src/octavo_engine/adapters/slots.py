"""AdapterSlots: which versions of adapters live requests need, and in which of the runner's slots they lie."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable

from octavo_engine.adapters.info import AdapterStats


class AdapterSlots:
    """Hands out the runner's slots. A version is a digest of an adapter's content. Only the scheduler writes it.

    A request holds its version from submission to its end, so that the version it began with stays; a running sequence
    has a slot. A version that no sequence uses stays in its slot until another needs it, the least recently used first.

    Args:
        num_slots: versions that sequences can run with at once; 0 for an engine without adapters.

    Attributes:
        num_fills: how often a slot was given to a version.
        on_unheld: called when no request holds some version any more.
    """

    def __init__(self, num_slots: int = 0) -> None:
        self._num_slots = num_slots
        self._holders: Counter[bytes] = Counter()  # requests by version
        self._users: Counter[bytes] = Counter()  # running sequences by version
        self.num_fills = 0
        self.on_unheld: Callable[[], None] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what lies in the slots, since the runner goes; no sequence runs."""
        assert not self._users
        self._slots: dict[bytes, int] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()  # in a slot without users, least recently used first
        self._free = list(reversed(range(self._num_slots)))

    @property
    def num_active(self) -> int:
        """Versions that running sequences use."""
        return len(self._users)

    def stats(self, num_loaded: int, num_reads: int) -> AdapterStats:
        """Return the figures, with those of the host's memory."""
        return AdapterStats(
            num_loaded=num_loaded, num_active=self.num_active, num_reads=num_reads, num_fills=self.num_fills
        )

    def hold(self, version: bytes) -> None:
        """Note that a request has come; b"" is the base model."""
        if version:
            self._holders[version] += 1

    def let_go(self, version: bytes) -> None:
        """Note that a request has ended."""
        if version:
            _decrease(self._holders, version)
            if version not in self._holders and self.on_unheld is not None:
                self.on_unheld()

    def is_held(self, version: bytes) -> bool:
        """Return whether a request that has not ended needs a version."""
        return version in self._holders

    def has_room(self, version: bytes) -> bool:
        """Return whether a sequence could get a slot now."""
        return not version or version in self._slots or bool(self._free or self._idle)

    def take(self, version: bytes) -> int | None:
        """Return the slot for a sequence that begins to run, None for the base model; there is room."""
        if not version:
            return None
        self._users[version] += 1
        self._idle.pop(version, None)
        if version not in self._slots:
            self._slots[version] = self._free.pop() if self._free else self._evict()
            self.num_fills += 1
        return self._slots[version]

    def give_back(self, version: bytes) -> None:
        """Note that a sequence has stopped running."""
        if version:
            _decrease(self._users, version)
            if version not in self._users:
                self._idle[version] = None

    def _evict(self) -> int:
        version, _ = self._idle.popitem(last=False)
        return self._slots.pop(version)


def _decrease(counter: Counter[bytes], version: bytes) -> None:
    counter[version] -= 1
    if not counter[version]:
        del counter[version]
