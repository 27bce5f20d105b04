"""The small Llama of published figures, from nothing: trained, rounded, trained for rounding, compared.

    python -m bench.tinystories --text DIR --out DIR [--tokens 3000000] [--qat-tokens 200000] [--seeds 0 1 2]

The text is TinyStories: train.txt and valid.txt in DIR, stories parted by <|endoftext|>. A tokenizer of 2000 words is
made of it, a model of 4.4 million parameters (width 256, feed-forward 768, 4 layers, 2 heads, untied) is trained in
float and kept in bfloat16; then `qserve-train compare` for the default recipe, and for int4-weight-only with the head
as the body, which is the smallest file. Each step is a word of qserve-train; the same command goes on where it was
stopped, and the float model is taken when its schedule has ended, not before. On a machine that does other things too,
--no-speed first; the same command without it then adds the speeds alone.
"""

import argparse
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig

from bench.training_step import SMALL_LLAMA
from training.cli import main as qserve_train
from training.data import END_OF_TEXT

_COMPARISONS = {
    "default": ["--recipe", "int8-dynamic-act-int4-weight"],
    "smallest": ["--recipe", "int4-weight-only", "--group-size", "64", "--head", "same"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tokens", type=int, default=3_000_000, help="of float training")
    parser.add_argument("--qat-tokens", type=int, default=200_000)
    parser.add_argument("--eval-tokens", type=int, default=60_000)
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--speed", action=argparse.BooleanOptionalAction, default=True, help="also serve and time")
    wanted = parser.parse_args()
    train, valid = wanted.text / "train.txt", wanted.text / "valid.txt"
    config, run, base = (wanted.out / name for name in ("config", "run", "model"))
    if not (config / "config.json").is_file():
        make_config(config, train)
    if not base.is_dir():
        word("prepare", config, "--recipe", "float", "--run", run)
        pace = ["--learning-rate", "1e-3", "--batch-size", "8", "--micro-batch", "8", "--weight-decay", "0.1"]
        word("train", "--run", run, "--data", train, "--tokens", wanted.tokens, *pace)
        word("finalize", run, "--out", base)
    for name, recipe in _COMPARISONS.items():
        measured = ["--eval-data", valid, "--max-tokens", wanted.eval_tokens, "--seeds", *wanted.seeds]
        trained = ["--data", train, "--tokens", wanted.qat_tokens, "--micro-batch", "8"]
        pace = ["--learning-rate", "3e-5", "--learn-ranges", "--speed" if wanted.speed else "--no-speed"]
        word("compare", base, "--out", wanted.out / name, *recipe, *trained, *pace, *measured)


def make_config(directory: Path, text: Path) -> None:
    """A model's config and a tokenizer, without weights: what `prepare --recipe float` begins a fresh model from."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SMALL_LLAMA["vocab_size"],
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text.read_text()], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    LlamaConfig(**SMALL_LLAMA, bos_token_id=0, eos_token_id=0).save_pretrained(directory)


def word(*arguments: object) -> None:
    """One command of qserve-train, shown as it would be typed."""
    print("$ qserve-train", *arguments, flush=True)
    status = qserve_train([str(argument) for argument in arguments])
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
