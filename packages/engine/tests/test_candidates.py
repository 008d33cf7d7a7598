"""The likeliest next tokens, against a full sort, and the same in every company."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runner needs the extra octavo-engine[local]")

from octavo_engine.runner.candidates import likeliest
from octavo_engine.runner.rules.base import RowsFailed
from octavo_engine.runner.rules.changes import Addition, Ban


@pytest.mark.parametrize("vocab_size", [5, 63, 64, 640, 1000, 4096, 49152, 49159])
@pytest.mark.parametrize("count", [1, 4, 12])
def test_candidates_are_the_first_of_the_sorted_log_softmax(vocab_size: int, count: int):
    logits = torch.randn(7, vocab_size, generator=torch.Generator().manual_seed(1)) * 4
    token_ids, logprobs, errors = likeliest(logits, count)
    assert not errors
    expected = logits.double().log_softmax(-1).sort(dim=-1, descending=True)
    assert token_ids.shape == (7, min(count, vocab_size))
    assert torch.equal(token_ids, expected.indices[:, :count])
    torch.testing.assert_close(logprobs.double(), expected.values[:, :count], rtol=1e-5, atol=1e-5)


def test_the_best_tokens_may_lie_in_one_block_or_behind_the_last_whole_one():
    logits = torch.zeros(2, 2000)
    logits[0, 128:140] = torch.arange(12, 0, -1).float()
    logits[1, 1990:2000] = torch.arange(10, 0, -1).float()
    token_ids = likeliest(logits, 10).token_ids
    assert token_ids.tolist() == [list(range(128, 138)), list(range(1990, 2000))]


def test_a_rows_candidates_do_not_depend_on_other_rows():
    logits = torch.randn(65, 49152, generator=torch.Generator().manual_seed(2)) * 3
    token_ids, logprobs, _ = likeliest(logits, 8)
    for num_rows in (1, 2, 7, 16, 33):
        some_ids, some_logprobs, _ = likeliest(logits[:num_rows], 8)
        assert torch.equal(some_ids, token_ids[:num_rows])
        assert torch.equal(some_logprobs, logprobs[:num_rows])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_holds_no_numbers_shows_in_its_best_logprob(bad: float):
    logits = torch.randn(3, 4096)
    logits[1, 77] = bad
    logprobs = likeliest(logits, 4).logprobs
    assert logprobs[:, 0].isnan().tolist() == [False, True, False]


def test_rules_change_logprobs_and_what_is_barred_comes_last():
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(3))
    places, banned = np.array([0, 0, 1]), np.array([*logits[0].topk(2).indices.tolist(), 7])
    raised = Addition(np.array([1]), np.array([7]), np.array([50.0], np.float32))
    found = likeliest(logits, 300, (raised, Ban(places, banned)))
    expected = logits.log_softmax(-1)
    expected[places, banned] = float("-inf")
    assert torch.equal(found.logprobs, expected.sort(dim=-1, descending=True).values)
    assert found.token_ids[0, 0] == logits[0].topk(3).indices[2]


def test_a_row_whose_rule_fails_is_named():
    class Fails:
        def apply(self, logits: torch.Tensor) -> None:
            raise RowsFailed({1: "no"})

    assert likeliest(torch.randn(3, 100), 4, (Fails(),)).errors == {1: "no"}
