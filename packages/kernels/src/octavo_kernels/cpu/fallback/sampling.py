"""sample_tokens in batched torch: all draws at once, filters by partial sorts."""

import torch
from torch import Tensor

from octavo_kernels._draw import DrawOptions
from octavo_kernels.cpu.fallback.noise import gumbel_noise, gumbel_noise_at

_NEGATIVE_INFINITY = float("-inf")
_FEW = 8  # noise is made one by one for at most this part of the scores: by itself a value costs up to four times more
_SHORT_PREFIX = 1024  # the likeliest tokens that mostly hold top_p; the rest is sorted only where they do not


def sample_tokens(logits: Tensor, options: DrawOptions, token_ids: Tensor, best: Tensor) -> None:
    """Fill token_ids and best [draws]."""
    if options.source_rows is not None:
        logits = logits[options.source_rows]
    torch.max(logits, dim=-1, out=(best, token_ids))
    draws = (options.temperature > 0).nonzero()[:, 0]
    if len(draws):
        token_ids[draws] = _draw(logits, options, draws, best)


def filtered(scores: Tensor, *, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None) -> Tensor:
    """Return scores with the tokens that min_p, top_k and top_p take out, in this order, at -inf.

    Args:
        scores: [draws, vocab_size] fp32, after temperature; not modified.
        top_k: [draws] int64 or None.
        top_p: [draws] fp32 or None.
        min_p: [draws] fp32 or None.
    """
    if min_p is not None and (min_p > 0).any():
        scores = _keep_from(scores, scores.amax(dim=-1, keepdim=True) + min_p.log()[:, None])
    if top_k is not None and (top_k > 0).any():
        scores = _keep_from(scores, _top_k_threshold(scores, top_k))
    if top_p is not None and (top_p < 1).any():
        scores = _keep_top_p(scores, top_p)
    return scores


def _draw(logits: Tensor, options: DrawOptions, draws: Tensor, best: Tensor) -> Tensor:
    """Draw a token for each of some draws; returns [draws] int64."""
    scores = logits if len(draws) == len(logits) else logits[draws]
    scores = (scores - best[draws, None]) / options.temperature[draws, None]  # at most 0, so that nothing overflows
    filters = {"top_k": options.top_k, "top_p": options.top_p, "min_p": options.min_p}
    scores = filtered(scores, **{name: None if value is None else value[draws] for name, value in filters.items()})
    seeds, sequence_index, positions = options.seeds[draws], options.sequence_index[draws], options.positions[draws]
    place, column = scores.isfinite().nonzero(as_tuple=True)
    if len(place) <= scores.numel() // _FEW:
        noise = torch.empty(len(place), dtype=torch.float32, device=scores.device)
        gumbel_noise_at(seeds[place], sequence_index[place], positions[place], column, noise)
        scores[place, column] += noise
        return scores.argmax(dim=-1)
    noise = torch.empty_like(scores)
    gumbel_noise(seeds, sequence_index, positions, noise)
    return noise.add_(scores).argmax(dim=-1)


def _keep_from(scores: Tensor, threshold: Tensor) -> Tensor:
    return scores.masked_fill(scores < threshold, _NEGATIVE_INFINITY)


def _top_k_threshold(scores: Tensor, top_k: Tensor) -> Tensor:
    """Return the k-th largest score of each row, [draws, 1]; -inf where top_k is 0."""
    k = top_k.clamp(max=scores.shape[1])[:, None]
    largest = scores.topk(int(k.max()), dim=-1).values
    return largest.gather(1, k.clamp(min=1) - 1).masked_fill(k == 0, _NEGATIVE_INFINITY)


def _keep_top_p(scores: Tensor, top_p: Tensor) -> Tensor:
    draws = (top_p < 1).nonzero()[:, 0]
    probabilities = scores[draws].softmax(dim=-1)
    wanted = top_p[draws, None].double()
    threshold, enough = _top_p_threshold(probabilities, wanted, _SHORT_PREFIX)
    if not enough.all():
        lacking = ~enough
        threshold[lacking] = _top_p_threshold(probabilities[lacking], wanted[lacking], scores.shape[1])[0]
    removed = torch.zeros_like(scores, dtype=torch.bool)
    removed[draws] = probabilities < threshold
    return scores.masked_fill(removed, _NEGATIVE_INFINITY)


def _top_p_threshold(probabilities: Tensor, wanted: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Find the last probability that top_p keeps among the `prefix` largest.

    Returns:
        The probability [draws, 1], and whether the prefix holds what is wanted [draws] bool (always so if it is all).
    """
    prefix = min(prefix, probabilities.shape[1])
    largest = probabilities.topk(prefix, dim=-1).values
    held = largest.double().cumsum(dim=-1)
    num_kept = (held < wanted).sum(dim=-1, keepdim=True) + 1
    enough = (num_kept <= prefix).squeeze(1) | (prefix == probabilities.shape[1])
    return largest.gather(1, (num_kept - 1).clamp(max=prefix - 1)), enough
