"""One compute thread for each test process: tiny models lose more by sharing a multiplication out than they gain."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
