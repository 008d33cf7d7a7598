"""GGUFVocabulary: the tokenizer in the metadata of a GGUF file, and how to build it with the tokenizers library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from octavo_engine.errors import CorruptModelFile, UnsupportedModel
from octavo_engine.text.byte_alphabet import BYTE_OF_CHAR, SPACE_MARK, spell
from octavo_engine.text.library_errors import corrupt_if_refused

_MAX_TOKEN_CHARS = 1024
# The keys that say which token is which, the usual one first.
_SPECIAL_KEYS = {
    "bos_token": ("bos",),
    "eos_token": ("eos",),
    "unk_token": ("unknown",),
    "pad_token": ("padding",),
    "fim_prefix_token": ("fim_pre", "prefix"),
    "fim_suffix_token": ("fim_suf", "suffix"),
    "fim_middle_token": ("fim_mid", "middle"),
}
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

# How each vocabulary splits text before merging. Their order matters, as in every regex alternation:
# contractions, words, numbers, other signs, line breaks, spaces.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS: dict[str, str | None] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    **dict.fromkeys(("default", "gpt-2", "smollm", "starcoder", "refact"), None),  # None: GPT-2's own split
}
_SINGLE_DIGITS = frozenset(("smollm", "starcoder", "refact"))
_WHOLE_WORDS_FIRST = _ADD_BOS = frozenset(("llama-bpe", "llama3", "llama-v3"))


@dataclass(frozen=True)
class GGUFVocabulary:
    """The `tokenizer.ggml.*` keys of a file, checked. `model` is `gpt2` (byte-level BPE) or `llama` (SentencePiece)."""

    where: str
    model: str
    pre: str
    tokens: list[str]
    token_types: list[int]
    scores: list[float]
    merges: list[str]
    special_tokens: Mapping[str, str]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool

    @classmethod
    def read(cls, metadata: Mapping[str, Any], where: str) -> GGUFVocabulary:
        """Check and collect the keys; see Tokenizer.from_gguf for what is raised."""
        model, pre = _text(metadata, "model", None, where), _text(metadata, "pre", "default", where)
        if model not in ("gpt2", "llama"):
            raise UnsupportedModel(f"{where}: tokenizer.ggml.model {model!r} is not supported; gpt2 and llama are")
        if model == "gpt2" and pre not in _SPLITS:
            supported = ", ".join(sorted(_SPLITS))
            raise UnsupportedModel(f"{where}: tokenizer.ggml.pre {pre!r} is not supported; these are: {supported}")
        tokens = metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens:
            _fail(where, "tokens", "a list of strings", tokens)
        vocabulary = cls(
            where=where,
            model=model,
            pre=pre,
            tokens=tokens,
            token_types=_numbers(metadata, "token_type", len(tokens), where, [1] * len(tokens)),
            scores=_numbers(metadata, "scores", len(tokens), where, None if model == "llama" else []),
            merges=_merges(metadata, where) if model == "gpt2" else [],
            special_tokens=_special_tokens(metadata, tokens, where),
            add_bos=_flag(metadata, "add_bos_token", model == "llama" or pre in _ADD_BOS, where),
            add_eos=_flag(metadata, "add_eos_token", False, where),
            add_space_prefix=_flag(metadata, "add_space_prefix", True, where),
        )
        if len(vocabulary.ids) != len(tokens):
            _fail(where, "tokens", "different strings", f"{len(tokens) - len(vocabulary.ids)} repeated ones")
        return vocabulary

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token ids by spelling."""
        return {token: token_id for token_id, token in enumerate(self.tokens)}

    @cached_property
    def special_ids(self) -> list[int]:
        """The ids of control tokens, the unknown token, and the named special tokens."""
        named = {self.ids[token] for token in self.special_tokens.values()}
        marked = {i for i, kind in enumerate(self.token_types) if kind in (_CONTROL, _UNKNOWN)}
        return sorted(named | marked)

    @property
    def user_defined_ids(self) -> list[int]:
        """The ids of tokens that are never split, but are ordinary text."""
        return [i for i, kind in enumerate(self.token_types) if kind == _USER_DEFINED]


def build(vocabulary: GGUFVocabulary) -> Tokenizer:
    """Build the tokenizer.

    Raises:
        CorruptModelFile: if a merge does not fit the vocabulary.
    """
    with corrupt_if_refused(f"{vocabulary.where}: the tokenizer's vocabulary and merges do not fit"):
        tokenizer = _byte_level(vocabulary) if vocabulary.model == "gpt2" else _sentencepiece(vocabulary)
    special = set(vocabulary.special_ids)
    plain = [i for i in vocabulary.user_defined_ids if i not in special]
    tokens = vocabulary.tokens
    tokenizer.add_special_tokens([AddedToken(tokens[i], normalized=False, special=True) for i in sorted(special)])
    tokenizer.add_tokens([AddedToken(tokens[i], normalized=False, special=False) for i in plain])
    return tokenizer


def _byte_level(vocabulary: GGUFVocabulary) -> Tokenizer:
    # Added tokens are spelled as they are; everything else must be in the byte alphabet.
    added = {*vocabulary.special_ids, *vocabulary.user_defined_ids}
    ids = {
        token if i in added or BYTE_OF_CHAR.keys() >= set(token) else spell(token): i
        for i, token in enumerate(vocabulary.tokens)
    }
    pairs = [_split_merge(merge, vocabulary.where) for merge in vocabulary.merges]
    model = models.BPE(vocab=ids, merges=pairs, ignore_merges=vocabulary.pre in _WHOLE_WORDS_FIRST)
    tokenizer = Tokenizer(model)
    split = _SPLITS[vocabulary.pre]
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if vocabulary.pre in _SINGLE_DIGITS else []
    if split is not None:
        steps.append(pre_tokenizers.Split(Regex(split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


def _sentencepiece(vocabulary: GGUFVocabulary) -> Tokenizer:
    longest = max(map(len, vocabulary.tokens))
    if longest > _MAX_TOKEN_CHARS:  # the work below grows with the square of it
        _fail(vocabulary.where, "tokens", f"tokens of at most {_MAX_TOKEN_CHARS} characters", f"one of {longest}")
    merges = _merges_from_scores(vocabulary.ids, vocabulary.scores)
    unknown = vocabulary.special_tokens.get("unk_token")
    model = models.BPE(vocab=vocabulary.ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps: list[Any] = [normalizers.Prepend(SPACE_MARK)] if vocabulary.add_space_prefix else []
    steps.append(normalizers.Replace(" ", SPACE_MARK))
    tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer


def _merges_from_scores(ids: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Recover BPE merges: every way to put a token together from two others, the best score first.

    SentencePiece joins the pair whose result scores highest, the leftmost on a tie; the library wants that as a rank.
    """
    found = [
        (-scores[token_id], token_id, cut, token[:cut], token[cut:])
        for token, token_id in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    found.sort(key=lambda entry: entry[:3])
    return [(left, right) for *_, left, right in found]


def _split_merge(merge: str, where: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        _fail(where, "merges", "two tokens with a space between", merge)
    return left, right


def _merges(metadata: Mapping[str, Any], where: str) -> list[str]:
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        _fail(where, "merges", "a list of strings", merges)
    return merges


def _numbers(metadata: Mapping[str, Any], key: str, count: int, where: str, default: list[Any] | None) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None and default is not None:
        return default
    if not isinstance(value, np.ndarray) or len(value) != count:
        found = len(value) if isinstance(value, np.ndarray | list) else value
        _fail(where, key, f"{count} numbers, one per token", found)
    return list(value.tolist())


def _special_tokens(metadata: Mapping[str, Any], tokens: list[str], where: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, keys in _SPECIAL_KEYS.items():
        key = next((key for key in keys if f"tokenizer.ggml.{key}_token_id" in metadata), None)
        if key is None:
            continue
        token_id = metadata[f"tokenizer.ggml.{key}_token_id"]
        if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
            _fail(where, f"{key}_token_id", f"an id below {len(tokens)}", token_id)
        found[name] = tokens[token_id]
    return found


def _text(metadata: Mapping[str, Any], key: str, default: str | None, where: str) -> str:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, str):
        _fail(where, key, "a string", value)
    return value


def _flag(metadata: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, bool):
        _fail(where, key, "true or false", value)
    return value


def _fail(where: str, key: str, expected: str, found: Any) -> NoReturn:
    what = "nothing" if found is None else repr(found)[:100]
    raise CorruptModelFile(f"{where}: tokenizer.ggml.{key}: expected {expected}, found {what}")
