"""Detokenizer: pieces that join to the whole, never half a character."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_engine.text.detokenizer import Detokenizer
from octavo_engine.text.tokenizer import Tokenizer
from octavo_engine.weights.source import GGUFSource


@pytest.fixture(scope="session")
def demo(demo_source: GGUFSource) -> Tokenizer:
    return demo_source.tokenizer()


@pytest.fixture(scope="session")
def spm() -> Tokenizer:
    """A SentencePiece vocabulary by hand: specials, all bytes, a few words with the space mark."""
    words = ["▁", "a", "b", "▁a", "▁b", "ab", "▁ab", "é", "▁日"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    types = [2, 3, 3] + [6] * 256 + [1] * len(words)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.zeros(len(tokens), np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return Tokenizer.from_gguf(metadata, "spm.gguf")


def pieces(tokenizer: Tokenizer, ids: list[int], skip: bool = True, continues: bool = False) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip, continues_prompt=continues)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@pytest.mark.model
@given(ids=st.lists(st.integers(0, 49151) | st.integers(17, 300), max_size=50), skip=st.booleans())
@settings(max_examples=400, deadline=None)
def test_pieces_of_any_ids_join_to_decode(demo: Tokenizer, ids: list[int], skip: bool) -> None:
    assert "".join(pieces(demo, ids, skip)) == demo.decode(ids, skip_special_tokens=skip)


@pytest.mark.model
@given(text=st.text(alphabet="aé日😀👩\u200d🇫 \n", max_size=30))
@settings(max_examples=150, deadline=None)
def test_no_piece_of_sound_text_holds_half_a_character(demo: Tokenizer, text: str) -> None:
    found = pieces(demo, demo.encode(text))
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)


@pytest.mark.model
def test_character_comes_with_its_last_byte(demo: Tokenizer) -> None:
    ids = demo.encode("😀")
    assert len(ids) > 1
    assert pieces(demo, ids) == [""] * (len(ids) - 1) + ["😀", ""]


@pytest.mark.model
def test_character_that_never_ends_becomes_one_replacement(demo: Tokenizer) -> None:
    ids = demo.encode("😀")[:-1]
    assert pieces(demo, ids) == [""] * len(ids) + ["\ufffd"]


@pytest.mark.model
def test_special_tokens_are_text_only_on_request(demo: Tokenizer) -> None:
    ids = demo.encode("<|im_start|>hi<|im_end|>")
    assert "".join(pieces(demo, ids)) == "hi"
    assert "".join(pieces(demo, ids, skip=False)) == "<|im_start|>hi<|im_end|>"


@pytest.mark.model
def test_ids_beyond_the_vocabulary_add_nothing(demo: Tokenizer) -> None:
    assert pieces(demo, [demo.vocab_size, 1 << 40]) == ["", "", ""]


@given(data=st.data(), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_sentencepiece_pieces_join_to_decode(spm: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, spm.vocab_size - 1) | st.integers(250, spm.vocab_size - 1), max_size=30))
    assert "".join(pieces(spm, ids, skip)) == spm.decode(ids, skip_special_tokens=skip)


def test_sentencepiece_space_is_dropped_at_the_start_only(spm: Tokenizer) -> None:
    ids = [spm.token_id(token) or 0 for token in ("▁a", "▁b")]
    assert pieces(spm, ids) == ["a", " b", ""]
    assert pieces(spm, ids, continues=True) == [" a", " b", ""]
    assert pieces(spm, [1, *ids]) == ["", "a", " b", ""]


def test_sentencepiece_bytes_make_a_character(spm: Tokenizer) -> None:
    ids = [3 + byte for byte in "é".encode()]
    assert pieces(spm, ids) == ["", "é", ""]


def test_module_loads_without_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, octavo_engine.text.output, octavo_engine.text.chat_template, octavo_engine.weights.source as s\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'sentencepiece', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@given(st.data())
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("name", ["demo", "spm"])
def test_tokens_pushed_together_give_the_text_of_one_after_the_other(name: str, request, data: st.DataObject) -> None:
    tokenizer = request.getfixturevalue(name)
    ids = data.draw(st.lists(st.integers(0, min(tokenizer.vocab_size, 400) - 1), max_size=40))
    continues = data.draw(st.booleans())
    cut = data.draw(st.integers(0, len(ids)))
    detokenizer = Detokenizer(tokenizer, continues_prompt=continues)
    together = [detokenizer.push_all(ids[:cut]), detokenizer.push_all(ids[cut:]), detokenizer.finish()]
    assert "".join(together) == "".join(pieces(tokenizer, ids, continues=continues))
