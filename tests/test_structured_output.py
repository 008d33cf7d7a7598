"""Structured output on the real model: random JSON Schemas at temperature 1, held against `jsonschema`; and over HTTP.

A few schemas, new ones in each run, are for every day; a thousand are marked `slow`, and `OCTAVO_SCHEMAS` says which:

    OCTAVO_SCHEMAS=0:250 pytest tests/test_structured_output.py -m slow -s
"""

from __future__ import annotations

import json
import os
import random
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field
from starlette.testclient import TestClient

from octavo_engine import LLM, AsyncEngine, EngineConfig, FinishReason, SamplingParams, StructuredOutputsParams
from octavo_server import create_app

pytestmark = pytest.mark.model

MAX_TOKENS = 1024
MIN_SHARE_ENDED = 0.99
NUM_EVERY_DAY = 16
BATCH = 50
PATTERNS = ("^[a-z]{2,8}$", "^[A-Z]{3}-[0-9]{2,4}$", "^(red|green|blue)$", "^#[0-9a-f]{6}$", "[0-9]{1,3}", "^a.{0,5}z$")
WORDS = ("name", "size", "kind", "tags", "owner", "price", "notes", "state", "items", "code", "x", "last seen", "größe")
CHAT = [{"role": "user", "content": "Invent a record of anything you like, and write it as JSON."}]

Schema = dict[str, Any]


class RandomSchemas:
    """Makes schemas: nested objects, bounded arrays, strings and numbers, enums, patterns, `$ref`."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def schema(self) -> Schema:
        """Return an object's schema with one or two definitions, which it refers to here and there."""
        names = ["a", "b"][: self._random.randint(1, 2)]
        definitions = {name: self._value(depth=2, definitions=()) for name in names}
        return {**self._object(depth=0, definitions=tuple(names)), "$defs": definitions}

    def _value(self, depth: int, definitions: Sequence[str]) -> Schema:
        pick = self._random
        scalars = (self._string, self._integer, self._number, self._enum, self._pattern, self._constant)
        if definitions and pick.random() < 0.15:
            return {"$ref": f"#/$defs/{pick.choice(definitions)}"}
        if depth >= 3 or pick.random() < 0.55:
            return pick.choice(scalars)()
        make: Callable[[int, Sequence[str]], Schema] = pick.choice(
            (self._object, self._object, self._array, self._options)
        )
        return make(depth + 1, definitions)

    def _object(self, depth: int, definitions: Sequence[str]) -> Schema:
        pick = self._random
        names = pick.sample(WORDS, pick.randint(1, 4))
        schema: Schema = {
            "type": "object",
            "properties": {name: self._value(depth + 1, definitions) for name in names},
            "additionalProperties": False,
        }
        return {**schema, "required": [name for name in names if pick.random() < 0.7]}

    def _array(self, depth: int, definitions: Sequence[str]) -> Schema:
        low = self._random.randint(0, 2)
        items = self._value(depth + 1, definitions)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + self._random.randint(0, 3)}

    def _options(self, depth: int, definitions: Sequence[str]) -> Schema:
        return {"anyOf": [self._value(depth + 1, definitions), {"type": self._random.choice(("null", "boolean"))}]}

    def _string(self) -> Schema:
        low = self._random.choice((0, 0, 3))
        return {"type": "string", "minLength": low, "maxLength": low + self._random.randint(1, 30)}

    def _integer(self) -> Schema:
        low = self._random.randint(-1000, 1000)
        step = {"multipleOf": 5} if self._random.random() < 0.2 else {}
        return {"type": "integer", "minimum": low, "maximum": low + self._random.randint(10, 5000), **step}

    def _number(self) -> Schema:
        low = self._random.uniform(-100, 100)
        return {
            "type": "number",
            "minimum": round(low, 2),
            "exclusiveMaximum": round(low + self._random.uniform(1, 99), 1),
        }

    def _enum(self) -> Schema:
        values = ["small", "large", 'a "quoted" one', 7, -2.5, None, True, {"a": [1]}]
        return {"enum": self._random.sample(values, self._random.randint(1, 4))}

    def _pattern(self) -> Schema:
        return {"type": "string", "pattern": self._random.choice(PATTERNS), "maxLength": 12}

    def _constant(self) -> Schema:
        return self._random.choice(({"const": "fixed"}, {"type": "boolean"}, {"type": "null"}, {"const": [1, 2]}))


class Tally(NamedTuple):
    """How many texts ended by themselves, were accepted, and came in all."""

    num_ended: int
    num_accepted: int
    num_texts: int
    num_tokens: int


def generate(llm: LLM, seeds: Sequence[int]) -> Tally:
    """Draw one text for each of some schemas, and count; a text that was cut must say so."""
    tally = Tally(0, 0, 0, 0)
    for start in range(0, len(seeds), BATCH):
        part = seeds[start : start + BATCH]
        schemas = [RandomSchemas(seed).schema() for seed in part]
        sampling = [
            SamplingParams(
                temperature=1.0,
                seed=seed,
                max_tokens=MAX_TOKENS,
                structured_outputs=StructuredOutputsParams(json=schema),
            )
            for seed, schema in zip(part, schemas, strict=True)
        ]
        for schema, output in zip(schemas, llm.chat([CHAT] * len(part), sampling), strict=True):
            choice = output.outputs[0]
            ended = choice.finish_reason is FinishReason.STOP
            assert ended or (choice.finish_reason is FinishReason.LENGTH and len(choice.token_ids) == MAX_TOKENS)
            tally = Tally(
                tally.num_ended + ended,
                tally.num_accepted + (ended and accepted(choice.text, schema)),
                tally.num_texts + 1,
                tally.num_tokens + len(choice.token_ids),
            )
    return tally


def accepted(text: str, schema: Schema) -> bool:
    """Return whether a text is compact JSON that `jsonschema` accepts; say what is wrong if not."""
    jsonschema.Draft202012Validator.check_schema(schema)
    errors = list(jsonschema.Draft202012Validator(schema).iter_errors(json.loads(text)))
    if errors:
        print(f"NOT accepted: {text}\n  {errors[0].message}\n  {json.dumps(schema)}")
    return not errors


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(show_progress=False, max_num_seqs=BATCH, max_model_len=2048, kv_cache_bytes=1 << 30) as llm:
        yield llm


def test_random_schemas_are_kept(llm: LLM) -> None:
    first = secrets.randbits(32)
    tally = generate(llm, range(first, first + NUM_EVERY_DAY))
    print(f"schemas from {first}: {tally}")
    assert tally.num_accepted == tally.num_ended
    assert tally.num_ended >= NUM_EVERY_DAY - 2, "one or two in a hundred may ramble on"


@pytest.mark.slow
def test_a_thousand_random_schemas_are_kept(llm: LLM) -> None:
    first, _, stop = os.environ.get("OCTAVO_SCHEMAS", "0:1000").partition(":")
    tally = generate(llm, range(int(first), int(stop)))
    print(f"schemas {first}:{stop}: {tally}, {tally.num_ended / tally.num_texts:.2%} ended by themselves")
    assert tally.num_accepted == tally.num_ended
    assert tally.num_ended >= MIN_SHARE_ENDED * tally.num_texts


class Ticket(BaseModel):
    """What the openai SDK makes a strict schema of."""

    title: str = Field(max_length=40)
    priority: int = Field(ge=1, le=5)
    labels: list[str] = Field(max_length=0)


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    engine = AsyncEngine.from_config(EngineConfig(max_model_len=1024, num_blocks=200))
    try:
        with TestClient(create_app(engine)) as http:
            yield openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http)
    finally:
        engine.close()


def served(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_the_openai_sdk_parses_what_it_asked_for(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "File a ticket: the printer is on fire."}]
    answer = client.chat.completions.parse(
        model=served(client), messages=messages, response_format=Ticket, max_tokens=200, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Ticket)
    assert answer.choices[0].finish_reason == "stop"


def test_a_stream_joins_to_the_whole_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": served(client),
        "messages": CHAT,
        "seed": 5,
        "max_tokens": 100,
        "extra_body": {"structured_outputs": {"regex": "[A-Z][a-z]{2,9} [0-9]{1,3}"}},
    }
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_a_bad_schema_is_one_400_and_the_engine_lives_on(client: openai.OpenAI) -> None:
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"items": {"uniqueItems": True}}}}
    with pytest.raises(openai.BadRequestError, match="/items/uniqueItems"):
        client.chat.completions.create(model=served(client), messages=CHAT, response_format=wrong)  # type: ignore[arg-type]
    right: Any = {"structured_outputs": {"choice": ["tea", "coffee"]}}
    answer = client.completions.create(
        model=served(client), prompt="I would like some ", max_tokens=8, extra_body=right
    )
    assert answer.choices[0].text in ("tea", "coffee")
