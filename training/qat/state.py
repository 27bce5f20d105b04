"""Everything that changes while a run trains, as named tensors: parameters, the optimizer's moments, the generator.

The tensors are whole, however many processes share them: a run goes on with another number of processes than before.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

_RANDOM = "random"
Named = Iterable[tuple[str, nn.Parameter]]


def gather(parameters: Named, optimizer: Any) -> dict[str, Tensor]:
    """All processes call it; all get everything."""
    tensors: dict[str, Tensor] = {_RANDOM: torch.get_rng_state()}
    for name, parameter in parameters:
        tensors[f"parameter/{name}"] = _whole(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = _whole(value)
    return tensors


def scatter(tensors: Mapping[str, Tensor], parameters: Named, optimizer: Any) -> None:
    """The inverse of `gather`."""
    moments = _by_parameter(tensors)
    for name, parameter in parameters:
        with torch.no_grad():
            parameter.copy_(_like(tensors[f"parameter/{name}"], parameter))
        if name in moments:
            optimizer.state[parameter] = {key: _like(value, parameter) for key, value in moments[name].items()}
    torch.set_rng_state(tensors[_RANDOM].clone())


def load_parameters(tensors: Mapping[str, Tensor], parameters: Named) -> None:
    """Only what a model needs that is not trained any more."""
    with torch.no_grad():
        for name, parameter in parameters:
            parameter.copy_(tensors[f"parameter/{name}"])


def _by_parameter(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    moments: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        kind, _, rest = full_name.partition("/")
        if kind == "optimizer":
            key, _, name = rest.partition("/")
            moments.setdefault(name, {})[key] = tensor
    return moments


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """On the parameter's device and, but for a count of steps, divided as it is."""
    if tensor.ndim == 0:
        return tensor.clone()
    own = tensor.clone().to(parameter.device)
    return (
        distribute_tensor(own, parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else own
    )
