"""Every error that qserve raises on purpose, split by whose fault it is.

QserveError
├── RequestError                the caller's fault: answered as 4xx, the server is fine
│   ├── InvalidRequest          a field is malformed, of a wrong type or out of range
│   ├── ContextLengthExceeded   prompt and max_tokens do not fit the model's context
│   ├── ModelNotFound           the request names a model that is not served here
│   ├── DeadlineExceeded        the answer took longer than the server lets it take
│   └── QueueFull               more work than the queue may hold: try again later
├── ArtifactError               the files' fault: cannot be loaded, and the message says what to do
│   ├── NotACheckpoint          the path holds no model
│   ├── BrokenCheckpoint        files missing, truncated, left over, or disagreeing with the config
│   ├── UnsupportedWeight       a tensor class, quantization config or version that cannot be read
│   ├── UnsupportedArchitecture a model type that neither the decoder nor the fallback can run
│   └── UnsafePickle            a .bin file that would run code
├── UsageError                  the operator's fault: an option, or a pair of them, that cannot be in force
└── EngineError                 our fault
    ├── EngineDead              the engine thread has ended; nothing can be served any more
    └── NotReady                loading, or finishing what runs before the end: try again later

A message says what was found, what was expected, and what to do next.
"""


class QserveError(Exception):
    """The root of the tree; catching it catches everything that is raised on purpose."""


class RequestError(QserveError):
    """The caller's fault. `param` names the field of the request, where there is one."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(RequestError):
    """A field of the request is malformed, of a wrong type or out of range."""


class ContextLengthExceeded(RequestError):
    """The prompt and the tokens asked for do not fit the model's context."""


class ModelNotFound(RequestError):
    """The request names a model that is not served here."""


class DeadlineExceeded(RequestError):
    """The answer took longer than the server lets it take."""


class QueueFull(RequestError):
    """The queue holds as much as it may, of `reason` (requests or tokens); `retry_after` is in seconds."""

    def __init__(self, message: str, *, reason: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class ArtifactError(QserveError):
    """The fault is in the files of a model."""


class NotACheckpoint(ArtifactError):
    """The path holds no model."""


class BrokenCheckpoint(ArtifactError):
    """Files are missing, truncated, left over, or disagree with the config."""


class UnsupportedWeight(ArtifactError):
    """A tensor class, a quantization config or a version of one that cannot be read."""


class UnsupportedArchitecture(ArtifactError):
    """A model type that neither the decoder nor the fallback can run."""


class UnsafePickle(ArtifactError):
    """A .bin file that would run code when it is read."""


class UsageError(QserveError):
    """An option, or a pair of options, that cannot be in force."""


class EngineError(QserveError):
    """Our own fault."""


class EngineDead(EngineError):
    """The engine thread has ended; nothing can be served any more."""


class NotReady(EngineError):
    """Nothing new is taken now: the model is loading, or the server is draining; `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: int = 5) -> None:
        super().__init__(message)
        self.retry_after = retry_after
