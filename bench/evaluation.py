"""Do evaluation harnesses get the model's own scores from the server? lm-evaluation-harness against transformers.

    python -m bench.evaluation [MODEL] [--documents 25] [--data FILE.jsonl ...]

Starts `qserve serve MODEL` (by default the bf16 demo checkpoint), lets lm-evaluation-harness score local tasks through
/v1/completions with the remote tokenizer, and scores the same texts with transformers in float32. Without --data the
tasks are made of the standard library's documentation: choose the true continuation, foretell the last word, and the
perplexity of whole texts. A line of FILE is {query, choices, gold} or {context, continuation}.

With --no-reference nothing is compared: for quantized models, and for long runs.
"""

import argparse
import json
import pydoc_data.topics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.harness import Outcome, Scored, run_harness
from bench.server import serving
from training.demo import SMOLLM2, cache_directory, make_demo

TOLERANCE = 1e-3  # of the log-likelihood of a hundred tokens
LONGEST = 2048  # tokens; the harness's own default
_METRICS = {
    "multiple_choice": ("acc", "acc_norm"),
    "loglikelihood": ("acc", "perplexity"),
    "loglikelihood_rolling": ("bits_per_byte", "byte_perplexity"),
}
# What of a line is the question, and what the answer, in the harness's templates.
_FIELDS = {
    "multiple_choice": {"doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"},
    "loglikelihood": {"doc_to_text": "{{context}}", "doc_to_target": " {{continuation}}"},
    "loglikelihood_rolling": {"doc_to_text": "", "doc_to_target": "{{text}}"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Documents of one kind; the kind is the harness's output type."""

    name: str
    kind: str
    documents: Sequence[dict[str, Any]]


def main() -> int:
    args = parse_arguments()
    model = args.model or str(_float_demo())
    tasks = [read_task(path, args.documents) for path in args.data] or list(make_tasks(args.documents))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tasks(tasks, folder)
        with serving(model) as url:
            max_length = min(LONGEST, _context_of(url))
            names = [task.name for task in tasks]
            outcome = run_harness(
                url,
                tasks=folder,
                names=names,
                out=folder / "out",
                max_length=max_length,
                num_concurrent=args.concurrent,
            )
    errors = [] if args.no_reference else compare(model, outcome.scores, max_length=max_length)
    return report(outcome, errors)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a directory; by default the demo model's bf16 checkpoint")
    parser.add_argument("--documents", type=int, default=25, help="of each task")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="tasks of your own")
    parser.add_argument("--concurrent", type=int, default=8, help="requests at a time")
    parser.add_argument("--no-reference", action="store_true", help="measure, and compare with nothing")
    return parser.parse_args()


def make_tasks(number: int, *, longest: int = 4000) -> Iterator[Task]:
    """Three tasks out of texts that every Python has, of at most that many characters."""
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items()) if len(text) > longest // 2][:number]
    halves = [text[: longest // 4].rsplit(" ", 1)[0] for text in texts]
    rests = [text[len(half) + 1 :][:100] for text, half in zip(texts, halves, strict=True)]
    others = rests[1:] + rests[:1]
    pairs = list(zip(halves, rests, others, strict=True))
    choices = [{"query": half, "choices": [rest, other], "gold": 0} for half, rest, other in pairs]
    yield Task(name="true_continuation", kind="multiple_choice", documents=choices)
    words = [dict(zip(("context", "continuation"), half.rsplit(maxsplit=1), strict=True)) for half in halves]
    yield Task(name="last_word", kind="loglikelihood", documents=words)
    yield Task(name="perplexity", kind="loglikelihood_rolling", documents=[{"text": text[:longest]} for text in texts])


def read_task(path: Path, number: int) -> Task:
    documents = [json.loads(line) for line in path.read_text().splitlines()[:number]]
    kind = "multiple_choice" if "choices" in documents[0] else "loglikelihood"
    return Task(name=path.stem, kind=kind, documents=documents)


def write_tasks(tasks: Sequence[Task], folder: Path) -> None:
    """A definition and a data file each. JSON is YAML, so the definitions need no library."""
    for task in tasks:
        lines = folder / f"{task.name}.jsonl"
        lines.write_text("".join(json.dumps(document) + "\n" for document in task.documents))
        definition = {
            "task": task.name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(lines)}},
            "test_split": "test",
            "output_type": task.kind,
            **_FIELDS[task.kind],
            "metric_list": [{"metric": metric} for metric in _METRICS[task.kind]],
        }
        (folder / f"{task.name}.yaml").write_text(json.dumps(definition, indent=2))


def compare(model: str, scores: Sequence[Scored], *, max_length: int) -> list[float]:
    """By how much each score is off, for each hundred tokens begun; infinity where only one side calls it greedy."""
    reference = Reference(model, max_length=max_length)
    return [reference.error_of(scored) for scored in scores]


class Reference:
    """transformers in float32, scoring as the harness's documentation defines a log-likelihood."""

    def __init__(self, model: str, *, max_length: int) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._room = max_length - 1  # a place is kept for the token that the API makes

    def error_of(self, scored: Scored) -> float:
        context, ids = self._encode(scored)
        total, is_greedy = self._score(context, ids)
        if scored.is_greedy is not None and scored.is_greedy is not is_greedy:
            return float("inf")
        return abs(total - scored.logprob) / max(len(ids) / 100, 1)

    def _encode(self, scored: Scored) -> tuple[list[int], list[int]]:
        """What is conditioned on, and what is scored; spaces between the two belong to the text that is scored."""
        if scored.context is None:
            start = self._tokenizer.bos_token_id or self._tokenizer.eos_token_id
            ids = self._ids(scored.text)
            assert len(ids) < self._room, "the texts are cut so that one window holds them"
            return [start], ids
        whole = self._ids(scored.context + scored.text)
        context = self._ids(scored.context.rstrip())
        return whole[: len(context)], whole[len(context) :]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    @torch.inference_mode()
    def _score(self, context: list[int], ids: list[int]) -> tuple[float, bool]:
        tokens = (context + ids)[-self._room :]
        logits = self._model(torch.tensor([tokens[:-1]])).logits[0, -len(ids) :]  # (ids, vocabulary)
        targets = torch.tensor(ids)
        # In double: the rounding of a float32 softmax over the vocabulary would add up to more than is looked for.
        logprobs = logits.double().log_softmax(dim=-1).gather(1, targets.unsqueeze(1))
        return float(logprobs.sum()), bool((logits.argmax(dim=-1) == targets).all())


def report(outcome: Outcome, errors: Sequence[float]) -> int:
    for task, metrics in outcome.metrics.items():
        print(task, ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    worst = max(errors, default=0.0)
    summary = {"scores": len(outcome.scores), "compared": len(errors), "worst": worst, "tasks": outcome.metrics}
    print(json.dumps(summary))
    return 1 if worst > TOLERANCE else 0


def _float_demo() -> Path:
    return make_demo(SMOLLM2, cache_directory(), wants_float=True, console=Console(stderr=True))


def _context_of(url: str) -> int:
    (model,) = httpx.get(f"{url}/v1/models").raise_for_status().json()["data"]
    length: int = model["max_model_len"]
    return length


if __name__ == "__main__":
    sys.exit(main())
