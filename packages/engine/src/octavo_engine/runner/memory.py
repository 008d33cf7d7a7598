"""How many blocks of KV cache there are, and why."""

from __future__ import annotations

import os
from dataclasses import dataclass

from octavo_engine.errors import InvalidConfig

_HOST_BYTES = 4 << 30  # what a GPU's sequences get in the host's memory unless more is asked for: it is pinned
CPU_SHARE = 0.25  # of the memory that is available: pages are touched only as blocks are used


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The size of the KV cache and the context that fits in it; `reason` says in words how it was chosen."""

    num_blocks: int
    num_bytes: int
    max_model_len: int
    reason: str

    def num_pinnable(self, block_size: int, share: float) -> int:
        """Return how many blocks may be pinned: a share of all, as far as the longest sequence fits beside them."""
        num_usable = self.num_blocks - 1
        return max(0, min(int(share * num_usable), num_usable - -(-self.max_model_len // block_size)))


def available_bytes() -> int:
    """Return the host memory that can be taken without swapping, in bytes."""
    try:
        with open("/proc/meminfo") as meminfo:
            for line in meminfo:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: fall through to what the operating system says of its physical memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident_bytes() -> int | None:
    """Return the physical memory that this process has, in bytes; None where the system does not tell."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None  # not Linux


def plan_memory(
    *,
    bytes_per_block: int,
    block_size: int,
    max_num_seqs: int,
    model_max_len: int,
    max_model_len: int | None,
    num_blocks: int | None,
    kv_cache_bytes: int | None,
    free_bytes: int,
    share: float = CPU_SHARE,
    what: str | None = None,
) -> MemoryPlan:
    """Choose the number of blocks: what was asked for, else a share of the free memory up to what can be used.

    Block 0 is reserved and counted in. `share` is of `free_bytes`, which `what` describes for the reason.

    Raises:
        InvalidConfig: if the context asked for is more than the model's or does not fit; lists the ways out with
            their computed sizes.
    """
    if max_model_len is not None and max_model_len > model_max_len:
        raise InvalidConfig(f"max_model_len {max_model_len} is more than the model's context of {model_max_len} tokens")
    wanted_len = max_model_len or model_max_len
    useful = max_num_seqs * -(-wanted_len // block_size) + 1
    if num_blocks is not None:
        chosen, reason = num_blocks, "num_blocks was given"
    elif kv_cache_bytes is not None:
        chosen, reason = kv_cache_bytes // bytes_per_block, "kv_cache_bytes was given"
    else:
        chosen = int(free_bytes * share) // bytes_per_block
        reason = f"{share:.0%} of {what or f'the {free_bytes / 2**30:.1f} GiB of free memory'}"
        if chosen > useful:
            chosen, reason = useful, f"what {max_num_seqs} sequences of {wanted_len} tokens can use"
    capacity = (chosen - 1) * block_size
    if max_model_len is None:
        max_model_len = min(model_max_len, capacity)
        if max_model_len < model_max_len:
            reason += f"; the context is cut from {model_max_len} to the {max_model_len} tokens that fit"
    if max_model_len < 2 or capacity < max_model_len:
        needed = -(-wanted_len // block_size) + 1
        raise InvalidConfig(
            f"a KV cache of {chosen} blocks ({max(capacity, 0)} tokens) cannot hold a sequence of {wanted_len} tokens;"
            f" set num_blocks to {needed} or more, kv_cache_bytes to {needed * bytes_per_block} or more,"
            f" or max_model_len to {max(capacity, 0)} or less"
        )
    return MemoryPlan(chosen, chosen * bytes_per_block, max_model_len, reason)


@dataclass(frozen=True, slots=True)
class HostPlan:
    """The size of the KV cache's host tier; `reason` says in words how it was chosen."""

    num_blocks: int
    num_bytes: int
    reason: str


def plan_host_tier(
    *, bytes_per_block: int, num_device_blocks: int, host_kv_bytes: int | None, on_gpu: bool, free_bytes: int
) -> HostPlan:
    """Choose the number of host blocks: what was asked for, else none on a CPU and a share of the memory on a GPU.

    Block 0 is reserved and counted in.

    Raises:
        InvalidConfig: if what was asked for holds less than a block; says how much does.
    """
    if host_kv_bytes is None and not on_gpu:
        return HostPlan(0, 0, "the device's memory is the host's, so a larger KV cache takes its place")
    if host_kv_bytes is None:
        chosen = min(_HOST_BYTES, int(free_bytes * CPU_SHARE)) // bytes_per_block
        reason = f"the least of {_HOST_BYTES >> 30} GiB, {CPU_SHARE:.0%} of the free memory, and the KV cache"
        num_blocks = min(chosen, num_device_blocks)
        if num_blocks < 2:
            return HostPlan(0, 0, f"{CPU_SHARE:.0%} of the free memory holds no block")
    elif host_kv_bytes == 0:
        return HostPlan(0, 0, "host_kv_bytes is 0")
    else:
        num_blocks, reason = host_kv_bytes // bytes_per_block, "host_kv_bytes was given"
        if num_blocks < 2:
            raise InvalidConfig(
                f"host_kv_bytes {host_kv_bytes} holds {num_blocks} blocks of {bytes_per_block} bytes, of which block 0 "
                f"is reserved; give {2 * bytes_per_block} or more, or 0 for none"
            )
    return HostPlan(num_blocks, num_blocks * bytes_per_block, reason)
