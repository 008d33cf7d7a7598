import subprocess
import sys

import pytest

import octavo_client

NAMES = [
    "AsyncOctavo",
    "ConfigurationError",
    "EmbeddingExtras",
    "Extras",
    "InvalidAnswerError",
    "Octavo",
    "OctavoError",
    "StructuredOutputs",
]


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_all_is_exact_and_every_name_resolves() -> None:
    assert octavo_client.__all__ == NAMES
    assert [getattr(octavo_client, name).__name__ for name in NAMES] == NAMES
    assert set(NAMES) <= set(dir(octavo_client))


def test_star_import_brings_all_names() -> None:
    namespace: dict[str, object] = {}
    exec("from octavo_client import *", namespace)
    assert sorted(set(namespace) - {"__builtins__"}) == NAMES


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'octavo_client' has no attribute 'Pages'"):
        octavo_client.Pages  # noqa: B018  (the access is the test)


def test_importing_the_package_loads_no_sdk_until_a_client_is_named() -> None:
    loaded = "print('openai' in sys.modules)"
    assert run(f"import sys, octavo_client; {loaded}; octavo_client.Octavo; {loaded}").split() == ["False", "True"]


def test_importing_the_clients_loads_no_torch_and_no_grpc() -> None:
    program = (
        "import sys; from octavo_client import *; print([n for n in ('torch', 'grpc', 'numpy') if n in sys.modules])"
    )
    assert run(program) == "[]"
