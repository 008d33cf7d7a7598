"""Settings: the values of a checkpoint's quantization_config, each checked as it is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn, TypeVar

from octavo_engine.errors import CorruptModelFile, UnsupportedModel

T = TypeVar("T", str, int)

_MAX_SIZE = 1 << 31


class Settings:
    """Values by key; errors name the file and the key.

    Args:
        values: the parsed JSON object; not modified.
        where: the file and the path of the object in it, for error messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self.where = where

    def get(self, *keys: str) -> Any:
        """Return the value of the first of some keys that is there and not null, else None."""
        return next((self._values[key] for key in keys if self._values.get(key) is not None), None)

    def corrupt(self, key: str, expected: str, found: Any) -> NoReturn:
        """Raise CorruptModelFile for a value."""
        what = "nothing" if found is None else repr(found)
        raise CorruptModelFile(f"{self.where}: {key}: expected {expected}, found {what}")

    def unsupported(self, key: str, found: Any, supported: str) -> NoReturn:
        """Raise UnsupportedModel for a value; `supported` says what is."""
        raise UnsupportedModel(f"{self.where}: {key} {found!r} is not supported; {supported}")

    def choice(self, keys: str | tuple[str, ...], allowed: Collection[T], default: T | None = None) -> T:
        """Return a value that is one of a few; letters of strings may be of either case."""
        keys = (keys,) if isinstance(keys, str) else keys
        value = self.get(*keys)
        value = default if value is None else value.lower() if isinstance(value, str) else value
        for known in allowed:
            if value == known and type(value) is type(known):
                return known
        listed = ", ".join(map(str, allowed))
        if value is None:
            self.corrupt(keys[0], f"one of {listed}", None)
        return self.unsupported(keys[0], value, f"these are: {listed}")

    def flag(self, *keys: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self.get(*keys)
        if value is not None and not isinstance(value, bool):
            self.corrupt(keys[0], "true or false", value)
        return default if value is None else value

    def group_size(self, *keys: str) -> int | None:
        """Return the inputs that share a scale, None for all of them (-1 in files)."""
        value = self.get(*keys)
        if value in (None, -1) and value is not True:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < _MAX_SIZE:
            self.corrupt(keys[0], "a number of inputs, or -1 for all", value)
        return value

    def shape(self, key: str) -> tuple[int, int] | None:
        """Return the rows and columns of a block, None where there is no such key."""
        match self.get(key):
            case None:
                return None
            case [int(rows), int(columns)] if 0 < rows < _MAX_SIZE and 0 < columns < _MAX_SIZE:
                return rows, columns
            case found:
                return self.corrupt(key, "[rows, columns]", found)

    def section(self, key: str) -> Settings | None:
        """Return an object within this one, None where there is none."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.corrupt(key, "an object", value)
        return Settings(value, f"{self.where}: {key}")

    def sections(self, key: str) -> dict[str, Settings]:
        """Return the objects of an object of objects, by their names."""
        section = self.section(key)
        if section is None:
            return {}
        return {name: section.section(name) or Settings({}, f"{section.where}: {name}") for name in section._values}

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of strings, empty where there is none."""
        value = self.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.corrupt(key, "a list of strings", value)
        return tuple(value)

    def only(self, *known: str) -> None:
        """Refuse a key that is neither among these nor null, since it may change what the codes mean."""
        for key, value in self._values.items():
            if key not in known and value is not None:
                raise UnsupportedModel(
                    f"{self.where}: key {key!r} (here {value!r}) is not known, and may change what the weights mean; "
                    "if it does not, take it out of the file"
                )
