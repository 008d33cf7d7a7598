"""TuningCache: launch configurations of kernels, measured here or shipped, by op, device, dtype, rows and shape.

A configuration is looked for among what was measured on this machine (`tuned.json` in the user's cache folder,
$XDG_CACHE_HOME/octavo/kernels), then among what the package ships for the device; a kernel's own default comes last.
Shipped files say whether their numbers were measured: starting points were not. Files are read once per process.
"""

import functools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from octavo_kernels.errors import OptionError

_ANY_SHAPE = "*"
_VERSION = 1
_BUCKETS = (16, 32, 64)
_SHIPPED = Path(__file__).parent / "tuned"

Config = Mapping[str, int]
"""What a kernel is launched with, by name: sizes of tiles, warps, stages."""


class Key(NamedTuple):
    """What a configuration is for.

    device: its name, as torch tells it. dtype: of the activations, without "torch.". rows: "16", "32", "64" or "more",
    see `row_bucket`. shape: what else distinguishes launches, in words of the op.
    """

    op: str
    device: str
    dtype: str
    rows: str
    shape: str


class Measured(NamedTuple):
    """The best of some configurations, and its time in seconds."""

    config: Config
    seconds: float


def row_bucket(num_tokens: int) -> str:
    """Return which batches a configuration is shared by: up to 16 rows, 32, 64, or more."""
    return next((str(limit) for limit in _BUCKETS if num_tokens <= limit), "more")


def user_file() -> Path:
    """Return where configurations measured on this machine are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo" / "kernels" / "tuned.json"


class TuningCache:
    """Configurations of a user's file and of a folder of shipped ones; `keep` alone writes, to the user's file.

    Args:
        file: the user's; need not exist, and counts as none where it may not be read.
        shipped: a folder of JSON files.

    Raises:
        OptionError: a file does not hold what it should.
    """

    def __init__(self, file: Path, shipped: Path = _SHIPPED) -> None:
        self._file = file
        self._measured = _read_user(file)
        self._shipped = [_read_shipped(path) for path in sorted(shipped.glob("*.json"))]
        self._found: dict[Key, Config | None] = {}  # every launch asks

    def find(self, key: Key) -> Config | None:
        """Return the configuration for a key: the user's, else one shipped for it, else one shipped for any shape."""
        if key not in self._found:
            self._found[key] = self._look(key)
        return self._found[key]

    def _look(self, key: Key) -> Config | None:
        if key in self._measured:
            return self._measured[key].config
        words = re.split(r"[ -]", key.device)
        for shape in (key.shape, _ANY_SHAPE):
            for word, entries in self._shipped:
                found = entries.get(key._replace(device=word, shape=shape))
                if found is not None and word in words:
                    return found
        return None

    def keep(self, key: Key, best: Measured) -> None:
        """Write a measured configuration down; what other processes wrote meanwhile stays."""
        self._measured = {**_read_user(self._file), key: best}
        self._found.clear()
        entries = [
            {**known._asdict(), "config": dict(item.config), "seconds": item.seconds}
            for known, item in sorted(self._measured.items())
        ]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self._file.parent, suffix=".json", delete=False) as part:
            json.dump({"version": _VERSION, "entries": entries}, part, indent=1)
        Path(part.name).replace(self._file)  # readers see the old file or the new one


@functools.cache
def tuning_cache() -> TuningCache:
    """Return this process's cache, read when it is first needed; where there is no home, of what is shipped."""
    try:
        file = user_file()
    except RuntimeError:  # pathlib's, of a user without a home
        file = _SHIPPED / "none"
    return TuningCache(file)


def measure(candidates: Iterable[Config], seconds_of: Callable[[Config], float]) -> Measured:
    """Return the fastest of some configurations; the first of equals.

    Args:
        candidates: what to try.
        seconds_of: how long a launch takes; infinity where a configuration cannot be launched.

    Raises:
        OptionError: none of them can be launched.
    """
    measured = [Measured(config, seconds_of(config)) for config in candidates]
    usable = [item for item in measured if math.isfinite(item.seconds)]
    if not usable:
        raise OptionError(f"measure: none of {len(measured)} configurations can be launched; pass smaller tiles")
    return min(usable, key=lambda item: item.seconds)


def _read_user(path: Path) -> dict[Key, Measured]:
    try:
        entries = _entries(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # of a service, home is often another's
        return {}
    try:
        return {Key(*(str(item[name]) for name in Key._fields)): _measured(item) for item in entries}
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, repr(error)) from error


def _measured(item: Mapping[str, Any]) -> Measured:
    return Measured(_config(item["config"]), float(item["seconds"]))


def _read_shipped(path: Path) -> tuple[str, dict[Key, Config]]:
    """Return a device's word and its configurations."""
    try:
        word = str(json.loads(path.read_text(encoding="utf-8"))["device"])
        found = {
            Key(item["op"], word, item["dtype"], item["rows"], item["shape"]): _config(item["config"])
            for item in _entries(path)
        }
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, repr(error)) from error
    return word, found


def _entries(path: Path) -> list[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _unreadable(path, str(error)) from error
    if not isinstance(content, dict) or content.get("version") != _VERSION or "entries" not in content:
        raise _unreadable(path, "it has no entries of that version")
    return list(content["entries"])


def _config(values: Mapping[str, Any]) -> Config:
    for name, value in values.items():
        if not isinstance(value, int) or value < 1 or value & (value - 1):
            if name == "num_stages" and isinstance(value, int) and value > 0:
                continue
            raise ValueError(f"{name} is {value!r}, expected a power of two")
    return dict(values)


def _unreadable(path: Path, reason: str) -> OptionError:
    return OptionError(
        f"tuning cache: {path} is not a file of launch configurations, version {_VERSION}: {reason}; "
        "delete it, and measure again with python -m octavo_kernels.tune"
    )
