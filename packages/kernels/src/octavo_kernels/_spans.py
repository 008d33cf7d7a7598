"""How matrix products cut their inputs into spans, so that few rows fill a GPU and bits do not follow the batch."""

import torch

_SPLIT_ROWS = 32
_PROGRAMS = 264  # two for each of an H200's 132 processors
_COLUMNS = 64
_LEAST_BLOCKS = 8
PACKED_STEP = 128
"""Inputs that spans of a packed weight are made of: four groups."""


def num_spans(out_features: int, num_blocks: int) -> int:
    """Return how many spans there are: enough to fill a GPU, by the shape of the weight alone."""
    tiles = -(-out_features // _COLUMNS)
    return max(1, min(_PROGRAMS // tiles, num_blocks // _LEAST_BLOCKS))


def splits_rows(num_tokens: int) -> bool:
    """Return whether each span of so few tokens is a program of its own; else one program adds all of its tile's."""
    return num_tokens <= _SPLIT_ROWS


def spans_workspace(num_tokens: int, out_features: int, num_blocks: int) -> int:
    """Return the bytes that the sums of spans take, 0 where there is one span or a program adds them."""
    spans = num_spans(out_features, num_blocks)
    return spans * num_tokens * out_features * torch.float32.itemsize if spans > 1 and splits_rows(num_tokens) else 0
