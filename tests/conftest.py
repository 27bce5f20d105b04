"""What holds in every test process: one compute thread, and where there is no GPU, Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, which torch and torchao do too


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models lose more by sharing a multiplication out than they gain."""
    torch.set_num_threads(1)
