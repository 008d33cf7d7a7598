"""Attention for models of Hugging Face Transformers: an attention function, and the call that registers it.

Transformers is imported by `register` alone, and need not be installed otherwise.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels.attention import varlen_attention

__all__ = ["attention_forward", "register"]


def register(name: str = "octavo") -> str:
    """Make this package's attention known to Transformers, and return the name to load models with.

    `AutoModelForCausalLM.from_pretrained(path, attn_implementation=register())`, or
    `model.set_attn_implementation(register())`. Registering again under the same name changes nothing.

    Raises: ImportError (Transformers is not installed), OptionError (a name that Transformers gives a meaning).
    """
    op = "register"
    transformers = importlib.import_module("transformers")
    masks = importlib.import_module("transformers.masking_utils")
    functions = transformers.AttentionInterface
    free = name not in functions().valid_keys() or functions()[name] is attention_forward
    _check.option(op, "name", name, free and "|" not in name, "a name that Transformers does not know yet")
    functions.register(name, attention_forward)
    masks.AttentionMaskInterface.register(name, masks.flash_attention_mask)
    return name


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as Transformers' attention functions do, by `varlen_attention`; for inference.

    Args:
        module: the attention layer; says whether attention is causal, where is_causal does not.
        query: [batch, num_heads, query_len, head_dim], the last query_len positions of each row.
        key: [batch, num_kv_heads, key_len, head_dim].
        value: as key.
        attention_mask: [batch, key_len] bool or whole numbers, false for padding; None where there is none. Rows may be
            padded on either side. A mask that is shorter than key_len, as for static caches, leaves the rest unread.
        dropout: 0.
        scaling: factor on the scores; head_dim ** -0.5 when None.
        sliding_window: number of positions that a query may look at, itself included.
        softcap: s becomes softcap * tanh(s / softcap).
        is_causal: whether a query sees no later position.
        s_aux: [num_heads], a logit per head without a value (attention sinks).

    Returns:
        [batch, query_len, num_heads, head_dim], 0 for padding, and None in place of weights.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit, dropout is asked for, or a gradient.

    """
    op = "attention_forward"
    _check.option(op, "dropout", dropout, dropout == 0.0, "0.0: these kernels are for inference")
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    _check.option(op, "query.requires_grad", trained, not trained, "no gradient: call it inside torch.no_grad()")
    batch, num_heads, query_len, head_dim = query.shape
    if attention_mask is None:
        attention_mask = torch.ones((batch, key.shape[2]), dtype=torch.bool, device=query.device)
        full = True
    else:
        _check.shape(op, "attention_mask", attention_mask, (batch, "key_len"))
        attention_mask, full = attention_mask.bool(), False
    key_len = attention_mask.shape[1]
    _check.option(op, "key_len", key_len, key_len >= query_len, f"at least query_len, {query_len}")
    own = attention_mask[:, -query_len:]
    # [batch, heads, length, head_dim] -> [tokens, heads, head_dim] without padding
    padded = ((query, own), (key, attention_mask), (value, attention_mask))
    q, k, v = (_unpad(x, None if full else rows, rows.shape[1]) for x, rows in padded)
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    result = varlen_attention(
        q, k, v, _starts(own), _starts(attention_mask),
        max_query_len=query_len, max_key_len=key_len, scale=head_dim**-0.5 if scaling is None else scaling,
        causal=causal, window=sliding_window, soft_cap=softcap, sinks=None if s_aux is None else s_aux.float(),
    )  # fmt: skip
    if full:
        return result.view(batch, query_len, num_heads, head_dim), None
    out = torch.zeros((batch, query_len, num_heads, head_dim), dtype=query.dtype, device=query.device)
    out[own] = result
    return out, None


def _unpad(x: Tensor, mask: Tensor | None, length: int) -> Tensor:
    tokens = x[:, :, :length].transpose(1, 2)
    return (tokens.flatten(0, 1) if mask is None else tokens[mask]).contiguous()


def _starts(mask: Tensor) -> Tensor:
    """Return where each row of a mask begins among all true entries, and where the last one ends."""
    ends = mask.sum(1).cumsum(0)
    return torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
