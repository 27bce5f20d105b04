"""The GPU's stages, where what they need is there. Importing this needs no Triton."""

import importlib.util
import logging

import torch

from qserve.kernels.build import KernelsUnavailable
from qserve.kernels.ops import Ops

_log = logging.getLogger(__name__)
_LEAST_CAPABILITY = (8, 0)  # Ampere, the first with tf32


def open_cuda(device: torch.device) -> tuple[Ops, str]:
    """The stages for this device, and the name of their kernels; KernelsUnavailable says what is missing."""
    if importlib.util.find_spec("triton") is None:
        raise KernelsUnavailable("Triton, which compiles the kernels, is not installed. Do so with: pip install triton")
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        raise KernelsUnavailable(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]};"
            f" the kernels need {_LEAST_CAPABILITY[0]}.{_LEAST_CAPABILITY[1]} or newer."
        )
    from qserve.kernels.cuda.ops import CudaOps

    _log.info("Triton compiles the kernels, in half a minute the first time, and keeps them in its own cache")
    return CudaOps(device=device), "triton"
