"""token_logprobs, by a log-softmax and a sort."""

from torch import Tensor


def token_logprobs(
    logits: Tensor, token_ids: Tensor, logprobs: Tensor, ranks: Tensor, top_ids: Tensor, top_logprobs: Tensor
) -> None:
    """Fill all that is returned."""
    every = logits.double().log_softmax(dim=-1)
    chosen = token_ids[:, None]
    logprobs.copy_(every.gather(1, chosen)[:, 0])
    ranks.copy_((logits > logits.gather(1, chosen)).sum(dim=-1) + 1)
    top_ids.copy_(logits.argsort(dim=-1, descending=True, stable=True)[:, : top_ids.shape[1]])
    top_logprobs.copy_(every.gather(1, top_ids))
