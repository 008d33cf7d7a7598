"""A program that compiles Triton kernels for sm_90 and gfx942 without a GPU and measures them; test_compile.py runs it.

It is a process of its own, since triton.jit decides at import whether it interprets. Standard input is JSON, variants
by name; standard output is JSON, by name and target what was measured, or {"error": text}. A variant has

    kernel      "module:function"
    types       Triton's type of each argument that is neither int32 nor a constant, by name
    constants   values of tl.constexpr parameters, and of arguments that are None or 1 in this launch, by name
    aligned     integers beside strides that are multiples of 16 in this launch
    num_warps, num_stages
    targets     where it is compiled; both where it does not say
"""

import functools
import importlib
import json
import re
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
PRODUCTS = ("wgmma.mma_async", "mma.sync", "v_mfma")


def main():
    variants = json.load(sys.stdin)
    jobs = [(name, target) for name, variant in variants.items() for target in variant.get("targets", TARGETS)]
    with ThreadPoolExecutor(max_workers=2) as pool:
        found = list(pool.map(lambda job: measured(variants[job[0]], job[1]), jobs))
    results = {name: {} for name in variants}
    for (name, target), result in zip(jobs, found, strict=True):
        results[name][target] = result
    json.dump(results, sys.stdout)


def measured(variant, target):
    """Compile one variant; return bytes of shared memory and of spills, registers, and kinds of products."""
    try:
        compiled = compile_variant(variant, target)
        read = read_cubin if target == "sm_90" else read_amdgcn
        text = compiled.asm["ptx" if target == "sm_90" else "amdgcn"]
        products = [name for name in PRODUCTS if name in text]
        return read(compiled) | {"shared": compiled.metadata.shared, "products": products}
    except Exception:  # the others are compiled all the same, and the test of this one shows the text
        return {"error": traceback.format_exc()}


def compile_variant(variant, target):
    module, function = variant["kernel"].split(":")
    kernel = getattr(importlib.import_module(module), function)
    constants, types = variant["constants"], variant["types"]
    unknown = {*constants, *types} - {*kernel.arg_names}
    if unknown:
        raise ValueError(f"{variant['kernel']} has no arguments {sorted(unknown)}")
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    # A launch finds aligned pointers and strides that are multiples of 16, and specialises on them.
    aligned = [name for name, kind in signature.items() if kind[0] == "*" or (kind[0] == "i" and "stride" in name)]
    aligned += variant.get("aligned", [])
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    options = {key: variant[key] for key in ("num_warps", "num_stages") if key in variant}
    return triton.compile(source, target=TARGETS[target], options=options)


def read_cubin(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {"spilled": found["STACK"] + found["LOCAL"], "registers": found["REG"]}


def read_amdgcn(compiled):
    found = {key: int(value) for key, value in re.findall(r"^ +\.(\w+): +(\d+)$", compiled.asm["amdgcn"], re.MULTILINE)}
    # Scalar registers spill into lanes of vector registers, which takes no memory.
    return {"spilled": found["private_segment_fixed_size"], "registers": found["vgpr_count"]}


@functools.cache
def cuobjdump():
    found = sorted(Path(triton.__file__).parent.rglob("cuobjdump*"))
    if not found:
        raise FileNotFoundError(f"no cuobjdump beside {triton.__file__}; install triton from PyPI")
    return str(found[0])


main()
