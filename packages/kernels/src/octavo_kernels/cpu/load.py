"""Library: the native CPU code, loaded by ctypes for the best instruction set of this machine.

OCTAVO_CPU_ISA=baseline|avx2|avx512|avx512vnni asks for one instruction set, `none` for batched torch; it is read when
the library is first needed. OCTAVO_CPU_TILES=0 keeps products out of the tiles of AMX. OCTAVO_CPU_LIBRARY_DIR names
another folder of libraries, for example one built with sanitizers. In a source checkout the library is built on first
use, and again when its sources change.
"""

import ctypes
import logging
import os
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

from octavo_kernels import _dispatch
from octavo_kernels.cpu import build
from octavo_kernels.errors import BackendFallbackWarning, BackendUnavailable, OptionError

ABI_VERSION = 9
"""What `octavo_abi_version()` of the library must answer: the layout of the op structs that both sides agree on."""

_logger = logging.getLogger("octavo_kernels")


@dataclass(frozen=True)
class Library:
    """The loaded native code: ctypes' handle, its instruction set, its file, and whether products use tiles of AMX."""

    handle: ctypes.CDLL
    isa: str
    path: Path
    tiles: bool = False


class _Loaded:
    """What was loaded: the library, or why there is none. Only `library` writes it, under its lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.done = False
        self.library: Library | None = None
        self.missing: str | None = None


_loaded = _Loaded()


def library() -> Library | None:
    """Return the native library, loaded once per process; None where batched torch serves instead.

    Warns (BackendFallbackWarning, once) when there is no library although OCTAVO_CPU_ISA does not say `none`.

    Raises: OptionError (OCTAVO_CPU_ISA or OCTAVO_CPU_TILES has an unknown value), BackendUnavailable (this machine
    cannot run what it names, the file cannot be loaded or has another version, or compiling it failed).
    """
    if not _loaded.done:
        with _loaded.lock:
            if not _loaded.done:
                _loaded.library, _loaded.missing = _load()
                _loaded.done = True
                if _loaded.missing is not None:
                    warnings.warn(
                        f"octavo_kernels: torch serves the cpu backend: {_loaded.missing}",
                        BackendFallbackWarning,
                        stacklevel=3,
                    )
    return _loaded.library


def library_for(op: str) -> Library | None:
    """Return the native library for a call of `op`; a call that finds none is counted in `fallbacks()`.

    With OCTAVO_CPU_ISA=none torch is what was asked for, and nothing is counted.
    """
    found = library()
    if found is None and _loaded.missing is not None:
        _dispatch.count_fallback(op, _loaded.missing)
    return found


def isa() -> str:
    """Return the instruction set of the native library in use, or "none" where batched torch serves the CPU.

    One of baseline, avx2, avx512, avx512vnni, none; it says which bits a result has. Loads the library, with its
    warning and errors.
    """
    found = library()
    return "none" if found is None else found.isa


def supported() -> tuple[str, ...]:
    """Return the instruction sets that this machine can run and this installation holds, least capable first.

    In a source checkout with a compiler it holds all of them. Empty where there is no library.
    """
    return tuple(name for name in build.instruction_sets()[: _machine_level() + 1] if _obtainable(name))


def open_library(isa: str) -> Library:
    """Load the library of one instruction set, built first in a source checkout; `library` is what ops call.

    Raises: BackendUnavailable (there is none, it cannot be loaded, or it has another version), OptionError
    (OCTAVO_CPU_TILES has an unknown value).
    """
    path = _find(isa)
    if path is None:
        raise BackendUnavailable(f"the native library for {isa} is missing: {_why_missing()}")
    handle = _open(str(path))
    found = handle.octavo_abi_version() if hasattr(handle, "octavo_abi_version") else None
    if found != ABI_VERSION:
        raise BackendUnavailable(
            f"{path} has interface version {found}, expected {ABI_VERSION}; reinstall octavo-kernels so that its "
            "Python and native parts are of one build, or set OCTAVO_CPU_ISA=none to use torch"
        )
    tiles = hasattr(handle, "octavo_use_tiles") and bool(handle.octavo_use_tiles(_tiles_are_wanted()))
    return Library(handle, isa, path, tiles)


def _tiles_are_wanted() -> bool:
    value = os.environ.get("OCTAVO_CPU_TILES", "1")
    if value not in ("0", "1"):
        raise OptionError(f"OCTAVO_CPU_TILES is {value!r}, expected 0 or 1; set one of them, or unset it")
    return value == "1"


def _load() -> tuple[Library | None, str | None]:
    """Return the library, or why there is none although one was wanted."""
    wanted = os.environ.get("OCTAVO_CPU_ISA", "")
    if wanted == "none":
        return None, None
    if wanted:
        return open_library(_checked(wanted)), None
    names = supported()
    return (open_library(names[-1]), None) if names else (None, _why_missing())


def _checked(wanted: str) -> str:
    """Return an instruction set that OCTAVO_CPU_ISA asks for, if this machine can run it."""
    known = build.instruction_sets()
    if wanted not in build.ISA_FLAGS:
        names = ", ".join((*build.ISA_FLAGS, "none"))
        raise OptionError(f"OCTAVO_CPU_ISA is {wanted!r}, expected one of {names}; set one of them, or unset it")
    if wanted == "baseline":
        return wanted
    best = known[_machine_level()]
    if wanted not in known or known.index(wanted) > known.index(best):
        raise BackendUnavailable(
            f"OCTAVO_CPU_ISA={wanted}: this machine runs {best} at most; set OCTAVO_CPU_ISA={best}, or unset it"
        )
    return wanted


def _open(path: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise BackendUnavailable(f"{path} cannot be loaded: {error}; set OCTAVO_CPU_ISA=none to use torch") from error


def _machine_level() -> int:
    """Return the index of the best instruction set that processor and operating system support; the baseline asks."""
    known = build.instruction_sets()
    path = _folder() / build.library_name("baseline")
    if len(known) == 1 or not (path.exists() or _find("baseline")):
        return 0
    # One from older sources can answer too. It is loaded under another name than `open_library` gives it, since the
    # dynamic loader would hand the old file out again after a rebuild under the same name.
    probe = _open(f"{path.parent}/./{path.name}")
    return min(int(probe.octavo_cpu_isa()), len(known) - 1)


def _folder() -> Path:
    named = os.environ.get("OCTAVO_CPU_LIBRARY_DIR")
    return Path(named) if named else build.LIB


def _builds_here() -> bool:
    """Say whether libraries are made from the sources beside this file."""
    return not os.environ.get("OCTAVO_CPU_LIBRARY_DIR") and build.has_sources() and build.find_compiler() is not None


def _obtainable(isa: str) -> bool:
    return _builds_here() or _is_usable(_folder() / build.library_name(isa))


def _is_usable(path: Path) -> bool:
    """Say whether a file exists and, in a source checkout, comes from the sources of now."""
    if os.environ.get("OCTAVO_CPU_LIBRARY_DIR") or not build.has_sources():
        return path.exists()
    return build.is_current(path)


def _find(isa: str) -> Path | None:
    """Return the file of an instruction set's library, built first where it can be and must be."""
    path = _folder() / build.library_name(isa)
    if _is_usable(path):
        return path
    if not _builds_here():
        return None
    compiler = build.find_compiler()
    assert compiler is not None
    try:
        return build.build(path.parent, [isa], compiler, report=_logger.warning)[0]
    except build.BuildError as error:
        raise BackendUnavailable(
            f"the native library for {isa} did not compile; set OCTAVO_CPU_ISA=none to use torch\n{error}"
        ) from error


def _why_missing() -> str:
    if os.environ.get("OCTAVO_CPU_LIBRARY_DIR"):
        return f"OCTAVO_CPU_LIBRARY_DIR={_folder()} has no such file; unset it, or build there"
    if build.has_sources():
        return "its sources are not compiled, and there is no C++ compiler; install g++, or set OCTAVO_CPU_ISA=none"
    return (
        "this installation was built without a C++ compiler; install a wheel built with one, or set "
        "OCTAVO_CPU_ISA=none to say that torch is wanted"
    )
