import subprocess
import sys

import pytest

import octavo_engine


def test_every_public_name_can_be_imported_without_surprise():
    pytest.importorskip("torch", reason="LLM needs the extra [local]")
    exported = {name: getattr(octavo_engine, name) for name in octavo_engine.__all__}
    assert all(value.__name__ == name for name, value in exported.items())
    assert set(octavo_engine._MODULES) == set(octavo_engine.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = octavo_engine.Nothing


@pytest.mark.parametrize(
    "module",
    ["types", "config", "batch", "sequence", "scheduler", "engine", "async_engine", "api", "text.processor", "build"],
)
def test_core_modules_load_no_torch(module: str):
    code = f"import sys, octavo_engine.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
