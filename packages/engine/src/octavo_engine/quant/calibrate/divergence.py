"""divergence: how far a model's next tokens are from another's, and what hidden states it would be less with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 512  # whose logits are made at once


class Divergence(NamedTuple):
    """mean: of KL(target || own) over rows, in nats. gradient: of the mean by the own hidden states, fp32."""

    mean: float
    gradient: Tensor


def divergence(hidden: Tensor, target: Tensor, head: Tensor) -> Divergence:
    """Return the Kullback-Leibler divergence of next tokens' distributions, and its gradient.

    The gradient by logits is the difference of the two distributions, so that no graph has to be kept for them.

    Args:
        hidden: [..., hidden_size], a model's last hidden states; not modified.
        target: of the same shape, those of the model to be like.
        head: [vocab_size, hidden_size], of both models, in the dtype of its products.

    """
    own, other = hidden.detach().flatten(0, -2).to(head.dtype), target.flatten(0, -2).to(head.dtype)
    gradient = torch.empty(own.shape)
    total = 0.0
    for start in range(0, len(own), _ROWS):
        rows = slice(start, start + _ROWS)
        logprobs = (own[rows] @ head.T).float().log_softmax(dim=-1)
        wanted = (other[rows] @ head.T).float().log_softmax(dim=-1)
        probs = wanted.exp()
        total += float(wanted.sub_(logprobs).mul_(probs).sum())
        gradient[rows] = (logprobs.exp_().sub_(probs).to(head.dtype) @ head).float() / len(own)
    return Divergence(total / len(own), gradient.view(hidden.shape))
