"""Adapters: names, versions, and what stays in the host's memory."""

from dataclasses import dataclass
from typing import Any

import pytest

from octavo_engine.adapters.store import Adapters
from octavo_engine.errors import InvalidAdapter, InvalidRequest, UnknownAdapter


@dataclass(frozen=True)
class Fake:
    digest: bytes
    rank: int = 4
    num_bytes: int = 100


class Disk:
    """Files by path, requests that hold versions, and a store on both."""

    def __init__(self, max_num_loaded: int = 2, **files: bytes) -> None:
        self.files = files
        self.held: set[bytes] = set()
        self.read_paths: list[str] = []
        self.store = Adapters(self.read, max_num_loaded=max_num_loaded, is_held=self.held.__contains__)
        for name in files:
            self.store.load(name, name)

    def read(self, path: str) -> Any:
        self.read_paths.append(path)
        return Fake(self.files[path])

    @property
    def loaded(self) -> list[str]:
        return [info.name for info in self.store.listed() if info.is_loaded]


def test_the_version_used_least_recently_leaves_memory_and_is_read_again() -> None:
    disk = Disk(x=b"1", y=b"2")
    disk.store.bind("x")
    disk.files["z"] = b"3"
    disk.store.load("z", "z")
    assert disk.loaded == ["x", "z"]
    assert disk.store.path_to_read("y") == "y"
    assert disk.store.path_to_read("x") is None
    assert disk.store.bind("y") == b"2"
    assert disk.read_paths == ["x", "y", "z", "y"]
    assert disk.loaded == ["y", "z"]


def test_versions_that_requests_hold_stay_over_the_limit_until_let_go() -> None:
    disk = Disk(x=b"1", y=b"2")
    disk.held |= {b"1", b"2"}
    disk.files["z"] = b"3"
    disk.store.load("z", "z")
    assert disk.loaded == ["x", "y", "z"]
    disk.held.clear()
    disk.store.evict()
    assert disk.loaded == ["y", "z"]


def test_a_version_without_a_name_stays_while_it_is_held() -> None:
    disk = Disk(x=b"1")
    disk.held.add(b"1")
    disk.files["x"] = b"2"
    assert disk.store.load("x", "x", in_place=True).digest == b"2".hex()
    assert disk.store.bind("x") == b"2"
    assert disk.store.weights(b"1").digest == b"1"
    disk.held.clear()
    disk.store.evict()
    assert disk.store.num_loaded == 1
    with pytest.raises(KeyError):
        disk.store.weights(b"1")


def test_equal_content_is_in_memory_once() -> None:
    disk = Disk(x=b"1", y=b"1")
    assert disk.loaded == ["x", "y"]
    assert disk.store.num_loaded == 1
    disk.store.unload("x")
    assert disk.loaded == ["y"]


def test_files_that_changed_unasked_are_refused_and_change_nothing() -> None:
    disk = Disk(1, x=b"1", y=b"2")
    disk.files["x"] = b"9"
    with pytest.raises(InvalidAdapter, match="x: the files have changed since adapter 'x' was loaded"):
        disk.store.bind("x")
    assert disk.loaded == ["y"]


def test_a_read_that_fails_changes_nothing() -> None:
    disk = Disk(x=b"1")
    with pytest.raises(KeyError):
        disk.store.load("x", "gone", in_place=True)
    assert disk.store.bind("x") == b"1"


def test_names() -> None:
    disk = Disk(x=b"1")
    with pytest.raises(InvalidRequest, match="is served already") as taken:
        disk.store.load("x", "x")
    assert (taken.value.param, taken.value.code) == ("lora_name", "adapter_exists")
    with pytest.raises(InvalidRequest, match="lora_name is empty"):
        disk.store.load("", "x")
    with pytest.raises(UnknownAdapter, match="no adapter 'y' is served; these are: 'x'") as unknown:
        disk.store.bind("y")
    assert unknown.value.code == "adapter_not_found"
