"""The state of rows on the device: exact, against plain loops over plain lists."""

import numpy as np
import pytest
import torch

import octavo_kernels as ok

MAX_NUM_ROWS, MAX_NUM_BLOCKS, BLOCK_SIZE = 9, 300, 4
POISON = -77


def state_of(rng, num_groups, device):
    """Lengths, last tokens and block tables of all rows, of numbers that tell rows and groups apart."""
    lengths = torch.from_numpy(rng.integers(0, 40, MAX_NUM_ROWS).astype(np.int32))
    tokens = torch.from_numpy(rng.integers(0, 2**33, MAX_NUM_ROWS))
    tables = rng.permutation(num_groups * MAX_NUM_ROWS * MAX_NUM_BLOCKS) + 1
    wide = torch.from_numpy(tables.reshape(num_groups, MAX_NUM_ROWS, MAX_NUM_BLOCKS).astype(np.int32))
    return [lengths.to(device), tokens.to(device), wide.to(device)]


def ints(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def out_of(num_groups, num_tokens, num_seqs, num_logits_rows, device):
    def poison(*shape, dtype):
        return torch.full(shape, POISON, dtype=dtype, device=device)

    return ok.StepTensors(
        token_ids=poison(num_tokens, dtype=torch.int64),
        positions=poison(num_tokens, dtype=torch.int64),
        query_start_loc=poison(num_seqs + 1, dtype=torch.int32),
        seq_lens=poison(num_seqs, dtype=torch.int32),
        logits_indices=poison(num_logits_rows, dtype=torch.int64),
        block_tables=poison(num_groups, num_seqs, MAX_NUM_BLOCKS, dtype=torch.int32),
        slot_mapping=poison(num_groups, num_tokens, dtype=torch.int64),
    )


def expected_of(state, rows, query_lens, given, wanted, out):
    """What `expand_rows` leaves in tensors that are poisoned, token by token; None stands for anything."""
    lengths, last_tokens, tables = (np.asarray(tensor.cpu()).tolist() for tensor in state)
    found = {name: np.full(tensor.shape, POISON).tolist() for name, tensor in out._asdict().items()}
    token = 0
    for seq, (row, query_len) in enumerate(zip(rows, query_lens, strict=True)):
        found["query_start_loc"][seq] = token
        found["seq_lens"][seq] = lengths[row] + query_len
        for position in range(lengths[row], lengths[row] + query_len):
            found["token_ids"][token] = last_tokens[row] if given[token] < 0 else given[token]
            found["positions"][token] = position
            for group, slots in enumerate(found["slot_mapping"]):
                slots[token] = tables[group][row][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            token += 1
        for group, table in enumerate(found["block_tables"]):
            num_blocks = -(-found["seq_lens"][seq] // BLOCK_SIZE)
            table[seq] = tables[group][row][:num_blocks] + [None] * (MAX_NUM_BLOCKS - num_blocks)
    for seq in range(len(rows), len(found["seq_lens"])):
        found["query_start_loc"][seq], found["seq_lens"][seq] = token, 0
    found["query_start_loc"][-1] = token
    for slots in found["slot_mapping"]:
        slots[token:] = [-1] * (len(slots) - token)
    for index, seq in enumerate(wanted):
        found["logits_indices"][index] = sum(query_lens[: seq + 1]) - 1
    return found


def check(out, expected):
    for name, tensor in out._asdict().items():
        if name != "block_tables":
            assert tensor.tolist() == expected[name], name
    for found, wanted in zip(out.block_tables.tolist(), expected["block_tables"], strict=True):
        for row, entries in zip(found, wanted, strict=True):
            assert [None if e is None else f for f, e in zip(row, entries, strict=True)] == entries


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize(
    ("query_lens", "wanted", "spare"),
    [
        pytest.param([1], [0], (0, 0), id="one"),
        pytest.param([3, 1, 4, 1], [0, 1, 3], (0, 0), id="full"),
        pytest.param([1, 5, 1], [2, 0], (3, 2), id="filled up"),
        pytest.param([2, 700, 1, 256], [1, 2], (300, 1), id="long"),
        pytest.param([6], [], (2, 1), id="no draw"),
    ],
)
def test_a_step_is_expanded_as_token_by_token(device, query_lens, wanted, spare, num_groups):
    rng = np.random.default_rng(sum(query_lens))
    state = state_of(rng, num_groups, device)
    rows = rng.permutation(MAX_NUM_ROWS)[: len(query_lens)].tolist()
    num_tokens = sum(query_lens)
    given = np.where(rng.random(num_tokens) < 0.7, rng.integers(0, 2**31 - 1, num_tokens), -1).tolist()
    out = out_of(num_groups, num_tokens + spare[0], len(rows) + spare[1], len(wanted) + 1, device)
    expected = expected_of(state, rows, query_lens, given, wanted, out)
    ok.expand_rows(
        *state,
        ints(rows, device),
        block_size=BLOCK_SIZE,
        max_query_len=max(query_lens),
        max_seq_len=max(expected["seq_lens"]),
        out=out,
        query_start_loc=ints([0, *np.cumsum(query_lens)], device),
        token_ids=ints(given, device),
        logits_seqs=ints(wanted, device),
    )
    check(out, expected)


@pytest.mark.parametrize("num_spare", [0, 2])
@pytest.mark.parametrize("num_rows", [1, 2, 5, MAX_NUM_ROWS])
def test_a_decode_step_needs_its_rows_alone(device, num_rows, num_spare):
    rng = np.random.default_rng(num_rows)
    state = state_of(rng, 2, device)
    state[0][3] = 1099  # the 275th block
    rows = [3, *(row for row in rng.permutation(MAX_NUM_ROWS).tolist() if row != 3)][:num_rows]
    size = num_rows + num_spare
    out = out_of(2, size, size, size, device)
    expected = expected_of(state, rows, [1] * num_rows, [-1] * num_rows, range(num_rows), out)
    sizes = {"block_size": BLOCK_SIZE, "max_query_len": 1, "max_seq_len": 1100}
    ok.expand_rows(*state, ints(rows, device), out=out, **sizes)
    check(out, expected)


def test_what_is_left_of_larger_memory_stays(device):
    """Views of buffers for larger steps: nothing behind them is written."""
    state = state_of(np.random.default_rng(1), 2, device)
    whole = out_of(2, 12, 8, 8, device)
    out = ok.StepTensors(
        *(tensor[:size] for tensor, size in zip(whole[:5], (5, 5, 4, 3, 3), strict=True)),
        *(tensor[:, :size] for tensor, size in zip(whole[5:], (3, 5), strict=True)),
    )
    rows = [7, 2]
    expected = expected_of(state, rows, [1, 1], [-1, -1], range(2), out)
    sizes = {"block_size": BLOCK_SIZE, "max_query_len": 1, "max_seq_len": int(state[0].max()) + 1}
    ok.expand_rows(*state, ints(rows, device), out=out, **sizes)
    check(out, expected)
    assert (whole.token_ids[5:] == POISON).all()
    assert (whole.slot_mapping[:, 5:] == POISON).all()
    assert (whole.query_start_loc[4:] == POISON).all()
    assert (whole.seq_lens[3:] == POISON).all()
    assert (whole.block_tables[:, 2:] == POISON).all()


@pytest.mark.parametrize("num_rows", [0, 1, 4, MAX_NUM_ROWS])
@pytest.mark.parametrize("num_runs", [0, 1, 5])
def test_changes_are_written_and_nothing_else(device, num_rows, num_runs):
    rng = np.random.default_rng(num_rows + 10 * num_runs)
    state = state_of(rng, 2, device)
    lengths, last_tokens, tables = (tensor.tolist() for tensor in state)
    rows = rng.permutation(MAX_NUM_ROWS)[:num_rows].tolist()
    new_lengths = rng.integers(0, 500, num_rows).tolist()
    new_tokens = [int(token) if token % 3 else -1 for token in rng.integers(0, 2**33, num_rows)]
    for row, length, token in zip(rows, new_lengths, new_tokens, strict=True):
        lengths[row] = length
        last_tokens[row] = last_tokens[row] if token < 0 else token
    pairs = rng.permutation(2 * MAX_NUM_ROWS)[:num_runs].tolist()
    sizes = [0, 1, 299, 7, 257][:num_runs]
    runs = [
        (pair % 2, pair // 2, int(rng.integers(0, MAX_NUM_BLOCKS - size + 1)))
        for pair, size in zip(pairs, sizes, strict=True)
    ]
    block_ids = rng.integers(10**6, 10**7, sum(sizes)).tolist()
    starts = [0, *np.cumsum(sizes, dtype=int).tolist()]
    for (group, row, first), start, end in zip(runs, starts[:-1], starts[1:], strict=True):
        tables[group][row][first : first + end - start] = block_ids[start:end]
    ok.update_rows(
        *state,
        rows=ints(rows, device),
        new_num_computed_tokens=ints(new_lengths, device),
        new_last_tokens=torch.tensor(new_tokens, dtype=torch.int64, device=device),
        runs=ints(runs, device).view(num_runs, 3),
        run_starts=ints(starts, device),
        block_ids=ints(block_ids, device),
    )
    assert [tensor.tolist() for tensor in state] == [lengths, last_tokens, tables]


@pytest.mark.parametrize(("num_seqs", "num_draws"), [(1, 0), (0, 2), (3, 1), (2, 5), (MAX_NUM_ROWS, MAX_NUM_ROWS)])
def test_rows_advance_by_what_was_computed_and_drawn(device, num_seqs, num_draws):
    rng = np.random.default_rng(num_seqs)
    state = state_of(rng, 1, device)[:2]
    lengths, last_tokens = (tensor.tolist() for tensor in state)
    rows, drawing = (rng.permutation(MAX_NUM_ROWS)[:size].tolist() for size in (num_seqs, num_draws))
    seq_lens, token_ids = rng.integers(1, 99, num_seqs).tolist(), rng.integers(0, 2**33, num_draws).tolist()
    for row, length in zip(rows, seq_lens, strict=True):
        lengths[row] = length
    for row, token in zip(drawing, token_ids, strict=True):
        last_tokens[row] = token
    ok.advance_rows(
        *state,
        rows=ints(rows, device),
        seq_lens=ints(seq_lens, device),
        drawing_rows=ints(drawing, device),
        token_ids=torch.tensor(token_ids, dtype=torch.int64, device=device),
    )
    assert [tensor.tolist() for tensor in state] == [lengths, last_tokens]


def expand_options(**changed):
    state = state_of(np.random.default_rng(0), 1, "cpu")
    options = {
        "rows": ints([1, 2], "cpu"),
        "block_size": BLOCK_SIZE,
        "max_query_len": 1,
        "max_seq_len": 40,
        "out": out_of(1, 2, 2, 2, "cpu"),
    }
    names = ("num_computed_tokens", "last_tokens", "block_tables")
    return dict(zip(names, state, strict=True)) | options | changed


REFUSED = {
    "rows dtype": ({"rows": torch.tensor([1, 2])}, ok.DtypeError, "rows has dtype int64, expected int32"),
    "tokens dtype": ({"last_tokens": ints([0] * 9, "cpu")}, ok.DtypeError, "last_tokens has dtype"),
    "table of other rows": ({"block_tables": torch.zeros(1, 8, 9, dtype=torch.int32)}, ok.ShapeError, "block_tables"),
    "few sequences": ({"out": out_of(1, 2, 1, 2, "cpu")}, ok.OptionError, "out.seq_lens is 1, expected at least 2"),
    "few tokens": ({"out": out_of(1, 1, 2, 2, "cpu")}, ok.OptionError, "out.token_ids is 1, expected at least 2"),
    "few logits": ({"out": out_of(1, 2, 2, 1, "cpu")}, ok.OptionError, "out.logits_indices is 1, expected at least 2"),
    "other groups": ({"out": out_of(2, 2, 2, 2, "cpu")}, ok.ShapeError, "out.block_tables"),
    "starts alone": ({"query_start_loc": ints([0, 1, 2], "cpu")}, ok.OptionError, "a tensor beside query_start_loc"),
    "no block": ({"block_size": 0}, ok.OptionError, "block_size is 0"),
}


@pytest.mark.parametrize(("changed", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused(changed, error, message):
    options = expand_options(**changed)
    ok.expand_rows(**expand_options())
    with pytest.raises(error, match=message):
        ok.expand_rows(**options)


def test_changes_that_do_not_fit_are_refused():
    state = state_of(np.random.default_rng(0), 1, "cpu")
    rows, tokens, none = ints([1], "cpu"), torch.tensor([3]), ints([], "cpu")
    options = {"rows": rows, "new_num_computed_tokens": rows, "new_last_tokens": tokens, "block_ids": none}
    options |= {"runs": none.view(0, 3), "run_starts": ints([0], "cpu")}
    with pytest.raises(ok.ShapeError, match="run_starts"):
        ok.update_rows(*state, **options | {"run_starts": none})
    with pytest.raises(ok.DtypeError, match="new_last_tokens has dtype"):
        ok.update_rows(*state, **options | {"new_last_tokens": rows})
    with pytest.raises(ok.ShapeError, match="token_ids"):
        ok.advance_rows(*state[:2], rows=rows, seq_lens=rows, drawing_rows=rows, token_ids=torch.tensor([3, 4]))
