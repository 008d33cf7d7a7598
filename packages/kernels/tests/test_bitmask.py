"""Token masks: exact, against bits read one by one in plain integers."""

import math

import numpy as np
import pytest
import torch

import octavo_kernels as ok

SIZES = [1, 31, 32, 33, 64, 100, 4096, 16384, 16385, 49152]


def random_masks(num_masks, num_words, seed=0):
    """Words that are all 1, all 0 and mixed, as grammars make them."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (num_masks, num_words), generator=generator)
    kind = torch.randint(0, 3, words.shape, generator=generator)
    return torch.where(kind == 0, 0, torch.where(kind == 1, -1, words)).to(torch.int32)


def masked_in_integers(logits, bitmask, rows):
    """Tokens removed one by one, with Python's integers."""
    expected = logits.cpu().tolist()
    for words, row in zip(bitmask.tolist(), rows, strict=True):
        for token in range(len(expected[row])):
            if not (words[token // 32] % 2**32 >> token % 32) & 1:
                expected[row][token] = -math.inf
    return expected


@pytest.mark.parametrize("vocab_size", SIZES)
def test_tokens_whose_bit_is_0_are_removed(device, vocab_size):
    logits = torch.randn(3, vocab_size)
    bitmask = random_masks(3, -(-vocab_size // 32))
    expected = masked_in_integers(logits, bitmask, range(3))
    given = logits.to(device)
    assert ok.apply_token_bitmask(given, bitmask.to(device)) is given
    assert given.tolist() == expected


def test_rows_say_which_logits_each_mask_is_for(device):
    logits, bitmask, rows = torch.randn(5, 100), random_masks(2, 4), [4, 1]
    expected = masked_in_integers(logits, bitmask, rows)
    given = ok.apply_token_bitmask(logits.to(device), bitmask.to(device), rows=torch.tensor(rows, device=device))
    assert given.tolist() == expected


def test_rows_and_masks_may_lie_at_any_distance(device):
    whole = torch.randn(4, 300, device=device)
    before, words = whole.clone(), random_masks(2, 9)
    ok.apply_token_bitmask(whole[::2, :200], words.to(device)[:, :7])
    expected = masked_in_integers(before[::2, :200], words, range(2))
    assert whole[::2, :200].tolist() == expected
    assert torch.equal(whole[1::2], before[1::2])
    assert torch.equal(whole[:, 200:], before[:, 200:])


def test_logits_that_are_not_finite_stay_where_they_are_allowed(device):
    logits = torch.tensor([[math.inf, -math.inf, math.nan, math.nan]], device=device)
    ok.apply_token_bitmask(logits, torch.tensor([[0b0111]], dtype=torch.int32, device=device))
    np.testing.assert_array_equal(logits.cpu().numpy(), [[math.inf, -math.inf, math.nan, -math.inf]])


@pytest.mark.usefixtures("native_library")
def test_threads_change_nothing():
    logits, bitmask = torch.randn(9, 49152), random_masks(9, 1536)
    alone = ok.apply_token_bitmask(logits.clone(), bitmask)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(ok.apply_token_bitmask(logits.clone(), bitmask), alone)
    finally:
        torch.set_num_threads(before)


def test_nothing_to_mask(device):
    logits = torch.randn(2, 64, device=device)
    none = torch.empty(0, 2, dtype=torch.int32, device=device)
    rows = torch.empty(0, dtype=torch.int64, device=device)
    assert torch.equal(ok.apply_token_bitmask(logits.clone(), none, rows=rows), logits)


LOGITS, MASKS = torch.zeros(2, 64), torch.zeros(2, 2, dtype=torch.int32)
REFUSED = {
    "few words": (LOGITS, MASKS[:, :1], None, ok.OptionError, "at least 2"),
    "few masks": (LOGITS, MASKS[:1], None, ok.ShapeError, "bitmask has shape"),
    "mask dtype": (LOGITS, MASKS.float(), None, ok.DtypeError, "bitmask has dtype"),
    "logits dtype": (LOGITS.half(), MASKS, None, ok.DtypeError, "logits has dtype"),
    "rank": (LOGITS[0], MASKS, None, ok.ShapeError, "logits has shape"),
    "rows": (LOGITS, MASKS, torch.zeros(1, dtype=torch.int64), ok.ShapeError, "rows"),
    "rows dtype": (LOGITS, MASKS, torch.zeros(2), ok.DtypeError, "rows has dtype"),
    "stride": (LOGITS, MASKS.T.contiguous().T, None, ok.ShapeError, "bitmask has stride"),
}


@pytest.mark.parametrize(("logits", "bitmask", "rows", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused(logits, bitmask, rows, error, message):
    with pytest.raises(error, match=message):
        ok.apply_token_bitmask(logits, bitmask, rows=rows)
