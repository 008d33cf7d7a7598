"""The kernels in CUDA C++ compiled where there is nvcc: gates on what they take, and the library as torch loads it."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from octavo_kernels import Backend

SOURCES = Path(__file__).resolve().parents[1] / "csrc_cuda"


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
