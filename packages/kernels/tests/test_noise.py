"""Philox against the published vectors and against plain integers; the Gumbel noise against its formula."""

import ctypes
import math

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels.cpu import abi, load

WORD = 0xFFFFFFFF
# Random123, kat_vectors, philox4x32 with 10 rounds: counter, key, output.
KNOWN_ANSWERS = {
    "zeros": ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "digits of pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


def philox_in_integers(counter, key):
    """Philox4x32-10 in Python's unbounded integers."""
    x, y, z, w = counter
    k, m = key
    for _ in range(10):
        a, b = 0xD2511F53 * x, 0xCD9E8D57 * z
        x, y, z, w = (b // 2**32) ^ y ^ k, b % 2**32, (a // 2**32) ^ w ^ m, a % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return x, y, z, w


def signed(value):
    """The int64 with the same 64 bits."""
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS.keys())
def test_the_integers_of_this_file_give_the_published_answers(counter, key, answer):
    assert philox_in_integers(counter, key) == answer


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS.keys())
def test_the_word_function_gives_the_published_answers(counter, key, answer):
    from octavo_kernels.reference.noise import philox_words

    words = philox_words(
        tuple(torch.tensor([word]) for word in counter), (torch.tensor([key[0]]), torch.tensor([key[1]]))
    )
    assert tuple(int(word) for word in words) == answer


def test_the_op_gives_the_published_answer_for_zeros(device):
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    assert ok.philox(zero, zero, zero, 4)[0].tolist() == list(KNOWN_ANSWERS["zeros"][2])


def test_philox_equals_integers_in_the_documented_counter_order(device):
    rows = [(0, 0, 0), (1, 2, 3), (2**64 - 1, 2**32 - 1, 2**63 - 1), (0xDEADBEEF12345678, 7, 2**40 + 5)]
    for num_columns in (1, 3, 4, 5, 41):
        arguments = [torch.tensor([signed(row[i]) for row in rows], device=device) for i in range(3)]
        actual = ok.philox(*arguments, num_columns).tolist()
        for row, (seed, sequence, position) in enumerate(rows):
            for column in range(num_columns):
                counter = (sequence, position % 2**32, position // 2**32, column // 4)
                words = philox_in_integers(counter, (seed % 2**32, seed // 2**32))
                assert actual[row][column] == words[column % 4]


def test_a_row_does_not_depend_on_its_batch(device):
    seeds = torch.arange(5, device=device)
    whole = ok.gumbel_noise(seeds, seeds + 1, seeds + 2, 100)
    for row in range(5):
        one = slice(row, row + 1)
        alone = ok.gumbel_noise(seeds[one], seeds[one] + 1, seeds[one] + 2, 100)
        assert torch.equal(alone, whole[one])
    assert torch.equal(ok.gumbel_noise(seeds, seeds + 1, seeds + 2, 37), whole[:, :37])


def test_gumbel_noise_equals_its_formula(device):
    seeds = torch.tensor([3, 2**62], device=device)
    words = ok.philox(seeds, seeds, seeds, 5000)
    noise = ok.gumbel_noise(seeds, seeds, seeds, 5000)
    assert noise.dtype == torch.float32
    for word, value in zip(words.flatten().tolist(), noise.flatten().tolist(), strict=True):
        uniform = (word + 0.5) / 2**32
        assert value == pytest.approx(-math.log(-math.log(uniform)), rel=1e-6, abs=1e-6)


def exact_noise(words):
    """The formula in fp64, the tail near u = 1 from the distance to it."""
    words = words.double()
    tail = (WORD - words + 0.5) / 2**32
    inner = torch.where(tail < 0.5, -torch.log1p(-tail), -torch.log((words + 0.5) / 2**32))
    return -inner.log()


def test_noise_is_accurate_to_fp32_on_many_words(device):
    seeds = torch.arange(64, device=device)
    words = ok.philox(seeds, seeds, seeds, 20_000).cpu()
    noise = ok.gumbel_noise(seeds, seeds, seeds, 20_000).cpu().double()
    torch.testing.assert_close(noise, exact_noise(words), rtol=4e-7, atol=3e-7)


@pytest.mark.parametrize(("seed", "column", "word"), [(15975, 3081, 51), (15669, 3536, WORD - 41)])
def test_noise_is_accurate_at_the_ends(device, seed, column, word):
    one, zero = torch.tensor([seed], device=device), torch.zeros(1, dtype=torch.int64, device=device)
    assert ok.philox(one, zero, zero, column + 1)[0, column] == word
    expected = exact_noise(torch.tensor(word)).item()
    assert ok.gumbel_noise(one, zero, zero, column + 1)[0, column].item() == pytest.approx(expected, rel=4e-7)


@pytest.mark.parametrize("folder", ["reference", "cpu.fallback"])
@pytest.mark.parametrize("word", [0, 1, 2**31, WORD - 1, WORD])
def test_gumbel_noise_is_finite_and_accurate_at_the_ends(monkeypatch, folder, word):
    import importlib

    module = importlib.import_module(f"octavo_kernels.{folder}.noise")
    monkeypatch.setattr(module, "philox", lambda seeds, sequence, positions, out: out.fill_(word))
    one, out = torch.zeros(1, dtype=torch.int64), torch.empty(1, 1)
    module.gumbel_noise(one, one, one, out)
    tail = (WORD - word + 0.5) / 2**32
    inner = -math.log1p(-tail) if tail < 0.5 else -math.log((word + 0.5) / 2**32)
    assert out.item() == pytest.approx(-math.log(inner), rel=1e-6)


def test_gumbel_noise_has_the_moments_of_its_distribution(device):
    seeds = torch.arange(8, device=device)
    noise = ok.gumbel_noise(seeds, seeds, seeds, 20000).double()
    assert noise.mean().item() == pytest.approx(0.5772156649, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.04)


def test_no_rows_and_no_columns_give_empty_tensors(device):
    none, one = (torch.zeros(rows, dtype=torch.int64, device=device) for rows in (0, 1))
    assert ok.philox(none, none, none, 4).shape == (0, 4)
    assert ok.gumbel_noise(one, one, one, 0).shape == (1, 0)


def test_instruction_sets_make_the_same_noise():
    seeds = torch.arange(8)
    noise = []
    for isa in load.supported():
        noise.append(torch.empty(8, 5003))
        addresses = [tensor.data_ptr() for tensor in (seeds, seeds, seeds, noise[-1])]
        args = abi.NoiseArgs(*addresses, num_columns=5003)
        op = abi.Op(kind=abi.OpKind.NOISE, num_rows=8, args=ctypes.addressof(args))
        load.open_library(isa).handle.octavo_run(ctypes.byref(op), ctypes.c_int64(1), None, 1)
    assert all(torch.equal(one, noise[0]) for one in noise)


def test_single_values_are_those_of_whole_rows_bit_for_bit(device):
    num_rows, num_columns = 5, 1003
    seeds = torch.tensor([0, -1, 2**62, -(2**63), 12345], device=device)
    sequence_index = torch.arange(num_rows, device=device) * 3
    positions = torch.tensor([0, 1, 2**40, 77, 2**31], device=device)
    whole = ok.gumbel_noise(seeds, sequence_index, positions, num_columns)
    generator = torch.Generator().manual_seed(4)
    rows = torch.randint(num_rows, (60,), generator=generator).to(device)
    columns = torch.randint(num_columns, (60,), generator=generator).to(device)
    columns[:4] = torch.tensor([0, 3, 4, num_columns - 1], device=device)
    for count in (0, 1, 7, 60):
        row, column = rows[:count], columns[:count]
        single = ok.gumbel_noise_at(seeds[row], sequence_index[row], positions[row], column)
        assert torch.equal(single, whole[row, column])


def test_single_values_need_one_column_each(device):
    one = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(ok.ShapeError, match="columns"):
        ok.gumbel_noise_at(one, one, one, one[:1])
