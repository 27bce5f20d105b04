import platform
import subprocess
import sys
from pathlib import Path

import pytest

_HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_PROGRAM = """
import os, resource, torch
from training.memory import keep_released_memory
keep_released_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(2**24)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, "THP_MEM_ALLOC_ENABLE" in os.environ)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
@pytest.mark.skipif(not _HUGE.is_file() or "[never]" in _HUGE.read_text(), reason="no huge pages here")
def test_large_tensors_enter_few_pages() -> None:
    """Sixteen thousand for each tensor, otherwise."""
    told = subprocess.run([sys.executable, "-c", _PROGRAM], check=True, capture_output=True, text=True).stdout.split()
    assert int(told[0]) < 8000
    assert told[1] == "False"
