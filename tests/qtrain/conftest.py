"""Settings for the trainers' tests."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The nets here are tiny; threads that wait for each other on a busy machine are slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
