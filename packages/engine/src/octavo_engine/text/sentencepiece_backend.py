"""SentencePieceBackend: a tokenizer.model file, read by the sentencepiece package; tokenizer.json goes before it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octavo_engine.errors import CorruptModelFile, ModelNotFound
from octavo_engine.text.byte_alphabet import SPACE_MARK


class SentencePieceBackend:
    """A TokenizerBackend on SentencePiece; control tokens spelled out in a text are recognised.

    Raises:
        ModelNotFound: if the sentencepiece package is not installed.
        CorruptModelFile: if the file is no SentencePiece model.
    """

    def __init__(self, path: Path) -> None:
        self._model = _load(path)
        self.vocab_size: int = self._model.vocab_size()
        ids = range(self.vocab_size)
        self.special_token_ids = frozenset(i for i in ids if self._model.is_control(i) or self._model.is_unknown(i))
        self.special_tokens = dict(self._named_tokens())
        spellings = sorted((self._model.id_to_piece(i) for i in self.special_token_ids), key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, spellings)) + ")")
        self._special_ids = {self._model.id_to_piece(i): i for i in self.special_token_ids}
        self.adds_space_prefix = self._model.encode("a", out_type=str)[0].startswith(SPACE_MARK)

    def _named_tokens(self) -> Iterator[tuple[str, str]]:
        ids = {"bos_token": self._model.bos_id(), "eos_token": self._model.eos_id()}
        ids |= {"unk_token": self._model.unk_id(), "pad_token": self._model.pad_id()}
        for name, token_id in ids.items():
            if token_id >= 0:
                yield name, self._model.id_to_piece(token_id)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._special.split(text):
            if part in self._special_ids:
                ids.append(self._special_ids[part])
            elif part:
                ids.extend(self._model.encode(part))
        return ids

    def token(self, token_id: int) -> str | None:
        return str(self._model.id_to_piece(token_id))

    def token_id(self, token: str) -> int | None:
        token_id = int(self._model.piece_to_id(token))
        return token_id if self._model.id_to_piece(token_id) == token else None


def _load(path: Path) -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise ModelNotFound(f"{path}: reading this tokenizer needs `pip install sentencepiece`") from error
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise CorruptModelFile(f"{path}: expected a SentencePiece model: {error}") from error
