"""What is left of loading a model: no file that is mapped, no other number of threads."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qserve.build import build_llm
from qserve.checkpoint.detect import detect
from qserve.checkpoint.load import open_weights
from qserve.clock import Clock
from qserve.config import DeviceConfig
from qserve.device.load import load_model
from qserve.errors import BrokenCheckpoint
from qserve.kernels.reference import ReferenceOps
from tests import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_a_loaded_model_needs_its_files_no_more(checkpoint: Path) -> None:
    clock = Clock()
    llm = build_llm(checkpoint, device=DeviceConfig(kv_cache_mb=8), clock=clock)
    try:
        assert llm.info.details["kernels"] != "reference"
        assert str(checkpoint) not in Path("/proc/self/maps").read_text()
        assert "weights" in clock.report()
    finally:
        llm.close()


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_torch_has_as_many_threads_as_before(checkpoint: Path) -> None:
    read, cpu = detect(checkpoint), torch.device("cpu")
    weights = dict(open_weights(read))
    load_model(read.config, weights, ops=ReferenceOps(device=cpu), device=cpu, max_positions=64)
    assert torch.get_num_threads() == 3
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(BrokenCheckpoint, match="up_proj"):
        load_model(read.config, weights, ops=ReferenceOps(device=cpu), device=cpu, max_positions=64)
    assert torch.get_num_threads() == 3
