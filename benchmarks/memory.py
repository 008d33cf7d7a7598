"""Memory of the process that measures, as the benchmarks of whole engines share it."""

from __future__ import annotations

import resource


def peak_rss_mb() -> int:
    """Return the most memory that this process and the largest of its children have had, in MiB."""
    kib = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return kib // 1024
