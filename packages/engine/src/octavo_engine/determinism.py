"""resolve_deterministic: whether an engine answers each request alike, bit for bit, in whatever company it runs."""

from __future__ import annotations

import torch

from octavo_engine.errors import InvalidConfig
from octavo_kernels import Backend, choose


def resolve_deterministic(wanted: bool | None, device: torch.device) -> bool:
    """Return what `EngineConfig.deterministic` comes to on a device.

    Raises:
        InvalidConfig: if it is asked for where it cannot be promised; says why.
    """
    reason = _why_not(device)
    if wanted is None:
        return reason is None
    if wanted and reason is not None:
        raise InvalidConfig(f"deterministic=True was asked for, but {reason}; leave it out")
    return wanted


def _why_not(device: torch.device) -> str | None:
    """Say why a device's sums may hang on the batch; None where they do not."""
    if device.type != "cpu":
        return (
            f"on {device} matrices are multiplied by the maker's library, which sums in another order for another "
            "number of rows, so that last bits depend on the batch; only a CPU can promise it"
        )
    backend = choose("paged_attention", device)
    if backend is not Backend.CPU:
        return f"OCTAVO_BACKEND={backend.value} chooses kernels that do not promise it, unlike those of cpu"
    return None
