"""rejection_sample: the reference's tokens, the target's distribution, and greedy prefixes."""

import math

import pytest
import torch

import octavo_kernels as ok

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning")  # the interpreter's, in numpy
    for what in ("invalid value encountered", "divide by zero")
]


def keys(num_seqs, device):
    index = torch.arange(num_seqs, device=device)
    return {"seeds": index * 0x9E3779B97F4A7C15 + 5, "sequence_index": index % 3, "positions": index + 2**33}


def ragged(num_drafts, vocab_size, device, seed=0):
    """Logits of some sequences with these numbers of drafts, and drafts that are often likely."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.tensor([0, *(count + 1 for count in num_drafts)]).cumsum(0).to(torch.int32)
    target = torch.randn(int(starts[-1]), vocab_size, generator=generator) * 2
    guess = target + torch.randn(target.shape, generator=generator)
    drafts = (guess + torch.randn(target.shape, generator=generator)).argmax(dim=-1)
    return target.to(device), guess.to(device), drafts.to(device), starts.to(device)


@pytest.mark.parametrize("guessed", [False, True], ids=["given drafts", "drawn drafts"])
@pytest.mark.parametrize("vocab_size", [1, 7, 4099])
def test_tokens_equal_the_reference(oracle, device, vocab_size, guessed):
    num_drafts = [3, 0, 1, 2, 3, 3, 1, 0, 2, 3] * (1 if vocab_size > 1000 else 3)
    target, guess, drafts, starts = ragged(num_drafts, vocab_size, device)
    target[::4, ::2] = -math.inf if vocab_size > 1 else 0.0
    temperature = torch.tensor([0.0, 0.7, 1.0, 2.0, 1.0] * (len(num_drafts) // 5), device=device)
    options = {"max_num_drafts": 3, "draft_logits": guess if guessed else None, **keys(len(num_drafts), device)}
    token_ids, num_accepted = ok.rejection_sample(target, drafts, starts, temperature, **options)
    expected = oracle(ok.rejection_sample, target, drafts, starts, temperature, **options)
    assert token_ids.tolist() == expected[0].tolist()
    assert num_accepted.tolist() == expected[1].tolist()
    assert vocab_size == 1 or 0 < int(num_accepted.sum()) < sum(num_drafts)
    assert ((token_ids >= 0).sum(dim=1) == num_accepted + 1).all()


def test_without_drafts_a_token_is_that_of_sample_tokens(device):
    target, _, drafts, starts = ragged([0] * 40, 300, device)
    temperature = torch.tensor([0.0, 0.5, 1.0, 3.0] * 10, device=device)
    token_ids, num_accepted = ok.rejection_sample(
        target, drafts, starts, temperature, max_num_drafts=0, **keys(40, device)
    )
    assert token_ids[:, 0].tolist() == ok.sample_tokens(target, temperature, **keys(40, device))[0].tolist()
    assert not num_accepted.any()


def test_greedy_accepts_the_prefix_that_it_would_have_made(device):
    target, _, drafts, starts = ragged([4, 4, 4], 50, device)
    largest = target.argmax(dim=-1)
    drafts = largest.clone()
    drafts[7] += 1  # the third draft of the second sequence
    temperature = torch.zeros(3, device=device)
    token_ids, num_accepted = ok.rejection_sample(
        target, drafts % 50, starts, temperature, max_num_drafts=5, **keys(3, device)
    )
    assert num_accepted.tolist() == [4, 2, 4]
    rows = largest.view(3, 5).tolist()
    assert token_ids.tolist() == [[*rows[0], -1], [*rows[1][:3], -1, -1, -1], [*rows[2], -1]]


@pytest.mark.parametrize("guessed", [False, True], ids=["given drafts", "drawn drafts"])
def test_tokens_follow_the_target_whatever_the_drafts(backend, device, guessed):
    num_seqs = 4000 if backend is ok.Backend.TRITON else 300  # the reference judges them one at a time
    generator = torch.Generator().manual_seed(3)
    target, guess = torch.randn(2, 6, generator=generator) * 1.5, torch.randn(2, 6, generator=generator)
    guess[0, 2], target[0, 4] = -math.inf, -math.inf
    draws = torch.multinomial(guess[0].softmax(dim=-1), num_seqs, replacement=True, generator=generator)
    drafts = draws if guessed else torch.full((num_seqs,), 1)
    starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=device) * 2
    token_ids, num_accepted = ok.rejection_sample(
        target.repeat(num_seqs, 1).to(device),
        drafts.repeat_interleave(2).to(device),
        starts,
        torch.ones(num_seqs, device=device),
        max_num_drafts=1,
        draft_logits=guess.repeat(num_seqs, 1).to(device) if guessed else None,
        **keys(num_seqs, device),
    )
    first, second = token_ids.cpu().T
    behind = second[num_accepted.cpu() == 1]
    for tokens, logits in ((first, target[0]), (behind, target[1])):
        expected = logits.double().softmax(dim=-1) * len(tokens)
        counts = torch.bincount(tokens, minlength=6)
        possible = expected > 0
        assert counts[~possible].sum() == 0
        statistic = float(((counts - expected) ** 2 / expected)[possible].sum())
        freedom = int(possible.sum()) - 1
        assert statistic <= freedom + 5 * (2 * freedom) ** 0.5  # the noise is fixed, so the verdict is too
    overlap = torch.minimum(target[0].softmax(-1), guess[0].softmax(-1)).sum() if guessed else target[0].softmax(-1)[1]
    assert float(num_accepted.float().mean()) == pytest.approx(float(overlap), abs=4 * (0.25 / num_seqs) ** 0.5)


def test_no_sequences_and_sequences_without_rows(device):
    target, _, drafts, starts = ragged([1], 5, device)
    none = torch.zeros(1, dtype=torch.int32, device=device)
    token_ids, num_accepted = ok.rejection_sample(
        target, drafts, none, torch.ones(0, device=device), max_num_drafts=2, **keys(0, device)
    )
    assert (token_ids.shape, num_accepted.shape) == ((0, 3), (0,))
    starts = torch.cat([none, starts])
    token_ids, num_accepted = ok.rejection_sample(
        target, drafts, starts, torch.ones(2, device=device), max_num_drafts=2, **keys(2, device)
    )
    assert token_ids[0].tolist() == [-1, -1, -1]
    assert token_ids[1, 0] >= 0
    assert num_accepted[0] == 0


def test_what_does_not_fit_is_refused():
    target, guess, drafts, starts = ragged([1, 2], 5, "cpu")
    arguments = {"temperature": torch.ones(2), "max_num_drafts": 2, **keys(2, "cpu")}
    with pytest.raises(ok.OptionError, match="max_num_drafts is -1, expected at least 0"):
        ok.rejection_sample(target, drafts, starts, **arguments | {"max_num_drafts": -1})
    with pytest.raises(ok.ShapeError, match=r"draft_logits has shape \[4, 5\], expected \[5, 5\]"):
        ok.rejection_sample(target, drafts, starts, **arguments, draft_logits=guess[1:])
    with pytest.raises(ok.DtypeError, match="query_start_loc has dtype int64, expected int32"):
        ok.rejection_sample(target, drafts, starts.long(), **arguments)
    with pytest.raises(ok.ShapeError, match="seeds has shape"):
        ok.rejection_sample(target, drafts, starts, **arguments | {"seeds": torch.ones(1, dtype=torch.int64)})
