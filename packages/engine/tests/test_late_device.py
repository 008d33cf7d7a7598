"""LateDevice: what it does late, in which order, and what it does not let pass."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")

import torch

from octavo_engine.runner.late_device import LateDevice


def test_work_waits_for_later_events_and_keeps_its_order() -> None:
    device, done = LateDevice(num_late=1), list[int]()
    device.launch(lambda: done.append(1))
    first = device.record()
    assert (done, first.is_done) == ([], False)
    device.launch(lambda: done.append(2))
    second = device.record()
    assert (done, first.is_done, second.is_done) == ([1], True, False)
    second.wait()
    assert (done, second.is_done) == ([1, 2], True)
    assert device.num_unfinished_launches == 1


def test_host_memory_is_poison_until_its_download_is_done() -> None:
    device = LateDevice(num_late=9)
    source, whole, real = torch.tensor([4, 5]), device.host_bytes(16).view(torch.int64), device.host_bytes(8)
    whole.fill_(3)  # as a step before left it
    device.download(source, whole)
    device.download(torch.tensor([1.0, 2.0]), real.view(torch.float32))
    event = device.record()
    assert whole.tolist() == [-1, -1]
    assert real.view(torch.float32).isnan().all()
    event.wait()
    assert whole.tolist() == [4, 5]
    assert real.view(torch.float32).tolist() == [1.0, 2.0]


def test_download_takes_what_earlier_work_left() -> None:
    device = LateDevice(num_late=9)
    value, host = torch.zeros(1), device.host_bytes(4).view(torch.float32)
    device.launch(lambda: value.fill_(3.0) and None)
    device.download(value, host)
    device.record().wait()
    assert host.tolist() == [3.0]


def test_downloads_come_in_any_order() -> None:
    orders = set()
    for seed in range(8):
        device = LateDevice(num_late=9, seed=seed)
        hosts = [device.host_bytes(8).view(torch.int64) for _ in range(2)]
        device.download(torch.tensor([1]), hosts[0])
        first = device.record()
        device.download(torch.tensor([2]), hosts[1])
        device.record()
        first.wait()
        orders.add(hosts[1].item())
        assert hosts[0].tolist() == [1]
    assert orders == {-1, 2}


def test_upload_of_memory_that_changes_fails() -> None:
    device = LateDevice(num_late=9)
    host, value = device.host_bytes(4), torch.zeros(4, dtype=torch.uint8)
    host.fill_(1)
    device.upload(host, value)
    host.fill_(2)
    with pytest.raises(AssertionError, match="written to while its copy"):
        device.record().wait()


def test_error_comes_with_the_event_behind_the_work() -> None:
    def fail() -> None:
        raise RuntimeError("told to")

    device = LateDevice(num_late=9)
    before = device.record()
    device.launch(fail)
    behind = device.record()
    device.launch(lambda: None)
    after = device.record()
    before.wait()
    after.wait()
    with pytest.raises(RuntimeError, match="told to"):
        behind.wait()
