"""SamplingTokens: bad words and sequence breakers as token ids, on a small vocabulary of spelled-out tokens."""

from __future__ import annotations

import pytest

from octavo_engine.errors import InvalidRequest
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.text.sampling_tokens import SamplingTokens
from octavo_engine.text.tokenizer import Tokenizer, TokenizerRules

TOKENS = ["cat", " cat", "c", "a", "t", " ", "\n", ".\n", ":", "dog", "s"]


class LongestFirst:
    """Takes the longest token that fits, from left to right; letters that it does not know are left out."""

    vocab_size = len(TOKENS)

    def encode(self, text: str) -> list[int]:
        token_ids = []
        while text:
            fitting = [token for token in TOKENS if text.startswith(token)]
            taken = max(fitting, key=len) if fitting else text[0]
            token_ids += [TOKENS.index(taken)] if fitting else []
            text = text[len(taken) :]
        return token_ids

    def token(self, token_id: int) -> str | None:
        return TOKENS[token_id]

    def token_id(self, token: str) -> int | None:
        return TOKENS.index(token)


@pytest.fixture
def tokens() -> SamplingTokens:
    rules = TokenizerRules(
        bytes_of=str.encode, strip_leading_space=False, special_token_ids=frozenset(), special_tokens={}, prefix=(3,)
    )
    return SamplingTokens(Tokenizer(LongestFirst(), rules), len(TOKENS))


def ids(*spelled: str) -> tuple[int, ...]:
    return tuple(TOKENS.index(token) for token in spelled)


def test_a_bad_word_is_banned_at_the_start_and_within_a_sentence(tokens: SamplingTokens) -> None:
    for word in ("cat", " cat", "cat "):
        sequences = tokens.resolve(SamplingParams(bad_words=[word])).bad_words_ids
        assert {ids("cat"), ids(" cat")} <= set(sequences)
    assert tokens.resolve(SamplingParams(bad_words=["cats"])).bad_words_ids == (ids("cat", "s"), ids(" cat", "s"))


def test_given_sequences_stand_beside_bad_words(tokens: SamplingTokens) -> None:
    given = SamplingParams(bad_words=["dog"], bad_words_ids=[[2, 3], ids("dog")])
    assert tokens.resolve(given).bad_words_ids == ((2, 3), ids("dog"), ids(" ", "dog"))


def test_every_token_with_a_breaker_in_it_breaks(tokens: SamplingTokens) -> None:
    given = SamplingParams(dry_multiplier=1, dry_sequence_breakers=["\n", ":"], dry_breaker_ids=[0])
    assert tokens.resolve(given).dry_breaker_ids == tuple(sorted((0, *ids("\n", ".\n", ":"))))
    assert tokens.resolve(SamplingParams(dry_sequence_breakers=["\n"])).dry_breaker_ids == ()  # DRY is off


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        (SamplingParams(bad_words=["xyz"]), "bad_words"),
        (SamplingParams(dry_multiplier=1, dry_sequence_breakers=["catdog"]), "dry_sequence_breakers"),
        (SamplingParams(dry_multiplier=1, dry_sequence_breakers=[], dry_breaker_ids=[11]), "dry_breaker_ids"),
        (SamplingParams(stop_token_ids=[11]), "stop_token_ids"),
        (SamplingParams(logit_bias={11: 1}), "logit_bias"),
        (SamplingParams(allowed_token_ids=[3, 11]), "allowed_token_ids"),
        (SamplingParams(bad_words_ids=[[1, 11]]), "bad_words_ids"),
        (SamplingParams(bad_words=["a"], allowed_token_ids=ids("a")), "allowed_token_ids"),
    ],
    ids=[
        "no tokens",
        "long breaker",
        "breaker id",
        "stop",
        "bias",
        "allowed",
        "bad sequence",
        "nothing left",
    ],
)
def test_what_the_vocabulary_does_not_have_is_refused(
    tokens: SamplingTokens, sampling: SamplingParams, param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tokens.resolve(sampling)
    assert caught.value.param == param
