import pickle
import subprocess
import sys
import types

import pytest

import octavo_kvcache
from octavo_kvcache import CacheFull, KVCacheError, UnknownSequence, errors


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_all_names_what_is_public():
    public = {
        name
        for name, value in vars(octavo_kvcache).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name != "TYPE_CHECKING"
    }
    assert public | {"KVStorage"} == set(octavo_kvcache.__all__)


def test_import_loads_neither_torch_nor_siblings():
    code = "import sys, octavo_kvcache; print(sorted({'torch', 'octavo_kernels', 'numpy'} & set(sys.modules)))"
    assert run(code) == "[]"


def test_storage_without_torch_says_what_to_install():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import octavo_kvcache\n"
        "try: octavo_kvcache.KVStorage\n"
        "except ImportError as error: print(error)"
    )
    assert "pip install 'octavo-kvcache[torch]'" in run(code)


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Storage'"):
        octavo_kvcache.Storage  # noqa: B018 - the access is what is tested


def test_error_tree_is_what_the_docstring_draws():
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert all(issubclass(cls, KVCacheError) for cls in classes)
    assert all(cls.__name__ in errors.__doc__ for cls in classes)


def test_errors_survive_pickling_and_print_plainly():
    error = pickle.loads(pickle.dumps(CacheFull(3, 2, 9)))
    assert (error.wanted, error.free, error.total) == (3, 2, 9)
    assert str(UnknownSequence("sequence 'a' does not exist")) == "sequence 'a' does not exist"
