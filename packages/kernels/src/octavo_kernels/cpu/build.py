"""The build of the native library: one shared library per instruction set from csrc, with cached objects.

Standard library only, and no import of the package: the wheel's build hook loads this file by its path, where torch is
not installed. In a source checkout `octavo_kernels.cpu.load` calls it, and `python build.py FOLDER` builds by hand.

Variables: CXX (the compiler; `none` builds nothing), OCTAVO_KERNELS_CXXFLAGS (appended, for example sanitizers),
OCTAVO_KERNELS_STRICT=1 (a compiler's warning is an error), XDG_CACHE_HOME (where objects are kept).
"""

import argparse
import contextlib
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")

# From the least to the most capable machine: a machine that runs one runs those before it.
ISA_FLAGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"baseline": (), "avx2": _AVX2, "avx512": _AVX512, "avx512vnni": (*_AVX512, "-mavx512vnni")}
)

# What tells an instruction set from the one before it, in a source or its headers; other sources are compiled once for
# both, for the lesser one.
_OWN_CODE: Mapping[str, str] = MappingProxyType({"avx512vnni": "AVX512VNNI"})

# No -ffast-math: sums keep the order in which the source writes them, and NaN and infinities keep their meaning.
_COMPILE = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",  # GCC 12 says it of its own vector intrinsics (its bug 105593)
)
# Sources that -O3 makes much larger and hardly faster. On all machines those that choose among products, which is not
# what takes the time; without vectors of bytes also products of bytes, slower there than those in full, and packing.
_SMALL = ("argmax.cpp", "packed_sample.cpp")
_SMALL_BY_ISA: Mapping[str, tuple[str, ...]] = MappingProxyType({"baseline": ("matmul_codes.cpp", "planes.cpp")})

# The C++ runtime is linked in and hidden, so that the library runs beside any other in one process.
_LINK_LINUX = (
    "-static-libstdc++",
    "-static-libgcc",
    "-pthread",
    "-Wl,--version-script=exports.map",
    "-Wl,--gc-sections",
    "-Wl,--no-undefined",
)
_CACHE_SECONDS = 30 * 24 * 3600

_HERE = Path(__file__).resolve().parent
CSRC = _HERE / "csrc"
LIB = _HERE / "lib"


class BuildError(Exception):
    """The compiler or the linker failed; the message holds what it said."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command that runs it, and what it says about itself."""

    command: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class _Unit:
    """One source file compiled for one instruction set, and the place of its object in the cache."""

    isa: str
    source: Path
    arguments: tuple[str, ...]
    target: Path


def find_compiler() -> Compiler | None:
    """Return the compiler that CXX names, or else c++, g++ or clang++; None when there is none."""
    if sys.platform == "win32":
        return None  # the sources are written for GCC and clang
    wanted = os.environ.get("CXX", "")
    for candidate in [wanted] if wanted else ["c++", "g++", "clang++"]:
        command = tuple(shlex.split(candidate))
        if command and shutil.which(command[0]) is not None:
            shown = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
            if shown.returncode == 0:
                return Compiler(command, shown.stdout)
    return None


def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets that are built on this platform, least capable first."""
    return tuple(ISA_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else ("baseline",)


def library_name(isa: str) -> str:
    """Return the file name of an instruction set's library."""
    return f"liboctavo_cpu_{isa}.so"


def has_sources() -> bool:
    """Say whether the sources lie here: in a source checkout they do, in an installed wheel they do not."""
    return any(CSRC.glob("*.cpp"))


def is_current(library: Path, csrc: Path | None = None) -> bool:
    """Say whether a library exists and was built from the sources and flags of now."""
    stamp = _stamp(library)
    return library.exists() and stamp.exists() and stamp.read_text() == _source_digest(csrc or CSRC)


def build(
    folder: Path,
    isas: Sequence[str],
    compiler: Compiler,
    *,
    csrc: Path | None = None,
    report: Callable[[str], None] = print,
) -> list[Path]:
    """Compile and link the libraries of some instruction sets into a folder, and return their paths.

    Objects and libraries come from the user's cache where it has them; compilers run side by side, one per core. A
    library appears under its name only when it is whole, and one that is loaded keeps working.

    Raises: BuildError (the compiler or the linker fails).
    """
    csrc = csrc or CSRC
    cache = _cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    digest = _source_digest(csrc)
    with _only_one(cache / "lock"):
        units = [unit for isa in isas for unit in _units(csrc, isa, compiler, cache)]
        objects = {unit.target: unit for unit in units}
        missing = [unit for unit in objects.values() if not _in_cache(unit.target)]
        if missing:
            report(f"octavo-kernels: compiling {len(missing)} of {len(objects)} objects for {', '.join(isas)}")
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for _ in pool.map(lambda unit: _produce(compiler, unit.arguments, unit.target, csrc), missing):
                pass
        libraries = []
        for isa in isas:
            of_isa = [unit.target for unit in units if unit.isa == isa]
            libraries.append(_install(_link(compiler, of_isa, csrc, cache), folder / library_name(isa), digest))
        _prune(cache)
    return libraries


def _extra_flags() -> list[str]:
    return shlex.split(os.environ.get("OCTAVO_KERNELS_CXXFLAGS", ""))


def _headers(csrc: Path) -> list[Path]:
    return sorted([*csrc.glob("*.h"), *csrc.glob("*.map")])


def _sources(csrc: Path) -> list[Path]:
    return sorted(csrc.glob("*.cpp"))


def _digest(*parts: object) -> str:
    """Hash texts and files; each part's length is hashed too, so that parts do not run together."""
    total = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else str(part).encode()
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def _source_digest(csrc: Path) -> str:
    files = [*_headers(csrc), *_sources(csrc)]
    isas = [sorted(ISA_FLAGS.items()), sorted(_OWN_CODE.items()), _SMALL, sorted(_SMALL_BY_ISA.items())]
    flags = [*_COMPILE, *_LINK_LINUX, *isas, *_extra_flags()]
    return _digest(*(path.name for path in files), *files, *flags)


def _units(csrc: Path, isa: str, compiler: Compiler, cache: Path) -> Iterator[_Unit]:
    strict = ["-Werror"] if os.environ.get("OCTAVO_KERNELS_STRICT") == "1" else []
    headers = _headers(csrc)
    named_headers = [part for path in headers for part in (path.name, path)]
    for source in _sources(csrc):
        made_for = _least_alike(source, isa)
        small = ["-O2"] if source.name in (*_SMALL, *_SMALL_BY_ISA.get(made_for, ())) else []
        defined = f"-DOCTAVO_ISA_{made_for.upper()}=1"
        flags = (*_COMPILE, *small, *ISA_FLAGS[made_for], defined, *strict, *_extra_flags())
        key = _digest(*compiler.command, compiler.version, *flags, *named_headers, source.name, source)
        # A bare file name keeps the path of this checkout out of the object, so that another checkout can share it.
        yield _Unit(isa, source, (*flags, "-c", source.name), cache / f"{key}.o")


def _least_alike(source: Path, isa: str) -> str:
    """Return the instruction set whose object of a source serves a more capable one too, or that one itself."""
    own = _OWN_CODE.get(isa)
    if own is None or any(own in text for text in _with_headers(source, {}).values()):
        return isa
    return list(ISA_FLAGS)[list(ISA_FLAGS).index(isa) - 1]


def _with_headers(source: Path, known: dict[str, str]) -> dict[str, str]:
    """Return the texts, by name, of a source and of what it includes of ours, directly or not."""
    if source.name not in known and source.exists():
        known[source.name] = source.read_text()
        for name in re.findall(r'^ *# *include *"([^"]+)"', known[source.name], re.MULTILINE):
            _with_headers(source.with_name(name), known)
    return known


def _link(compiler: Compiler, objects: Sequence[Path], csrc: Path, cache: Path) -> Path:
    extra = _extra_flags()
    platform_flags = _LINK_LINUX if sys.platform == "linux" else ()
    # Extra flags are a developer's: symbols and line numbers stay for reports of sanitizers and profilers.
    flags = ("-shared", *platform_flags, *(extra or ["-Wl,-s"] if sys.platform == "linux" else extra))
    names = [str(path) for path in objects]
    target = cache / f"{_digest(*compiler.command, compiler.version, *flags, *names)}.so"
    if not _in_cache(target):
        _produce(compiler, (*flags, *names), target, csrc)
    return target


def _in_cache(target: Path) -> bool:
    if not target.exists():
        return False
    os.utime(target)
    return True


def _produce(compiler: Compiler, arguments: Iterable[str], target: Path, csrc: Path) -> None:
    """Run the compiler beside the sources; the target appears when it is whole."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        unfinished = Path(scratch, target.name)
        command = [*compiler.command, *arguments, "-o", str(unfinished)]
        run = subprocess.run(command, cwd=csrc, capture_output=True, text=True, check=False)
        if run.returncode:
            raise BuildError(f"{shlex.join(command)}\nexited with {run.returncode}:\n{run.stdout}{run.stderr}")
        if run.stderr:
            sys.stderr.write(run.stderr)  # warnings of the compiler
        unfinished.replace(target)


def _install(built: Path, library: Path, digest: str) -> Path:
    stamp = _stamp(library)
    stamp.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        copy = Path(scratch, library.name)
        shutil.copyfile(built, copy)
        copy.replace(library)
    stamp.write_text(digest)
    return library


def _stamp(library: Path) -> Path:
    return library.with_suffix(".digest")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo" / "build"


def _prune(cache: Path) -> None:
    """Delete what no build has used for a month."""
    oldest = time.time() - _CACHE_SECONDS
    for path in (*cache.glob("*.o"), *cache.glob("*.so")):
        if path.stat().st_mtime < oldest:
            path.unlink()


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Let one process at a time build; the next one finds the objects in the cache."""
    import fcntl  # POSIX alone, and so is find_compiler

    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Build into the folder that the command line names."""
    parser = argparse.ArgumentParser(description="Build the native CPU library of octavo-kernels.")
    parser.add_argument("folder", type=Path, nargs="?", default=LIB, help="where the libraries go")
    parser.add_argument("--isa", action="append", choices=instruction_sets(), help="one of several; default all")
    options = parser.parse_args()
    compiler = find_compiler()
    if compiler is None:
        parser.error("no C++ compiler: install g++ or clang, or set CXX")
    for library in build(options.folder.resolve(), options.isa or instruction_sets(), compiler):
        print(library)


if __name__ == "__main__":
    main()
