"""A model divided over processes (FSDP2): each keeps its rows of every parameter and gathers a layer when it computes.

Knows which modules are layers and nothing of training. What works on rows alone works on each process's own.
"""

from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def shard(model: Any, *, device: str, num_processes: int) -> None:
    """In place; parameters are other objects after it. Layers are what transformers says must not be split."""
    mesh = init_device_mesh(device, (num_processes,))
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def own_rows(tensor: Tensor) -> Tensor:
    """What this process keeps of a tensor: all of it where it is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
