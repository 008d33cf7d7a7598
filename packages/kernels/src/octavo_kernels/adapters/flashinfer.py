"""Attention on caches and page tables as FlashInfer lays them out, for code that is written for it.

FlashInfer's pages are blocks here. It is not imported, and need not be installed.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from octavo_kernels import _check
from octavo_kernels.attention import paged_attention
from octavo_kernels.errors import OptionError

__all__ = ["Blocks", "batch_attention", "blocks_of", "caches_of"]

Layout = Literal["NHD", "HND"]


class Blocks(NamedTuple):
    """A page table as `paged_attention` takes it.

    block_table: [num_seqs, max_num_pages] int32, -1 past a sequence's end. seq_lens: [num_seqs] int32.
    """

    block_table: Tensor
    seq_lens: Tensor


def blocks_of(
    kv_indptr: Tensor, kv_indices: Tensor, kv_last_page_len: Tensor, *, page_size: int, max_num_pages: int
) -> Blocks:
    """Return the block table and the lengths that a page table in compressed rows stands for.

    Nothing is read back from the device, so the widest row is given by the caller.

    Args:
        kv_indptr: [num_seqs + 1] int32, where each sequence's pages begin in kv_indices.
        kv_indices: [num_pages] int32, page ids.
        kv_last_page_len: [num_seqs] int32, tokens in a sequence's last page, 1 .. page_size.
        page_size: slots per page.
        max_num_pages: pages of the longest sequence, or more.

    Returns:
        Blocks.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    op = "blocks_of"
    device = _check.same_device(op, kv_indptr=kv_indptr, kv_indices=kv_indices, kv_last_page_len=kv_last_page_len)
    _check.rank(op, "kv_last_page_len", kv_last_page_len, ("num_seqs",))
    _check.shape(op, "kv_indptr", kv_indptr, (len(kv_last_page_len) + 1,))
    _check.rank(op, "kv_indices", kv_indices, ("num_pages",))
    for name, index in (
        ("kv_indptr", kv_indptr), ("kv_indices", kv_indices), ("kv_last_page_len", kv_last_page_len),
    ):  # fmt: skip
        _check.dtype(op, name, index, torch.int32)
    _check.option(op, "page_size", page_size, page_size >= 1, "at least 1")
    _check.option(op, "max_num_pages", max_num_pages, max_num_pages >= 0, "at least 0")
    num_pages = kv_indptr.diff()
    columns = torch.arange(max_num_pages, dtype=torch.int32, device=device)
    table = torch.full((len(kv_last_page_len), max_num_pages), -1, dtype=torch.int32, device=device)
    if len(kv_indices):
        places = (kv_indptr[:-1, None] + columns).clamp_(max=len(kv_indices) - 1)
        table = torch.where(columns < num_pages[:, None], kv_indices[places.long()], table)
    seq_lens = torch.where(num_pages > 0, (num_pages - 1) * page_size + kv_last_page_len, 0)
    return Blocks(table, seq_lens.to(torch.int32))


def caches_of(paged_kv_cache: Tensor | tuple[Tensor, Tensor], kv_layout: Layout = "NHD") -> tuple[Tensor, Tensor]:
    """Return k_cache and v_cache, [num_pages, num_kv_heads, page_size, head_dim] each, as views.

    Args:
        paged_kv_cache: [num_pages, 2, page_size, num_kv_heads, head_dim] in the layout NHD, [num_pages, 2,
            num_kv_heads, page_size, head_dim] in HND, or a pair without the dimension of 2.
        kv_layout: "NHD" or "HND".

    Raises: OptionError, ShapeError.

    """
    op = "caches_of"
    _check.option(op, "kv_layout", kv_layout, kv_layout in ("NHD", "HND"), '"NHD" or "HND"')
    if isinstance(paged_kv_cache, Tensor):
        _check.shape(op, "paged_kv_cache", paged_kv_cache, ("num_pages", 2, *_page(kv_layout)))
        paged_kv_cache = (paged_kv_cache[:, 0], paged_kv_cache[:, 1])
    k_cache, v_cache = paged_kv_cache
    _check.rank(op, "paged_kv_cache[0]", k_cache, ("num_pages", *_page(kv_layout)))
    return (k_cache, v_cache) if kv_layout == "HND" else (k_cache.transpose(1, 2), v_cache.transpose(1, 2))


def batch_attention(
    q: Tensor,
    paged_kv_cache: Tensor | tuple[Tensor, Tensor],
    qo_indptr: Tensor,
    blocks: Blocks,
    *,
    max_query_len: int,
    kv_layout: Layout = "NHD",
    causal: bool = True,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    workspace: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to paged keys and values, prefill and decode alike, with FlashInfer's names and units.

    It does what `plan` and `run` of BatchPrefillWithPagedKVCacheWrapper and of its decode sibling do; for decode
    qo_indptr is arange(num_seqs + 1).

    Args:
        q: [num_tokens, num_qo_heads, head_dim].
        paged_kv_cache: see `caches_of`.
        qo_indptr: [num_seqs + 1] int32, where each sequence's queries begin.
        blocks: what `blocks_of` returned for the batch; one serves all layers.
        max_query_len: queries of the longest sequence, or more.
        kv_layout: "NHD" or "HND".
        causal: whether a query sees no later position.
        sm_scale: factor on the scores; head_dim ** -0.5 when None.
        window_left: positions before its own that a query sees; -1 for all.
        logits_soft_cap: 0 for none.
        sinks: [num_qo_heads] fp32.
        k_scale: one factor on all keys, for 8-bit caches; it goes into the scores' factor.
        v_scale: one factor on all values; it multiplies the result.
        out: like q; allocated when None.
        return_lse: whether lse is returned too: [num_tokens, num_qo_heads] fp32, base 2 as FlashInfer's.
        workspace: see `paged_attention`.

    Returns:
        out, or out and lse.

    Raises:
        ShapeError, DtypeError, DeviceError, OptionError: an argument does not fit.

    """
    op = "batch_attention"
    _check.option(op, "window_left", window_left, window_left >= -1, "-1 or at least 0")
    k_cache, v_cache = caches_of(paged_kv_cache, kv_layout)
    if not k_cache.dtype.is_floating_point:
        raise OptionError(f"{op}: paged_kv_cache has dtype {k_cache.dtype}, expected a floating dtype; use fp8")
    scale = (q.shape[-1] ** -0.5 if sm_scale is None else sm_scale) * (1.0 if k_scale is None else k_scale)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if return_lse else None
    out = paged_attention(
        q, k_cache, v_cache, qo_indptr, blocks.seq_lens, blocks.block_table, max_query_len=max_query_len, scale=scale,
        causal=causal, window=None if window_left < 0 else window_left + 1, soft_cap=logits_soft_cap or None,
        sinks=sinks, out=out, lse=lse, workspace=workspace,
    )  # fmt: skip
    if v_scale is not None:
        out.mul_(v_scale)
    return out if lse is None else (out, lse.mul_(math.log2(math.e)))


def _page(kv_layout: Layout) -> tuple[str, str, str]:
    middle = ("page_size", "num_kv_heads") if kv_layout == "NHD" else ("num_kv_heads", "page_size")
    return (*middle, "head_dim")
