"""The build hook: compiles the native CPU library into the wheel, or beside the sources of an editable install.

A CUDA library that `csrc_cuda/build.py` has made goes into the wheel too; it is not made here, since that takes nvcc
and torch's headers.
"""

import importlib.util
import platform
import re
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_PACKAGE = "octavo_kernels/cpu"
_CUDA_LIBRARY = "octavo_kernels/cuda/lib/octavo_kernels_cuda.so"
_MANYLINUX_GLIBC = (2, 28)


class NativeLibraryHook(BuildHookInterface[Any]):
    """Adds one library per instruction set; without a compiler the wheel is pure Python, and torch serves."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build before hatchling collects the files; `version` is "editable" for `pip install -e`."""
        cuda = Path(self.root, "src", _CUDA_LIBRARY)
        compiled = [cuda] if cuda.is_file() and version != "editable" else []
        for library in compiled:
            build_data["force_include"][str(library)] = _CUDA_LIBRARY
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform_tag(compiled)}"
        build = _load_build(Path(self.root, "src", _PACKAGE, "build.py"))
        compiler = build.find_compiler()
        if compiler is None or not build.has_sources():
            self.app.display_warning(
                "octavo-kernels: no C++ compiler was found (CXX, c++, g++, clang++), so this build has no native CPU "
                "library and batched torch serves; install g++ and build again for full speed"
            )
            return
        isas = build.instruction_sets()
        if version == "editable":
            build.build(build.LIB, isas, compiler, report=self.app.display_info)
            return
        self._scratch = tempfile.TemporaryDirectory()
        libraries = build.build(Path(self._scratch.name), isas, compiler, report=self.app.display_info)
        for library in libraries:
            build_data["force_include"][str(library)] = f"{_PACKAGE}/lib/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag([*libraries, *compiled])}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002 hatch's
        """Remove what the wheel has taken in."""
        if hasattr(self, "_scratch"):
            self._scratch.cleanup()


def _load_build(path: Path) -> ModuleType:
    """Load build.py alone: the package itself needs torch, which is not there while a wheel is built."""
    spec = importlib.util.spec_from_file_location("octavo_kernels_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _platform_tag(libraries: list[Path]) -> str:
    """Return manylinux_2_28 where the symbols allow it, else the platform's plain tag."""
    plain = sysconfig.get_platform().replace("universal2", platform.machine())
    versions = [found for library in libraries for found in _glibc_versions(library)]
    if plain == "linux-x86_64" and versions and max(versions) <= _MANYLINUX_GLIBC:
        return "manylinux_2_28_x86_64"
    return re.sub(r"[-.]", "_", plain)


def _glibc_versions(library: Path) -> list[tuple[int, int]]:
    """Return the versions of glibc symbols that a library asks for: their names lie in its string table."""
    found = re.findall(rb"\0GLIBC_(\d+)\.(\d+)(?:\.\d+)?(?=\0)", library.read_bytes())
    return [(int(major), int(minor)) for major, minor in found]
