"""Does the server say what the model says? Greedy completions over HTTP against transformers, token by token.

    python -m bench.fidelity MODEL [--prompts 20] [--tokens 64]

Starts `qserve serve MODEL` on a free port, asks for greedy completions of prompts cut from the standard library's
documentation, and compares their ids with those of transformers in float32 on the same weights. Where they part, the
gap between the two tokens' logits is looked up in transformers: below 1e-3 it is a near-tie, counted and excused.
"""

import argparse
import json
import pydoc_data.topics
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bench.server import serving

NEAR_TIE = 1e-3
PROMPT_CHARACTERS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How one prompt went. `gap` is that of the logits where the two part, None where they do not."""

    num_equal: int
    gap: float | None

    @property
    def is_good(self) -> bool:
        return self.gap is None or self.gap < NEAR_TIE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a float checkpoint: a directory")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    prompts = cut_prompts(AutoTokenizer.from_pretrained(args.model), args.prompts)
    with serving(str(args.model)) as url:
        answers = [complete(url, ids, args.tokens) for ids in prompts]
    verdicts = [judge(model, ids, answer) for ids, answer in zip(prompts, answers, strict=True)]
    return report(verdicts)


def cut_prompts(tokenizer: PreTrainedTokenizerBase, number: int) -> list[list[int]]:
    topics = sorted(pydoc_data.topics.topics.items())
    texts = [text[:PROMPT_CHARACTERS] for _, text in topics if len(text) > PROMPT_CHARACTERS]
    return [tokenizer.encode(text) for text in texts[:: len(texts) // number][:number]]


def complete(url: str, ids: list[int], num_tokens: int) -> list[int]:
    body = {"prompt": ids, "max_tokens": num_tokens, "temperature": 0, "return_token_ids": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300)
    answer.raise_for_status()
    token_ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return token_ids


def judge(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> Verdict:
    """One forward over prompt and answer gives what transformers would have said at each position."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]  # (tokens, vocabulary)
    wanted = logits.argmax(dim=-1).tolist()
    for position, (own, other) in enumerate(zip(answer, wanted, strict=True)):
        if own != other:
            return Verdict(num_equal=position, gap=float(logits[position, other] - logits[position, own]))
    return Verdict(num_equal=len(answer), gap=None)


def report(verdicts: list[Verdict]) -> int:
    for number, verdict in enumerate(verdicts):
        told = "equal" if verdict.gap is None else f"part after {verdict.num_equal}, logits {verdict.gap:.2g} apart"
        print(f"prompt {number:2}: {verdict.num_equal:3} tokens, {told}")
    summary = {
        "prompts": len(verdicts),
        "equal": sum(verdict.gap is None for verdict in verdicts),
        "near_ties": sum(verdict.gap is not None and verdict.is_good for verdict in verdicts),
        "different": sum(not verdict.is_good for verdict in verdicts),
    }
    print(json.dumps(summary))
    return 1 if summary["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
