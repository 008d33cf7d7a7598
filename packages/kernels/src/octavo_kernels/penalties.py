"""Penalties on tokens that a prompt or an output already has."""

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels._dispatch import implementation


def apply_penalties(
    logits: Tensor,
    output_counts: Tensor,
    prompt_bitmask: Tensor,
    *,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
    rows: Tensor | None = None,
    table_rows: Tensor | None = None,
) -> Tensor:
    """Change logits in place by repetition, frequency and presence penalties.

    Repetition (CTRL, arXiv 1909.05858, section 4.1): a token of the prompt or the output has its logit divided by the
    penalty if positive, else multiplied. Then, for tokens of the output, frequency times the count and presence once
    are subtracted.

    Args:
        logits: [num_rows, vocab_size] fp32; the stride of rows is free. Modified.
        output_counts: [num_tables, vocab_size] int32, how often the output has each token; the stride of rows is free.
        prompt_bitmask: [num_tables, num_words] int32, which tokens the prompt has, in the form of
            `apply_token_bitmask`; num_words is at least vocab_size / 32 rounded up. The stride of rows is free.
        repetition: [num_penalised] fp32, above 0; 1 changes nothing.
        frequency: [num_penalised] fp32; 0 changes nothing.
        presence: [num_penalised] fp32; 0 changes nothing.
        rows: [num_penalised] int64, the different rows of logits that the penalties are for; None: all, in order.
        table_rows: [num_penalised] int64, the rows of the tables that they go by; None: in order.

    Returns:
        logits.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    op = "apply_penalties"
    fp32 = {"logits": logits, "repetition": repetition, "frequency": frequency, "presence": presence}
    tables = {"output_counts": output_counts, "prompt_bitmask": prompt_bitmask}
    places = {"rows": rows, "table_rows": table_rows}
    device = _check.same_device(op, **fp32, **tables, **places)
    _check.rank(op, "logits", logits, ("num_rows", "vocab_size"))
    _check.rank(op, "repetition", repetition, ("num_penalised",))
    vocab_size, num_penalised = logits.shape[1], len(repetition)
    _check.shape(op, "output_counts", output_counts, ("num_tables", vocab_size))
    _check.shape(op, "prompt_bitmask", prompt_bitmask, (len(output_counts), "num_words"))
    needed, num_words = -(-vocab_size // 32), prompt_bitmask.shape[1]
    _check.option(op, "num_words", num_words, num_words >= needed, f"at least {needed}, 32 tokens in each")
    _check.last_dim_contiguous(op, logits=logits, **tables)
    for dtype, tensors in ((torch.float32, fp32), (torch.int32, tables), (torch.int64, places)):
        for name, tensor in tensors.items():
            if tensor is not None:
                _check.dtype(op, name, tensor, dtype)
                if name not in ("logits", *tables):
                    _check.shape(op, name, tensor, (num_penalised,))
    if rows is None:
        _check.shape(op, "repetition", repetition, (len(logits),))
    if table_rows is None:
        _check.shape(op, "repetition", repetition, (len(output_counts),))
    if num_penalised and vocab_size:
        implementation(op, device)(
            logits, output_counts, prompt_bitmask, repetition, frequency, presence, rows, table_rows
        )  # fmt: skip
    return logits
