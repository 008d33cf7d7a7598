"""Adapters in GGUF files, written by the gguf package: what is read of sound ones, and what is said of the others."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="adapters are tensors")
gguf = pytest.importorskip("gguf", reason="the gguf package writes the files")

from octavo_engine import LLM, SamplingParams
from octavo_engine.adapters.info import AdapterTarget
from octavo_engine.adapters.read import AdapterReader
from octavo_engine.errors import InvalidAdapter
from octavo_engine.weights.source import open_source

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HEADS = {"attn_q": 4, "attn_k": 2}

Checkpoint = tuple[Path, Any]
Write = Callable[..., dict[str, Any]]
Matrices = dict[str, tuple[Any, Any]]


def gguf_name(module: str) -> str:
    _, _, layer, name = module.split(".", 3)
    return f"blk.{layer}.{NAMES[name]}.weight"


def in_rotary_order(b: np.ndarray, num_heads: int) -> np.ndarray:
    """Put the rows that rotate together side by side, as the converter of llama.cpp does."""
    return b.reshape(num_heads, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)


def tensors_of(matrices: Matrices) -> dict[str, np.ndarray]:
    """Return an adapter's tensors as a GGUF file has them."""
    tensors = {}
    for module, (a, b) in matrices.items():
        base = gguf_name(module)
        heads = HEADS.get(base.split(".")[2])
        tensors[f"{base}.lora_a"] = a.numpy()
        tensors[f"{base}.lora_b"] = b.numpy() if heads is None else in_rotary_order(b.numpy(), heads)
    return tensors


def write_gguf(path: Path, tensors: dict[str, np.ndarray], alpha: float = 8.0, **changes: Any) -> Path:
    """Write a file; `changes` to its keys have `__` for a dot, and None leaves a key out."""
    architecture = changes.pop("general__architecture", "llama")
    writer = gguf.GGUFWriter(path, architecture)
    keys = {"general__type": "adapter", "adapter__type": "lora", "adapter__lora__alpha": alpha, **changes}
    for key, value in keys.items():
        if isinstance(value, float):
            writer.add_float32(key.replace("__", "."), value)
        elif value is not None:
            writer.add_string(key.replace("__", "."), value)
    for name, values in tensors.items():
        as_q8 = name.endswith("ffn_up.weight.lora_a") and values.shape[1] % 32 == 0 and values.dtype == np.float16
        if as_q8:
            packed = gguf.quants.quantize(values.astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def reader_for(folder: Path, model: Any, max_rank: int = 16) -> AdapterReader:
    targets = {
        name: AdapterTarget(linear.in_features, linear.out_features, linear.bias is not None)
        for name, linear in model.named_modules()
        if isinstance(linear, torch.nn.Linear) and name != "lm_head"
    }
    config = open_source(str(folder)).config
    return AdapterReader(targets, config=config, max_rank=max_rank, dtype=torch.float32)


def test_a_file_and_a_folder_of_the_same_adapter_give_the_same_matrices(
    tiny_llama: Checkpoint, write_adapter: Write, tmp_path: Path
) -> None:
    folder, model = tiny_llama
    read = reader_for(folder, model)
    matrices = write_adapter(tmp_path / "peft", model, seed=1, ranks={"q_proj": 8, "up_proj": 2}, rank_pattern={
        "q_proj": 8, "up_proj": 2,
    })  # fmt: skip
    expected = read(str(tmp_path / "peft"))
    found = read(str(write_gguf(tmp_path / "a.gguf", tensors_of(matrices))))
    assert found.modules.keys() == expected.modules.keys()
    assert len(found.modules) == 14
    for name, module in found.modules.items():
        assert torch.equal(module.a, expected.modules[name].a)
        assert torch.equal(module.b, expected.modules[name].b)
        assert module.scale == expected.modules[name].scale
    assert found.rank == 8
    assert found.digest == read(str(write_gguf(tmp_path / "b.gguf", tensors_of(matrices)))).digest
    assert found.digest != read(str(write_gguf(tmp_path / "c.gguf", tensors_of(matrices), 9.0))).digest
    assert read(str(write_gguf(tmp_path / "d.gguf", tensors_of(matrices), 0.0))).modules[name].scale == 1.0
    matrices[name][0][0, 0] += 1
    assert found.digest != read(str(write_gguf(tmp_path / "e.gguf", tensors_of(matrices)))).digest


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="too slow in the interpreter")
def test_files_are_served_beside_folders_as_if_merged_into_the_base(
    tiny_llama: Checkpoint, write_adapter: Write, merged: Callable[..., Any], tmp_path: Path
) -> None:
    folder, model = tiny_llama
    peft = write_adapter(tmp_path / "peft", model, seed=1)
    file = write_adapter(tmp_path / "other", model, seed=2, dtype="float16")
    write_gguf(tmp_path / "a.gguf", tensors_of(file))
    for name, (a, _) in file.items():  # what Q8_0 made of it
        if name.endswith("up_proj"):
            packed = gguf.quants.quantize(a.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
            a.copy_(torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)))
    models = {None: model, "peft": merged(model, peft), "a": merged(model, file)}
    source = random.Random(4)
    prompts = [[source.randrange(131) for _ in range(source.randint(3, 20))] for _ in range(6)]
    order = ["a", None, "peft"] * 2
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM(str(folder), show_progress=False, num_blocks=400, enable_lora=True) as llm:
        llm.load_adapter("peft", str(tmp_path / "peft"))
        assert llm.load_adapter("a", str(tmp_path / "a.gguf")).rank == 4
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, adapter=order)
        with pytest.raises(InvalidAdapter, match="expected the magic number"):
            llm.load_adapter("b", str(tmp_path / "peft" / "adapter_config.json"))
    for name, prompt, output in zip(order, prompts, outputs, strict=True):
        answer = output.outputs[0].token_ids
        with torch.inference_mode():
            logits = models[name](torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert (logits.amax(-1) - logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]).max() <= 2e-3


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


UP = "blk.1.ffn_up.weight"
Tensors = dict[str, np.ndarray]
WRONG: dict[str, tuple[Callable[[Tensors], object], dict[str, Any], str]] = {
    "a model": (lambda _: None, {"general__type": "model"}, "'general.type': expected 'adapter', found 'model'"),
    "another architecture": (
        lambda _: None,
        {"general__architecture": "qwen2"},
        "'general.architecture': expected 'llama', found 'qwen2'",
    ),
    "a control vector": (lambda _: None, {"adapter__type": "cvec"}, "'adapter.type': expected 'lora', found 'cvec'"),
    "no alpha": (lambda _: None, {"adapter__lora__alpha": None}, "'adapter.lora.alpha': expected a number from 0 on"),
    "an alpha below 0": (lambda _: None, {"adapter__lora__alpha": -1.0}, "from 0 on, found -1.0"),
    "an alpha that is none": (lambda _: None, {"adapter__lora__alpha": float("nan")}, "from 0 on, found nan"),
    "an alpha of text": (lambda _: None, {"adapter__lora__alpha": "8"}, "from 0 on, found '8'"),
    "invocation tokens": (
        lambda _: None,
        {"adapter__alora__invocation_tokens": "x"},
        "'adapter.alora.invocation_tokens': expected none",
    ),
    "no B": (lambda t: t.pop(f"{UP}.lora_b"), {}, f"expected a tensor '{UP}.lora_b' beside '{UP}.lora_a', found none"),
    "no A": (lambda t: t.pop(f"{UP}.lora_a"), {}, f"expected a tensor '{UP}.lora_a' beside '{UP}.lora_b', found none"),
    "another kind": (
        lambda t: t.update({"blk.0.attn_norm.weight": np.ones(64, np.float32)}),
        {},
        "tensor 'blk.0.attn_norm.weight' is of a kind that is not served",
    ),
    "an embedding": (
        lambda t: t.update({f"token_embd.weight.lora_{k}": np.ones((4, 4), np.float32) for k in "ab"}),
        {},
        "is for 'token_embd.weight', which is none of the model's linears",
    ),
    "a layer the model lacks": (
        lambda t: t.update({f"blk.7.ffn_up.weight.lora_{k}": np.ones((4, 4), np.float32) for k in "ab"}),
        {},
        "is for 'blk.7.ffn_up.weight', which is none",
    ),
    "another size": (
        lambda t: t.update({f"{UP}.lora_a": np.ones((4, 32), np.float32)}),
        {},
        r"'blk.1.ffn_up.weight.lora_a': expected shape \[4, 64\].*found \[4, 32\]",
    ),
    "another rank": (
        lambda t: t.update({f"{UP}.lora_b": np.ones((80, 3), np.float32)}),
        {},
        r"'blk.1.ffn_up.weight.lora_b': expected shape \[80, 4\].*found \[80, 3\]",
    ),
    "one dimension": (
        lambda t: t.update({f"{UP}.lora_b": np.ones(320, np.float32)}),
        {},
        r"expected shape \[80, 4\].*found \[320\]",
    ),
    "not finite": (
        lambda t: t.update({f"{UP}.lora_b": np.full((80, 4), np.inf, np.float32)}),
        {},
        "'blk.1.ffn_up.weight.lora_b': expected finite numbers",
    ),
    "a high rank": (
        lambda t: t.update({f"{UP}.lora_a": np.ones((17, 64), np.float32), f"{UP}.lora_b": np.ones((80, 17), "f4")}),
        {},
        "'blk.1.ffn_up.weight' has rank 17, at most 16 is served; raise max_lora_rank",
    ),
    "no tensors": (lambda t: t.clear(), {}, "expected LoRA matrices, found no tensors"),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_are_wrong_or_not_served_are_refused_with_what_is_wrong(
    tiny_llama: Checkpoint, write_adapter: Write, tmp_path: Path, case: str
) -> None:
    folder, model = tiny_llama
    change, keys, message = WRONG[case]
    tensors = tensors_of(write_adapter(tmp_path / "peft", model, seed=1, names=("up_proj",)))
    change(tensors)
    path = write_gguf(tmp_path / "a.gguf", tensors, **keys)
    with pytest.raises(InvalidAdapter, match=message) as caught:
        reader_for(folder, model)(str(path))
    assert str(path) in str(caught.value)


def test_damaged_files_and_files_of_something_else_are_refused(
    tiny_llama: Checkpoint, write_adapter: Write, tmp_path: Path
) -> None:
    folder, model = tiny_llama
    path = write_gguf(tmp_path / "a.gguf", tensors_of(write_adapter(tmp_path / "peft", model, seed=1)))
    read = reader_for(folder, model)
    _truncate(path)
    with pytest.raises(InvalidAdapter, match=r"a\.gguf: tensor .*download or convert the file again"):
        read(str(path))
    (tmp_path / "text").write_text(json.dumps({"r": 4}))
    with pytest.raises(InvalidAdapter, match="expected the magic number"):
        read(str(tmp_path / "text"))
    with pytest.raises(InvalidAdapter, match="or a GGUF file, found none"):
        read(str(tmp_path / "nothing.gguf"))
