"""What decides: which tokens of which requests the device computes next, in which blocks of its cache.

Knows no tensors, no text and no HTTP: token ids in, token ids out, and the device behind one method (`Runner`).
"""
