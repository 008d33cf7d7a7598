"""The Triton kernels compiled without a GPU, for sm_90 and gfx942: they fit, spill nothing and use Hopper's products.

What is compiled stands in compiled/, one list per family: `KERNELS`, variants by name, in the form that
compiled/harness.py describes. A variant may say `wgmma`, whether its products on sm_90 must be those of warpgroups, and
`may_spill`, the targets on which it is let off.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "compiled"
LAUNCHED, BROKEN = (
    {
        name: variant
        for family in families
        for name, variant in runpy.run_path(str(FOLDER / f"{family}.py"))["KERNELS"].items()
    }
    for families in (("attention", "small_ops", "products"), ("broken",))
)
BROKEN["short tiles for prefill"] = LAUNCHED["decode with the lowest tile"] | {"wgmma": True}
VARIANTS = LAUNCHED | BROKEN
SHARED_MEMORY = {"sm_90": 227 * 1024, "gfx942": 64 * 1024}  # bytes that a program can have


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory, backend):
    """Compile the variants of the tests that were selected: what was measured, by name and target."""
    if backend.value != "triton":
        pytest.skip("compiled in the triton run only")
    names = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]
    variants = {name: VARIANTS[name] for name in names}
    cache = str(tmp_path_factory.mktemp("cache"))
    environment = {"TRITON_CACHE_DIR": cache, **os.environ, "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(FOLDER / "harness.py")],
        input=json.dumps(variants), env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(name, compiled):
    """Assert what every kernel must hold, on every target that it was compiled for."""
    for target, found in compiled[name].items():
        assert "error" not in found, f"{name} on {target}:\n{found['error']}"
        assert found["spilled"] == 0 or target in VARIANTS[name].get("may_spill", ()), (
            f"{name} on {target} spills: {found}"
        )
        assert found["shared"] <= SHARED_MEMORY[target], f"{name} on {target} takes too much shared memory: {found}"
    wanted = VARIANTS[name].get("wgmma")
    if wanted is not None:
        products = compiled[name]["sm_90"]["products"]
        assert products == ["wgmma.mma_async" if wanted else "mma.sync"], f"{name} on sm_90 multiplies by {products}"


@pytest.mark.parametrize("name", LAUNCHED)
def test_kernel_fits_and_spills_nothing(compiled, name):
    check(name, compiled)


COMPLAINTS = {
    "spills": "spills on sm_90 spills",
    "takes too much shared memory": "on sm_90 takes too much shared memory",
    "does not compile": "y is not defined",
    "short tiles for prefill": "on sm_90 multiplies by .'mma.sync'",
}


@pytest.mark.parametrize(("name", "complaint"), COMPLAINTS.items())
def test_a_broken_kernel_fails(compiled, name, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check(name, compiled)
