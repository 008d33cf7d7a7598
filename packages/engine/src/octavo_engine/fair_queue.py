"""FairQueue: among the sequences that wait, those of the tenant go first that was served least."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from octavo_engine.sequence import Sequence, SequenceStatus
from octavo_engine.types import Tenant

_NOBODY = Tenant("")
_PRUNE_FROM = 256  # accounts; below, nobody minds those that are of no use any more


@dataclass(slots=True, eq=False)
class _Account:
    """What one tenant has had, and who waits in its name.

    Attributes:
        number: in order of appearance; between equals the older account goes first.
        share: what its service is divided by.
        service: tokens that were computed for it, and its answers' once more, over its share.
        waiting: a heap, by priority and arrival.
        is_listed: whether the queue has it among those with somebody waiting.
    """

    number: int
    share: float = 1.0
    service: float = 0.0
    waiting: list[Sequence] = field(default_factory=list)
    is_listed: bool = False


class FairQueue:
    """A `QueuePolicy` that gives tenants equal shares, in tokens: the virtual token counter of arXiv 2401.00588.

    Each tenant's service is counted: a token of a prompt once, a token of an answer twice, as in the paper, over the
    tenant's share. The tenant with the least service goes first; its own sequences go by priority and arrival. Who
    comes back after a pause is lifted to the least of those that wait, so that nobody saves up service. Requests
    without a tenant count as those of one.

    For tenants that wait all the time the services differ, times their shares, by no more than twice what one
    admission or all rows together can take (theorem 4.4). Only the scheduler writes it.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        # (service when it was listed, number, account): service only rises, so that an old entry is too early at worst.
        self._listed: list[tuple[float, int, _Account]] = []
        self._last_to_leave: _Account | None = None
        self._num_waiting = 0
        self._num_seen = 0
        self._prune_at = _PRUNE_FROM

    def __len__(self) -> int:
        return self._num_waiting

    def push(self, sequence: Sequence) -> None:
        """Let a sequence wait."""
        sequence.status = SequenceStatus.WAITING
        tenant = sequence.request.tenant or _NOBODY
        account = self._account(tenant)
        account.share = tenant.share
        if not account.is_listed:
            account.service = max(account.service, self._least())
            account.is_listed = True
            heapq.heappush(self._listed, (account.service, account.number, account))
        heapq.heappush(account.waiting, sequence)
        self._num_waiting += 1

    def first(self) -> Sequence | None:
        """Return the sequence to be served next; None if nobody waits."""
        account = self._front()
        return None if account is None else account.waiting[0]

    def pop(self, num_tokens: int) -> None:
        """Take out the first sequence, which begins to run and is to compute some tokens of its prompt."""
        account = self._front()
        assert account is not None
        heapq.heappop(account.waiting)
        account.service += num_tokens / account.share
        self._num_waiting -= 1

    def discard(self) -> None:
        """Note that one of the waiting sequences has ended; its status must say so before the next call."""
        self._num_waiting -= 1

    def charge(self, tenant: Tenant, num_tokens: int) -> None:
        """Count tokens that were generated for a tenant."""
        account = self._account(tenant)
        account.service += 2 * num_tokens / account.share

    def service(self, tenant: Tenant) -> float:
        """Return what a tenant has had so far, lifts included, over its share."""
        return self._account(tenant).service

    def _account(self, tenant: Tenant) -> _Account:
        account = self._accounts.get(tenant.name)
        if account is None:
            if len(self._accounts) >= self._prune_at:
                self._prune()
            self._num_seen += 1
            account = self._accounts[tenant.name] = _Account(self._num_seen, tenant.share, self._least())
        return account

    def _front(self) -> _Account | None:
        """Return the account to be served next, when those without anybody waiting have left."""
        while self._listed:
            service, number, account = self._listed[0]
            while account.waiting and account.waiting[0].status is not SequenceStatus.WAITING:
                heapq.heappop(account.waiting)
            if not account.waiting:
                heapq.heappop(self._listed)
                account.is_listed = False
                self._last_to_leave = account
            elif service < account.service:
                heapq.heapreplace(self._listed, (account.service, number, account))
            else:
                return account
        return None

    def _least(self) -> float:
        """Return the service from which one that comes back begins."""
        front = self._front() or self._last_to_leave
        return 0.0 if front is None else front.service

    def _prune(self) -> None:
        """Forget accounts that would be lifted when they come back: new ones would do as well."""
        least = self._least()
        self._accounts = {
            name: account
            for name, account in self._accounts.items()
            if account.is_listed or account.service > least or account is self._last_to_leave
        }
        self._prune_at = max(2 * len(self._accounts), _PRUNE_FROM)
