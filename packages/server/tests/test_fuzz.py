"""Whatever JSON comes, the answer is a success or a mistake of the client in OpenAI's shape."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SCALARS = st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.floats() | st.text(max_size=5)
ANY = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
PART = st.fixed_dictionaries({"type": st.just("text") | ANY, "text": ANY})
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]) | ANY},
    optional={"content": ANY | st.lists(PART, max_size=2), "tool_calls": ANY, "name": ANY},
)
KEYWORD = st.sampled_from(["type", "items", "properties", "$ref", "enum", "required", "minItems", "anyOf", "pattern"])
SCHEMA = st.dictionaries(KEYWORD, ANY | st.sampled_from(["object", "array", "string", "#"]), max_size=4)
FORMAT = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "json_object", "json_schema", "structural_tag"])},
    optional={"json_schema": st.fixed_dictionaries({"schema": SCHEMA}) | ANY, "structures": ANY, "triggers": ANY},
)
SMALL = st.integers(-2, 25)
NAME = st.sampled_from(["f", "g"]) | ANY
TOOL = st.fixed_dictionaries(
    {
        "type": st.just("function") | ANY,
        "function": st.fixed_dictionaries({"name": NAME}, optional={"parameters": SCHEMA | ANY}),
    }
)
CHOICE = st.sampled_from(["auto", "none", "required"]) | ANY
BLOCK = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "tool_use", "tool_result", "thinking", "image"]) | ANY},
    optional={"text": ANY, "name": NAME, "input": ANY, "content": ANY | st.lists(PART, max_size=2), "tool_use_id": ANY},
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]) | ANY, "content": ANY | st.lists(BLOCK, max_size=3)}
)
SHARED = {
    "model": ANY,
    "n": ANY | SMALL,
    "temperature": ANY | st.floats(0, 2),
    "top_p": ANY,
    "top_k": ANY | SMALL,
    "min_p": ANY,
    "stop": ANY,
    "seed": ANY,
    "stream": st.booleans(),
    "stream_options": ANY | st.fixed_dictionaries({"include_usage": st.booleans()}),
    "max_tokens": ANY | SMALL,
    "min_tokens": ANY | SMALL,
    "stop_token_ids": ANY | st.lists(st.integers(-1, 300), max_size=3),
    "logit_bias": ANY,
    "cache_salt": ANY,
    "response_format": ANY | FORMAT,
    "structured_outputs": ANY | st.dictionaries(st.sampled_from(["json", "regex", "choice", "json_object"]), ANY),
}
BODIES = {
    "/v1/completions": st.fixed_dictionaries(
        {"prompt": ANY | st.lists(st.integers(-1, 300), max_size=4)},
        optional=SHARED | {"echo": ANY, "logprobs": ANY | SMALL, "best_of": ANY, "suffix": ANY},
    ),
    "/v1/chat/completions": st.fixed_dictionaries(
        {"messages": ANY | st.lists(MESSAGE, max_size=3)},
        optional=SHARED
        | {
            "logprobs": ANY,
            "top_logprobs": ANY | SMALL,
            "tools": ANY | st.lists(TOOL, max_size=2),
            "tool_choice": CHOICE,
        }
        | {"parallel_tool_calls": ANY, "chat_template_kwargs": ANY, "continue_final_message": ANY},
    ),
    "/v1/messages": st.fixed_dictionaries(
        {"messages": ANY | st.lists(TURN, max_size=3), "max_tokens": ANY | SMALL},
        optional={name: SHARED[name] for name in ("temperature", "top_p", "top_k", "stream")}
        | {
            "system": ANY | st.lists(PART, max_size=2),
            "stop_sequences": ANY | st.lists(st.text(max_size=2), max_size=6),
        }
        | {"tools": ANY | st.lists(st.fixed_dictionaries({"name": NAME, "input_schema": SCHEMA | ANY}), max_size=2)}
        | {
            "tool_choice": ANY
            | st.fixed_dictionaries({"type": st.sampled_from(["auto", "any", "tool", "none"]), "name": NAME})
        }
        | {"thinking": ANY},
    ),
    "/v1/embeddings": st.fixed_dictionaries(
        {"input": ANY}, optional={"encoding_format": ANY, "pooling": ANY, "dimensions": ANY}
    ),
    "/tokenize": st.fixed_dictionaries(
        {}, optional={"prompt": ANY, "messages": ANY | st.lists(MESSAGE, max_size=2), "return_token_strs": ANY}
    ),
    "/detokenize": st.fixed_dictionaries({"tokens": ANY | st.lists(st.integers(-1, 300), max_size=4)}),
}


@pytest.mark.parametrize("path", BODIES)
def test_any_body_is_answered_without_a_server_error(client, path):
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(BODIES[path] | ANY)
    def check(body):
        response = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        assert response.status_code in (200, 400, 404), response.text
        if response.status_code != 200:
            expected = {"message", "type"} if path == "/v1/messages" else {"message", "type", "param", "code"}
            assert set(response.json()["error"]) == expected
            assert len(response.content) < 32_000

    check()
    assert client.get("/health").status_code == 200
