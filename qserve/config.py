"""What can be set, one frozen dataclass a part; the command line is made from these fields and their help.

A leaf: knows nothing of the parts it configures. What can be computed is not asked.
"""

from dataclasses import dataclass, field
from typing import Any


def option(default: Any, help_text: str, **metadata: Any) -> Any:
    """A dataclass field with the text that `--help` shows for it, and the values it may take.

    These are `choices`, or numbers from `least` to `most`.
    """
    return field(default=default, metadata={"help": help_text, **metadata})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model."""

    model: str = option("", "a directory or ORG/NAME; by default the demo model")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """Where and how the model computes."""

    device: str = option("cpu", "where the model runs", choices=("cpu", "cuda"))
    threads: int = option(0, "compute threads; 0 takes every core this process may use", least=0)
    kernels: str = option(
        "auto",
        "auto uses the compiled kernels where they can be built, native insists on them; reference is plain torch",
        choices=("auto", "native", "reference"),
    )
    kv_cache_dtype: str = option(
        "auto",
        "auto is float32 for a float model, so that it is served exactly, and bfloat16 for a quantized one;"
        " int8, with a scale for each token and head, holds nearly twice as many tokens as bfloat16",
        choices=("auto", "float32", "bfloat16", "int8"),
    )
    kv_cache_mb: int = option(512, "memory for the key-value cache, in MiB", least=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How requests share the model."""

    max_model_len: int = option(0, "longest prompt plus completion, in tokens; 0 takes the model's own limit", least=0)
    max_running: int = option(64, "requests computed at the same time", least=1)
    max_step_tokens: int = option(
        512, "tokens computed in one step, over all requests; longer prompts are chunked", least=1
    )
    max_queued: int = option(1024, "requests that may wait; one more is answered 429", least=0)
    max_queued_tokens: int = option(
        262144, "prompt tokens that unfinished requests may hold; more is answered 429", least=1
    )
    block_size: int = option(16, "positions in one block of the key-value cache", least=1)
    prefix_caching: bool = option(True, "share the cache blocks of equal prompt beginnings")
    speculative_tokens: int = option(
        15,
        "guess up to so many tokens ahead, where a text repeats itself, and check them in one step: the same tokens,"
        " sooner; 0 guesses none",
        least=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What is served, and where."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 takes a free one", least=0, most=65535)
    served_model_name: tuple[str, ...] = option(
        (), "name clients ask for; several may be given, and answers carry the first; by default the model's own"
    )
    chat_template: str = option("", "file with a chat template (Jinja), in place of the model's own")
    ping_seconds: float = option(
        0.0, "send a comment this often in streams, for proxies that cut silent ones; 0 sends none", least=0
    )
    drain_seconds: float = option(30.0, "on SIGTERM, how long running requests may take to finish", least=0)
    ssl_certfile: str = option("", "certificate chain, PEM; with it the server speaks TLS alone")
    ssl_keyfile: str = option("", "private key of the certificate, PEM, unless it stands in the same file")
    metrics_prefix: str = option(
        "qserve", "what the names of /metrics begin with; vllm gives vLLM's own names", choices=("qserve", "vllm")
    )
    log_json: bool = option(False, "write the log as JSON, one object a line")


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessConfig:
    """Who may ask."""

    api_key: tuple[str, ...] = option((), "a key clients must send; may be given several times")
    api_key_file: str = option("", "file with more keys, one a line; lines that begin with # are left out")
    open_metrics: bool = option(False, "answer /metrics without a key too, as /health and /ready always are")
    allow_origin: tuple[str, ...] = option(
        (), "origin whose pages may call the server from a browser (CORS), or *; may be given several times"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """What one request may ask for; more is answered 400, 408 or 413."""

    max_body_mb: int = option(16, "largest request body that is taken, in MiB", least=1)
    max_prompts: int = option(1024, "prompts in one request", least=1, most=1024)
    max_n: int = option(128, "choices of one prompt: n and best_of", least=1, most=128)
    max_stops: int = option(64, "stop strings in one request", least=0, most=64)
    max_logprobs: int = option(
        20, "alternatives of one token: logprobs, top_logprobs, prompt_logprobs", least=0, most=20
    )
    receive_seconds: float = option(
        60.0, "how long a client may take to send a request, headers and body each", least=1
    )
    request_seconds: float = option(0.0, "how long an answer may take; 0 sets no limit", least=0)
