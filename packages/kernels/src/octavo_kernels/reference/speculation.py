"""rejection_sample, one drafted token at a time."""

import torch
from torch import Tensor

from octavo_kernels.reference.noise import gumbel_noise, philox_words

_WORD = 0xFFFFFFFF


def rejection_sample(
    target_logits: Tensor,
    draft_token_ids: Tensor,
    query_start_loc: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    sequence_index: Tensor,
    positions: Tensor,
    draft_logits: Tensor | None,
    token_ids: Tensor,
    num_accepted: Tensor,
) -> None:
    """Fill token_ids and num_accepted."""
    token_ids.fill_(-1)
    num_accepted.zero_()
    starts = query_start_loc.tolist()
    for sequence, heat in enumerate(temperature):
        rows = range(starts[sequence], starts[sequence + 1])[: token_ids.shape[1]]
        for place, row in enumerate(rows):
            key = (seeds[sequence], sequence_index[sequence], positions[sequence] + place)
            draft = None if place == len(rows) - 1 else int(draft_token_ids[row])
            guess = None if draft_logits is None or draft is None else draft_logits[row]
            token_ids[sequence, place], accepted = _judge(target_logits[row], guess, draft, heat, key)
            if not accepted:
                break
            num_accepted[sequence] += 1


def _judge(
    target: Tensor, guess: Tensor | None, draft: int | None, heat: Tensor, key: tuple[Tensor, Tensor, Tensor]
) -> tuple[int, bool]:
    """Return the token of a row, and whether it is the row's draft."""
    if heat == 0:
        return int(target.argmax()), draft == int(target.argmax())
    scores = (target - target.max()) / heat
    p, q = scores.double().softmax(dim=-1), torch.zeros(len(target), dtype=torch.float64, device=target.device)
    if guess is not None:
        q = ((guess - guess.max()) / heat).double().softmax(dim=-1)
    elif draft is not None:
        q[draft] = 1.0
    if draft is not None and _uniform(key) * q[draft] < p[draft]:
        return draft, True
    noise = torch.empty((1, len(target)), dtype=torch.float32, device=target.device)
    seed, sequence, position = (value.view(1) for value in key)
    gumbel_noise(seed, sequence, position, noise)
    if guess is not None:
        scores = (p - q).clamp(min=0).log()
    elif draft is not None:
        scores = scores.index_fill(0, torch.tensor([draft], device=target.device), float("-inf"))
    return int((scores + noise[0]).argmax()), False


def _uniform(key: tuple[Tensor, Tensor, Tensor]) -> float:
    """Return a number in 0 .. 1 - 2**-24 that no column's noise has a part in."""
    seed, sequence, position = key
    counter = (sequence & _WORD, position & _WORD, (position >> 32) & _WORD, torch.full_like(seed, _WORD))
    return int(philox_words(counter, (seed & _WORD, (seed >> 32) & _WORD))[0] >> 8) * 2.0**-24
