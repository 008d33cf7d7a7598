"""Any sequence of operations against a model that copies everything.

The model keeps each sequence's tokens in a list of its own. Beside it runs a fake device: a memory of blocks, another
of the host's, and rows of block ids that know only the copies and updates that the manager returns. What a slot holds
is the whole context that a real key depends on (salt, all tokens up to its own, group), so a wrong hit or a stale
block is seen. The longest prefix that could be hit is read off that memory, without any hash. What lies in blocks that
nobody holds and that can not be hit is destroyed.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from octavo_kvcache import DEVICE, HOST, Allocation, BlockCopy, CacheFull, CacheManager, KVCacheSpec, PinLimit

TOKENS = st.integers(0, 1)
PROMPTS = st.builds(  # beginnings of one text with different ends, so that prefixes repeat
    lambda num_tokens, end: [7, 8, 9, 7, 8, 8, 7, 9, 9, 8, 7, 7][:num_tokens] + end,
    st.integers(0, 12),
    st.lists(TOKENS, min_size=1, max_size=5),
)
SALTS = st.sampled_from([b"", b"", b"x"])

FULL = KVCacheSpec(1, 8)


def window(num_tokens: int) -> KVCacheSpec:
    return KVCacheSpec(1, 8, kind="window", window=num_tokens)


@dataclass
class Model:
    """One sequence: what it should hold, and the row of block ids that the fake device has for it."""

    tokens: list[int]
    salt: bytes
    rows: list[list[int]]
    num_computed: int
    num_tokens: int
    num_prompt: int
    stale: bool = False  # it began before the cache was reset

    def content(self, position: int, group: int) -> object:
        return self.salt, tuple(self.tokens[: position + 1]), group


class CacheMachine(RuleBasedStateMachine):
    """Operations of a scheduler in any order; `groups` is set by the subclasses."""

    groups: tuple[KVCacheSpec, ...] = (FULL,)

    @initialize(
        block_size=st.integers(1, 4),
        num_blocks=st.integers(4, 24),
        num_host_blocks=st.integers(2, 24),
        deduplicate=st.booleans(),
    )
    def start(self, block_size: int, num_blocks: int, num_host_blocks: int, deduplicate: bool) -> None:
        self.size = block_size
        self.deduplicate = deduplicate
        self.max_num_pinned = num_blocks // 3
        self.cache = CacheManager(
            num_blocks,
            block_size,
            groups=self.groups,
            deduplicate=deduplicate,
            max_num_pinned=self.max_num_pinned,
            num_host_blocks=num_host_blocks,
        )
        self.pins: dict[str, dict[int, list[object]]] = {}  # what each block of a pin holds
        self.set_aside: dict[str, int] = {}  # blocks, for each pin there ever was
        self.ends: dict[int, tuple[bytes | None, int]] = {}  # of blocks that ended a sequence: hash, tokens that count
        self.num_deduplicated = 0
        self.sequences: dict[int, Model] = {}
        self.swapped: dict[int, Model] = {}
        self.parked: list[tuple[int, list[int]]] = []
        self.memory: dict[tuple[int, int], object] = {}
        self.memories: dict[str, dict[tuple[int, int], object]] = {DEVICE: self.memory, HOST: {}}
        self.ids = itertools.count()
        self.step_id = 0
        self.num_copies = 0

    # Operations

    @rule(tokens=PROMPTS, salt=SALTS)
    def match(self, tokens: list[int], salt: bytes) -> None:
        seq_id = next(self.ids)
        longest = self.longest_hit(tokens, salt) if self.groups == (FULL,) else None
        num_cached = self.cache.match(seq_id, tokens, salt)
        assert num_cached == longest if longest is not None else num_cached % self.size == 0
        assert 0 <= num_cached < len(tokens)
        rows = [*self.cache.block_ids(seq_id)]
        self.sequences[seq_id] = Model(tokens, salt, rows, num_cached, num_cached, len(tokens))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), final=st.sampled_from([True, True, False]), num_rejected=st.integers(0, 4))
    def step(self, data: st.DataObject, final: bool, num_rejected: int) -> None:
        """Schedule some sequences, preempt when the cache is full, then run the copies and writes as one step."""
        scheduled: dict[int, tuple[int, int]] = {}
        copies: list[BlockCopy] = []
        for seq_id in data.draw(st.permutations(sorted(self.sequences)))[:4]:
            if seq_id not in self.sequences:
                continue  # it was preempted
            seq = self.sequences[seq_id]
            if seq.num_computed == len(seq.tokens):
                seq.tokens += data.draw(st.lists(TOKENS, min_size=1, max_size=5), label="sampled token and drafts")
            num_new = data.draw(st.integers(1, len(seq.tokens) - seq.num_computed), label="num_new_tokens")
            allocation = self.allocate(seq_id, num_new, scheduled, copies)
            if allocation is None:
                continue
            copies += allocation.copies
            scheduled[seq_id] = (seq.num_computed, seq.num_computed + num_new)
        self.apply(copies)
        for seq_id, (start, stop) in scheduled.items():
            self.write(seq_id, start, stop)
        for seq_id, (start, stop) in scheduled.items():
            first_draft = max(start, self.sequences[seq_id].num_prompt) + 1
            self.accept(seq_id, min(stop, max(first_draft, stop - num_rejected)), final)
        self.step_id += 1

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent_id, child_id = data.draw(st.sampled_from(sorted(self.sequences))), next(self.ids)
        self.cache.fork(parent_id, child_id)
        self.sequences[child_id] = deepcopy(self.sequences[parent_id])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def branch(self, data: st.DataObject) -> None:
        """Fork from a token in the middle and go another way; with a window, from what it has not left behind."""
        parent_id, child_id = data.draw(st.sampled_from(sorted(self.sequences))), next(self.ids)
        parent = self.sequences[parent_id]
        num_null = max((row.index(next(filter(None, row), None)) if any(row) else 0) for row in parent.rows)
        low = max(num_null * self.size, parent.num_computed if self.groups != (FULL,) else 0)
        num_tokens = data.draw(st.integers(min(low, parent.num_computed), parent.num_computed), label="num_tokens")
        self.cache.fork(parent_id, child_id, num_tokens=num_tokens)
        num_blocks = -(-num_tokens // self.size)
        self.sequences[child_id] = Model(
            tokens=parent.tokens[:num_tokens] + data.draw(st.lists(TOKENS, min_size=1, max_size=4), label="its own"),
            salt=parent.salt,
            rows=[row[:num_blocks] for row in parent.rows],
            num_computed=num_tokens,
            num_tokens=num_tokens,
            num_prompt=num_tokens,
            stale=parent.stale,
        )

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def step_together(self, data: st.DataObject) -> None:
        """Compute one token of all sequences of one length, or of none."""
        length = data.draw(st.sampled_from(sorted({seq.num_computed for seq in self.sequences.values()})))
        group = [seq_id for seq_id, seq in self.sequences.items() if seq.num_computed == length]
        before = self.snapshot()
        try:
            allocations = self.cache.allocate_together(group, length)
        except CacheFull:
            assert before == self.snapshot()
            return
        for seq_id, allocation in zip(group, allocations, strict=True):
            seq = self.sequences[seq_id]
            if seq.num_computed == len(seq.tokens):
                seq.tokens.append(data.draw(TOKENS, label="its next token"))
            for row, update in zip(seq.rows, allocation.updates, strict=bool(allocation.updates)):
                row[update.first_index : update.first_index + len(update.block_ids)] = update.block_ids
            assert tuple(seq.rows) == self.cache.block_ids(seq_id)
            seq.num_tokens = length + 1
            self.apply(allocation.copies)
        for seq_id in group:
            self.write(seq_id, length, length + 1)
            self.accept(seq_id, length + 1, final=True)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), late=st.sampled_from([None, 0, 1, 3]))
    def free(self, data: st.DataObject, late: int | None) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.sequences)))
        self.drop(seq_id, late)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        seq_ids = data.draw(st.lists(st.sampled_from(sorted(self.sequences)), min_size=1, max_size=4, unique=True))
        before = self.snapshot()
        try:
            self.apply(self.move_out(seq_ids))
        except CacheFull:
            assert before == self.snapshot()

    @precondition(lambda self: self.swapped)
    @rule(data=st.data(), num_spare=st.integers(0, 3))
    def swap_in(self, data: st.DataObject, num_spare: int) -> None:
        seq_ids = data.draw(st.lists(st.sampled_from(sorted(self.swapped)), min_size=1, max_size=4, unique=True))
        before = self.snapshot()
        try:
            copies = self.cache.host.swap_in(seq_ids, num_spare=num_spare)
        except CacheFull:
            assert before == self.snapshot()
            return
        assert self.cache.num_free >= num_spare
        self.apply(copies)
        for seq_id in seq_ids:
            seq = self.sequences[seq_id] = self.swapped.pop(seq_id)
            seq.rows = [*self.cache.block_ids(seq_id)]

    @precondition(lambda self: self.swapped)
    @rule(data=st.data())
    def free_swapped(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.swapped)))
        self.cache.free(seq_id)
        del self.swapped[seq_id]

    @rule()
    def distrust_copies(self) -> None:
        self.cache.host.distrust_copies()

    @rule()
    def step_done(self) -> None:
        self.cache.step_done(self.step_id)
        self.parked = [(after, held) for after, held in self.parked if after > self.step_id]
        self.step_id += 1

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.sequences)))
        seq, pin_id = self.sequences[seq_id], f"pin {next(self.ids)}"
        num_tokens = self.cache.num_committed(seq_id)
        num_blocks = num_tokens // self.size * len(self.groups)
        if seq.stale or not num_blocks or num_tokens > seq.num_computed:  # nobody pins what is about to be taken back
            return
        if sum(self.set_aside[pin_id] for pin_id in self.pins) + num_blocks > self.max_num_pinned:
            with pytest.raises(PinLimit):
                self.cache.pins.reserve(pin_id, num_tokens)
            return
        self.cache.pins.reserve(pin_id, num_tokens)
        self.set_aside[pin_id] = num_blocks
        assert self.cache.pin(pin_id, seq_id) == num_blocks // len(self.groups) * self.size
        held = self.cache.pins._held[pin_id]
        contents = {block_id: self.contents(block_id) for block_id in held}
        ends = {
            seq.content((index + 1) * self.size - 1, group)
            for group, row in enumerate(self.cache.block_ids(seq_id))
            for index in range(num_blocks // len(self.groups))
            if row[index]
        }
        assert {slots[-1] for slots in contents.values()} == ends
        assert len(held) == len(contents) == len(ends)
        self.pins[pin_id] = contents

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        pin_id = data.draw(st.sampled_from(sorted(self.pins)))
        del self.pins[pin_id]
        self.cache.pins.drop(pin_id)

    @precondition(lambda self: self.step_id % 8 == 7)  # seldom: nothing is cached for a while after it
    @rule()
    def reset_prefix_cache(self) -> None:
        self.cache.reset_prefix_cache()
        assert self.cache.stats().num_cached == 0
        self.pins.clear()
        for seq in (*self.sequences.values(), *self.swapped.values()):
            seq.stale = True

    @precondition(lambda self: self.sequences and self.groups == (FULL,))
    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        """Compute other tokens in the place of final ones."""
        seq = self.sequences[data.draw(st.sampled_from(sorted(self.sequences)))]
        seq.num_computed = data.draw(st.integers(0, seq.num_computed), label="num_computed_tokens")
        seq.tokens[seq.num_computed :] = data.draw(st.lists(TOKENS, min_size=1, max_size=6), label="other tokens")
        seq.num_prompt = len(seq.tokens)

    # Parts of a step

    def allocate(
        self, seq_id: int, num_new: int, scheduled: dict[int, tuple[int, int]], copies: list[BlockCopy]
    ) -> Allocation | None:
        seq = self.sequences[seq_id]
        while True:
            before = self.snapshot()
            possible = self.cache.can_allocate(seq_id, seq.num_computed, num_new)
            try:
                allocation = self.cache.allocate(seq_id, seq.num_computed, num_new)
            except CacheFull:
                assert not possible
                assert before == self.snapshot()
            else:
                assert possible
                for row, update in zip(seq.rows, allocation.updates, strict=bool(allocation.updates)):
                    row[update.first_index : update.first_index + len(update.block_ids)] = update.block_ids
                assert tuple(seq.rows) == self.cache.block_ids(seq_id)
                seq.num_tokens = seq.num_computed + num_new
                return allocation
            victims = [other for other in self.sequences if other != seq_id]
            if not victims:
                return None
            if victims[-1] not in scheduled:
                try:
                    copies += self.move_out(victims[-1:])
                except CacheFull:
                    pass
                else:
                    continue
            scheduled.pop(victims[-1], None)
            self.drop(victims[-1], None)

    def move_out(self, seq_ids: list[int]) -> list[BlockCopy]:
        copies = self.cache.host.swap_out(seq_ids)
        self.swapped |= {seq_id: self.sequences.pop(seq_id) for seq_id in seq_ids}
        return copies

    def apply(self, copies: Sequence[BlockCopy]) -> None:
        for copy in copies:
            self.num_copies += copy.src_tier == copy.dst_tier
            src, dst = self.memories[copy.src_tier], self.memories[copy.dst_tier]
            for offset in range(self.size):
                dst[copy.dst, offset] = src.get((copy.src, offset))

    def snapshot(self) -> object:
        return self.cache.stats(), [self.cache.block_ids(seq_id) for seq_id in self.sequences], sorted(self.swapped)

    def write(self, seq_id: int, start: int, stop: int) -> None:
        seq, holders = self.sequences[seq_id], self.holders()
        for group, row in enumerate(seq.rows):
            for position in range(start, stop):
                block_id, offset = row[position // self.size], position % self.size
                assert holders[block_id] == 1, f"block {block_id} is shared and written"
                assert self.cache._pool.block_hash(block_id) is None, f"block {block_id} can be hit and is written"
                self.memory[block_id, offset] = seq.content(position, group)

    def accept(self, seq_id: int, num_accepted: int, final: bool) -> None:
        seq = self.sequences[seq_id]
        if seq.num_tokens > num_accepted:
            del seq.tokens[num_accepted:]
        seq.num_computed = num_accepted
        if final:  # else a later step commits these tokens too
            before = self.cache.block_ids(seq_id)
            in_flight = self.step_id + 1 if self.step_id % 3 else None
            self.cache.commit(seq_id, seq.tokens, num_accepted, in_flight=in_flight)
            for old_row, row in zip(before, self.cache.block_ids(seq_id), strict=True):
                gave_way = [old for old, new in zip(old_row, row, strict=True) if old != new]
                self.num_deduplicated += len(gave_way)
                if in_flight is not None:
                    self.parked.append((in_flight, gave_way))

    def drop(self, seq_id: int, late: int | None) -> None:
        table = self.cache.block_ids(seq_id)
        held = [block_id for row in table for block_id in row if block_id]
        seq, num_committed = self.sequences.pop(seq_id), self.cache.num_committed(seq_id)
        sound = seq.num_computed >= num_committed  # else other tokens than those that were committed are to be computed
        after = None if late is None else self.step_id + late
        before = self.hittable()
        self.cache.free(seq_id, after=after, token_ids=seq.tokens if sound else ())
        if after is not None:
            self.parked.append((after, held))
        for block_id in self.hittable() - before:
            assert block_id == table[0][num_committed // self.size]
            self.ends[block_id] = self.cache._pool.block_hash(block_id), num_committed % self.size

    def holders(self) -> Counter[int]:
        tables = (row for seq_id in self.sequences for row in self.cache.block_ids(seq_id))
        parked = (held for _, held in self.parked)
        everyone = itertools.chain(tables, parked, self.pins.values())
        return Counter(block_id for held in everyone for block_id in held if block_id)

    def hittable(self) -> set[int]:
        pool = self.cache._pool
        return {block_id for block_id in range(1, self.cache.num_blocks) if pool.block_hash(block_id) is not None}

    def contents(self, block_id: int) -> list[object]:
        return [self.memory.get((block_id, offset)) for offset in range(self.size)]

    def longest_hit(self, tokens: list[int], salt: bytes) -> int:
        """Look into every block that can be hit for the longest beginning of some tokens, all but the last."""
        hittable = []
        for block_id in self.hittable():
            block_hash, num_tokens = self.ends.get(block_id, (None, 0))
            is_end = block_hash == self.cache._pool.block_hash(block_id)
            slots = self.contents(block_id)
            hittable.append(slots[:num_tokens] + [None] * (self.size - num_tokens) if is_end else slots)
        num_hit = 0
        for length in range(1, len(tokens)):
            offset = (length - 1) % self.size
            if any(slots[offset] == (salt, tuple(tokens[:length]), 0) for slots in hittable):
                num_hit = length
            else:
                break
        return num_hit

    # What must always hold

    @invariant()
    def nobody_misses_what_is_free(self) -> None:
        """Destroy what the manager may not rely on; the invariants that follow would see it."""
        pool, host = self.cache._pool, self.cache.host._pool
        lost = [(self.memory, block_id) for block_id in pool.free_block_ids() if pool.block_hash(block_id) is None]
        lost += [(self.memories[HOST], block_id) for block_id in host.free_block_ids()]
        for memory, block_id in lost:
            for offset in range(self.size):
                memory.pop((block_id, offset), None)

    @invariant()
    def rows_follow_from_updates(self) -> None:
        """But for blocks that gave way since, of which the next update tells."""
        for seq_id, seq in self.sequences.items():
            for row, table in zip(seq.rows, self.cache.block_ids(seq_id), strict=True):
                assert len(row) == len(table)
                assert row == table or self.deduplicate

    @invariant()
    def contents_equal_the_model(self) -> None:
        for seq_id, seq in self.sequences.items():
            for group, (spec, row) in enumerate(zip(self.groups, self.cache.block_ids(seq_id), strict=True)):
                first_seen = 0 if spec.window is None else max(0, seq.num_computed - spec.window + 1)
                for position in range(first_seen, seq.num_computed):
                    block_id, offset = row[position // self.size], position % self.size
                    assert block_id != 0
                    assert self.memory[block_id, offset] == seq.content(position, group)

    @invariant()
    def contents_on_the_host_equal_the_model(self) -> None:
        for seq_id, seq in self.swapped.items():
            tables = self.cache.host._sequences[seq_id].tables
            for group, (spec, table) in enumerate(zip(self.groups, tables, strict=True)):
                first_seen = 0 if spec.window is None else max(0, seq.num_computed - spec.window + 1)
                for position in range(first_seen, seq.num_computed):
                    block_id, offset = table.block_ids[position // self.size], position % self.size
                    assert block_id != 0
                    assert self.memories[HOST][block_id, offset] == seq.content(position, group)

    @invariant()
    def host_blocks_are_counted(self) -> None:
        counts, tier = self.cache.stats().host, self.cache.host
        refs = Counter(block_id for seq in tier._sequences.values() for block_id in seq.held())
        assert tier._sequences.keys() == self.swapped.keys()
        assert (counts.num_sequences, counts.num_used) == (len(self.swapped), len(refs))
        assert {block_id: tier._pool.ref_count(block_id) for block_id in refs} == refs
        assert all(seq_id not in self.cache for seq_id in self.swapped)

    @invariant()
    def no_block_is_leaked_and_counts_add_up(self) -> None:
        stats, holders = self.cache.stats(), self.holders()
        assert stats.num_used == len(holders)
        assert stats.num_used + stats.num_free == stats.num_usable
        assert stats.num_shared == sum(count > 1 for count in holders.values())
        assert stats.num_copies == self.num_copies
        assert stats.num_sequences == len(self.sequences)
        pool = self.cache._pool
        free = pool.free_block_ids()
        assert sorted([*free, *holders]) == list(range(1, stats.num_blocks))
        assert {block_id: pool.ref_count(block_id) for block_id in holders} == holders
        cached = [block_id for block_id in free if pool.block_hash(block_id) is not None]
        assert stats.num_cached == len(cached)
        assert free[len(free) - len(cached) :] == cached  # evicted last

    @invariant()
    def every_hash_leads_to_its_block(self) -> None:
        pool, prefix = self.cache._pool, self.cache._prefix
        hashes = {block_id: pool.block_hash(block_id) for block_id in range(self.cache.num_blocks)}
        hashed = {block_id: block_hash for block_id, block_hash in hashes.items() if block_hash is not None}
        assert len(prefix) == len(hashed)
        assert all(prefix.get(block_hash) == block_id for block_id, block_hash in hashed.items())

    @invariant()
    def pins_hold_what_they_held(self) -> None:
        assert all(self.contents(block_id) == slots for pin in self.pins.values() for block_id, slots in pin.items())
        stats = self.cache.stats()
        assert stats.num_pins == len(self.pins)
        assert stats.num_pinned == len({block_id for pin in self.pins.values() for block_id in pin})
        assert stats.num_deduplicated == self.num_deduplicated

    @invariant()
    def waste_is_counted_exactly(self) -> None:
        filled: dict[int, int] = {}
        num_table_blocks = 0
        for held in self.pins.values():
            num_table_blocks += len(held)
            filled |= dict.fromkeys(held, self.size)
        for seq_id, seq in self.sequences.items():
            for row in self.cache.block_ids(seq_id):
                for index, block_id in enumerate(row):
                    if block_id:
                        num_table_blocks += 1
                        num_here = min(max(seq.num_tokens - index * self.size, 0), self.size)
                        filled[block_id] = max(filled.get(block_id, 0), num_here)
        stats = self.cache.stats()
        assert stats.num_live_tokens == sum(filled.values())
        assert self.cache.waste == stats.waste
        assert stats.num_table_blocks == num_table_blocks
        assert stats.num_used - stats.num_parked == len(filled)

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for seq_id in list(self.sequences):
            self.drop(seq_id, None)
        for seq_id in self.swapped:
            self.cache.free(seq_id)
        for pin_id in self.pins:
            self.cache.pins.drop(pin_id)
        self.cache.step_done(self.step_id + 100)
        stats = self.cache.stats()
        assert (stats.num_used, stats.num_live_tokens, stats.num_table_blocks, stats.host.num_used) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    "groups",
    [(FULL,), (FULL, window(5)), (window(3), window(6))],
    ids=["full", "full and window", "two windows"],
)
def test_any_sequence_of_operations_equals_copying_everything(groups):
    machine = type("Machine", (CacheMachine,), {"groups": groups})
    run_state_machine_as_test(machine, settings=settings(max_examples=120, stateful_step_count=50, deadline=None))
