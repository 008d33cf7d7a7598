"""Filling in the middle: which tokens mark it, and how the prompt is laid out."""

from collections.abc import Callable
from pathlib import Path

import pytest

from octavo_engine.errors import InvalidRequest
from octavo_engine.text.infill import InfillTokens, find_infill_tokens
from octavo_engine.text.processor import TextProcessor
from octavo_engine.text.tokenizer import Tokenizer
from octavo_engine.weights.source import GGUFSource

MakeGGUF = Callable[..., Path]


def with_spellings(make_gguf: MakeGGUF, spellings: list[str], **metadata: object) -> Tokenizer:
    """Rename the last ordinary tokens of the tiny vocabulary, and mark them as control tokens."""
    keys = GGUFSource(make_gguf()).file.metadata
    tokens = list(keys["tokenizer.ggml.tokens"])
    types = keys["tokenizer.ggml.token_type"].tolist()
    for place, spelling in enumerate(spellings):
        tokens[-4 + place], types[-4 + place] = spelling, 3
    changed = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": ["i32", types],
               "tokenizer.ggml.merges": ["h e"]}  # fmt: skip
    return GGUFSource(make_gguf(changed | metadata, name="renamed.gguf")).tokenizer()


def processor(tokenizer: Tokenizer) -> TextProcessor:
    return TextProcessor(tokenizer, None, max_model_len=100, max_num_seqs=1, vocab_size=tokenizer.vocab_size)


@pytest.mark.parametrize(
    "spellings",
    [
        ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
        ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
        [f"<\uff5cfim\u2581{word}\uff5c>" for word in ("begin", "hole", "end")],
    ],
    ids=["qwen", "starcoder", "deepseek"],
)
def test_known_spellings_are_found(make_gguf: MakeGGUF, spellings: list[str]) -> None:
    tokenizer = with_spellings(make_gguf, spellings)
    ids = [tokenizer.token_id(spelling) for spelling in spellings]
    assert find_infill_tokens(tokenizer) == InfillTokens(*ids)
    prompt = processor(tokenizer).encode_infill("he", "x")
    assert prompt == [ids[0], *tokenizer.encode("he", False), ids[1], *tokenizer.encode("x", False), ids[2]]
    assert tokenizer.decode(prompt) == "hex"


@pytest.mark.parametrize("keys", [("fim_pre", "fim_suf", "fim_mid"), ("prefix", "suffix", "middle")], ids="-".join)
def test_tokens_that_the_file_names_are_taken(make_gguf: MakeGGUF, keys: tuple[str, ...]) -> None:
    plain = GGUFSource(make_gguf()).tokenizer()
    ids = [plain.vocab_size - 4 + place for place in range(3)]
    named = {f"tokenizer.ggml.{key}_token_id": token_id for key, token_id in zip(keys, ids, strict=True)}
    tokenizer = with_spellings(make_gguf, ["<a>", "<b>", "<c>"], **named)
    assert find_infill_tokens(tokenizer) == InfillTokens(*ids)
    assert set(ids) <= tokenizer.special_token_ids


def test_what_every_prompt_begins_with_comes_first(make_gguf: MakeGGUF) -> None:
    spellings = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
    tokenizer = with_spellings(make_gguf, spellings, **{"tokenizer.ggml.add_bos_token": True})
    assert processor(tokenizer).encode_infill("", "x")[:2] == [1, tokenizer.token_id("<fim_prefix>")]


def test_a_model_without_such_tokens_refuses(make_gguf: MakeGGUF) -> None:
    tokenizer = GGUFSource(make_gguf()).tokenizer()
    assert find_infill_tokens(tokenizer) is None
    with pytest.raises(InvalidRequest, match="no tokens for filling in the middle") as caught:
        processor(tokenizer).encode_infill("a", "b")
    assert caught.value.param == "suffix"


def test_two_of_three_tokens_are_not_enough(make_gguf: MakeGGUF) -> None:
    assert find_infill_tokens(with_spellings(make_gguf, ["<fim_prefix>", "<fim_suffix>"])) is None
