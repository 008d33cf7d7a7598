"""The loader's choice of a library, on stand-ins that claim any machine: best, asked for, missing, wrong."""

import shutil
import sys
import threading
import warnings
from pathlib import Path

import pytest

import octavo_kernels as ok
from octavo_kernels import Backend, _dispatch
from octavo_kernels.cpu import build, load

CSRC = Path(__file__).resolve().parents[1] / "src/octavo_kernels/cpu/csrc"
COMPILER = build.find_compiler()
x86 = pytest.mark.skipif(len(build.instruction_sets()) == 1, reason="one instruction set on this platform")
SOURCE = """
#define API extern "C" __attribute__((visibility("default")))
API int octavo_abi_version() { return %d; }
API int octavo_cpu_isa() { return %d; }
"""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(load, "_loaded", load._Loaded())
    monkeypatch.setattr(_dispatch, "_log", _dispatch._FallbackLog())
    monkeypatch.delenv("OCTAVO_CPU_ISA", raising=False)
    monkeypatch.delenv("OCTAVO_CPU_TILES", raising=False)
    monkeypatch.delenv("OCTAVO_KERNELS_CXXFLAGS", raising=False)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put stand-ins into the folder that the loader looks into; the baseline says what the machine runs."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def put(*isas: str, level: int = 0, abi: int = load.ABI_VERSION) -> Path:
        csrc, folder = tmp_path / "csrc", tmp_path / "lib"
        csrc.mkdir()
        (csrc / "standin.cpp").write_text(SOURCE % (abi, level))
        shutil.copy(CSRC / "exports.map", csrc)
        build.build(folder, ["baseline"], COMPILER, csrc=csrc, report=lambda _: None)
        for isa in isas:  # the code is the baseline's, so that it runs here whatever it is called
            shutil.copy(folder / build.library_name("baseline"), folder / build.library_name(isa))
        monkeypatch.setenv("OCTAVO_CPU_LIBRARY_DIR", str(folder))
        return folder

    return put


@x86
@pytest.mark.parametrize(("level", "best"), list(enumerate(build.ISA_FLAGS)), ids=list(build.ISA_FLAGS))
def test_the_best_that_the_machine_runs_is_loaded(install, level, best):
    folder = install("avx2", "avx512", "avx512vnni", level=level)
    assert load.supported() == tuple(build.ISA_FLAGS)[: level + 1]
    assert ok.cpu_isa() == best
    assert load.library().path == folder / f"liboctavo_cpu_{best}.so"


def test_what_is_not_installed_is_not_chosen(install):
    install(level=3)
    assert ok.cpu_isa() == "baseline"


@x86
def test_the_variable_chooses_a_lesser_one(install, monkeypatch):
    install("avx2", level=3)
    monkeypatch.setenv("OCTAVO_CPU_ISA", "avx2")
    assert ok.cpu_isa() == "avx2"


@x86
def test_what_the_machine_cannot_run_is_refused(install, monkeypatch):
    install("avx2", "avx512", level=1)
    monkeypatch.setenv("OCTAVO_CPU_ISA", "avx512")
    expected = "OCTAVO_CPU_ISA=avx512: this machine runs avx2 at most; set OCTAVO_CPU_ISA=avx2, or unset it"
    with pytest.raises(ok.BackendUnavailable, match=expected):
        ok.cpu_isa()


def test_an_unknown_name_is_refused_with_the_known_ones(monkeypatch):
    monkeypatch.setenv("OCTAVO_CPU_ISA", "sse")
    expected = "OCTAVO_CPU_ISA is 'sse', expected one of baseline, avx2, avx512, avx512vnni, none"
    with pytest.raises(ok.OptionError, match=expected):
        load.library()


@x86
def test_tiles_are_used_unless_they_are_not_wanted(install, monkeypatch):
    folder = install("avx512vnni", level=3)
    source = folder.parent / "csrc/standin.cpp"
    source.write_text(source.read_text() + "API int octavo_use_tiles(int wanted) { return wanted; }\n")
    build.build(folder, ["baseline"], COMPILER, csrc=source.parent, report=lambda _: None)
    shutil.copy(folder / build.library_name("baseline"), folder / build.library_name("avx512vnni"))
    assert load.library().tiles
    assert ok.cpu_isa() == "avx512vnni"  # the same bits
    monkeypatch.setenv("OCTAVO_CPU_TILES", "0")
    assert not load.open_library("avx512vnni").tiles
    monkeypatch.setenv("OCTAVO_CPU_TILES", "yes")
    with pytest.raises(ok.OptionError, match="OCTAVO_CPU_TILES is 'yes', expected 0 or 1"):
        load.open_library("avx512vnni")


def test_none_is_torch_without_a_warning_or_a_count(monkeypatch):
    monkeypatch.setenv("OCTAVO_CPU_ISA", "none")
    assert load.library_for("rms_norm") is None
    assert ok.cpu_isa() == "none"
    assert ok.fallbacks() == {}


def test_a_missing_library_is_said_once_and_counted_per_call(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTAVO_CPU_LIBRARY_DIR", str(tmp_path))
    with pytest.warns(ok.BackendFallbackWarning, match="torch serves the cpu backend: OCTAVO_CPU_LIBRARY_DIR=") as said:
        assert load.library_for("rms_norm") is None
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load.library_for("rms_norm") is None
        assert ok.cpu_isa() == "none"
    (entry,) = ok.fallbacks().values()
    assert (entry.wanted, entry.used, entry.num_calls) == (Backend.CPU, "torch", 2)
    assert "has no such file" in entry.reason


def test_one_asked_for_and_missing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTAVO_CPU_LIBRARY_DIR", str(tmp_path))
    monkeypatch.setenv("OCTAVO_CPU_ISA", "baseline")
    with pytest.raises(ok.BackendUnavailable, match="the native library for baseline is missing"):
        ok.cpu_isa()


def test_another_interface_version_is_refused(install):
    install(abi=load.ABI_VERSION + 1)
    expected = f"has interface version {load.ABI_VERSION + 1}, expected {load.ABI_VERSION}; reinstall octavo-kernels"
    with pytest.raises(ok.BackendUnavailable, match=expected):
        load.library()


def test_a_file_that_is_no_library_is_refused_with_its_path(tmp_path, monkeypatch):
    (tmp_path / "liboctavo_cpu_baseline.so").write_text("no library")
    monkeypatch.setenv("OCTAVO_CPU_LIBRARY_DIR", str(tmp_path))
    with pytest.raises(ok.BackendUnavailable, match=r"liboctavo_cpu_baseline\.so cannot be loaded"):
        load.library()


def test_threads_share_one_library(install):
    install(level=0)
    found = []
    threads = [threading.Thread(target=lambda: found.append(load.library())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert {id(library) for library in found} == {id(load.library())}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A source checkout: sources beside the loader, no library yet."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "standin.cpp").write_text(SOURCE % (load.ABI_VERSION, 0))
    shutil.copy(CSRC / "exports.map", csrc)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OCTAVO_CPU_LIBRARY_DIR", raising=False)
    monkeypatch.setattr(build, "CSRC", csrc)
    monkeypatch.setattr(build, "LIB", tmp_path / "lib")
    return csrc


def test_a_checkout_builds_on_first_use_and_says_so(checkout, caplog):
    assert ok.cpu_isa() == "baseline"
    assert caplog.messages == ["octavo-kernels: compiling 1 of 1 objects for baseline"]


def test_a_checkout_builds_again_when_its_sources_change(checkout):
    build.build(build.LIB, ["baseline"], COMPILER, report=lambda _: None)
    (checkout / "standin.cpp").write_text(SOURCE % (load.ABI_VERSION + 1, 0))
    with pytest.raises(ok.BackendUnavailable, match="interface version"):
        load.library()


def test_a_checkout_that_does_not_compile_says_what_the_compiler_said(checkout):
    (checkout / "wrong.cpp").write_text("int f() { return nothing; }\n")
    with pytest.raises(ok.BackendUnavailable, match=r"(?s)did not compile; set OCTAVO_CPU_ISA=none.*nothing"):
        load.library()


def test_a_checkout_without_a_compiler_runs_on_torch_and_says_so(checkout, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.warns(ok.BackendFallbackWarning, match="there is no C\\+\\+ compiler; install g\\+\\+"):
        assert load.library() is None


@pytest.mark.skipif(sys.platform != "linux", reason="the machine's own library is built on Linux in CI")
def test_this_machine_has_a_library_of_the_right_version(monkeypatch):
    monkeypatch.delenv("OCTAVO_CPU_LIBRARY_DIR", raising=False)
    if COMPILER is None and not build.LIB.exists():
        pytest.skip("no C++ compiler")
    assert load.library().handle.octavo_abi_version() == load.ABI_VERSION
