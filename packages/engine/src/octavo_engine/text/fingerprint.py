"""fingerprint: one hash for what a tokenizer does, so that two of them can be compared."""

from __future__ import annotations

from hashlib import blake2b

from octavo_engine.text.tokenizer import Tokenizer

# Words of several scripts, numbers, code and spaces: vocabularies that are equal may still be merged in another order.
_SAMPLE = "The quick brown fox's 12345 jumps,  naïvely — über 3.14!\n\tdef f(x): return x**2  # Привет, 你好 🙂\r\n\n"


def fingerprint(tokenizer: Tokenizer) -> bytes:
    """Return 32 bytes that are equal for tokenizers with one vocabulary, special tokens and way to cut a sample."""
    total = blake2b(digest_size=32)
    for token_id in range(tokenizer.vocab_size):
        spelling = (tokenizer.token(token_id) or "").encode("utf-8", "surrogatepass")
        total.update(len(spelling).to_bytes(4, "little") + spelling)
    ids = tokenizer.encode(_SAMPLE)
    parts = (sorted(tokenizer.special_token_ids), sorted(tokenizer.special_tokens.items()), ids, tokenizer.decode(ids))
    total.update(repr(parts).encode("utf-8", "surrogatepass"))
    return total.digest()
