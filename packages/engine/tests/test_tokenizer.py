"""Tokenizer: equal to the models' own tokenizers, from each kind of file."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_engine.errors import CorruptModelFile, ModelNotFound, UnsupportedModel
from octavo_engine.text.tokenizer import Tokenizer
from octavo_engine.weights.gguf import GGUFFile
from octavo_engine.weights.source import GGUFSource

MakeGGUF = Callable[..., Path]

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "What is the capital of France?",
    "  two spaces,\ttabs\t\tand\n\n\nlines \r\n end  ",
    "it's we'll I'D they've can't",
    "naïve café — “quotes” … §¶",
    "日本語のテキスト。中文字符, 한국어 텍스트",
    "emoji 😀👩‍👩‍👧‍👦🇫🇷 and combining e\u0301",
    "العربية עברית हिन्दी ไทย",
    "1234567890 3.14159 1,000,000 0x1F 2nd",
    "def f(x: int) -> int:\n    return x ** 2  # squared\n\n\nclass A:\n\tpass\n",
    '{"a": [1, 2, {"b": null}], "c": "\\u00e9"}',
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_start|> <|endoftext|>x<|im_end",
    "a" * 300,
    "\x00\x01\x7f\u200b\ufeff\ufffd",
]


@pytest.fixture(scope="session")
def demo(demo_source: GGUFSource) -> Tokenizer:
    return demo_source.tokenizer()


@pytest.fixture(scope="session")
def original_demo(transformers_demo: Any) -> Any:
    """The same vocabulary split as SmolLM2's own tokenizer.json does; Transformers leaves the digits out for GGUF."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import pre_tokenizers

    backend = Backend.from_str(transformers_demo.backend_tokenizer.to_str())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    return backend


@pytest.mark.model
@pytest.mark.parametrize("text", TEXTS)
def test_demo_encodes_and_decodes_as_transformers(demo: Tokenizer, transformers_demo: Any, text: str) -> None:
    ids = demo.encode(text)
    assert ids == transformers_demo(text)["input_ids"]
    for skip in (True, False):
        assert demo.decode(ids, skip_special_tokens=skip) == transformers_demo.decode(ids, skip_special_tokens=skip)


# Where Transformers departs from the model's own tokenizer: it leaves the splitting of digits out when it reads GGUF.
@pytest.mark.model
def test_spaces_before_a_digit_stay_together_as_in_training(demo: Tokenizer) -> None:
    assert [demo.token(i) for i in demo.encode("a  1 22")] == ["a", "ĠĠ", "1", "Ġ", "2", "2"]


@pytest.mark.model
@given(text=st.text(max_size=80) | st.text(alphabet=" \n\t\r1½aé's😀<|>im_startend", max_size=80))
@settings(max_examples=300, deadline=None)
def test_demo_encodes_any_text_as_the_original(demo: Tokenizer, original_demo: Any, text: str) -> None:
    assert demo.encode(text) == original_demo.encode(text, add_special_tokens=False).ids


@pytest.mark.model
@given(ids=st.lists(st.integers(0, 49151), max_size=40))
@settings(max_examples=300, deadline=None)
def test_demo_decodes_any_ids_as_the_library(demo: Tokenizer, original_demo: Any, ids: list[int]) -> None:
    for skip in (True, False):
        assert demo.decode(ids, skip_special_tokens=skip) == original_demo.decode(ids, skip_special_tokens=skip)


@pytest.mark.model
def test_demo_knows_its_special_tokens(demo: Tokenizer) -> None:
    assert demo.vocab_size == 49152
    assert demo.special_token_ids == frozenset(range(17))
    assert (demo.bos_token_ids, demo.eos_token_ids) == ((1,), (2,))
    assert demo.special_tokens["eos_token"] == "<|im_end|>"
    assert demo.token_id("<|im_start|>") == 1
    assert demo.token_id("no such token") is None


@pytest.mark.model
def test_token_bytes_are_raw(demo: Tokenizer) -> None:
    ids = demo.encode(" é😀")
    assert b"".join(map(demo.token_bytes, ids)) == " é😀".encode()
    assert demo.token_bytes(1) == b"<|im_start|>"
    assert demo.token_bytes(demo.vocab_size) == demo.token_bytes(-1) == b""
    assert demo.token(demo.vocab_size) is None


@pytest.mark.model
def test_lone_surrogate_is_replaced(demo: Tokenizer) -> None:
    assert demo.decode(demo.encode("a\ud800b")).startswith("a\ufffd")


@pytest.mark.parametrize("pre", ["gpt-2", "default", "llama-bpe", "qwen2"])
def test_pre_tokenizers_split_as_transformers(make_gguf: MakeGGUF, transformers_with_gguf: Any, pre: str) -> None:
    path = make_gguf(pre=pre)
    expected = transformers_with_gguf.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    found = Tokenizer.from_gguf(GGUFFile(path).metadata, str(path))
    texts = [
        "hello world",
        "12345 123 1",
        "th 12\n\n\nx  th",
        "HE'LL he'll",
        "a\r\n b!!\n",
        "<think>hello</think>",
        *TEXTS,
    ]
    for text in texts:
        ids = expected(text, add_special_tokens=False)["input_ids"]
        assert found.encode(text, add_special_tokens=False) == ids, text


@pytest.mark.parametrize(
    ("text", "pre", "tokens"),
    [
        ("1234", "smollm", ["1", "2", "3", "4"]),
        ("1234", "gpt-2", ["123", "4"]),
        ("1234", "llama-bpe", ["123", "4"]),
        ("1234", "qwen2", ["1", "2", "3", "4"]),
        (" world", "qwen2", ["Ġwor", "l", "d"]),
    ],
)
def test_numbers_are_split_as_the_model_was_trained(
    make_gguf: MakeGGUF, text: str, pre: str, tokens: list[str]
) -> None:
    tokenizer = GGUFSource(make_gguf(pre=pre)).tokenizer()
    assert [tokenizer.token(i) for i in tokenizer.encode(text, add_special_tokens=False)] == tokens


@pytest.mark.parametrize(
    ("pre", "flag", "expected"),
    [("smollm", None, []), ("smollm", True, [1]), ("llama-bpe", None, [1]), ("llama-bpe", False, [])],
)
def test_begin_of_sequence_is_added_where_the_file_says(
    make_gguf: MakeGGUF, pre: str, flag: bool | None, expected: list[int]
) -> None:
    tokenizer = GGUFSource(make_gguf({"tokenizer.ggml.add_bos_token": flag}, pre=pre)).tokenizer()
    assert tokenizer.encode("") == expected
    assert tokenizer.encode("", add_special_tokens=False) == []


def test_end_of_sequence_is_added_where_the_file_says(make_gguf: MakeGGUF) -> None:
    assert GGUFSource(make_gguf({"tokenizer.ggml.add_eos_token": True})).tokenizer().encode("") == [2]


def test_user_defined_tokens_stay_whole_and_are_text(make_gguf: MakeGGUF) -> None:
    tokenizer = GGUFSource(make_gguf()).tokenizer()
    ids = tokenizer.encode("<think>hello")
    assert len(ids) == 2
    assert tokenizer.decode(ids) == "<think>hello"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, UnsupportedModel, "tokenizer.ggml.model 't5' is not supported"),
        ({"tokenizer.ggml.model": None}, CorruptModelFile, "model: expected a string, found nothing"),
        (
            {"tokenizer.ggml.pre": "tekken"},
            UnsupportedModel,
            "tokenizer.ggml.pre 'tekken' is not supported; these are: ",
        ),
        ({"tokenizer.ggml.merges": None}, CorruptModelFile, "merges: expected a list of strings, found nothing"),
        ({"tokenizer.ggml.merges": ["ab"]}, CorruptModelFile, "merges: expected two tokens with a space between"),
        ({"tokenizer.ggml.merges": ["q zz"]}, CorruptModelFile, "vocabulary and merges do not fit"),
        ({"tokenizer.ggml.token_type": ["i32", [1]]}, CorruptModelFile, "token_type: expected 273 numbers"),
        ({"tokenizer.ggml.eos_token_id": 9999}, CorruptModelFile, "eos_token_id: expected an id below 273, found 9999"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, CorruptModelFile, "found 1|expected 2 numbers"),
        ({"tokenizer.ggml.add_bos_token": 1}, CorruptModelFile, "add_bos_token: expected true or false, found 1"),
    ],
)
def test_wrong_tokenizer_keys_are_named(
    make_gguf: MakeGGUF, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    file = GGUFFile(make_gguf(changes))
    with pytest.raises(error, match=message):
        Tokenizer.from_gguf(file.metadata, "x.gguf")


SPM_TEXTS = [
    "hello world",
    " leading and  double   spaces ",
    "unseen: 日本 é 😀",
    "the quick brown fox\njumps\tover",
    "123 456",
    "",
]


@pytest.fixture(scope="session")
def sentencepiece_model(sentencepiece_folder: Path) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))


@pytest.fixture(scope="session")
def sentencepiece_gguf(sentencepiece_model: Any) -> Tokenizer:
    """The same vocabulary as a GGUF file would have it."""
    model, ids = sentencepiece_model, range(sentencepiece_model.vocab_size())
    types = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": np.array([model.get_score(i) for i in ids], np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return Tokenizer.from_gguf(metadata, "spm.gguf")


@pytest.mark.parametrize("text", SPM_TEXTS)
def test_sentencepiece_in_gguf_equals_sentencepiece(
    sentencepiece_gguf: Tokenizer, sentencepiece_model: Any, text: str
) -> None:
    ids = sentencepiece_gguf.encode(text)
    assert ids == [1, *sentencepiece_model.encode(text)]
    assert sentencepiece_gguf.decode(ids) == sentencepiece_model.decode(ids) == text


@pytest.mark.parametrize("text", SPM_TEXTS)
def test_tokenizer_model_equals_sentencepiece(sentencepiece_folder: Path, sentencepiece_model: Any, text: str) -> None:
    tokenizer = Tokenizer.from_folder(sentencepiece_folder)
    ids = tokenizer.encode(text)
    assert ids == [1, *sentencepiece_model.encode(text)]
    assert tokenizer.decode(ids) == text


def test_endless_sentencepiece_token_is_refused() -> None:
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["a" * 1025],
        "tokenizer.ggml.scores": np.zeros(1, np.float32),
    }
    with pytest.raises(CorruptModelFile, match="tokens of at most 1024 characters, found 'one of 1025'"):
        Tokenizer.from_gguf(metadata, "spm.gguf")


def test_tokenizer_model_recognises_control_tokens(sentencepiece_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(sentencepiece_folder)
    ids = tokenizer.encode("<s>hello</s>", add_special_tokens=False)
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert tokenizer.token_id("<s>") == 1
    assert tokenizer.token_id("no such piece") is None


def test_sentencepiece_keeps_sound_characters_beside_broken_bytes(sentencepiece_gguf: Tokenizer) -> None:
    ids = [sentencepiece_gguf.token_id(f"<0x{byte:02X}>") for byte in b"\xc3\xa9\xe6\x97x"]
    assert sentencepiece_gguf.decode([i for i in ids if i is not None]) == "é\ufffdx"


@pytest.mark.model
def test_tokenizer_json_equals_the_file_it_was_saved_from(demo: Tokenizer, original_demo: Any, tmp_path: Path) -> None:
    original_demo.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert [tokenizer.encode(text) for text in TEXTS] == [demo.encode(text) for text in TEXTS]
    assert tokenizer.special_token_ids == demo.special_token_ids
    assert tokenizer.eos_token_ids == (2,)


def _folder(path: Path, *, bos_in_template: bool, config: dict[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, processors

    backend = Backend(models.BPE(vocab={"a": 0, "<s>": 1}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    if bos_in_template:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", **config}))
    return Tokenizer.from_folder(path)


@pytest.mark.parametrize(
    ("bos_in_template", "config", "expected"),
    [
        (True, {}, [1, 0]),
        (True, {"add_bos_token": False}, [0]),
        (False, {}, [0]),
        (False, {"add_bos_token": True}, [1, 0]),
        (True, {"add_bos_token": True}, [1, 0]),
    ],
)
def test_tokenizer_config_decides_about_begin_of_sequence(
    tmp_path: Path, bos_in_template: bool, config: dict[str, Any], expected: list[int]
) -> None:
    assert _folder(tmp_path, bos_in_template=bos_in_template, config=config).encode("a") == expected


def test_folder_without_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"expected tokenizer\.json or tokenizer\.model, found neither"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_damaged_tokenizer_file_is_corrupt(tmp_path: Path, name: str) -> None:
    if name == "tokenizer.model":
        pytest.importorskip("sentencepiece", reason="SentencePiece reads the file")
    (tmp_path / name).write_bytes(b"{ no tokenizer")
    with pytest.raises(CorruptModelFile, match=re.escape(name)):
        Tokenizer.from_folder(tmp_path)


def test_panic_of_the_library_is_a_corrupt_file(tmp_path: Path) -> None:
    _folder(tmp_path, bos_in_template=True, config={})
    path = tmp_path / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["post_processor"]["special_tokens"] = {"other": {"id": "other", "ids": [1], "tokens": ["<s>"]}}
    path.write_text(json.dumps(spec))
    with pytest.raises(CorruptModelFile, match=r"tokenizer\.json: expected a tokenizer of the tokenizers library: "):
        Tokenizer.from_folder(tmp_path)


def test_unknown_decoder_is_unsupported(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    backend = Backend(models.WordPiece(vocab={"[UNK]": 0}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedModel, match=r"decoder \['WordPiece'\] is not supported"):
        Tokenizer.from_folder(tmp_path)
