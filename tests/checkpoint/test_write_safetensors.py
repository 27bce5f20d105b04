"""Our writer against the format's own library, for every type of number and awkward tensors."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qserve.checkpoint.read_safetensors import DTYPES
from qserve.checkpoint.write_safetensors import write_safetensors

WIDE = torch.arange(24, dtype=torch.float32).view(4, 6)
TENSORS = {
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 3),
    "bytes of odd number": torch.arange(3, dtype=torch.int8),
    "whole": WIDE,
    "a view of it": WIDE[1:3],
    "turned": WIDE.t(),
    "repeated": torch.ones(1, dtype=torch.bfloat16).expand(5, 2),
    "ünïcode": torch.zeros(2, dtype=torch.float64),
}


def test_awkward_tensors(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_safetensors(file, TENSORS, metadata={"format": "pt", "note": 'quotes " and ü'})
    read = load_file(file)
    assert set(read) == set(TENSORS)
    assert all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": 'quotes " and ü'}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    values = (torch.arange(16, dtype=torch.uint8) % 2).view(dtype)
    write_safetensors(tmp_path / "x", {"x": values}, metadata={})
    (read,) = load_file(tmp_path / "x").values()
    assert (read.dtype, read.shape) == (values.dtype, values.shape)
    assert torch.equal(read.view(torch.uint8), values.view(torch.uint8))


def test_always_the_same_bytes(tmp_path: Path) -> None:
    metadata = {str(i): "x" for i in range(50)}
    for name in ("one", "two"):
        write_safetensors(tmp_path / name, TENSORS, metadata=metadata)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
