"""What the package shows and what it holds: exact exports, and an implementation for every promise."""

import importlib.util
import types

import pytest

import octavo_kernels as ok
from octavo_kernels import Backend, _dispatch


def test_exported_names_are_exact():
    public = {
        name for name, value in vars(ok).items() if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public == set(ok.__all__)
    assert list(ok.__all__) == sorted(ok.__all__)


@pytest.mark.parametrize("backend", Backend, ids=lambda backend: backend.value)
def test_every_op_of_the_table_is_implemented(backend):
    ops = _dispatch._OPS[backend]
    if importlib.util.find_spec("triton") is None:
        if backend is Backend.TRITON:
            pytest.skip("triton is not installed")
        if backend is Backend.CUDA:
            ops = ops - _dispatch._WITH_TRITON
    for op in ops:
        assert callable(_dispatch._load(backend, op))
