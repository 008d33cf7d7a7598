"""Penalties of the backend under test against a loop over tokens in plain numbers."""

import pytest
import torch

import octavo_kernels as ok


def make_inputs(num_tables, vocab_size, device):
    generator = torch.Generator().manual_seed(vocab_size)
    counts = torch.randint(0, 3, (num_tables, vocab_size), generator=generator, dtype=torch.int32)
    words = torch.randint(-(2**31), 2**31, (num_tables, -(-vocab_size // 32) + 1), generator=generator)
    return counts.to(device), words.to(torch.int32).to(device)


def penalised(logit, count, in_prompt, repetition, frequency, presence):
    if count or in_prompt:
        logit = logit / repetition if logit > 0 else logit * repetition
    return logit - frequency * count - presence * (count > 0)


@pytest.mark.parametrize("vocab_size", [1, 31, 33, 2049])
def test_penalties_change_the_tokens_that_were_seen(device, vocab_size):
    counts, words = make_inputs(4, vocab_size, device)
    whole = torch.randn(5, vocab_size + 3, device=device)
    logits, before = whole[:, :vocab_size], whole.tolist()
    rows, table_rows = [3, 0, 4], [2, 2, 1]
    values = {"repetition": [1.5, 1.0, 0.8], "frequency": [0.5, 0.0, -0.25], "presence": [0.0, 0.0, 1.0]}
    given = {name: torch.tensor(value, device=device) for name, value in values.items()}
    places = {"rows": torch.tensor(rows, device=device), "table_rows": torch.tensor(table_rows, device=device)}
    assert ok.apply_penalties(logits, counts, words, **given, **places) is logits
    for index, (row, table) in enumerate(zip(rows, table_rows, strict=True)):
        for token in range(vocab_size):
            count, word = int(counts[table, token]), int(words[table, token // 32]) % 2**32
            in_prompt = word >> token % 32 & 1
            before[row][token] = penalised(
                before[row][token], count, in_prompt, *(value[index] for value in values.values())
            )
        if vocab_size > 2000:
            break  # one row says it
    done = [3] if vocab_size > 2000 else [0, 1, 2, 3, 4]
    torch.testing.assert_close(whole[done].cpu(), torch.tensor(before)[done], rtol=1e-6, atol=1e-6)
    assert whole[[1, 2], :].tolist() == torch.tensor(before)[[1, 2]].tolist()


def test_tokens_at_minus_infinity_stay_there_and_neutral_penalties_change_nothing(device):
    counts, words = make_inputs(2, 40, device)
    logits = torch.randn(2, 40, device=device)
    logits[:, ::2] = float("-inf")
    before = logits.clone()
    one, zero = torch.ones(2, device=device), torch.zeros(2, device=device)
    ok.apply_penalties(logits, counts, words, repetition=one, frequency=zero, presence=zero)
    assert torch.equal(logits, before)
    ok.apply_penalties(logits, counts, words, repetition=one * 2, frequency=one, presence=one)
    assert torch.equal(logits.isinf(), before.isinf())
    assert not torch.equal(logits, before)


LOGITS, COUNTS, WORDS, ONE = torch.zeros(2, 40), torch.zeros(2, 40).int(), torch.zeros(2, 2).int(), torch.ones(2)
REFUSED = {
    "few words": ({"prompt_bitmask": WORDS[:, :1]}, ok.OptionError, "num_words is 1, expected at least 2"),
    "counts dtype": ({"output_counts": COUNTS.long()}, ok.DtypeError, "output_counts has dtype int64, expected int32"),
    "counts shape": ({"output_counts": COUNTS[:, 1:]}, ok.ShapeError, "output_counts has shape"),
    "tables": ({"output_counts": COUNTS[:1], "prompt_bitmask": WORDS[:1]}, ok.ShapeError, "repetition has shape"),
    "rows": ({"rows": torch.zeros(1).long()}, ok.ShapeError, r"rows has shape \[1\], expected \[2\]"),
    "presence": ({"presence": ONE[:1]}, ok.ShapeError, "presence has shape"),
}


@pytest.mark.parametrize(("changed", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused(changed, error, message):
    arguments = {"output_counts": COUNTS, "prompt_bitmask": WORDS}
    arguments |= dict.fromkeys(("repetition", "frequency", "presence"), ONE)
    with pytest.raises(error, match=message):
        ok.apply_penalties(LOGITS, **arguments | changed)
