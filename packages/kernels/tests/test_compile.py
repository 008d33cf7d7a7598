"""The Triton kernels compiled for sm_90 without a GPU: they spill nothing and use Hopper's instructions."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

# Compiled in a process of its own, since triton.jit decides at import whether it interprets.
PROGRAM = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from octavo_kernels.triton.attention import _attend
from octavo_kernels.triton.bitmask import _mask
from octavo_kernels.triton.cache_ops import _write
from octavo_kernels.triton.rope import _rope_write

POINTERS = {
    "query_start_loc": "*i32", "key_lens": "*i32", "block_table": "*i32", "positions": "*i64", "slot_mapping": "*i64",
    "cos_sin": "*fp32", "lse_ptr": "*fp32", "sinks_ptr": "*fp32", "slopes_ptr": "*fp32", "k_scale_ptr": "*fp32",
    "v_scale_ptr": "*fp32", "logits": "*fp32", "bitmask": "*i32", "rows": "*i64",
}
TENSORS = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "k_cache", "v_cache", "q_weight", "k_weight")


def compile_for_hopper(kernel, constants, num_warps):
    signature = {}
    for name in kernel.arg_names:
        kind = "*bf16" if name in TENSORS else "fp32" if name in ("factor", "soft_cap", "eps") else "i32"
        signature[name] = "constexpr" if name in constants else POINTERS.get(name, kind)
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    # A launch finds aligned pointers and strides that are multiples of 16, and specialises on them.
    aligned = [name for name, kind in signature.items() if kind[0] == "*" or "stride" in name]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": 2}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def attention(block_m, num_warps, rich):
    absent = () if rich else ("lse_ptr", "sinks_ptr", "slopes_ptr", "k_scale_ptr", "v_scale_ptr")
    sizes = {"GROUP": 4, "HEAD_DIM": 128, "BLOCK_SIZE": 16, "BLOCK_M": block_m, "BLOCK_Q": block_m // 4, "BLOCK_N": 64}
    flags = {"PAGED": True, "CAUSAL": True, "WINDOWED": rich, "CAPPED": rich, "LATE_SCALE": rich, "WIDE_DOT": False}
    constants = {**dict.fromkeys(absent), **sizes, "BLOCK_D": 128, **flags}
    return compile_for_hopper(_attend, constants, num_warps)


KERNELS = {
    "decode": lambda: attention(16, 4, False),
    "decode with all options": lambda: attention(16, 4, True),
    "prefill": lambda: attention(128, 8, False),
    "prefill with all options": lambda: attention(128, 8, True),
    "rope_kv_write": lambda: compile_for_hopper(
        _rope_write,
        {"HEAD_DIM": 128, "HALF": 64, "BLOCK_SIZE": 16, "BLOCK_D": 128, "BLOCK_HALF": 64, "INTERLEAVED": False}, 1,
    ),
    "write_kv": lambda: compile_for_hopper(_write, {"HEAD_DIM": 128, "BLOCK_SIZE": 16, "BLOCK_D": 128}, 1),
    "apply_token_bitmask": lambda: compile_for_hopper(_mask, {"BLOCK": 4096}, 4),
}
for name, build in KERNELS.items():
    compiled = build()
    path = sys.argv[1] + "/" + name.replace(" ", "_")
    open(path + ".cubin", "wb").write(compiled.asm["cubin"])
    open(path + ".ptx", "w").write(compiled.asm["ptx"])
    print(name, compiled.metadata.shared, sep="|")
"""
NAMES = (
    "decode",
    "decode with all options",
    "prefill",
    "prefill with all options",
    "rope_kv_write",
    "write_kv",
    "apply_token_bitmask",
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, backend):
    """Compile all kernels once: a folder of cubin and ptx, and the shared memory of each in bytes."""
    if backend.value != "triton":
        pytest.skip("compiled in the triton run only")
    folder = tmp_path_factory.mktemp("kernels")
    program = folder / "compile_kernels.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1", "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(program), str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder, dict(line.split("|") for line in done.stdout.splitlines())


@functools.cache
def cuobjdump():
    found = sorted(Path(triton.__file__).parent.rglob("cuobjdump*"))
    return str(found[0]) if found else None


@pytest.mark.parametrize("name", NAMES)
def test_kernel_fits_hopper_and_spills_nothing(compiled, name):
    folder, shared = compiled
    assert int(shared[name]) <= 227 * 1024
    if cuobjdump() is None:
        pytest.skip("this triton ships no cuobjdump")
    cubin = folder / f"{name.replace(' ', '_')}.cubin"
    usage = subprocess.run([cuobjdump(), "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"LOCAL:(\d+)", usage) == ["0"]
    assert int(re.findall(r"STACK:(\d+)", usage)[0]) == 0


@pytest.mark.parametrize(("name", "uses_wgmma"), [("decode", False), ("prefill", True)])
def test_prefill_uses_warpgroup_products(compiled, name, uses_wgmma):
    ptx = (compiled[0] / f"{name}.ptx").read_text()
    assert ("wgmma.mma_async" in ptx) == uses_wgmma
    assert ("mma.sync" in ptx) != uses_wgmma
