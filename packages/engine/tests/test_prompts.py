"""Prompts as offline callers write them."""

import pytest

from octavo_engine.errors import InvalidRequest
from octavo_engine.prompts import EncodedPrompt, encode_all, encode_salt


class Letters:
    """A text side that knows letters."""

    def encode_prompt(self, prompt) -> list[int]:
        return [ord(letter) for letter in prompt] if isinstance(prompt, str) else list(prompt)


@pytest.mark.parametrize(
    ("prompts", "encoded"),
    [
        ("ab", [EncodedPrompt("ab", [97, 98])]),
        (["a", "b"], [EncodedPrompt("a", [97]), EncodedPrompt("b", [98])]),
        ({"prompt_token_ids": (5, 6)}, [EncodedPrompt(None, [5, 6])]),
        ({"prompt": "a", "cache_salt": "x"}, [EncodedPrompt("a", [97], b"x")]),
        ([{"prompt_token_ids": [5], "cache_salt": "ü"}], [EncodedPrompt(None, [5], "ü".encode())]),
        ([], []),
    ],
    ids=str,
)
def test_every_form_is_encoded_with_its_salt(prompts, encoded):
    assert encode_all(Letters(), prompts) == encoded


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "prompt"),
        (5, "prompt"),
        ([1, 2], "prompt"),
        ({"prompt": "a", "cache_salt": ""}, "cache_salt"),
        ({"prompt": "a", "cache_salt": b"x"}, "cache_salt"),
    ],
    ids=str,
)
def test_other_forms_are_refused(prompt, param):
    with pytest.raises(InvalidRequest) as caught:
        encode_all(Letters(), [prompt])
    assert caught.value.param == param


def test_no_salt_is_the_empty_one():
    assert encode_salt(None) == b""
