"""Quantization-aware training: prepare, train, finalize. Knows no server; `qserve.quant` says what a recipe means."""
