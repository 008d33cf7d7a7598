"""ModelConfig: the same sizes from config.json, old and new, and from GGUF; contradictions named."""

from typing import Any

import pytest

from octavo_engine.errors import CorruptModelFile, EngineError, UnsupportedModel
from octavo_engine.models.config import SUPPORTED_ARCHITECTURES, ModelConfig, RopeConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "hidden_act": "silu",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
GGUF = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 256,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.eot_token_id": 3,
}


def from_hf(**changes: Any) -> ModelConfig:
    values = {key: value for key, value in {**LLAMA, **changes}.items() if value is not ...}
    return ModelConfig.from_hf(values, "config.json")


def from_gguf(changes: dict[str, Any] | None = None, tensors: tuple[str, ...] = (), **options: Any) -> ModelConfig:
    values = {key: value for key, value in {**GGUF, **(changes or {})}.items() if value is not ...}
    return ModelConfig.from_gguf(values, tensors, "x.gguf", vocab_size=1000, **options)


def test_both_kinds_of_file_give_the_same_config() -> None:
    expected = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=500000.0),
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        max_position_embeddings=256,
        sliding_window=None,
        bos_token_ids=(1,),
        eos_token_ids=(2, 3),
        dtype="float32",
        hidden_act="silu",
    )
    assert from_hf(rope_theta=500000.0, tie_word_embeddings=True) == expected
    assert from_gguf() == expected


def test_rope_of_transformers_5_and_of_older_files_agree() -> None:
    new = from_hf(rope_parameters={**LLAMA3_ROPE, "rope_theta": 500000.0})
    old = from_hf(rope_theta=500000.0, rope_scaling=LLAMA3_ROPE)
    assert new == old
    assert new.rope == RopeConfig(
        kind="llama3",
        theta=500000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=128,
    )


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_linear_rope_under_both_of_its_names(key: str) -> None:
    assert from_hf(rope_scaling={key: "linear", "factor": 2.0}).rope == RopeConfig(kind="linear", factor=2.0)


def test_yarn_without_its_own_length_uses_the_models() -> None:
    rope = from_hf(rope_scaling={"rope_type": "yarn", "factor": 4.0}).rope
    assert rope == RopeConfig(kind="yarn", factor=4.0, original_max_position_embeddings=256)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"llama.rope.scaling.type": "none"}, RopeConfig(theta=500000.0)),
        ({"llama.rope.scale_linear": 4.0}, RopeConfig(kind="linear", theta=500000.0, factor=4.0)),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
            RopeConfig(kind="linear", theta=500000.0, factor=2.0),
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 2.0,
                "llama.rope.scaling.original_context_length": 128,
            },
            RopeConfig(kind="yarn", theta=500000.0, factor=2.0, original_max_position_embeddings=128),
        ),
    ],
    ids=["none", "old-linear", "linear", "yarn"],
)
def test_gguf_rope_scaling(keys: dict[str, Any], expected: RopeConfig) -> None:
    assert from_gguf(keys).rope == expected


def test_gguf_tensors_tell_ties_and_biases() -> None:
    config = from_gguf(tensors=("output.weight", "blk.0.attn_q.bias", "blk.0.ffn_gate.bias"))
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (False, True, True)


def test_head_dim_of_its_own_is_kept() -> None:
    assert from_hf(head_dim=32).head_dim == 32


def test_model_type_stands_in_for_missing_architectures() -> None:
    assert from_hf(architectures=...).architecture == "LlamaForCausalLM"


def test_dtype_is_read_under_both_of_its_names() -> None:
    assert from_hf(torch_dtype="bfloat16").dtype == from_hf(dtype="bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"architectures": ["BertModel"]},
            UnsupportedModel,
            "architecture 'BertModel' is not supported; these are: Llama",
        ),
        ({"architectures": ..., "model_type": "bert"}, UnsupportedModel, "architecture 'bert' is not supported"),
        ({"hidden_size": -64}, CorruptModelFile, "hidden_size: expected an integer from 1 to 2147483647, found -64"),
        ({"hidden_size": True}, CorruptModelFile, "hidden_size: expected an integer"),
        ({"vocab_size": ...}, CorruptModelFile, "vocab_size: expected an integer .* found nothing"),
        ({"hidden_size": 65}, CorruptModelFile, "expected a hidden size that divides by 4 heads, found 65"),
        ({"num_key_value_heads": 3}, CorruptModelFile, "expected heads a multiple of KV heads, found 4/3"),
        ({"head_dim": 15}, CorruptModelFile, "expected an even head dimension, found 15"),
        ({"rms_norm_eps": float("nan")}, CorruptModelFile, "rms_norm_eps: expected a positive number"),
        ({"attention_bias": "yes"}, CorruptModelFile, "attention_bias: expected true or false, found 'yes'"),
        ({"eos_token_id": 1000}, CorruptModelFile, "expected token ids below vocab_size 1000, found 1000"),
        ({"eos_token_id": "x"}, CorruptModelFile, "eos_token_id: expected a token id or a list of them"),
        ({"hidden_act": "gelu"}, UnsupportedModel, "hidden_act 'gelu' is not supported; silu is"),
        ({"dtype": "int8"}, UnsupportedModel, "dtype 'int8' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, UnsupportedModel, "rope_type 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "factors"}}, UnsupportedModel, "rope_type 'factors' is not supported"),
        (
            {"rope_scaling": {"rope_type": "linear"}},
            CorruptModelFile,
            "factor: expected a positive number, found nothing",
        ),
        ({"rope_scaling": 5}, CorruptModelFile, "expected rope parameters as an object, found 5"),
        ({"rope_theta": 0}, CorruptModelFile, "rope_theta: expected a positive number, found 0"),
        (
            {"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 4.0}},
            CorruptModelFile,
            "low_freq_factor: expected a number below high_freq_factor 4, found 4.0",
        ),
        (
            {"rope_scaling": {**LLAMA3_ROPE, "original_max_position_embeddings": None}},
            CorruptModelFile,
            "original_max_position_embeddings: expected the length before scaling, found nothing",
        ),
        ({"rope_parameters": {"mscale": 1.0}}, UnsupportedModel, "mscale 1.0 is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, UnsupportedModel, "partial_rotary_factor 0.5 is not"),
    ],
)
def test_wrong_config_json_is_named(changes: dict[str, Any], error: type[EngineError], message: str) -> None:
    with pytest.raises(error, match=r"^config\.json: " + message):
        from_hf(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"general.architecture": "mamba"}, UnsupportedModel, "architecture 'mamba' is not supported; of GGUF files"),
        ({"general.architecture": ...}, CorruptModelFile, "general.architecture: expected a string, found nothing"),
        ({"llama.expert_count": 8}, CorruptModelFile, "llama.expert_used_count: expected an integer .* found nothing"),
        ({"llama.expert_count": 2, "llama.expert_used_count": 3}, CorruptModelFile, "expected up to .* found 3 of 2$"),
        (
            {"llama.expert_count": 1 << 30, "llama.expert_used_count": 2},
            CorruptModelFile,
            "expected up to 4096 experts",
        ),
        ({"llama.block_count": 0}, CorruptModelFile, "llama.block_count: expected an integer .* found 0"),
        ({"llama.rope.dimension_count": 8}, UnsupportedModel, "llama.rope.dimension_count 8 differs from the head dim"),
        ({"llama.rope.scaling.type": "longrope"}, UnsupportedModel, "llama.rope.scaling.type 'longrope' is not supp"),
    ],
)
def test_wrong_gguf_metadata_is_named(changes: dict[str, Any], error: type[EngineError], message: str) -> None:
    with pytest.raises(error, match=r"^x\.gguf: " + message):
        from_gguf(changes)


@pytest.mark.parametrize("factors", [(1.0,) * 7, (0.0,) * 8, (float("inf"),) * 8], ids=["short", "zero", "infinite"])
def test_wrong_rope_factors_are_corrupt(factors: tuple[float, ...]) -> None:
    with pytest.raises(CorruptModelFile, match=r"rope"):
        from_gguf(freq_factors=factors)


def test_supported_architectures_are_listed() -> None:
    assert SUPPORTED_ARCHITECTURES == ("LlamaForCausalLM", "MixtralForCausalLM")


def test_a_mixture_has_experts_in_both_kinds_of_file() -> None:
    from_folder = from_hf(
        architectures=["MixtralForCausalLM"], num_local_experts=8, num_experts_per_tok=2, rope_theta=500000.0
    )
    experts = {"llama.expert_count": 8, "llama.expert_used_count": 2}
    from_file = from_gguf(experts, ("output.weight",))
    for config in (from_folder, from_file):
        assert config.architecture == "MixtralForCausalLM"
        assert (config.num_experts, config.num_experts_per_token, config.own_experts) == (8, 2, None)
    assert from_gguf({"llama.expert_count": 0}).architecture == "LlamaForCausalLM"


def test_what_a_mixtral_leaves_out_is_what_transformers_takes() -> None:
    transformers = pytest.importorskip("transformers", reason="Transformers is the oracle")
    expected = transformers.MixtralConfig(hidden_size=64, num_attention_heads=32)
    left_out = dict.fromkeys(("num_key_value_heads", "rms_norm_eps", "max_position_embeddings"), ...)
    config = from_hf(model_type="mixtral", architectures=..., num_attention_heads=32, **left_out)
    assert config.num_kv_heads == expected.num_key_value_heads
    assert config.rms_norm_eps == expected.rms_norm_eps
    assert config.max_position_embeddings == expected.max_position_embeddings
    assert config.num_experts == expected.num_local_experts
    assert config.num_experts_per_token == expected.num_experts_per_tok
    assert config.rope.theta == expected.rope_parameters["rope_theta"]
