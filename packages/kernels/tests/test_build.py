"""The build of the native library, on small sources: flags, cache, staleness, errors, and what a library shows."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from octavo_kernels.cpu import build

CSRC = Path(__file__).resolve().parents[1] / "src/octavo_kernels/cpu/csrc"
COMPILER = build.find_compiler()
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

WHICH = """
#include "api.h"
API int octavo_which() {
#if defined(OCTAVO_ISA_AVX512VNNI) && defined(__AVX512VNNI__) && defined(__AVX512DQ__)
  return 3;
#elif defined(OCTAVO_ISA_AVX512) && defined(__AVX512BW__) && !defined(__AVX512VNNI__)
  return 2;
#elif defined(OCTAVO_ISA_AVX2) && defined(__FMA__) && defined(__F16C__) && !defined(__AVX512F__)
  return 1;
#elif defined(OCTAVO_ISA_BASELINE) && !defined(__AVX__)
  return 0;
#endif
}
API int octavo_extra() {
#ifdef EXTRA
  return EXTRA;
#else
  return 0;
#endif
}
"""
API = '#define API extern "C" __attribute__((visibility("default")))\n'


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OCTAVO_KERNELS_CXXFLAGS", raising=False)
    monkeypatch.delenv("OCTAVO_KERNELS_STRICT", raising=False)


@pytest.fixture
def csrc(tmp_path):
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "which.cpp").write_text(WHICH)
    (folder / "api.h").write_text(API)
    shutil.copy(CSRC / "exports.map", folder)
    return folder


def make(csrc: Path, folder: Path, *isas: str) -> tuple[list[Path], list[str]]:
    """Build, and return the libraries and what was reported."""
    said: list[str] = []
    return build.build(folder, isas or ("baseline",), COMPILER, csrc=csrc, report=said.append), said


def test_each_instruction_set_gets_its_flags_and_its_name(csrc, tmp_path):
    isas = build.instruction_sets()
    libraries, _ = make(csrc, tmp_path / "lib", *isas)
    assert [path.name for path in libraries] == [f"liboctavo_cpu_{isa}.so" for isa in isas]
    assert [ctypes.CDLL(str(path)).octavo_which() for path in libraries] == list(range(len(isas)))


def test_a_second_checkout_takes_all_from_the_cache(csrc, tmp_path):
    _, said = make(csrc, tmp_path / "one")
    assert said == ["octavo-kernels: compiling 1 of 1 objects for baseline"]
    copy = shutil.copytree(csrc, tmp_path / "another" / "csrc")
    (library,), said = make(copy, tmp_path / "two")
    assert said == []
    assert library.read_bytes() == (tmp_path / "one" / library.name).read_bytes()


@pytest.mark.parametrize("name", ["api.h", "which.cpp", "exports.map"])
def test_a_changed_source_makes_the_library_stale(csrc, tmp_path, name):
    (library,), _ = make(csrc, tmp_path / "lib")
    assert build.is_current(library, csrc)
    with (csrc / name).open("a") as file:
        file.write("\n")
    assert not build.is_current(library, csrc)
    _, said = make(csrc, tmp_path / "lib")
    assert len(said) == 1
    assert build.is_current(library, csrc)


@pytest.mark.skipif(len(build.instruction_sets()) == 1, reason="the platform has one instruction set")
@pytest.mark.parametrize(
    ("text", "num_objects"),
    [("", 1), ("#if defined(__AVX512VNNI__)\n#endif\n", 2), ('#include "deep.h"\n', 2), ('#include "api.h"\n', 1)],
    ids=["same for both", "own code", "own code behind two headers", "headers without it"],
)
def test_a_source_without_code_for_vnni_is_compiled_once_for_both(csrc, tmp_path, text, num_objects):
    (csrc / "deep.h").write_text('#include "deeper.h"\n')
    (csrc / "deeper.h").write_text("#if defined(__AVX512VNNI__)\n#endif\n")
    (csrc / "which.cpp").write_text(
        f'{text}extern "C" __attribute__((visibility("default"))) int octavo_it() {{ return 1; }}\n'
    )
    libraries, said = make(csrc, tmp_path / "lib", "avx512", "avx512vnni")
    assert said == [f"octavo-kernels: compiling {num_objects} of {num_objects} objects for avx512, avx512vnni"]
    assert len(libraries) == 2
    lesser, _ = make(csrc, tmp_path / "other", "avx2", "avx512")
    assert all(ctypes.CDLL(str(path)).octavo_it() == 1 for path in [*libraries, *lesser])


def test_extra_flags_are_used_and_make_another_library(csrc, tmp_path, monkeypatch):
    (library,), _ = make(csrc, tmp_path / "plain")
    assert ctypes.CDLL(str(library)).octavo_extra() == 0
    monkeypatch.setenv("OCTAVO_KERNELS_CXXFLAGS", "-DEXTRA=42")
    assert not build.is_current(library, csrc)
    (library,), _ = make(csrc, tmp_path / "extra")
    assert ctypes.CDLL(str(library)).octavo_extra() == 42


def test_a_warning_is_an_error_only_when_strict(csrc, tmp_path, monkeypatch, capfd):
    (csrc / "loose.cpp").write_text("static int unused() { return 1; }\n")
    make(csrc, tmp_path / "lib")
    assert "unused" in capfd.readouterr().err
    monkeypatch.setenv("OCTAVO_KERNELS_STRICT", "1")
    with pytest.raises(build.BuildError, match=r"(?s)-Werror.*loose\.cpp.*unused"):
        make(csrc, tmp_path / "lib")


def test_an_error_names_the_command_and_leaves_no_library(csrc, tmp_path):
    (csrc / "wrong.cpp").write_text("int f() { return nothing; }\n")
    with pytest.raises(build.BuildError, match=r"(?s)-c wrong\.cpp.*exited with 1.*nothing"):
        make(csrc, tmp_path / "lib")
    assert list((tmp_path / "lib").iterdir()) == []


def test_only_our_names_are_exported(csrc, tmp_path):
    (csrc / "more.cpp").write_text(API + "API int leaked() { return 1; }\nAPI int octavo_ours() { return leaked(); }\n")
    (library,), _ = make(csrc, tmp_path / "lib")
    handle = ctypes.CDLL(str(library))
    assert handle.octavo_ours() == 1
    assert not hasattr(handle, "leaked")


def test_a_compiler_that_is_not_there_is_none(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++ -m64")
    assert build.find_compiler() is None


def test_the_file_needs_neither_torch_nor_the_package():
    code = (
        "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['build.py', '--help']\n"
        f"runpy.run_path({build.__file__!r}, run_name='__main__')\n"
    )
    run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert "--isa" in run.stdout


def test_statics_are_constructed_once_and_containers_work_without_the_cpp_runtime(csrc, tmp_path):
    shutil.copy(CSRC / "runtime.cpp", csrc)
    (csrc / "use.cpp").write_text(
        """
        #include <pthread.h>
        #include <atomic>
        #include <vector>
        #include "api.h"
        static std::atomic<int> constructed{0}, waiting{0};
        struct Slow {
          // Until all threads have arrived, or nearly: they then wait for this constructor.
          Slow() { while (waiting.load() < 8) {} for (volatile int i = 0; i < 1000000; i = i + 1) {} ++constructed; }
          int value = 5;
        };
        static void* use(void* sum) {
          ++waiting;
          static Slow slow;
          *static_cast<std::atomic<int>*>(sum) += slow.value;
          return nullptr;
        }
        API int octavo_once() {
          std::atomic<int> sum{0};
          std::vector<pthread_t> threads(8);
          for (auto& thread : threads) pthread_create(&thread, nullptr, use, &sum);
          for (auto& thread : threads) pthread_join(thread, nullptr);
          return sum.load() * 100 + constructed.load();
        }
        """
    )
    (library,), _ = make(csrc, tmp_path / "lib")
    assert ctypes.CDLL(str(library)).octavo_once() == 40 * 100 + 1


def test_a_container_that_would_throw_ends_the_process_with_a_message(csrc, tmp_path):
    shutil.copy(CSRC / "runtime.cpp", csrc)
    (csrc / "far.cpp").write_text(
        '#include <vector>\n#include "api.h"\nAPI int octavo_far(int i) { return std::vector<int>(3).at(i); }\n'
    )
    (library,), _ = make(csrc, tmp_path / "lib")
    code = f"import ctypes; ctypes.CDLL({str(library)!r}).octavo_far(9)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == -6  # SIGABRT
    assert run.stderr.startswith("octavo_kernels: vector::_M_range_check")
