"""The pool of threads: the same bits on any number of threads, with more of them than cores, and after a fork."""

import os
import threading

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels.recording import Recording
from octavo_kernels.testing import make_paged_inputs

pytestmark = pytest.mark.usefixtures("native_library")

NUM_LAYERS, WIDTH, VOCAB_SIZE, NUM_TOKENS = 6, 256, 3000, 6


class Chain:
    """A program of many short loops in which every op reads what the one before wrote, and memory serves again."""

    def __init__(self) -> None:
        self.x = torch.zeros(NUM_TOKENS, WIDTH)
        norm = torch.ones(WIDTH)
        weights = [
            ok.pack_weight(quantized(WIDTH, WIDTH), ok.WeightFormat.Q8_0, in_features=WIDTH) for _ in range(NUM_LAYERS)
        ]
        head = ok.pack_weight(torch.randn(VOCAB_SIZE, WIDTH), ok.WeightFormat.F32, in_features=WIDTH)
        inputs = make_paged_inputs([1] * NUM_TOKENS, [700, 3, 90, 40, 1, 300], num_heads=4, num_kv_heads=2, head_dim=64)
        attention = inputs.arguments()
        with Recording(NUM_TOKENS) as recording:
            x = self.x
            for weight in weights:
                x = ok.rms_norm(ok.packed_linear(x, weight), norm, 1e-5)
                q = x.view(NUM_TOKENS, 4, 64)
                x = ok.paged_attention(**{**attention, "q": q}).view(NUM_TOKENS, WIDTH)
            self.logits = ok.packed_linear(x, head)
            self.ids, self.best = ok.packed_argmax(x, head)
        self.program = recording.program

    def run(self, x: torch.Tensor, num_threads: int) -> list[torch.Tensor]:
        """Return what the program computes of x [num_tokens, WIDTH]."""
        num_tokens = len(x)
        self.x[:num_tokens] = x
        with ok.native_threads(num_threads):
            self.program.run(num_tokens, num_tokens)
        return [result[:num_tokens].clone() for result in (self.logits, self.ids, self.best)]


def quantized(out_features: int, in_features: int) -> torch.Tensor:
    """Return a weight in the bytes of Q8_0: per 32 inputs an fp16 scale and 32 codes."""
    scales = torch.full((out_features, in_features // 32, 1), 0.01, dtype=torch.float16).view(torch.uint8)
    codes = torch.randint(-127, 128, (out_features, in_features // 32, 32), dtype=torch.int8).view(torch.uint8)
    return torch.cat([scales, codes], dim=-1).view(out_features, -1)


@pytest.fixture
def chain() -> Chain:
    return Chain()


@pytest.fixture
def busy_cores():
    """Other threads that want every core, so that the pool's threads lose theirs in the middle of jobs."""
    ended = threading.Event()

    def burn() -> None:
        while not ended.is_set():
            torch.mm(torch.ones(96, 96), torch.ones(96, 96))

    threads = [threading.Thread(target=burn) for _ in range(2 * (os.cpu_count() or 1))]
    for thread in threads:
        thread.start()
    yield
    ended.set()
    for thread in threads:
        thread.join()


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(mine, other) for mine, other in zip(some, others, strict=True))


def test_threads_that_lose_their_cores_change_no_bit(chain, busy_cores):
    steps = [torch.randn(num_tokens, WIDTH) for num_tokens in (1, 6, 2, 1, 5)]
    expected = [chain.run(x, 1) for x in steps]
    for num_threads in (2, 7, 3, 1, 16, 2):
        for _ in range(40):
            for x, wanted in zip(steps, expected, strict=True):
                assert equal(chain.run(x, num_threads), wanted)


def test_callers_take_turns(chain):
    x = torch.randn(3, WIDTH)
    expected = chain.run(x, 1)
    rows, weight = torch.randn(4, VOCAB_SIZE), torch.randn(VOCAB_SIZE)
    normed = ok.rms_norm(rows, weight, 1e-5)
    failures: list[int] = []

    def call(num_threads: int) -> None:
        with ok.native_threads(num_threads):
            failures.extend(i for i in range(500) if not torch.equal(ok.rms_norm(rows, weight, 1e-5), normed))

    threads = [threading.Thread(target=call, args=(n,)) for n in (2, 3)]
    for thread in threads:
        thread.start()
    wrong = sum(not equal(chain.run(x, 4), expected) for _ in range(200))
    for thread in threads:
        thread.join()
    assert (wrong, failures) == (0, [])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork()")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_has_threads_of_its_own(chain):
    x = torch.randn(6, WIDTH)
    expected = chain.run(x, 3)
    child = os.fork()
    if child == 0:
        os._exit(0 if equal(chain.run(x, 3), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert equal(chain.run(x, 3), expected)
