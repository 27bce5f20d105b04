"""Strings and token ids, one into the other: tokenizers, streamed text, stop strings, chat templates.

Knows no tensors, no HTTP and no engine: ids come in as plain integers.
"""
