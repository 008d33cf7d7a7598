"""Opening a model: what threads make of it before torch is there."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo_engine.errors import UnsupportedModel
from octavo_engine.opening import opening
from octavo_engine.weights.source import open_source

MakeGGUF = Callable[..., Path]


def test_digest_and_tokenizer_are_the_sources_own(make_gguf: MakeGGUF) -> None:
    with opening(open_source(make_gguf())) as opened:
        source, digest, tokenizer = opened
    assert digest.result() == source.digest
    assert tokenizer.result() is source.tokenizer()


def test_a_tokenizer_that_cannot_be_built_is_told_to_who_asks_for_it(make_gguf: MakeGGUF) -> None:
    with opening(open_source(make_gguf({"tokenizer.ggml.model": "other"}))) as opened:
        assert len(opened.digest.result()) == 32
    with pytest.raises(UnsupportedModel, match="'other' is not supported"):
        opened.tokenizer.result()


def test_opening_loads_no_torch(make_gguf: MakeGGUF) -> None:
    code = (
        "import sys\n"
        "from octavo_engine.opening import opening\n"
        "from octavo_engine.weights.source import open_source\n"
        f"with opening(open_source({str(make_gguf())!r})):\n"
        "    pass\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
