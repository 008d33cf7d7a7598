"""sample_tokens: against the reference, which tokens filters leave, the distribution, and that rows stand alone."""

import math
import os

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels.cpu.fallback.sampling import filtered
from octavo_kernels.reference.sampling import is_kept

INFINITY, NAN = math.inf, math.nan
# The interpreter's, in numpy: of infinities and NaN that a GPU computes with in silence.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning")
    for what in ("invalid value encountered", "overflow encountered", "divide by zero", "All-NaN slice")
]
not_the_reference_itself = pytest.mark.skipif(
    os.environ.get("OCTAVO_BACKEND") == "reference", reason="the reference would be held against itself"
)
FILTERS = {
    "plain": {},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.05},
    "all": {"top_k": 12, "top_p": 0.8, "min_p": 0.01},
}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def many_draws(backend, interpreted):
    """Return how many draws a distribution is judged by; the reference makes them one at a time."""
    return 2000 if backend is ok.Backend.REFERENCE or interpreted else 60_000


def full(num_draws, temperature=1.0, first_seed=0, device="cpu", **filters):
    """Make the arguments of draws that differ in their noise alone."""
    index = torch.arange(num_draws, device=device)
    arguments = {
        "temperature": torch.full((num_draws,), temperature, device=device),
        "seeds": index * 0x9E3779B97F4A7C15 + first_seed,
        "sequence_index": index % 3,
        "positions": index + 2**33,
    }
    for name, value in filters.items():
        arguments[name] = torch.full((num_draws,), value, device=device)
    return arguments


def mixed(num_draws, generator):
    """Make the arguments of draws with settings of every kind side by side."""

    def one_of(usual, *values):
        chosen = torch.tensor(values)[torch.randint(len(values), (num_draws,), generator=generator)]
        return torch.where(torch.rand(num_draws, generator=generator) < 0.6, usual, chosen)

    return {
        **full(num_draws, first_seed=int(torch.randint(1 << 40, (), generator=generator))),
        "temperature": one_of(1.0, 0.0, 0.3, 0.7, 2.5),
        "top_k": one_of(0, 1, 2, 10, 40, 100_000),
        "top_p": one_of(1.0, 0.0, 0.1, 0.5, 0.9, 0.999),
        "min_p": one_of(0.0, 0.001, 0.05, 0.3, 1.0),
    }


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(actual, expected):
    assert actual[0].tolist() == expected[0].tolist()
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=0, equal_nan=True)


# -- against the reference -----------------------------------------------------------------------------------------


@not_the_reference_itself
@pytest.mark.parametrize("vocab_size", [1, 2, 31, 127, 128, 129, 1000, 5003])
def test_draws_equal_the_reference_in_every_setting(oracle, device, interpreted, vocab_size):
    if interpreted and vocab_size not in (2, 129, 5003):
        pytest.skip("too many for the interpreter")
    num_draws = 60 if interpreted else 200
    generator = torch.Generator().manual_seed(vocab_size)
    for scale in (1.0,) if interpreted else (0.1, 1.0, 4.0):
        logits = torch.randn(num_draws, vocab_size, generator=generator) * scale
        arguments = {name: value.to(device) for name, value in mixed(num_draws, generator).items()}
        assert_same(
            ok.sample_tokens(logits.to(device), **arguments), oracle(ok.sample_tokens, logits.to(device), **arguments)
        )


@not_the_reference_itself
def test_draws_equal_the_reference_where_scores_tie(oracle, device, interpreted):
    generator = torch.Generator().manual_seed(1)
    for num_levels in (4,) if interpreted else (1, 2, 4, 30):
        logits = torch.randint(num_levels, (300, 200), generator=generator).to(device) / 2
        arguments = {name: value.to(device) for name, value in mixed(300, generator).items()}
        assert_same(ok.sample_tokens(logits, **arguments), oracle(ok.sample_tokens, logits, **arguments))


@not_the_reference_itself
def test_draws_equal_the_reference_where_many_tokens_are_kept(oracle, device, interpreted):
    logits = (normal(6, 20_000) * 0.2).to(device)
    many = {"top_k": 15_000, "top_p": 0.7}
    for filters in (many,) if interpreted else ({"top_p": 0.97}, {"top_k": 15_000}, many, {"min_p": 1e-30}):
        arguments = full(6, device=device, **filters)
        assert_same(ok.sample_tokens(logits, **arguments), oracle(ok.sample_tokens, logits, **arguments))


def test_the_noise_is_that_of_gumbel_noise(device):
    logits, arguments = normal(50, 300).to(device), full(50, device=device)
    noise = ok.gumbel_noise(arguments["seeds"], arguments["sequence_index"], arguments["positions"], 300)
    scores = logits - logits.amax(dim=-1, keepdim=True)
    token_ids, best = ok.sample_tokens(logits, **arguments)
    assert token_ids.tolist() == (scores + noise).argmax(dim=-1).tolist()
    assert torch.equal(best, logits.amax(dim=-1))


@pytest.mark.parametrize("other", [290, 4290])  # near the first, and behind what a kernel takes at once
def test_equal_sums_of_score_and_noise_take_the_lowest_token_id(device, other):
    arguments = full(400, device=device)
    noise = ok.gumbel_noise(arguments["seeds"], arguments["sequence_index"], arguments["positions"], other + 10)
    logits = torch.full((400, other + 10), -INFINITY, device=device)
    first, second = noise[:, 20], noise[:, other]
    logits[:, 20], logits[:, other] = (second - first).clamp(max=0), (first - second).clamp(max=0)
    equal = logits[:, 20] + first == logits[:, other] + second
    assert equal.sum() > 100
    token_ids, _ = ok.sample_tokens(logits, **arguments)
    assert set(token_ids[equal].tolist()) == {20}


def test_rare_noise_lifts_a_token_from_far_below(device):
    keys = torch.tensor([[15669], [0], [0]], device=device)  # in column 3536 it is 18.5
    logits = torch.full((1, 4096), -50.0, device=device)
    logits[0, 3], logits[0, 3536] = 0.0, -17.0
    expected = (logits + ok.gumbel_noise(*keys, 4096)).argmax(dim=-1).tolist()
    names = ("seeds", "sequence_index", "positions")
    token_ids, _ = ok.sample_tokens(logits, torch.ones(1, device=device), **dict(zip(names, keys, strict=True)))
    assert token_ids.tolist() == expected == [3536]


# -- which tokens are left -----------------------------------------------------------------------------------------


def random_filters(generator):
    def one_of(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    return {
        "top_k": one_of(0, 1, 2, 7, 49, 50, 1000),
        "top_p": one_of(1.0, 1e-6, 0.1, 0.5, 0.9, 0.999),
        "min_p": one_of(0.0, 0.001, 0.05, 0.3, 1.0),
    }


@pytest.mark.parametrize("seed", range(40))
def test_filters_keep_what_transformers_keeps(seed):
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(seed)
    filters = random_filters(generator)
    logits = torch.randn(16, 50, generator=generator) * 3
    scores = expected = logits - logits.amax(dim=-1, keepdim=True)
    if filters["min_p"]:
        expected = transformers.MinPLogitsWarper(filters["min_p"])(None, expected)
    if filters["top_k"]:
        expected = transformers.TopKLogitsWarper(filters["top_k"])(None, expected)
    expected = transformers.TopPLogitsWarper(filters["top_p"])(None, expected).isfinite()
    assert torch.equal(torch.stack([is_kept(row, **filters) for row in scores]), expected)
    in_torch = filtered(scores, **{name: torch.full((16,), value) for name, value in filters.items()})
    assert torch.equal(in_torch.isfinite(), expected)
    assert torch.equal(in_torch[expected], scores[expected])


@pytest.mark.parametrize("filters", list(FILTERS.values())[1:], ids=list(FILTERS)[1:])
def test_exactly_the_kept_tokens_are_drawn(device, many_draws, filters):
    logits = normal(30, seed=3) * 1.2
    kept = is_kept(logits - logits.max(), **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters})
    arguments = full(many_draws, device=device, **filters)
    token_ids, _ = ok.sample_tokens(logits.repeat(many_draws, 1).to(device), **arguments)
    assert set(token_ids.tolist()) == set(kept.nonzero()[:, 0].tolist())


def test_ties_at_the_boundary_are_all_kept(device):
    logits = torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0]).repeat(1000, 1).to(device)
    for filters in ({"top_k": 2}, {"top_p": 0.5}, {"min_p": math.exp(-1.0001)}):
        token_ids, _ = ok.sample_tokens(logits, **full(1000, device=device, **filters))
        assert set(token_ids.tolist()) == {0, 1, 2, 4}


def test_top_p_of_a_flat_distribution_keeps_its_share():
    scores = torch.linspace(-0.001, 0, 5000)
    kept = is_kept(scores, top_k=0, top_p=0.9, min_p=0.0)
    assert 4495 <= int(kept.sum()) <= 4505
    assert torch.equal(filtered(scores[None], top_k=None, top_p=torch.tensor([0.9]), min_p=None)[0].isfinite(), kept)


def test_apply_filters_keeps_what_the_reference_keeps(oracle, device, interpreted):
    generator = torch.Generator().manual_seed(11)
    for vocab_size in (3, 257) if interpreted else (1, 4, 257, 4097):
        for num_levels in (None, 5):  # logits that all differ, and logits that tie
            logits = torch.randn(120, vocab_size, generator=generator) * 3
            logits = (logits if num_levels is None else (logits * num_levels / 9).round()).to(device)
            logits[::9, ::2] = -INFINITY
            chosen = mixed(120, generator)
            values = {name: chosen[name].to(device) for name in ("temperature", "top_k", "top_p", "min_p")}
            expected = oracle(ok.apply_filters, logits.clone(), **values)
            assert torch.equal(ok.apply_filters(logits.clone(), **values), expected)
            alone = {name: value[7:8] for name, value in values.items()}
            assert torch.equal(ok.apply_filters(logits[7:8].clone(), **alone), expected[7:8])


def test_apply_filters_leaves_rows_that_are_not_filtered(device):
    whole = torch.zeros(5, 40, device=device)
    whole[:] = normal(5, 40)
    whole[1, 3], whole[2, 4], whole[3] = NAN, INFINITY, -INFINITY
    before = whole.clone()
    temperature = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0], device=device)
    rows = whole[:, 5:35]
    rows[1, 3], before[1, 8] = NAN, NAN
    rows[2, 4], before[2, 9] = INFINITY, INFINITY
    assert ok.apply_filters(rows, temperature, top_k=torch.tensor([2] * 5, device=device)) is rows
    assert rows[4].isfinite().sum() == 2
    whole[4, 5:35] = before[4, 5:35]
    torch.testing.assert_close(whole, before, rtol=0, atol=0, equal_nan=True)


def test_apply_filters_refuses_what_does_not_fit():
    logits, temperature = torch.zeros(2, 5), torch.ones(2)
    with pytest.raises(ok.DtypeError, match="apply_filters: logits has dtype float16"):
        ok.apply_filters(logits.half(), temperature)
    with pytest.raises(ok.ShapeError, match=r"top_p has shape \[1\], expected \[2\]"):
        ok.apply_filters(logits, temperature, top_p=torch.ones(1))
    with pytest.raises(ok.DtypeError, match="top_k has dtype float32, expected int64"):
        ok.apply_filters(logits, temperature, top_k=torch.ones(2))


# -- the distribution ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS.keys())
def test_draws_follow_the_softmax_of_what_is_left(device, backend, interpreted, many_draws, temperature, filters):
    if interpreted and temperature != 0.5:
        pytest.skip("too many for the interpreter")
    if backend is ok.Backend.REFERENCE and temperature != 0.5 and filters:
        pytest.skip("too many for draws one at a time: other temperatures without filters")
    num_draws, logits = many_draws, normal(20, seed=5) * 1.5
    scores = (logits - logits.max()) / temperature
    kept = is_kept(scores, **{"top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters})
    source_rows = torch.zeros(num_draws, dtype=torch.int64, device=device)
    arguments = full(num_draws, temperature, device=device, **filters)
    token_ids, _ = ok.sample_tokens(logits[None].to(device), **arguments, source_rows=source_rows)
    counts = torch.bincount(token_ids.cpu(), minlength=20)
    assert counts[~kept].sum() == 0
    expected = scores[kept].double().softmax(dim=0) * num_draws
    statistic, freedom = float(((counts[kept] - expected) ** 2 / expected).sum()), int(kept.sum()) - 1
    assert statistic <= freedom + 5 * (2 * freedom) ** 0.5  # p below 1e-3; the noise is fixed, so the verdict is too


def test_draws_from_a_large_vocabulary_have_the_mass_that_they_should(device, interpreted):
    logits = normal(1, 9000) * 2
    order = logits[0].argsort(descending=True)
    ends = [1, 10, 100, 1000, 5000]
    mass = logits[0, order].double().softmax(dim=0).cumsum(dim=0)[torch.tensor(ends) - 1]
    num_draws = 300 if interpreted else 1000
    source_rows = torch.zeros(num_draws, dtype=torch.int64, device=device)
    token_ids, _ = ok.sample_tokens(logits.to(device), **full(num_draws, device=device), source_rows=source_rows)
    rank = order.argsort()[token_ids.cpu()]
    for end, probability in zip(ends, mass.tolist(), strict=True):
        spread = (num_draws * probability * (1 - probability)) ** 0.5
        assert abs(int((rank < end).sum()) - num_draws * probability) <= 4 * spread


# -- rows stand alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [50, 4096, 9001])
def test_a_draw_does_not_depend_on_its_batch_or_on_threads(threads, device, backend, interpreted, vocab_size):
    slow = interpreted or backend is ok.Backend.REFERENCE  # which makes one draw at a time
    if slow and vocab_size != 4096:
        pytest.skip("too many for the interpreter, and for draws one at a time")
    generator = torch.Generator().manual_seed(7)
    logits = (torch.randn(33, vocab_size, generator=generator) * 2).to(device)
    sizes = (12,) if slow else (1, 2, 5, 12, 33)
    arguments = {name: value.to(device) for name, value in mixed(33, generator).items()}
    threads(1)
    whole = ok.sample_tokens(logits, **arguments)
    for num_threads in (1,) if slow else (1, 2, 3):
        threads(num_threads)
        for num_draws in sizes:
            for first in range(0, 33 - num_draws + 1, num_draws):
                part = slice(first, first + num_draws)
                found = ok.sample_tokens(logits[part], **{name: value[part] for name, value in arguments.items()})
                assert_same(found, (whole[0][part], whole[1][part]))


def test_draws_can_share_rows_and_rows_can_lie_apart(device):
    logits = normal(6, 500).to(device)
    source_rows = torch.tensor([5, 0, 0, 3, 5, 1, 1, 1], device=device)
    arguments = full(8, device=device, top_p=0.9)
    expected = ok.sample_tokens(logits[source_rows], **arguments)
    assert_same(ok.sample_tokens(logits, **arguments, source_rows=source_rows), expected)
    apart = torch.full((6, 700), NAN, device=device)[:, 100:600]
    apart.copy_(logits)
    assert_same(ok.sample_tokens(apart, **arguments, source_rows=source_rows), expected)


def test_temperature_0_takes_the_lowest_of_the_largest(device):
    logits = torch.zeros(3, 400, device=device)
    logits[0, [7, 30]] = 1.0
    logits[1, [390, 399]] = 2.0
    logits[2] -= 5.0
    token_ids, best = ok.sample_tokens(logits, **full(3, 0.0, device=device, top_k=3, top_p=0.1, min_p=0.5))
    assert token_ids.tolist() == [7, 390, 0]
    assert best.tolist() == [1.0, 2.0, -5.0]


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS.keys())
def test_a_tiny_temperature_takes_the_largest(device, filters):
    logits = normal(9, 300).to(device)
    token_ids, _ = ok.sample_tokens(logits, **full(9, 1e-30, device=device, **filters))
    assert token_ids.tolist() == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS.keys())
def test_rows_that_are_not_numbers_say_so_and_leave_the_others_alone(threads, device, filters, num_threads):
    threads(num_threads)
    for temperature in (0.0, 1.0):
        logits = normal(6, 700).to(device)
        arguments = full(6, temperature, device=device, **filters)
        expected = ok.sample_tokens(logits, **arguments)[0]
        logits[1, 699], logits[2, 3], logits[3] = NAN, INFINITY, -INFINITY
        token_ids, best = ok.sample_tokens(logits, **arguments)
        sound = [0, 4, 5]
        assert best.isfinite().tolist() == [row in sound for row in range(6)]
        assert best[1].isnan()
        assert best[2:4].tolist() == [INFINITY, -INFINITY]
        assert token_ids[sound].tolist() == expected[sound].tolist()
        assert ((token_ids >= 0) & (token_ids < 700)).all()


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS.keys())
def test_tokens_at_minus_infinity_are_never_drawn(device, filters):
    logits = torch.full((200, 300), -INFINITY, device=device)
    logits[:, [17, 299]] = 0.5
    token_ids, best = ok.sample_tokens(logits, **full(200, device=device, **filters))
    assert set(token_ids.tolist()) == {17, 299}
    assert best.tolist() == [0.5] * 200


# -- arguments -----------------------------------------------------------------------------------------------------


def test_no_draws_give_empty_tensors(device):
    token_ids, best = ok.sample_tokens(torch.empty(0, 5, device=device), **full(0, device=device))
    assert token_ids.shape == best.shape == (0,)
    assert (token_ids.dtype, best.dtype) == (torch.int64, torch.float32)


def test_arguments_that_do_not_fit_are_refused(device):
    logits, arguments = torch.zeros(3, 5, device=device), full(3, device=device)
    with pytest.raises(ok.DtypeError, match="logits"):
        ok.sample_tokens(logits.double(), **arguments)
    with pytest.raises(ok.ShapeError, match="top_p"):
        ok.sample_tokens(logits, **arguments, top_p=torch.ones(2, device=device))
    with pytest.raises(ok.DtypeError, match="top_k"):
        ok.sample_tokens(logits, **arguments, top_k=torch.ones(3, device=device))
    with pytest.raises(ok.OptionError, match="vocab_size"):
        ok.sample_tokens(logits[:, :0], **arguments)
    with pytest.raises(ok.ShapeError, match="temperature"):
        ok.sample_tokens(logits, **arguments, source_rows=torch.zeros(2, dtype=torch.int64, device=device))
