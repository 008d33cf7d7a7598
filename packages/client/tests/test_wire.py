import subprocess
import sys

import pytest
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from octavo_client import wire, wire_server
from octavo_client.wire import (
    DetokenizeRequest,
    EmbeddingExtras,
    Extras,
    StructuredOutputs,
    TokenizeRequest,
    TokenizeResponse,
)
from octavo_client.wire_server import Health, Version

ALL_EXTRAS = {
    "top_k": 40,
    "min_p": 0.05,
    "typical_p": 0.9,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.15,
    "mirostat_mode": 2,
    "mirostat_tau": 4.0,
    "mirostat_eta": 0.2,
    "dry_multiplier": 0.8,
    "dry_base": 1.5,
    "dry_allowed_length": 3,
    "dry_sequence_breakers": ["\\n"],
    "allowed_token_ids": [3, 4],
    "bad_words": ["word"],
    "prompt_logprobs": 1,
    "truncate_prompt_tokens": 100,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "repetition_penalty": 1.1,
    "min_tokens": 3,
    "ignore_eos": True,
    "stop_token_ids": [2, 7],
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "use_beam_search": True,
    "length_penalty": 0.5,
    "early_stopping": "never",
    "structured_outputs": {"json": {"type": "object", "properties": {"b": {}, "a": {}}}},
    "keep": True,
    "chat_template_kwargs": {"enable_thinking": False},
    "add_generation_prompt": False,
    "continue_final_message": True,
    "parent_id": "cmpl-1",
    "parent_index": 1,
    "branch_at": 5,
    "priority": -1,
    "timeout": 30.0,
    "cache_salt": "team a",
}


def models() -> list[type[BaseModel]]:
    found = [getattr(module, name) for module in (wire, wire_server) for name in module.__all__]
    return [item for item in found if isinstance(item, type) and issubclass(item, BaseModel)]


def test_extras_has_exactly_these_fields() -> None:
    assert list(Extras.model_fields) == list(ALL_EXTRAS)


def test_body_holds_every_field_that_was_set() -> None:
    assert Extras.model_validate(ALL_EXTRAS).body() == ALL_EXTRAS


def test_body_leaves_out_unset_fields_and_keeps_an_explicit_none() -> None:
    assert Extras(top_k=40, priority=None).body() == {"top_k": 40, "priority": None}
    assert Extras().body() == {}


def test_extras_unpacks_and_overrides_like_a_mapping() -> None:
    assert {"model": "m", "top_k": 1, **Extras(top_k=40)} == {"model": "m", "top_k": 40}
    assert dict(Extras(min_p=0.5)) == {"min_p": 0.5}
    with pytest.raises(KeyError):
        Extras(min_p=0.5)["top_k"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_k", -2),
        ("top_k", 2**31),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 10.1),
        ("repetition_penalty", float("inf")),
        ("min_tokens", -1),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [1] * 1025),
        ("priority", 2**31),
        ("cache_salt", ""),
        ("cache_salt", "x" * 257),
        ("cache_salt", "\ud800"),
    ],
)
def test_value_out_of_bounds_names_its_field(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        Extras.model_validate({field: value})
    assert [error["loc"][0] for error in caught.value.errors()] == [field]


@pytest.mark.parametrize("model", [Extras, EmbeddingExtras, StructuredOutputs], ids=lambda model: model.__name__)
def test_misspelt_field_is_refused(model: type[BaseModel]) -> None:
    with pytest.raises(ValidationError, match="topk"):
        model.model_validate({"topk": 40})


def test_server_model_may_inherit_extras_and_ignore_unknown_fields() -> None:
    class ChatRequest(Extras):
        model_config = ConfigDict(extra="ignore")
        model: str

    request = ChatRequest.model_validate({"model": "m", "top_k": 3, "unheard_of": 1})
    assert (request.model, request.top_k, request.min_p) == ("m", 3, None)


@pytest.mark.parametrize("model", models(), ids=lambda model: model.__name__)
def test_request_fields_say_what_they_mean(model: type[BaseModel]) -> None:
    silent = [name for name, field in model.model_fields.items() if not field.description and name != "status"]
    assert silent == []
    assert model.__doc__


def test_structured_outputs_is_typed_as_it_is_written() -> None:
    schema: dict[str, JsonValue] = {"type": "string"}
    assert StructuredOutputs(json=schema).body() == {"json": schema}
    assert Extras(structured_outputs=StructuredOutputs(regex="a+")).body() == {"structured_outputs": {"regex": "a+"}}
    assert StructuredOutputs(json=False).body() == {"json": False}


@pytest.mark.parametrize("fields", [{}, {"json": {}, "regex": "a"}, {"json_object": False}, {"choice": None}], ids=str)
def test_structured_outputs_takes_exactly_one_kind(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="exactly one of"):
        StructuredOutputs.model_validate(fields)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "neither came"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "both came"),
        ({"prompt": "a", "add_generation_prompt": True}, "goes with messages"),
        ({"messages": []}, "at least 1 item"),
    ],
    ids=["neither", "both", "generation prompt", "no messages"],
)
def test_tokenize_request_refuses_contradictions(body: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        TokenizeRequest.model_validate(body)


def test_tokenize_request_takes_an_empty_prompt_and_ignores_unknown_fields() -> None:
    assert TokenizeRequest.model_validate({"prompt": "", "unheard_of": 1}).body() == {"prompt": ""}


def test_detokenize_request_takes_no_tokens_but_no_negative_ones() -> None:
    assert DetokenizeRequest(tokens=[]).body() == {"tokens": []}
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        DetokenizeRequest(tokens=[1, -1])


def test_answers_ignore_fields_of_a_newer_server() -> None:
    answer = {"count": 1, "max_model_len": 8, "tokens": [5], "of_tomorrow": 1}
    assert TokenizeResponse.model_validate(answer).tokens == [5]
    assert Version.model_validate({"version": "9"}).packages == {}
    with pytest.raises(ValidationError, match="status"):
        Health.model_validate({"status": "dying"})


def test_importing_wire_loads_neither_openai_nor_an_http_library() -> None:
    program = """
import sys
import octavo_client.wire
heavy = ("openai", "httpx", "httpx2", "httpcore", "requests", "aiohttp", "urllib3", "http.client", "torch", "grpc")
print(sorted(name for name in heavy if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
