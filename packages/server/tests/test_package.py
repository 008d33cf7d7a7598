import subprocess
import sys
from pathlib import Path

import pytest

import octavo_server
from octavo_engine.errors import InvalidConfig
from octavo_server import ServerSettings


def test_public_names_are_exactly_all():
    assert sorted(octavo_server.__all__) == ["ApiError", "ServerSettings", "create_app"]
    for name in octavo_server.__all__:
        assert hasattr(octavo_server, name)


def test_the_command_line_starts_without_the_web_framework():
    names = "('fastapi', 'uvicorn', 'prometheus_client')"
    code = f"import sys, octavo_server.cli; print([name for name in {names} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'octavo_server' has no attribute 'nothing'"):
        _ = octavo_server.nothing


@pytest.mark.parametrize("module", ["octavo_server", "octavo_server.cli"])
def test_importing_loads_no_torch(module):
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'triton', 'transformers', 'openai') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    "settings",
    [
        {"max_body_bytes": 0},
        {"body_timeout": -1},
        {"keep_alive": 0},
        {"api_keys": ("a", "")},
        {"served_model_names": ("",)},
    ],
    ids=lambda s: next(iter(s)),
)
def test_wrong_settings_are_refused_by_name(settings):
    with pytest.raises(InvalidConfig, match=next(iter(settings))):
        ServerSettings(**settings)


def test_the_package_is_typed():
    assert (Path(octavo_server.__file__).parent / "py.typed").is_file()
