"""Runs one measurement in a process of its own and reads its result line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
from typing import Any


class MeasurementFailed(Exception):
    """The process ended without a result; says how."""


def measure(command: list[str], *, environment: dict[str, str], timeout: float) -> dict[str, Any]:
    """Run a command and return the JSON object of the last line that holds one.

    Raises:
        MeasurementFailed: if it fails, prints no result, or takes longer than `timeout` seconds.
    """
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=folder,
            env=os.environ | environment,
            start_new_session=True,  # an engine's own children go with it
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise MeasurementFailed(f"no result after {timeout:.0f} s") from None
        finally:
            _end_group(process)
        lines = [line for line in output.splitlines() if line.startswith("{")]
        if process.returncode or not lines:
            errors.seek(0)
            said = [line for line in errors.read().splitlines() if line.strip()]
            reason = _shorten(said[-1]) if said else "nothing on standard error"
            raise MeasurementFailed(f"exit code {process.returncode}: {reason}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def _shorten(message: str) -> str:
    """Leave the folders of absolute paths out of a message, for it goes into the results."""
    return re.sub(r"(?:/[\w.+~-]+)+/", ".../", message)[:300]


def _end_group(process: subprocess.Popen[str]) -> None:
    """End whatever of the process and its children is left."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
