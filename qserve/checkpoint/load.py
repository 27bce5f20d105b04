"""Loading: the named weights of a checkpoint, read when they are asked for, and whole models of transformers."""

from collections.abc import Iterator, Mapping

from qserve.checkpoint import read_bin, read_safetensors
from qserve.checkpoint.contents import Checkpoint
from qserve.errors import BrokenCheckpoint
from qserve.quant.weight import Weight

READERS = {"safetensors": read_safetensors.reader, "bin": read_bin.reader}


class Weights(Mapping[str, Weight]):
    """The weights of a checkpoint by name. Asking reads: what is asked for twice is read twice, nothing is kept.

    A plain tensor is a view of the mapped file, so its bytes are read when they are used; a quantized weight is read
    into its canonical form. No tensor is invented: a tied head is absent where the files do not hold it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._read = READERS[checkpoint.format](checkpoint.tensors)

    def __getitem__(self, name: str) -> Weight:
        return self._read(self._checkpoint.tensors[name])  # KeyError where there is none

    def __contains__(self, name: object) -> bool:
        return name in self._checkpoint.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.tensors)

    def __len__(self) -> int:
        return len(self._checkpoint.tensors)

    def require(self, name: str) -> Weight:
        """The weight, or BrokenCheckpoint where the files lack what the architecture needs."""
        if name not in self:
            raise BrokenCheckpoint(f"{self._checkpoint.path} lacks the tensor {name}, which its architecture needs")
        return self[name]


def open_weights(checkpoint: Checkpoint) -> Weights:
    return Weights(checkpoint)
