"""qserve: an OpenAI-compatible inference server for torchao-quantized language models."""

__version__ = "0.1.0"
