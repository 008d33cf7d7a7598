"""native_threads: who has which threads inside, and that all is as before afterwards."""

import threading

import pytest
import torch

from octavo_kernels import native_threads, num_native_threads


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_native_ops_have_torchs_threads_by_default():
    assert num_native_threads() == 3


def test_torch_computes_on_one_thread_inside():
    with native_threads(5):
        assert (num_native_threads(), torch.get_num_threads()) == (5, 1)
        with native_threads(2):
            assert (num_native_threads(), torch.get_num_threads()) == (2, 1)
        assert (num_native_threads(), torch.get_num_threads()) == (5, 1)
    assert (num_native_threads(), torch.get_num_threads()) == (3, 3)


def test_an_error_inside_gives_the_threads_back():
    with pytest.raises(KeyError), native_threads(2):
        raise KeyError
    assert (num_native_threads(), torch.get_num_threads()) == (3, 3)


def test_another_thread_keeps_its_own():
    opened, asked, found = threading.Event(), threading.Event(), []

    def other():
        torch.get_num_threads()  # a thread takes torch's number over with its first call
        asked.set()
        opened.wait(10)
        found.append((num_native_threads(), torch.get_num_threads()))
        with native_threads(2):
            found.append((num_native_threads(), torch.get_num_threads()))
        asked.set()

    thread = threading.Thread(target=other)
    thread.start()
    assert asked.wait(10)
    asked.clear()
    with native_threads(5):
        opened.set()
        assert asked.wait(10)
        assert (num_native_threads(), torch.get_num_threads()) == (5, 1)
    thread.join()
    assert found == [(3, 3), (2, 1)]
    assert (num_native_threads(), torch.get_num_threads()) == (3, 3)
