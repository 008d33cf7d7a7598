"""Tokenizer: text to token ids and back, and the bytes of each token; from tokenizer.json, tokenizer.model or GGUF."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from octavo_engine.errors import CorruptModelFile, ModelNotFound, UnsupportedModel
from octavo_engine.text.byte_alphabet import bytes_of_byte_level, bytes_of_sentencepiece
from octavo_engine.text.library_errors import corrupt_if_refused

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class TokenizerBackend(Protocol):
    """What turns text into ids: the tokenizers library or SentencePiece, behind one face."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of text; special tokens spelled out in it become their ids, none are added."""
        ...

    def token(self, token_id: int) -> str | None:
        """Return the spelling of a token, None for an id without one."""
        ...

    def token_id(self, token: str) -> int | None:
        """Return the id of a spelling, None if there is none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerRules:
    """What a tokenizer does beyond its vocabulary.

    `bytes_of` gives the bytes of a token's spelling. `strip_leading_space` says that decoding drops the space which
    encoding put before the text. `prefix` and `suffix` are the ids that `add_special_tokens` puts around a text.
    `special_tokens` maps the names that chat templates use (`bos_token`, ...) to spellings.
    """

    bytes_of: Callable[[str], bytes]
    strip_leading_space: bool
    special_token_ids: frozenset[int]
    special_tokens: Mapping[str, str]
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()


class Tokenizer:
    """Text to token ids and back.

    Encoding equals the model's own tokenizer. Decoding joins the tokens' bytes and reads them as UTF-8, each broken
    sequence as one U+FFFD. (The tokenizers library replaces a whole run of SentencePiece byte tokens if any of it is
    broken; we keep what is sound in it, so that a stream never has to take text back.)

    Safe to use from several threads.
    """

    def __init__(self, backend: TokenizerBackend, rules: TokenizerRules) -> None:
        self._backend = backend
        self._rules = rules
        self._bytes: list[bytes | None] = [None] * backend.vocab_size

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read a Hugging Face folder: tokenizer.json, else tokenizer.model (needs the sentencepiece package).

        Raises:
            ModelNotFound: if the folder has neither, or sentencepiece is needed and not installed.
            CorruptModelFile: if the file cannot be parsed.
            UnsupportedModel: if it is neither byte-level BPE nor of SentencePiece's kind.
        """
        config = _read_tokenizer_config(folder / "tokenizer_config.json")
        json_path, spm_path = folder / "tokenizer.json", folder / "tokenizer.model"
        if json_path.is_file():
            return cls._from_json(json_path, config)
        if spm_path.is_file():
            return cls._from_sentencepiece(spm_path, config)
        raise ModelNotFound(f"{folder}: expected tokenizer.json or tokenizer.model, found neither")

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], where: str) -> Tokenizer:
        """Build the tokenizer that the metadata of a GGUF file describes.

        Raises:
            CorruptModelFile: if a key is missing, has the wrong type, or contradicts another one.
            UnsupportedModel: if the kind of tokenizer or its pre-tokenizer is none that we know.
        """
        from octavo_engine.text.gguf_tokenizer import GGUFVocabulary, build

        vocabulary = GGUFVocabulary.read(metadata, where)
        backend = _TokenizersBackend(build(vocabulary))
        byte_level = vocabulary.model == "gpt2"
        special = frozenset(vocabulary.special_ids)
        rules = TokenizerRules(
            bytes_of=bytes_of_byte_level if byte_level else bytes_of_sentencepiece,
            strip_leading_space=not byte_level and vocabulary.add_space_prefix,
            special_token_ids=special,
            special_tokens=vocabulary.special_tokens,
            prefix=_ids_of(backend, vocabulary.special_tokens.get("bos_token")) if vocabulary.add_bos else (),
            suffix=_ids_of(backend, vocabulary.special_tokens.get("eos_token")) if vocabulary.add_eos else (),
        )
        return cls(backend, rules)

    @classmethod
    def _from_json(cls, path: Path, config: Mapping[str, Any]) -> Tokenizer:
        from tokenizers import Tokenizer as Backend

        with corrupt_if_refused(f"{path}: expected a tokenizer of the tokenizers library"):
            inner = Backend.from_str(path.read_text(encoding="utf-8"))
            inner.no_truncation()
            inner.no_padding()
            spec = json.loads(inner.to_str())
            prefix, suffix = _template(inner)
        backend = _TokenizersBackend(inner)
        bytes_of, strip = _decoding_rules(spec.get("decoder"), path)
        special_tokens = _special_tokens(config)
        rules = TokenizerRules(
            bytes_of=bytes_of,
            strip_leading_space=strip,
            special_token_ids=frozenset(i for i, token in inner.get_added_tokens_decoder().items() if token.special),
            special_tokens=special_tokens,
            prefix=_adjust(prefix, config.get("add_bos_token"), _ids_of(backend, special_tokens.get("bos_token"))),
            suffix=_adjust(suffix, config.get("add_eos_token"), _ids_of(backend, special_tokens.get("eos_token"))),
        )
        return cls(backend, rules)

    @classmethod
    def _from_sentencepiece(cls, path: Path, config: Mapping[str, Any]) -> Tokenizer:
        from octavo_engine.text.sentencepiece_backend import SentencePieceBackend

        backend = SentencePieceBackend(path)
        special_tokens = {**backend.special_tokens, **_special_tokens(config)}
        rules = TokenizerRules(
            bytes_of=bytes_of_sentencepiece,
            strip_leading_space=backend.adds_space_prefix,
            special_token_ids=backend.special_token_ids,
            special_tokens=special_tokens,
            prefix=_ids_of(backend, special_tokens.get("bos_token")) if config.get("add_bos_token", True) else (),
            suffix=_ids_of(backend, special_tokens.get("eos_token")) if config.get("add_eos_token", False) else (),
        )
        return cls(backend, rules)

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id; the model's embedding may be padded beyond it."""
        return self._backend.vocab_size

    @property
    def special_token_ids(self) -> frozenset[int]:
        """The ids that `skip_special_tokens` leaves out."""
        return self._rules.special_token_ids

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Spellings by the names that chat templates use: `bos_token`, `eos_token`, `unk_token`, `pad_token`."""
        return self._rules.special_tokens

    @property
    def bos_token_ids(self) -> tuple[int, ...]:
        """The id of `bos_token`; empty if there is none."""
        return _ids_of(self._backend, self.special_tokens.get("bos_token"))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The id of `eos_token`; empty if there is none."""
        return _ids_of(self._backend, self.special_tokens.get("eos_token"))

    @property
    def strip_leading_space(self) -> bool:
        """Whether decoding from the start of a text drops one leading space."""
        return self._rules.strip_leading_space

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its spelling in the vocabulary, None if there is none."""
        return self._backend.token_id(token)

    def token(self, token_id: int) -> str | None:
        """Return a token's spelling in the vocabulary, None for an id without one."""
        return self._backend.token(token_id) if 0 <= token_id < self.vocab_size else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text.

        Special tokens that are spelled out in the text, as a chat template does, become their ids.
        `add_special_tokens` adds what the model expects around a text (begin of sequence, if any).
        """
        # A lone surrogate has no UTF-8 form, and the library would raise for it; JSON can bring one.
        ids = self._backend.encode(text.encode("utf-8", "surrogatepass").decode("utf-8", "replace"))
        return [*self._rules.prefix, *ids, *self._rules.suffix] if add_special_tokens else ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; ids without a token add nothing."""
        skipped = self.special_token_ids if skip_special_tokens else frozenset()
        data = b"".join([self.token_bytes(token_id) for token_id in token_ids if token_id not in skipped])
        text = codecs.decode(data, "utf-8", "replace")
        return text[1:] if self.strip_leading_space and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """Return the raw bytes of a token, a space before a word included; b"" for an id without a token."""
        if not 0 <= token_id < len(self._bytes):
            return b""
        known = self._bytes[token_id]
        if known is None:
            token = self._backend.token(token_id)
            known = self._bytes[token_id] = b"" if token is None else self._rules.bytes_of(token)
        return known


class _TokenizersBackend:
    """The tokenizers library's tokenizer as a TokenizerBackend."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.vocab_size: int = 1 + max(inner.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str) -> list[int]:
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def token(self, token_id: int) -> str | None:
        token: str | None = self._inner.id_to_token(token_id)
        return token

    def token_id(self, token: str) -> int | None:
        token_id: int | None = self._inner.token_to_id(token)
        return token_id


def _read_tokenizer_config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptModelFile(f"{path}: expected JSON: {error}") from error
    if not isinstance(config, dict):
        raise CorruptModelFile(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Read the named special tokens of a tokenizer_config.json; each is a string or an object with `content`."""
    found: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        spelling = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(spelling, str):
            found[name] = spelling
    return found


def _ids_of(backend: TokenizerBackend, token: str | None) -> tuple[int, ...]:
    token_id = None if token is None else backend.token_id(token)
    return () if token_id is None else (token_id,)


def _template(inner: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the library's post-processor puts before and after a text."""
    plain = inner.encode("a", add_special_tokens=False).ids
    full = inner.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return tuple(full[:start]), tuple(full[start + len(plain) :])
    return (), ()


def _adjust(ids: tuple[int, ...], wanted: Any, token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Follow `add_bos_token` or `add_eos_token` where tokenizer_config.json sets it, else the post-processor."""
    if wanted is True and not ids:
        return token_ids
    return () if wanted is False and ids == token_ids else ids


def _decoding_rules(decoder: Any, path: Path) -> tuple[Callable[[str], bytes], bool]:
    """Return how a token's spelling becomes bytes, and whether decoding strips the leading space."""
    steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    by_type = {step.get("type"): step for step in steps}
    if "ByteLevel" in by_type:
        return bytes_of_byte_level, False
    if "Metaspace" in by_type:
        return bytes_of_sentencepiece, by_type["Metaspace"].get("prepend_scheme", "always") != "never"
    if "ByteFallback" in by_type:
        return bytes_of_sentencepiece, by_type.get("Strip", {}).get("start", 0) > 0
    raise UnsupportedModel(
        f"{path}: decoder {sorted(map(str, by_type))} is not supported; byte-level BPE and SentencePiece kinds are"
    )
