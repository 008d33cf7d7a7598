"""Recorded programs: the bits of the eager calls for any number of tokens, memory that serves again, and refusals."""

import subprocess
import sys

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels.recording import NotRecordable, Recording
from octavo_kernels.testing import make_paged_inputs

pytestmark = pytest.mark.usefixtures("native_library")

MAX_NUM_TOKENS, HIDDEN, NUM_LAYERS = 17, 72, 3


def layers(x, residual, weights):
    """A chain of ops as a model has them; returns the last norm and the last norm of a gate."""
    for weight in weights:
        x = ok.add_rms_norm(x, residual, weight, 1e-5)
        half = ok.rms_norm(ok.silu_and_mul(x), weight[: HIDDEN // 2], 1e-5)
    return ok.rms_norm(x, weights[0], 1e-5), half


def record(num_layers):
    """Return a program, the tensors it reads, its weights, and the tensors it writes."""
    weights = [torch.randn(HIDDEN) for _ in range(num_layers)]
    x, residual = torch.zeros(MAX_NUM_TOKENS, HIDDEN), torch.zeros(MAX_NUM_TOKENS, HIDDEN)
    with Recording(MAX_NUM_TOKENS) as recording:
        results = layers(x, residual, weights)
    return recording.program, x, residual, weights, results


@pytest.fixture
def recorded():
    """A recorded program of some layers."""
    return record(NUM_LAYERS)


def test_a_program_gives_the_bits_of_the_eager_calls_for_every_number_of_tokens(recorded):
    program, x, residual, weights, results = recorded
    for num_tokens in range(MAX_NUM_TOKENS + 1):
        inputs = torch.randn(2, num_tokens, HIDDEN)
        x[:num_tokens], residual[:num_tokens] = inputs
        residual[num_tokens:] = 7.0
        program.run(num_tokens, 0)
        sums = inputs[1].clone()
        for mine, wanted in zip(results, layers(inputs[0], sums, weights), strict=True):
            assert torch.equal(mine[:num_tokens], wanted)
        assert torch.equal(residual[:num_tokens], sums)
        assert (residual[num_tokens:] == 7.0).all()


def test_one_program_after_another_is_one_program(recorded):
    program, x, residual, weights, (result, _) = recorded
    stored = ok.pack_weight(torch.randn(50, HIDDEN), ok.WeightFormat.F32, in_features=HIDDEN)
    with Recording(5) as recording:
        ids, best = ok.packed_argmax(result[:5], stored)
    both = program.then(recording.program)
    assert (both.max_num_tokens, both.num_ops) == (5, program.num_ops + 1)
    for num_tokens in (5, 1, 3):
        inputs = torch.randn(2, num_tokens, HIDDEN)
        x[:num_tokens], residual[:num_tokens] = inputs
        both.run(num_tokens, 0)
        expected = ok.packed_argmax(layers(inputs[0], inputs[1].clone(), weights)[0], stored)
        assert torch.equal(ids[:num_tokens], expected[0])
        assert torch.equal(best[:num_tokens], expected[1])
    with pytest.raises(ok.OptionError, match="expected at most 5"):
        both.run(6, 0)


def test_nothing_is_computed_while_recording(recorded):
    program, _, residual, _, results = recorded
    assert program.num_ops == 3 * NUM_LAYERS + 1
    assert not residual.any()
    assert not any(result.any() for result in results)


def test_memory_of_results_serves_again(recorded):
    row = MAX_NUM_TOKENS * HIDDEN * 4
    assert recorded[0].num_bytes <= 4 * row
    assert record(4 * NUM_LAYERS)[0].num_bytes == recorded[0].num_bytes


def test_attention_takes_the_number_of_sequences_from_the_step():
    inputs = make_paged_inputs([1, 1, 5, 1], [30, 200, 9, 70], num_heads=6, num_kv_heads=2)
    arguments = inputs.arguments()
    with Recording(8) as recording:
        out = ok.paged_attention(**arguments)
    expected = ok.paged_attention(**arguments)
    for num_seqs, num_tokens in ((1, 1), (2, 2), (3, 7), (4, 8)):
        out.fill_(float("nan"))
        recording.program.run(num_tokens, num_seqs)
        assert torch.equal(out[:num_tokens], expected[:num_tokens])
        assert out[num_tokens:].isnan().all()


def test_cache_writes_follow_what_the_buffers_hold_when_run():
    q, k, v = torch.randn(4, 2, 16), torch.randn(4, 1, 16), torch.randn(4, 1, 16)
    k_cache, v_cache = torch.zeros(3, 1, 8, 16), torch.zeros(3, 1, 8, 16)
    positions, slots = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    angles = torch.outer(torch.arange(9.0), torch.tensor([1.0, 0.1, 0.01, 0.001]))
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
    with Recording(4) as recording:
        ok.rope_kv_write(q, k, v, positions, cos_sin, k_cache, v_cache, slots)
    positions[:] = torch.tensor([3, 8, 0, 1])
    slots[:] = torch.tensor([9, 23, -1, 2])
    eager = [x.clone() for x in (q, k, k_cache, v_cache)]
    ok.rope_kv_write(eager[0], eager[1], v, positions, cos_sin, eager[2], eager[3], slots)
    recording.program.run(4, 0)
    assert all(torch.equal(mine, wanted) for mine, wanted in zip((q, k, k_cache, v_cache), eager, strict=True))


@pytest.mark.parametrize(
    "compute",
    [lambda x: x + 1, lambda x: x.contiguous(), lambda x: x.add_(1), lambda _: torch.empty(3)],
    ids=["sum", "copy", "in place", "new memory"],
)
def test_what_torch_computes_cannot_be_recorded(compute):
    x = torch.zeros(8, 4)[:, :2]
    with pytest.raises(NotRecordable, match="torch computed"), Recording(8):
        compute(x)


def test_an_op_without_native_code_cannot_be_recorded():
    x, weight = torch.zeros(4, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    with pytest.raises(NotRecordable), Recording(4):
        ok.rms_norm(x, weight, 1e-5)


def test_recording_does_not_import_torchs_compiler():
    code = (
        "import sys, torch, octavo_kernels as ok\n"
        "x, weight = torch.zeros(4, 8), torch.ones(8)\n"
        "with ok.Recording(4):\n"
        "    ok.rms_norm(x, weight, 1e-5)[:2].view(16)\n"
        "sys.exit('torch._dynamo' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_views_may_be_taken_between_ops():
    x, weight = torch.randn(6, 24), torch.ones(24)
    with Recording(6) as recording:
        first, second = ok.rms_norm(x, weight, 1e-5).split([16, 8], dim=-1)
        out = ok.silu_and_mul(first), ok.silu_and_mul(second)
    recording.program.run(6, 0)
    normed = ok.rms_norm(x, weight, 1e-5)
    assert torch.equal(out[0], ok.silu_and_mul(normed[:, :16]))
    assert torch.equal(out[1], ok.silu_and_mul(normed[:, 16:]))


@pytest.mark.parametrize("num_tokens", [-1, MAX_NUM_TOKENS + 1])
def test_more_tokens_than_recorded_are_refused(recorded, num_tokens):
    with pytest.raises(ok.OptionError, match="expected at most 17"):
        recorded[0].run(num_tokens, 0)


def test_a_failed_recording_leaves_the_thread_usable():
    x, weight = torch.randn(3, 8), torch.ones(8)
    with pytest.raises(NotRecordable), Recording(3):
        x + 1
    with Recording(3) as recording:
        out = ok.rms_norm(x, weight, 1e-5)
    recording.program.run(3, 0)
    assert torch.equal(out, ok.rms_norm(x, weight, 1e-5))
