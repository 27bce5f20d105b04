"""Multiple choice: of several ends of a text, which does the model find likeliest?

A file holds one JSON object a line: `query`, `choices`, and the index `gold`. A choice is scored by the summed
log-probability of its tokens after the query, and again per byte, which does not favour short ones.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qserve.errors import UsageError

BETWEEN = "\nAnswer: "
Likelihoods = Callable[[Sequence[int]], Sequence[float]]  # of every token but the first


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Shares of items whose gold choice scored highest."""

    items: int
    summed: float
    per_byte: float


def read_items(path: Path, *, limit: int | None = None) -> list[Item]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:limit]
    return [_item(line, path, number) for number, line in enumerate(lines, start=1)]


def accuracy(items: Iterable[Item], likelihoods: Likelihoods, tokenizer: Any, *, between: str) -> Accuracy:
    """Ask `likelihoods` for every choice of every item."""
    summed = per_byte = number = 0
    for item in items:
        number += 1
        scores = [_score(item.query, choice, likelihoods, tokenizer, between) for choice in item.choices]
        lengths = [len(choice.encode()) for choice in item.choices]
        summed += _best(scores) == item.gold
        per_byte += _best([score / length for score, length in zip(scores, lengths, strict=True)]) == item.gold
    return Accuracy(items=number, summed=summed / number, per_byte=per_byte / number)


def likelihoods_of(model: Any) -> Likelihoods:
    """A transformers model as a function from ids to log-probabilities."""

    def likelihoods(ids: Sequence[int]) -> list[float]:
        tokens = torch.tensor(ids)
        with torch.no_grad():
            log_p = model(input_ids=tokens[None, :-1], use_cache=False).logits[0].float().log_softmax(-1)
        return log_p.gather(-1, tokens[1:, None]).flatten().tolist()  # type: ignore[no-any-return]

    return likelihoods


def _score(query: str, choice: str, likelihoods: Likelihoods, tokenizer: Any, between: str) -> float:
    """What belongs to the choice begins where the tokens of the whole part from those of the query alone."""
    start = query.rstrip() + between
    before = tokenizer(start.rstrip(), add_special_tokens=False)["input_ids"]
    ids = tokenizer(start + choice, add_special_tokens=False)["input_ids"]
    common = next((n for n, (own, other) in enumerate(zip(before, ids, strict=False)) if own != other), len(before))
    return sum(likelihoods(ids)[max(common, 1) - 1 :])


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda index: scores[index])


def _item(line: str, path: Path, number: int) -> Item:
    try:
        told = json.loads(line)
        return Item(query=told["query"], choices=tuple(told["choices"]), gold=int(told["gold"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}, line {number}, is no item ({error!r}); expected query, choices and the index gold"
        ) from error
