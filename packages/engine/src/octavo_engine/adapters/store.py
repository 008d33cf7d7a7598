"""Adapters: the adapters that an engine serves by name, and their weights in the host's memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from octavo_engine.adapters.info import AdapterInfo
from octavo_engine.errors import InvalidAdapter, InvalidRequest, UnknownAdapter

if TYPE_CHECKING:
    from octavo_engine.adapters.weights import AdapterWeights


@dataclass(frozen=True, slots=True)
class _Served:
    """What a name stands for."""

    info: AdapterInfo
    version: bytes


class Adapters:
    """Names, and the versions behind them; only the thread that steps the engine writes it.

    A version is the content of an adapter's files, named by its digest, and never changes. Loading a name again makes
    it stand for another version; requests that hold the old one keep it. At most `max_num_loaded` versions are in the
    host's memory, beside those that requests hold; the least recently used goes first, and is read again when a
    request names it.

    Args:
        read: reads an adapter's files, from any thread; raises InvalidAdapter.
        max_num_loaded: versions in the host's memory.
        is_held: whether requests need a version.

    Attributes:
        num_reads: how often an adapter was taken in.
    """

    def __init__(
        self, read: Callable[[str], AdapterWeights], *, max_num_loaded: int, is_held: Callable[[bytes], bool]
    ) -> None:
        self.read = read
        self._max_num_loaded = max_num_loaded
        self._is_held = is_held
        self._served: dict[str, _Served] = {}
        self._loaded: OrderedDict[bytes, AdapterWeights] = OrderedDict()  # least recently used first
        self.num_reads = 0

    @property
    def num_loaded(self) -> int:
        """Versions in the host's memory."""
        return len(self._loaded)

    def listed(self) -> list[AdapterInfo]:
        """Return the adapters that are served, in the order in which their names came."""
        return [replace(served.info, is_loaded=served.version in self._loaded) for served in self._served.values()]

    def check_name(self, name: str, *, in_place: bool) -> None:
        """Check that an adapter may be loaded under a name.

        Raises:
            InvalidRequest: the name is empty, or another adapter has it and is not to be replaced.
        """
        if not name:
            raise InvalidRequest("lora_name is empty; give the name that requests are to use", param="lora_name")
        if name in self._served and not in_place:
            raise InvalidRequest(
                f"an adapter {name!r} is served already; load it in place (load_inplace) to replace it, unload it, or "
                "use another name",
                param="lora_name",
                code="adapter_exists",
            )

    def put(self, name: str, path: str, weights: AdapterWeights, *, in_place: bool = False) -> AdapterInfo:
        """Serve weights that were read from now on; requests that came before keep what they have.

        Raises:
            InvalidRequest: as `check_name` does.
        """
        self.check_name(name, in_place=in_place)
        info = AdapterInfo(
            name=name, path=path, digest=weights.digest.hex(), rank=weights.rank, num_bytes=weights.num_bytes
        )
        self._served[name] = _Served(info, weights.digest)
        self._take_in(weights)
        return info

    def load(self, name: str, path: str, *, in_place: bool = False) -> AdapterInfo:
        """Read an adapter and serve it.

        Raises:
            InvalidAdapter: its files cannot be read, or do not fit the model; nothing has changed.
            InvalidRequest: as `check_name` does.
        """
        self.check_name(name, in_place=in_place)
        return self.put(name, path, self.read(path), in_place=in_place)

    def unload(self, name: str) -> None:
        """Serve a name no more; requests that came before go on.

        Raises:
            UnknownAdapter: no adapter has this name.
        """
        self._find(name)
        del self._served[name]
        self.evict()

    def bind(self, name: str) -> bytes:
        """Return the version that a name stands for now, whose weights are in the host's memory then.

        Raises:
            UnknownAdapter: no adapter has this name.
            InvalidAdapter: it had to be read again, and its files are others by now or cannot be read.
        """
        served = self._find(name)
        if served.version not in self._loaded:
            self.bring_back(name, self.read(served.info.path))
        self._loaded.move_to_end(served.version)
        return served.version

    def path_to_read(self, name: str) -> str | None:
        """Return where an adapter must be read again before `bind`; None if it need not be, or is unknown."""
        served = self._served.get(name)
        return None if served is None or served.version in self._loaded else served.info.path

    def bring_back(self, name: str, weights: AdapterWeights) -> None:
        """Take in weights that were read again.

        Raises:
            UnknownAdapter: no adapter has this name any more.
            InvalidAdapter: they are others than those that the name stands for.
        """
        served = self._find(name)
        if weights.digest != served.version:
            raise InvalidAdapter(
                f"{served.info.path}: the files have changed since adapter {name!r} was loaded; load it again in place "
                "to serve what they hold now"
            )
        self._take_in(weights)

    def weights(self, version: bytes) -> AdapterWeights:
        """Return the weights of a version that a request holds."""
        return self._loaded[version]

    def evict(self) -> None:
        """Drop what is over the limit, the least recently used first, and what no name and no request needs."""
        named = {served.version for served in self._served.values()}
        for version in list(self._loaded):
            is_over = len(self._loaded) > self._max_num_loaded and next(reversed(self._loaded)) != version
            if (is_over or version not in named) and not self._is_held(version):
                del self._loaded[version]

    def _find(self, name: str) -> _Served:
        served = self._served.get(name)
        if served is None:
            raise unknown_adapter(name, list(self._served))
        return served

    def _take_in(self, weights: AdapterWeights) -> None:
        self.num_reads += 1
        self._loaded.setdefault(weights.digest, weights)
        self._loaded.move_to_end(weights.digest)
        self.evict()


def unknown_adapter(name: str, known: list[str]) -> UnknownAdapter:
    """Return the error for a name that no adapter has."""
    served = f"these are: {', '.join(map(repr, known[:20]))}" if known else "none is"
    return UnknownAdapter(f"no adapter {name!r} is served; {served}")
