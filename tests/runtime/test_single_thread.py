"""Computing on the calling thread alone."""

from __future__ import annotations

import threading

import pytest
import torch

from graphwright.runtime.single_thread import single_thread


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def counts() -> dict[str, int]:
    """Return the threads that each library would compute on if called from this thread."""
    lines = (line.strip().split(" : ") for line in torch.__config__.parallel_info().splitlines())
    computing = ("at::get_num_threads()", "omp_get_max_threads()", "mkl_get_max_threads()")
    return {pair[0]: int(pair[1]) for pair in lines if pair[0] in computing}


def test_every_library_computes_on_this_thread(two_threads):
    """Within the context each library has one thread; afterwards they have what they had."""
    before = counts()
    assert before["omp_get_max_threads()"] == 2
    with single_thread() as alone:
        if not alone:
            pytest.skip("torch was built without an OpenMP whose count can be set")
        assert set(counts().values()) == {1}
        assert torch.get_num_threads() == 1
    assert counts() == before
    assert torch.get_num_threads() == 2


def test_other_threads_keep_their_count(two_threads):
    """Other threads compute on as many threads as before."""
    seen: list[int] = []
    with single_thread():
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
    assert seen == [2]


def test_the_count_comes_back_after_an_error(two_threads):
    """An exception leaves the count as it was."""
    with pytest.raises(KeyError), single_thread():
        raise KeyError
    assert torch.get_num_threads() == 2
