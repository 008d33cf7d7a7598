"""The alphabet in which byte-level BPE spells bytes, and from it the bytes of a token's spelling.

GPT-2's vocabulary writes every byte as one printable character: those of Latin-1 that are printable stand for
themselves, the other 68 bytes for the characters from U+0100 on (a space is `Ġ`).
"""

from __future__ import annotations

import re

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = tuple(byte for byte in range(256) if byte not in frozenset(_PRINTABLE))

BYTE_OF_CHAR: dict[str, int] = {
    **{chr(byte): byte for byte in _PRINTABLE},
    **{chr(256 + i): byte for i, byte in enumerate(_OTHERS)},
}
CHAR_OF_BYTE: dict[int, str] = {byte: char for char, byte in BYTE_OF_CHAR.items()}

SPACE_MARK = "\u2581"
"""The character that stands for a space in a SentencePiece vocabulary."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def spell(text: str) -> str:
    """Return text as byte-level BPE spells it."""
    return "".join(CHAR_OF_BYTE[byte] for byte in text.encode("utf-8"))


def bytes_of_byte_level(token: str) -> bytes:
    """Return the bytes of a byte-level token; one with a character outside the alphabet stands for itself."""
    try:
        return bytes([BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode("utf-8")


def bytes_of_sentencepiece(token: str) -> bytes:
    """Return the bytes of a SentencePiece token: `<0xE4>` is one byte, the space mark is a space."""
    match = _BYTE_TOKEN.fullmatch(token)
    if match is not None:
        return bytes([int(match[1], 16)])
    return token.replace(SPACE_MARK, " ").encode("utf-8")
