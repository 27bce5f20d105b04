"""What a step of QAT costs over a step of float training, measured in pairs.

    python -m bench.training_step [--model DIR] [--recipe R ...] [--batch 4] [--length 512] [--micro 1] [--pairs 8]

A pair is one float step and one QAT step of the same windows, both on the text's own loss, one right after the other,
so that whatever else the machine does falls on both. Without a model it is the Llama of 4.4 million parameters that
published figures exist for. Prints a line for each recipe and, last, one JSON document.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from transformers import LlamaConfig

from qserve.quant.recipes import DEFAULT_RECIPE
from training.config import TrainOptions
from training.memory import keep_released_memory
from training.qat.loop import Training
from training.qat.model import FLOAT, build
from training.qat.prepare import Prepare, prepare

SMALL_LLAMA = {
    "vocab_size": 2000,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--recipe", nargs="+", default=[DEFAULT_RECIPE, "int4-weight-only"])
    parser.add_argument("--batch", type=int, default=4, help="windows computed at once")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--micro", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--learn-ranges", action="store_true")
    wanted = parser.parse_args()
    keep_released_memory()  # as qserve-train does
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = wanted.model or small_llama(Path(scratch))
        plain = training(base, FLOAT, wanted, Path(scratch))
        for recipe in wanted.recipe:
            ratios, seconds = pairs(plain, training(base, recipe, wanted, Path(scratch)), wanted.pairs)
            results[recipe] = {"ratio": statistics.median(ratios), "ratios": ratios, "float_seconds": seconds}
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(f"{recipe}: {statistics.median(ratios):.3f} times a float step of {seconds:.3f} s ({spread})")
    print(json.dumps({"precision": wanted.precision, "threads": torch.get_num_threads(), "recipes": results}))


def small_llama(scratch: Path) -> Path:
    directory = scratch / "config"
    LlamaConfig(**SMALL_LLAMA).save_pretrained(directory)
    return directory


def training(base: Path, recipe: str, wanted: argparse.Namespace, scratch: Path) -> Training:
    options = TrainOptions(
        objective="task",
        sequence_length=wanted.length,
        batch_size=wanted.batch * wanted.micro,
        micro_batch=wanted.batch,
        precision=wanted.precision,
        learn_ranges=wanted.learn_ranges and recipe != FLOAT,
        tokens=10**9,
    )
    run = prepare(Prepare(base=str(base), run=scratch / recipe, recipe=recipe), console=Console(quiet=True))
    trainee = build(run, options)
    vocabulary = trainee.model.config.vocab_size
    windows = torch.randint(vocabulary, (64, wanted.length + 1), generator=torch.Generator().manual_seed(0))
    return Training(trainee, options, windows=windows, teacher=None, kl_share=0.0, accelerator=Accelerator(cpu=True))


def pairs(plain: Training, quantized: Training, number: int) -> tuple[list[float], float]:
    """The ratio of each pair, and the usual time of a float step; the first pair warms up."""
    times = [(seconds_of(plain), seconds_of(quantized)) for _ in range(number + 1)][1:]
    return [slow / fast for fast, slow in times], statistics.median(fast for fast, _ in times)


def seconds_of(training: Training) -> float:
    begin = time.perf_counter()
    training.advance()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
