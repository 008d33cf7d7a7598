"""The kernels in CUDA C++: on the host as far as that goes, compiled where there is nvcc, and when they are chosen.

On a GPU with a build of the library `test_cache_ops.py` runs them by OCTAVO_BACKEND=cuda, against the reference.
"""

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels import Backend, _dispatch
from octavo_kernels.cuda import cache_ops, load

SOURCES = Path(__file__).resolve().parents[1] / "csrc_cuda"
ON_HOST = Path(__file__).parent / "cuda_on_host" / "copy_blocks.cpp"
GPU = torch.device("cuda")


def load_build():
    spec = importlib.util.spec_from_file_location("octavo_kernels_cuda_build", SOURCES / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def where_kernels_are_compiled(backend):
    """Skip everything where `test_compile.py` compiles nothing either: compilers take their time."""
    if backend not in (Backend.TRITON, Backend.CUDA):
        pytest.skip("compiled in the triton run only")


# -- the kernel on the host ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """The kernel's own code, compiled by the host's compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on PATH to compile the kernel for the host")
    library = tmp_path_factory.mktemp("on_host") / "copy_blocks.so"
    flags = ("-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
    sanitizer = ("-fsanitize=undefined", "-fno-sanitize-recover=undefined", "-static-libubsan")  # misaligned vectors
    subprocess.run([compiler, *flags, *sanitizer, f"-I{SOURCES}", str(ON_HOST), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).copy_blocks_on_host
    function.restype = ctypes.c_int64
    return function


@pytest.fixture
def copy_on_host(on_host, monkeypatch):
    """`cuda.cache_ops.copy_blocks` as it is, with the kernel on the host behind it; see `copy_blocks.cpp`."""

    def op(parts, src, dst, aside, stream):
        assert stream == 5
        assert all(part.dim() == 2 and part.stride(1) == 1 for part in parts)
        assert src.is_contiguous()
        assert dst.is_contiguous()
        longs = ctypes.c_int64 * len(parts)
        taken = on_host(
            (ctypes.c_void_p * len(parts))(*(part.data_ptr() for part in parts)),
            longs(*(part.stride(0) * part.element_size() for part in parts)),
            longs(*(part.shape[1] * part.element_size() for part in parts)),
            len(parts),
            ctypes.c_void_p(aside.data_ptr()),
            ctypes.c_int64(aside.numel()),
            ctypes.c_void_p(src.data_ptr()),
            ctypes.c_void_p(dst.data_ptr()),
            ctypes.c_int64(len(src)),
            copy.most_in_grid,
            len(src),
        )
        assert taken == aside.numel()

    def copy(caches, src, dst, most_in_grid):
        copy.most_in_grid = most_in_grid
        cache_ops.copy_blocks(caches, src, dst)

    monkeypatch.setattr(cache_ops, "ops", lambda: SimpleNamespace(copy_blocks=op))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=5))
    return copy


def make(shape, dtype=torch.float32, **options):
    values = torch.randint(0, 127, shape, **options)
    return values.to(dtype)


def cases():
    torch.manual_seed(0)
    pair = make((6, 2, 4, 3, 16))
    wide = make((6, 40), torch.uint8)
    yield "two layers", [make((6, 2, 3, 16)), make((6, 2, 3, 16))]
    yield "views of one allocation", [pair[:, 0], pair[:, 1]]
    yield "heads inside tokens", [make((6, 4, 3, 16), torch.bfloat16).transpose(1, 2)]
    yield "scales beside codes", [make((6, 3, 8, 16), torch.int8), make((6, 3, 8))]
    yield "rows of 8, 4, 2 and 1 bytes", [wide[:, 8:16], wide[:, 4:8], wide[:, 2:4], wide[:, 17:24]]
    yield "more parts than a table has", [make((6, 5), torch.int16) for _ in range(150)]
    yield "rows of several spans", [make((6, 50_000), torch.int16), make((6, 7))]
    yield "gaps inside a block", [make((6, 4, 9))[:, :, 1:6]]


CASES = dict(cases())
COPIES = {
    "one": ([0], [2]),
    "swap": ([0, 1], [1, 0]),
    "chain": ([0, 1, 2], [1, 2, 3]),
    "one to two": ([5, 5], [0, 1]),
    "onto itself": ([3], [3]),
    "all turned around": ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("copies", COPIES)
def test_the_kernel_copies_what_the_reference_copies(copy_on_host, name, copies, monkeypatch):
    monkeypatch.setenv("OCTAVO_BACKEND", "reference")
    ids = torch.tensor(COPIES[copies]).T.contiguous().T  # rows with gaps
    for most_in_grid in (1 << 30, 2):
        found, expected = (views_of_copies(CASES[name]) for _ in range(2))
        copy_on_host(found, *ids, most_in_grid)
        ok.copy_blocks(expected, *ids)
        assert all(torch.equal(one, other) for one, other in zip(whole(found), whole(expected), strict=True))


def views_of_copies(caches):
    """Copy the memory that caches are in or views of, and return the same views of the copies."""
    bases = {id(base): base.clone(memory_format=torch.preserve_format) for base in whole(caches)}
    return [
        bases[id(base)].as_strided(cache.shape, cache.stride(), cache.storage_offset())
        for cache, base in zip(caches, whole(caches), strict=True)
    ]


def whole(caches):
    """Return all memory that caches are in, so that a write beside them shows."""
    return [cache if cache._base is None else cache._base for cache in caches]


# -- compiled --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def build():
    module = load_build()
    if module.find_nvcc() is None:
        pytest.skip("no nvcc on PATH (or by NVCC) to compile csrc_cuda with")
    return module


@pytest.fixture(scope="module")
def built(build, tmp_path_factory):
    return build.build(tmp_path_factory.mktemp("cuda"))


def resources(report):
    """Return (kernel, target, registers, bytes of stack, bytes spilled) of every kernel in an assembler's report."""
    found = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    return [
        (name, target, int(regs), int(stack), int(stores) + int(loads))
        for name, target, stack, stores, loads, regs in found
    ]


def check(report, num_kernels):
    """Assert what every kernel must hold."""
    kernels = resources(report)
    assert sorted({target for _, target, *_ in kernels}) == ["sm_80", "sm_90a"]
    assert len(kernels) == 2 * num_kernels
    for name, target, registers, stack, spilled in kernels:
        assert (stack, spilled) == (0, 0), f"{name} on {target} spills: {stack} bytes of stack, {spilled} spilled"
        most = 64 if "copy_rows" in name else 240
        assert registers <= most, f"{name} on {target} takes {registers} registers"


def machine_code(path):
    """Return (function, its instructions) of every kernel in a file, for each target."""
    tools = Path(pytest.importorskip("triton").__file__).parent / "backends" / "nvidia" / "bin"
    if not (tools / "cuobjdump").is_file():
        pytest.skip(f"no cuobjdump in {tools}")
    command, environment = [str(tools / "cuobjdump"), "-sass", str(path)], {"PATH": f"{tools}:/usr/bin:/bin"}
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return [tuple(part.split(None, 1)) for part in found.split("Function : ")[1:]]


def check_attention(path, num_kernels):
    """Assert how attention reads its keys, 16 bytes at a time and aside, and that halves are multiplied as matrices."""
    kernels = [(name, code) for name, code in machine_code(path) if "split_keys" in name]
    assert len(kernels) == 2 * num_kernels
    for name, code in kernels:
        assert "LDGSTS.E.BYPASS" in code, f"{name} copies nothing aside"
        assert re.search(r"LDGSTS\S*\.128", code), f"{name} copies less than 16 bytes at a time"
        assert ("HMMA.16816" in code) == ("IffL" not in name), f"{name} multiplies otherwise"


def test_kernels_compile_for_both_targets_and_spill_nothing(built):
    library, report = built
    check(report, 2 + 9)
    check_attention(library, 9)
    assert library.stat().st_size < 4 << 20


def test_a_broken_kernel_fails_the_gate(build, tmp_path):
    shutil.copytree(SOURCES, tmp_path / "sources")
    kernel = tmp_path / "sources" / "copy_blocks.cuh"
    kernel.write_text(
        kernel.read_text().replace(
            "const Part& part = parts.part",
            "Parts own = parts; own.part[threadIdx.x % 64].width += num_copies; const Part part = own.part",
        )
    )
    with pytest.raises(AssertionError, match="spills"):
        check(build.compile_kernels(tmp_path / "copy_blocks.o", tmp_path / "sources"), 2)


@pytest.fixture
def compile_one(build, tmp_path):
    """Compile one kernel of attention, with changed words in its sources; return the object and the report."""

    def compile_changed(*changes):
        sources = tmp_path / "sources"
        shutil.copytree(SOURCES, sources)
        for name, old, new in changes:
            text = (sources / name).read_text()
            assert old in text
            (sources / name).write_text(text.replace(old, new))
        (sources / "attention.cu").write_text(
            '#include "attention.cuh"\n'
            "using namespace octavo_cuda;\n"
            "template __global__ void octavo_cuda::split_keys_kernel<Bf16, Bf16, 128>"
            "(const __grid_constant__ SplitCall, bool);\n"
        )
        return tmp_path / "attention.o", build.compile_kernels(tmp_path / "attention.o", sources)

    return compile_changed


def test_broken_attention_fails_the_gates(compile_one):
    """Registers for six thread blocks at once, and copies that a thread waits for."""
    waits = '    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"'
    path, report = compile_one(
        ("attention.h", "kBlocksPerProcessor = 2", "kBlocksPerProcessor = 8"),
        (
            "device.cuh",
            waits,
            "    *static_cast<uint4*>(to) = present ? *static_cast<const uint4*>(from) : uint4{};\n    return;\n"
            + waits,
        ),
    )
    with pytest.raises(AssertionError, match="spills"):
        check(report, 1)
    with pytest.raises(AssertionError, match="copies nothing aside"):
        check_attention(path, 1)


def test_more_shared_memory_than_there_is_does_not_compile(build, compile_one):
    with pytest.raises(build.BuildError, match="takes more shared memory than a thread block has on sm_80"):
        compile_one(("attention.h", "kTileBytes <= 4096 ? 4 : 2", "8"))


def test_a_compiler_that_fails_or_is_missing_says_so(monkeypatch, tmp_path):
    build = load_build()
    monkeypatch.setenv("NVCC", "false")
    with pytest.raises(build.BuildError, match=r"false -c .*copy_blocks\.cu"):
        build.build(tmp_path)
    monkeypatch.setenv("NVCC", "no-such-compiler")
    with pytest.raises(build.BuildError, match=r"no nvcc was found \(NVCC, PATH\); install the CUDA toolkit"):
        build.build(tmp_path)


def test_torch_loads_the_library_without_its_cuda_part(built):
    """In a process of its own, since an op can be registered once alone."""
    program = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from octavo_kernels.cuda import load\n"
        "assert load.load(Path(sys.argv[1])) is None\n"
        "print(load.ops().copy_blocks.default._schema)\n"
        "try:\n"
        "    load.ops().copy_blocks([torch.zeros(2, 2)], *torch.zeros(2, 1, dtype=torch.int64), torch.zeros(16), 0)\n"
        "except NotImplementedError as error:\n"
        "    assert 'CPU' in str(error)\n"
        "    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(built[0])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    schema, refused = done.stdout.splitlines()
    assert schema.startswith("octavo_cuda::copy_blocks(Tensor(a!)[] caches, Tensor src, Tensor dst, Tensor(b!) aside")
    assert refused == "refused"


def test_the_library_needs_nothing_of_torch_but_its_stable_abi(built):
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm on PATH")
    listed = subprocess.run([nm, "-D", "--undefined-only", str(built[0])], capture_output=True, text=True, check=True)
    names = [line.split()[-1].split("@")[0] for line in listed.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    unstable = ("N2at", "N3c10", "N5torch", "NK2at", "NK3c10", "NK5torch")
    assert not [name for name in names if any(part in name for part in unstable) or name.startswith("cuda")], names


# -- chosen ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A library that is there, on a machine with a GPU; return a function that says what loading it comes to."""
    path = tmp_path / load.NAME
    path.write_bytes(b"")
    outcome: list[str | None] = [None]
    monkeypatch.setenv("OCTAVO_CUDA_LIBRARY", str(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(load, "_why_not_loaded", lambda _: outcome[0])
    monkeypatch.setattr(_dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(_dispatch, "_log", _dispatch._FallbackLog())
    monkeypatch.delenv("OCTAVO_BACKEND", raising=False)
    return lambda reason: outcome.__setitem__(0, reason)


def test_what_is_compiled_is_taken_before_triton_and_the_rest_is_tritons(installed):
    assert ok.choose("copy_blocks", GPU) is Backend.CUDA
    assert ok.choose("paged_attention", GPU) is Backend.TRITON
    assert ok.choose("write_kv", GPU) is Backend.TRITON
    assert ok.choose("copy_blocks", "cpu") is Backend.CPU
    assert _dispatch.implementation("copy_blocks", GPU) is cache_ops.copy_blocks
    assert Backend.CUDA in ok.available_backends()


def test_attention_is_compiled_where_it_is_asked_for(installed, monkeypatch):
    monkeypatch.setattr(_dispatch, "_load", lambda used, *_: used)
    for name, value in (("OCTAVO_CUDA_OPS", "copy_blocks, paged_attention"), ("OCTAVO_BACKEND", "cuda")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert ok.choose("paged_attention", GPU) is Backend.CUDA
    monkeypatch.setenv("OCTAVO_CUDA_OPS", "paged_attention")
    assert ok.choose("copy_blocks", GPU) is Backend.CUDA
    assert ok.choose("write_kv", GPU) is Backend.TRITON
    assert ok.choose("paged_attention", "cpu") is Backend.CPU
    installed("it cannot be loaded")
    expected = r"paged_attention: the cuda backend does not serve it here, triton does \(it cannot be loaded\)"
    with pytest.warns(ok.BackendFallbackWarning, match=expected):
        assert _dispatch.implementation("paged_attention", GPU) is Backend.TRITON
    monkeypatch.setenv("OCTAVO_CUDA_OPS", "paged_attention,write_kv")
    expected = (
        "OCTAVO_CUDA_OPS is 'paged_attention,write_kv', expected names of copy_blocks, paged_attention, with comm"
    )
    with pytest.raises(ok.OptionError, match=expected):
        ok.choose("paged_attention", GPU)


def test_attention_that_is_asked_for_and_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(load, "library_path", lambda: None)
    monkeypatch.setattr(_dispatch, "_unavailable", lambda backend, *_: "none" if backend is Backend.CUDA else None)
    monkeypatch.setattr(_dispatch, "_log", _dispatch._FallbackLog())
    monkeypatch.setattr(_dispatch, "_load", lambda used, *_: used)
    monkeypatch.setenv("OCTAVO_CUDA_OPS", "paged_attention")
    monkeypatch.delenv("OCTAVO_BACKEND", raising=False)
    with pytest.warns(ok.BackendFallbackWarning, match=r"paged_attention: .* triton does \(none\)"):
        assert _dispatch.implementation("paged_attention", GPU) is Backend.TRITON


def test_a_library_that_cannot_be_loaded_is_said_and_triton_serves(installed, monkeypatch):
    installed("broken.so cannot be loaded")
    monkeypatch.setattr(_dispatch, "_load", lambda used, *_: used)
    assert ok.choose("copy_blocks", GPU) is Backend.TRITON
    expected = r"copy_blocks: the cuda backend does not serve it here, triton does \(broken.so cannot be loaded\)"
    with pytest.warns(ok.BackendFallbackWarning, match=expected):
        assert _dispatch.implementation("copy_blocks", GPU) is Backend.TRITON
    found = ok.Fallback(Backend.CUDA, Backend.TRITON, 1, "broken.so cannot be loaded")
    assert ok.fallbacks() == {"copy_blocks": found}


def test_forced_cuda_leaves_other_ops_to_triton_and_says_so(installed, monkeypatch):
    monkeypatch.setenv("OCTAVO_BACKEND", "cuda")
    monkeypatch.setattr(_dispatch, "_load", lambda used, *_: used)
    assert ok.choose("copy_blocks", GPU) is Backend.CUDA
    assert ok.choose("write_kv", GPU) is Backend.TRITON
    assert ok.choose("pack_weight", GPU) is Backend.CPU
    with pytest.warns(
        ok.BackendFallbackWarning, match="write_kv: the cuda backend does not serve it here, triton does"
    ):
        _dispatch.implementation("write_kv", GPU)
    installed("the library cannot be loaded")
    with pytest.raises(ok.BackendUnavailable, match="OCTAVO_BACKEND=cuda: the library cannot be loaded"):
        ok.choose("copy_blocks", GPU)


def test_without_a_library_triton_serves_without_a_word(monkeypatch):
    monkeypatch.setattr(load, "library_path", lambda: None)
    monkeypatch.setattr(_dispatch, "library_path", lambda: None)
    monkeypatch.setattr(_dispatch, "_unavailable", lambda backend, *_: None)
    monkeypatch.setattr(_dispatch, "_load", lambda used, *_: used)
    monkeypatch.delenv("OCTAVO_BACKEND", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _dispatch.implementation("copy_blocks", GPU) is Backend.TRITON


def test_a_file_that_is_no_library_is_the_reason(tmp_path):
    path = tmp_path / "broken.so"
    path.write_bytes(b"not a library")
    reason = load.load(path)
    assert reason is not None
    assert "broken.so cannot be loaded" in reason
    assert "build it again with csrc_cuda/build.py" in reason
