"""Prints what CI runs side by side, a job a line, from what `nox -l --json` says on standard input.

A job is a session; of those with parameters each `tests` is one, and the others are one together.
"""

import json
import sys

DONE = {"lint", "layers", "docs", "env", "wheels"}  # before, or by a session that needs it
# What takes long must not come last.
FIRST = ("e2e", "tests(engine, cpu)", "tests(kernels, triton-interpreter)", "isolation", "sanitize")


def main() -> None:
    """Print the jobs, the long ones first."""
    names = [listed["session"] for listed in json.load(sys.stdin)]
    jobs = dict.fromkeys(name if name.startswith("tests(") else name.partition("(")[0] for name in names)
    wanted = [job for job in jobs if job not in DONE]
    print(*[job for job in FIRST if job in wanted], *[job for job in wanted if job not in FIRST], sep="\n")


if __name__ == "__main__":
    main()
