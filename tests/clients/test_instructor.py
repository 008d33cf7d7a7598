"""instructor, unchanged, against the served demo model: in each of its modes an object comes back."""

from __future__ import annotations

import instructor
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

ASKED = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Describe Paris."}],
    "temperature": 0,
    "max_tokens": 120,
    "max_retries": 1,
}


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")  # else the answer may have members that nobody asked for, as many as fit

    name: str = Field(max_length=12)
    inhabitants: int = Field(ge=0, le=99_999_999)


@pytest.fixture
def make(url):
    sdk = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    return lambda mode: instructor.from_openai(sdk, mode=mode)


@pytest.mark.parametrize("name", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"])
def test_an_object_comes_back(make, name):
    assert isinstance(make(instructor.Mode[name]).create(response_model=City, **ASKED), City)


@pytest.mark.parametrize("name", ["TOOLS", "JSON_SCHEMA"])
def test_a_partial_object_grows(make, name):
    grown = list(make(instructor.Mode[name]).create_partial(response_model=City, **ASKED))
    assert grown[-1].name is not None
    assert grown[-1].inhabitants is not None
