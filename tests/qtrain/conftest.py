"""Settings for the trainers' tests."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The nets here are tiny; threads that wait for each other on a busy machine are slow.

    Processes that a test starts have one too: the order of sums, and with it the bits, depends on
    it, and Adam makes whole steps of gradients near 0.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)
