"""The build of the CUDA library: a fat binary for compute capabilities 8.0 and 9.0a, bound by torch's stable ABI.

    python packages/kernels/csrc_cuda/build.py              # into src/octavo_kernels/cuda/lib
    python packages/kernels/csrc_cuda/build.py FOLDER

Needs nvcc of CUDA 12.4 or newer, a C++ compiler, and torch 2.11 or newer of any kind: a build for CPUs serves. What it
makes is loaded by every torch from 2.11 on; a wheel takes it in where it lies.

Variables: NVCC (the compiler), OCTAVO_KERNELS_STRICT=1 (a warning is an error).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIB = HERE.parent / "src" / "octavo_kernels" / "cuda" / "lib"
NAME = "octavo_kernels_cuda.so"
KERNELS = ("copy_blocks", "attention")

# Machine code for both, and PTX of the lesser one for GPUs that come after.
_GENCODE = (
    "arch=compute_80,code=[sm_80,compute_80]",
    "arch=compute_90a,code=sm_90a",
)
_TORCH_TARGET = 0x020B000000000000  # 2.11: nothing newer of the ABI is used
_CXX = ("-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")


class BuildError(Exception):
    """A compiler is missing or failed; the message holds what it said."""


def find_nvcc() -> str | None:
    """Return the CUDA compiler: NVCC, or the one on PATH; None where there is none."""
    return shutil.which(os.environ.get("NVCC", "nvcc"))


def build(folder: Path) -> tuple[Path, str]:
    """Compile and link; return the library, and what `compile_kernels` does.

    Raises:
        BuildError: something is missing, or a compiler failed; says what it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kernels, ops, library = [folder / f"{name}.o" for name in KERNELS], folder / "ops.o", folder / NAME
    report = "".join(compile_kernels(target) for target in kernels)
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        raise BuildError("no C++ compiler was found (CXX, c++, g++); install g++")
    compile_binding(compiler, ops)
    # By name alone: whichever torch the process has loaded is the one that it finds.
    linked = ("-cudart", "static", f"-L{torch_folder() / 'lib'}", "-ltorch_cpu")
    _run([_nvcc(), "-shared", *map(str, kernels), str(ops), "-o", str(library), *_gencode(), *linked])
    for made in (*kernels, ops):
        made.unlink()
    return library, report


def compile_binding(compiler: str, target: Path, *flags: str) -> None:
    """Compile what binds the kernels to torch, to an object file.

    Raises:
        BuildError: as `build`.
    """
    flags = (*_CXX, *(("-Werror",) if _is_strict() else ()), f"-DTORCH_TARGET_VERSION={_TORCH_TARGET:#018x}", *flags)
    headers = ("-isystem", str(torch_folder() / "include"))
    _run([compiler, "-c", str(HERE / "ops.cpp"), "-o", str(target), *flags, *headers])


def compile_kernels(target: Path, sources: Path = HERE) -> str:
    """Compile the kernels of target's name to an object file; return what the assembler says of each one's resources.

    Raises:
        BuildError: as `build`.
    """
    source = ("-c", str(sources / f"{target.stem}.cu"), "-o", str(target))
    strict = ("-Werror", "all-warnings") if _is_strict() else ()
    flags = ("-std=c++17", "-O3", "--resource-usage", "-Xcompiler", "-fPIC,-fvisibility=hidden", *strict)
    return _run([_nvcc(), *source, *flags, *_gencode()])


def _nvcc() -> str:
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("no nvcc was found (NVCC, PATH); install the CUDA toolkit 12.4 or newer")
    return nvcc


def _gencode() -> list[str]:
    return [argument for each in _GENCODE for argument in ("-gencode", each)]


def _is_strict() -> bool:
    return os.environ.get("OCTAVO_KERNELS_STRICT") == "1"


def torch_folder() -> Path:
    """Return where torch is, with its headers and libraries; it is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed here, whose headers are needed; install torch 2.11 or newer")
    return Path(spec.origin).parent


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


if __name__ == "__main__":
    try:
        made, _ = build(Path(sys.argv[1]) if len(sys.argv) > 1 else LIB)
    except BuildError as error:
        raise SystemExit(str(error)) from None
    print(made)
