"""Log-probabilities of the backend under test against a log-softmax in fp64 and a stable sort."""

import math

import pytest
import torch

import octavo_kernels as ok


@pytest.mark.parametrize(("num_rows", "vocab_size", "num_top"), [(0, 5, 2), (3, 1, 1), (9, 40, 40), (4, 9001, 3)])
def test_logprobs_ranks_and_the_likeliest(device, num_rows, vocab_size, num_top):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(num_rows, vocab_size + 2, generator=generator) * 3
    logits[:, ::3] = (logits[:, ::3] / 4).round()  # some tie
    logits[1:, 5::7] = -math.inf
    logits = logits[:, 2:]
    token_ids = torch.randint(vocab_size, (num_rows,), generator=generator)
    given = torch.full((num_rows, vocab_size + 2), math.nan, device=device)[:, 2:]
    given.copy_(logits)
    logprobs, ranks, top_ids, top_logprobs = (
        part.cpu() for part in ok.token_logprobs(given, token_ids.to(device), num_top)
    )
    every = logits.double().log_softmax(dim=-1)
    chosen = every.gather(1, token_ids[:, None])
    torch.testing.assert_close(logprobs.double(), chosen[:, 0], rtol=1e-6, atol=2e-6)
    assert ranks.tolist() == ((logits > logits.gather(1, token_ids[:, None])).sum(dim=-1) + 1).tolist()
    assert top_ids.tolist() == logits.argsort(dim=-1, descending=True, stable=True)[:, :num_top].tolist()
    torch.testing.assert_close(top_logprobs.double(), every.gather(1, top_ids), rtol=1e-6, atol=2e-6)


def test_a_row_has_the_same_bits_in_every_batch(device):
    logits, token_ids = torch.randn(5, 5000, device=device), torch.arange(5, device=device)
    whole = ok.token_logprobs(logits, token_ids, 2)
    for mine, part in zip(ok.token_logprobs(logits[3:4], token_ids[3:4], 2), whole, strict=True):
        assert torch.equal(mine, part[3:4])


def test_no_likeliest_tokens_are_wanted(device):
    *_, top_ids, top_logprobs = ok.token_logprobs(torch.zeros(2, 4, device=device), torch.tensor([0, 3], device=device))
    assert top_ids.shape == top_logprobs.shape == (2, 0)


def test_what_does_not_fit_is_refused():
    logits, token_ids = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ok.OptionError, match="num_top is 6, expected 0 to vocab_size 5"):
        ok.token_logprobs(logits, token_ids, 6)
    with pytest.raises(ok.DtypeError, match="token_ids has dtype int32"):
        ok.token_logprobs(logits, token_ids.int())
    with pytest.raises(ok.ShapeError, match=r"token_ids has shape \[1\], expected \[2\]"):
        ok.token_logprobs(logits, token_ids[:1])
