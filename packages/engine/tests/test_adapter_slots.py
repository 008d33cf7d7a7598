"""AdapterSlots: which version gets which slot, who is evicted, and what is held."""

import pytest

from octavo_engine.adapters.slots import AdapterSlots

A, B, C = b"a", b"b", b"c"


def test_versions_get_slots_and_keep_them_while_sequences_run() -> None:
    slots = AdapterSlots(2)
    assert [slots.take(version) for version in (A, A, B, b"")] == [0, 0, 1, None]
    assert slots.num_active == 2
    assert [slots.has_room(version) for version in (A, B, C, b"")] == [True, True, False, True]
    slots.give_back(A)
    assert not slots.has_room(C)
    slots.give_back(A)
    assert slots.has_room(C)
    assert slots.take(C) == 0
    assert slots.num_fills == 3


def test_the_version_unused_for_longest_makes_room() -> None:
    slots = AdapterSlots(2)
    for version in (A, B, A):
        slots.take(version)
        slots.give_back(version)
    assert slots.num_fills == 2
    assert slots.take(C) == 1
    assert slots.take(A) == 0
    assert not slots.has_room(B)


def test_versions_are_held_from_a_request_s_beginning_to_its_end() -> None:
    slots = AdapterSlots(1)
    told: list[bool] = []
    slots.on_unheld = lambda: told.append(slots.is_held(A))
    for version in (A, A, b""):
        slots.hold(version)
    slots.let_go(A)
    assert slots.is_held(A)
    assert told == []
    slots.let_go(A)
    slots.let_go(b"")
    assert told == [False]


def test_nothing_is_in_a_slot_after_a_reset() -> None:
    slots = AdapterSlots(1)
    slots.take(A)
    with pytest.raises(AssertionError):
        slots.reset()
    slots.give_back(A)
    slots.reset()
    slots.take(A)
    assert slots.num_fills == 2
