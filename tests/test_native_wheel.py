"""The kernels' wheel: its native libraries, what they ask of a system, and how it builds and installs."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "packages/kernels"
NATIVE = KERNELS / "src/octavo_kernels/cpu"
ISAS = ("baseline", "avx2", "avx512", "avx512vnni") if platform.machine() == "x86_64" else ("baseline",)
LIBRARIES = [f"octavo_kernels/cpu/lib/liboctavo_cpu_{isa}.so" for isa in ISAS]
CUDA_LIBRARY = "octavo_kernels/cuda/lib/octavo_kernels_cuda.so"
MAX_GLIBC = (2, 28)
BASE_LIBRARIES = {"libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="native wheels are checked on Linux"),
    pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler"),
]


def build(folder: Path, kind: str, project: Path = KERNELS, **variables: str) -> Path:
    """Build a wheel or an sdist by the standard interface of build backends, where torch cannot be imported."""
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import hatchling.build\n"
        f"print(hatchling.build.build_{kind}({str(folder)!r}))\n"
    )
    environment = {**os.environ, **variables}
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder / run.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("native"), "wheel")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel by pip into a folder of its own."""
    folder = tmp_path_factory.mktemp("installed")
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    return folder


def symbols(library: Path) -> list[tuple[str, str]]:
    """Return (name, version) of every symbol that a library asks for; the version is empty where there is none."""
    table = subprocess.run(["readelf", "--dyn-syms", "-W", str(library)], capture_output=True, text=True, check=True)
    names = [line.split()[7] for line in table.stdout.splitlines() if " UND " in line and len(line.split()) > 7]
    return [(name.partition("@")[0], name.partition("@")[2].lstrip("@")) for name in names]


def run_installed(folder: Path, program: str, **variables: str) -> str:
    """Run a program on the installed wheel where PATH has no compiler nor anything else."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OCTAVO_")}
    environment |= {"PYTHONPATH": str(folder), "PATH": str(folder / "bin"), **variables}
    environment.pop("CXX", None)
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.strip()


def test_wheel_has_a_library_per_instruction_set_and_no_sources(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert sorted(name for name in names if "/cpu/lib/" in name) == sorted(LIBRARIES)
    assert not [name for name in names if "/csrc/" in name]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other platforms have their plain tag")
def test_wheel_is_tagged_for_every_linux_since_glibc_2_28(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-manylinux_2_28_x86_64.whl")


@pytest.mark.parametrize("library", LIBRARIES, ids=ISAS)
def test_library_asks_for_nothing_but_an_old_glibc(installed: Path, library: str) -> None:
    path = installed / library
    versions = {version for _, version in symbols(path) if version}
    assert versions, "readelf shows no versioned symbol: the check would pass on anything"
    assert all(re.fullmatch(r"GLIBC_\d+(\.\d+)+", version) for version in versions), versions
    newest = max(tuple(map(int, version.removeprefix("GLIBC_").split(".")[:2])) for version in versions)
    assert newest <= MAX_GLIBC, versions
    shown = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"\(NEEDED\).*\[(.+)\]", shown)) <= BASE_LIBRARIES


@pytest.mark.parametrize("library", LIBRARIES, ids=ISAS)
def test_library_asks_for_nothing_of_torch(installed: Path, library: str) -> None:
    # Mangled names: _ZN2at, _ZN3c10, _ZN5torch and their variants for constants and virtual tables.
    foreign = re.compile(r"_Z\w*?(2at|3c10|5torch)|^(at|c10|torch)::|^(aoti_torch|Py)")
    names = [name for name, _ in symbols(installed / library)]
    assert "malloc" in names or "free" in names
    assert [name for name in names if foreign.match(name)] == []


def test_build_requires_nothing_but_hatchling() -> None:
    project = tomllib.loads((KERNELS / "pyproject.toml").read_text())
    assert [re.split(r"\W", line)[0] for line in project["build-system"]["requires"]] == ["hatchling"]


def test_installed_wheel_runs_native_code_where_there_is_no_compiler(installed: Path) -> None:
    program = (
        "import shutil, octavo_kernels as ok\n"
        f"assert ok.__file__.startswith({str(installed)!r}), ok.__file__\n"
        "assert not [name for name in ('c++', 'g++', 'clang++') if shutil.which(name)]\n"
        "print(ok.cpu_isa())\n"
    )
    assert run_installed(installed, program) in ISAS
    assert run_installed(installed, program, OCTAVO_CPU_ISA="baseline") == "baseline"


def test_without_a_compiler_the_wheel_is_pure_and_torch_serves(tmp_path: Path) -> None:
    pure = build(tmp_path, "wheel", CXX="/nowhere/g++")
    assert pure.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(pure) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path / "site")
    program = (
        "import warnings, torch, octavo_kernels as ok\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    ok.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5)\n"
        "    isa = ok.cpu_isa()\n"
        "print(isa, [str(item.message) for item in said if item.category is ok.BackendFallbackWarning])\n"
    )
    isa, _, said = run_installed(tmp_path / "site", program).partition(" ")
    assert isa == "none"
    assert said.count("torch serves the cpu backend: this installation was built without a C++ compiler") == 1


def test_a_cuda_library_that_was_built_before_is_in_the_wheel(tmp_path: Path) -> None:
    project = tmp_path / "kernels"
    shutil.copytree(KERNELS, project, ignore=shutil.ignore_patterns("tests", "lib", "__pycache__"))
    library = project / "src" / CUDA_LIBRARY
    library.parent.mkdir()
    library.write_bytes(b"\0GLIBC_2.17\0")
    wheel = build(tmp_path, "wheel", project, CXX="/nowhere/g++")
    assert not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.endswith(".so")] == [CUDA_LIBRARY]


def test_sdist_holds_what_the_build_needs(tmp_path: Path) -> None:
    with tarfile.open(build(tmp_path, "sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(KERNELS)) for path in (NATIVE / "csrc").iterdir()}
    assert sources
    cuda = {"build.py", "device.cuh", "ops.cpp", "attention_products.cuh"}
    cuda |= {f"{name}.{kind}" for name in ("attention", "copy_blocks") for kind in ("cu", "cuh", "h")}
    assert {"hatch_build.py", "src/octavo_kernels/cpu/build.py", *sources} <= names
    assert {f"csrc_cuda/{name}" for name in cuda} <= names
    assert not [name for name in names if "/cpu/lib/" in name]
