"""Files to named tensors and back: what is at a path, reading it, writing it.

Knows nothing of kernels, devices, text or HTTP, and of torchao only the names and layouts of its tensors.
"""
