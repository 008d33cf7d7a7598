"""AutoRound checkpoints (SignRound, arXiv 2309.05516): the layouts of GPTQ and AWQ under settings of their own."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import Any

from octavo_engine.quant.schemes.awq import AWQ
from octavo_engine.quant.schemes.base import Scheme
from octavo_engine.quant.schemes.gptq import GPTQ
from octavo_engine.quant.schemes.settings import Settings

_LAYOUTS = MappingProxyType(
    {
        "auto_round:auto_gptq": GPTQ,
        "auto_round:gptq": GPTQ,
        "auto_gptq": GPTQ,
        "auto_round:auto_awq": AWQ,
        "auto_round:awq": AWQ,
        "auto_awq": AWQ,
    }
)
_DENSE_BITS = 16
# What only says how the codes were found, or how activations would be rounded.
_TELLS_NOTHING = (
    *(
        "quant_method",
        "autoround_version",
        "block_name_to_quantize",
        "to_quant_block_names",
        "iters",
        "lr",
        "minmax_lr",
    ),
    *("nsamples", "seqlen", "batch_size", "gradient_accumulate_steps", "amp", "low_gpu_mem_usage", "dataset"),
    *("enable_minmax_tuning", "enable_quanted_input", "enable_norm_bias_tuning", "quant_lm_head", "scale_dtype"),
    *("act_bits", "act_data_type", "act_dynamic", "act_group_size", "act_sym", "backend", "super_bits", "damp_percent"),
    *("super_group_size", "static_groups", "desc_act", "true_sequential", "modules_to_not_convert", "zero_point"),
    *("version", "supported_types", "static_kv_dtype", "enable_alg_ext", "not_use_best_mse", "lm_head"),
)


def auto_round(settings: Settings) -> Scheme:
    """Return the scheme of an AutoRound checkpoint: that of its packing format, with the bits of single linears.

    Args:
        settings: the `quantization_config`.
    """
    settings.only("bits", "group_size", "sym", "data_type", "packing_format", "extra_config", *_TELLS_NOTHING)
    settings.choice("data_type", ("int",), "int")
    layout = _LAYOUTS[settings.choice("packing_format", tuple(_LAYOUTS))]
    common = {"bits": settings.get("bits"), "group_size": settings.get("group_size")}
    if layout is AWQ:
        return AWQ(Settings(common, settings.where))
    rules: dict[str, Any] = {}
    for name, own in settings.sections("extra_config").items():
        if own.get("bits") != _DENSE_BITS:
            rules[f"+:{re.escape(name)}$"] = {key: own.get(key) for key in common}
    return GPTQ(Settings({**common, "dynamic": rules}, settings.where))
