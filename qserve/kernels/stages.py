"""The structures of `csrc/stage.h`, field by field, and the library's functions.

Knows no stage's meaning. `check_mirrors` finds a mirror that has drifted from its original before it is used.
"""

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum

import torch
from torch import Tensor


class Form(IntEnum):
    INT4 = 0
    INT8 = 1
    FLOAT = 2


class StageKind(IntEnum):
    EMBED = 0
    LINEAR = 1
    ROTATE = 2
    ATTEND = 3
    SELECT = 4


FLOAT_TYPES = {
    torch.bfloat16: 0,
    torch.float16: 1,
    torch.float32: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
}
CACHE_TYPES = {torch.bfloat16: 0, torch.float32: 2, torch.int8: 5}


class WeightStruct(Structure):
    _fields_ = (
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("units", c_void_p),
        ("zeros", c_void_p),
        ("offsets", c_void_p),
        ("fix", c_void_p),
        ("pre_scale", c_void_p),
        ("form", c_int32),
        ("value_type", c_int32),
        ("scale_type", c_int32),
        ("offset_type", c_int32),
        ("activation", c_int32),
        ("planes", c_int32),
        ("out_features", c_int32),
        ("in_features", c_int32),
        ("group_size", c_int32),
        ("padded_group", c_int32),
        ("groups", c_int32),
        ("code_bias", c_int32),
        ("column", c_int32),
        ("is_narrow", c_int32),
    )


class LinearStruct(Structure):
    _fields_ = (
        ("weights", POINTER(WeightStruct)),
        ("bias", c_void_p),
        ("num_weights", c_int32),
        ("in_features", c_int32),
        ("out_features", c_int32),
        ("is_paired", c_int32),
    )


class NormStruct(Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("eps", c_float),
        ("is_layer", c_int32),
        ("size", c_int32),
    )


class AttentionStruct(Structure):
    _fields_ = (
        ("query_norm", POINTER(NormStruct)),
        ("key_norm", POINTER(NormStruct)),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("half", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("window", c_int32),
        ("scale", c_float),
        ("soft_cap", c_float),
    )


class CacheStruct(Structure):
    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("head_bytes", c_int64),
        ("type", c_int32),
        ("block_size", c_int32),
    )


class StepStruct(Structure):
    _fields_ = (
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("query_starts", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("tokens", c_int32),
        ("chunks", c_int32),
        ("max_blocks", c_int32),
    )


class StageStruct(Structure):
    _fields_ = (
        ("input", c_void_p),
        ("output", c_void_p),
        ("residual", c_void_p),
        ("index", c_void_p),
        ("linear", POINTER(LinearStruct)),
        ("norm", POINTER(NormStruct)),
        ("post_norm", POINTER(NormStruct)),
        ("attention", POINTER(AttentionStruct)),
        ("cache", POINTER(CacheStruct)),
        ("step", POINTER(StepStruct)),
        ("kind", c_int32),
        ("rows", c_int32),
        ("input_stride", c_int32),
        ("output_stride", c_int32),
        ("width", c_int32),
        ("table_type", c_int32),
        ("gate", c_int32),
        ("scale", c_float),
        ("soft_cap", c_float),
    )


class SamplingStruct(Structure):
    _fields_ = (
        ("logits", c_void_p),
        ("draws", c_void_p),
        ("allowed", c_void_p),
        ("tokens", c_void_p),
        ("rows", c_int64),
        ("numbers", c_int64),
        ("stride", c_int64),
        ("vocabulary", c_int64),
    )


# In the order of qserve_last_member's argument.
STRUCTURES: tuple[type[Structure], ...] = (
    WeightStruct,
    LinearStruct,
    NormStruct,
    AttentionStruct,
    CacheStruct,
    StepStruct,
    StageStruct,
    SamplingStruct,
)


class Runner:
    """The library with a team of threads; runs stages one call at a time, without the GIL."""

    def __init__(self, library: ctypes.CDLL, *, num_threads: int) -> None:
        library.qserve_open.restype = c_void_p
        library.qserve_open.argtypes = (c_int32,)
        library.qserve_close.argtypes = (c_void_p,)
        library.qserve_run.argtypes = (c_void_p, c_void_p, c_int32)
        library.qserve_run.restype = None
        library.qserve_sample.argtypes = (c_void_p, c_void_p)
        library.qserve_sample.restype = None
        check_mirrors(library)
        self._library = library
        self._run = library.qserve_run
        self._sample = library.qserve_sample
        self._handle: int | None = library.qserve_open(num_threads)
        self.num_threads = num_threads

    def run(self, stages: ctypes.Array[StageStruct] | StageStruct, count: int) -> None:
        self._run(self._handle, ctypes.addressof(stages), count)

    def sample(self, sampling: SamplingStruct) -> None:
        self._sample(self._handle, ctypes.addressof(sampling))

    def close(self) -> None:
        """End the team's threads; the runner is of no use afterwards."""
        if self._handle is not None:
            self._library.qserve_close(self._handle)
        self._handle = None

    def __del__(self) -> None:
        self.close()


def check_mirrors(library: ctypes.CDLL) -> None:
    library.qserve_last_member.argtypes = (c_int32,)
    theirs = [library.qserve_last_member(index) for index in range(len(STRUCTURES))]
    ours = [getattr(structure, structure._fields_[-1][0]).offset for structure in STRUCTURES]
    assert ours == theirs, (ours, theirs)


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
