"""What can be set, one frozen dataclass a part; the command line is made from these fields and their help.

A leaf: knows nothing of the parts it configures. What can be computed is not asked.
"""

from dataclasses import dataclass, field
from typing import Any


def option(default: Any, help_text: str, **metadata: Any) -> Any:
    """A dataclass field with the text that `--help` shows for it, and the values it may take (`choices`)."""
    return field(default=default, metadata={"help": help_text, **metadata})


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """Where and how the model computes."""

    device: str = option("cpu", "where the model runs", choices=("cpu", "cuda"))
    threads: int = option(0, "compute threads; 0 takes every core this process may use")
    kernels: str = option(
        "auto",
        "auto uses the compiled kernels where they can be built; reference is plain torch",
        choices=("auto", "native", "reference"),
    )
    kv_cache_dtype: str = option(
        "auto",
        "auto is float32 for a float model, so that it is served exactly, and bfloat16 for a quantized one",
        choices=("auto", "float32", "bfloat16"),
    )
    kv_cache_mb: int = option(512, "memory for the key-value cache, in MiB")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How requests share the model."""

    max_model_len: int = option(0, "longest prompt plus completion, in tokens; 0 takes the model's own limit")
    max_running: int = option(64, "requests computed at the same time")
    max_step_tokens: int = option(512, "tokens computed in one step, over all requests; longer prompts are chunked")
    max_queued: int = option(1024, "requests that may wait; one more is answered 429")
    max_queued_tokens: int = option(262144, "prompt tokens that unfinished requests may hold; more is answered 429")
    block_size: int = option(16, "positions in one block of the key-value cache")
    prefix_caching: bool = option(True, "share the cache blocks of equal prompt beginnings")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What is served, and where."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    served_model_name: str = option("", "name clients ask for; by default the directory's or the repository's name")
    drain_seconds: float = option(30.0, "on SIGTERM, how long running requests may take to finish")
    max_body_mb: int = option(16, "largest request body that is taken, in MiB")
    api_key: tuple[str, ...] = option((), "a key clients must send; may be given several times")
