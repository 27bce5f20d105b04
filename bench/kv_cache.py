"""What the key-value cache's type costs: time of attention and of whole steps, and what rounding does to the model.

    python -m bench.kv_cache [MODEL ...] [--types bfloat16,int8] [--repeats 5] [--tokens 20000] [--text FILE]

By default the demo, as int8-dynamic-act-int4-weight and in bf16. Speed: steps of so many rows at so much context, each
type in turns over one model; each stage of a step is a call of its own here, which makes the small ones slower.
Quality: text in windows of 512 tokens, without FILE of the standard library's documentation; loss, divergence and
greedy agreement, all against the same model over a float32 cache.
"""

import argparse
import json
import pydoc_data.topics
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.models import FLOAT, get_model
from qserve.bench.machine import Machine, describe_circumstances
from qserve.checkpoint.detect import detect
from qserve.checkpoint.load import open_weights
from qserve.device.batch import make_batch
from qserve.device.kv_cache import KVCache, make_cache
from qserve.device.load import load_model
from qserve.device.runner import Model, ModelRunner
from qserve.device.sampler import Sampler
from qserve.engine.request import Chunk, Request, SamplingParams
from qserve.kernels.build import choose_variant, count_cores, load_library
from qserve.kernels.native import NativeOps
from qserve.kernels.stages import Runner, StageKind
from qserve.text.tokenizer import load_tokenizer

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
CPU = torch.device("cpu")
WINDOW = 512
_BLOCK_SIZE = 16
_PARAMS = SamplingParams(max_tokens=4096, temperature=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Rows that each compute the last `new` of `context` tokens."""

    rows: int
    context: int
    new: int = 1

    @property
    def num_blocks(self) -> int:
        return self.rows * -(-self.context // _BLOCK_SIZE)


POINTS = (
    Point(rows=1, context=150),
    Point(rows=1, context=1500),
    Point(rows=32, context=150),
    Point(rows=32, context=1000),
    Point(rows=1, context=446, new=446),
)


class TimedRunner(Runner):
    """Runs recorded stages one by one and adds up the seconds of each kind."""

    def __init__(self) -> None:
        super().__init__(load_library(choose_variant()), num_threads=count_cores())
        self.seconds = dict.fromkeys(StageKind, 0.0)

    def run(self, stages: Any, count: int) -> None:
        for index in range(count):
            stage = stages[index] if hasattr(stages, "__getitem__") else stages
            start = time.perf_counter()
            super().run(stage, 1)
            self.seconds[StageKind(stage.kind)] += time.perf_counter() - start

    def take(self) -> dict[StageKind, float]:
        taken, self.seconds = self.seconds, dict.fromkeys(StageKind, 0.0)
        return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="directories; by default the demo, quantized and in bf16")
    parser.add_argument("--types", default="bfloat16,int8")
    parser.add_argument("--repeats", type=int, default=5, help="of the speed; 0 leaves it out")
    parser.add_argument("--tokens", type=int, default=20_000, help="of text; 0 leaves quality out")
    parser.add_argument("--text", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(count_cores())
    circumstances, console = describe_circumstances(), Console(width=140)
    models = [Path(model) for model in args.models] or [
        get_model("smollm2", recipe) for recipe in ("int8-dynamic-act-int4-weight", FLOAT)
    ]
    types = {name: TYPES[name] for name in args.types.split(",")}
    text = args.text.read_text() if args.text else "\n".join(pydoc_data.topics.topics.values())
    speed: list[dict[str, Any]] = []
    quality: list[dict[str, Any]] = []
    for path in models:
        timer = TimedRunner()
        ops = NativeOps(timer, choose_variant())
        model, ids = load(path, ops, text=text, num_tokens=args.tokens)
        if args.repeats:
            speed += measure_speed(path.name, model, types, timer, Sampler(choose=ops.sample), repeats=args.repeats)
        if args.tokens:
            quality += measure_quality(path.name, model, types, ids)
    for rows in (speed, quality):
        if rows:
            console.print(make_table(rows))
    console.print(Machine(**circumstances["machine"]).line, highlight=False)
    print(json.dumps({"bench": "kv_cache", **circumstances, "speed": speed, "quality": quality}))
    return 0


def load(path: Path, ops: NativeOps, *, text: str, num_tokens: int) -> tuple[Model, list[int]]:
    checkpoint = detect(path)
    model = load_model(checkpoint.config, open_weights(checkpoint), ops=ops, device=CPU, max_positions=2048)
    tokenizer = load_tokenizer(checkpoint.home)
    return model, tokenizer.encode(text[: 8 * num_tokens], add_special_tokens=False)[:num_tokens]


def measure_speed(
    name: str, model: Model, types: dict[str, torch.dtype], timer: TimedRunner, sampler: Sampler, *, repeats: int
) -> list[dict[str, Any]]:
    """Medians over the repeats, milliseconds of a step."""
    rows = []
    for point in POINTS:
        runners = {kind: _fill(model, sampler, point, dtype) for kind, dtype in types.items()}
        found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in types}
        for repeat in range(repeats + 1):  # the first is to warm up
            for kind in list(types)[:: 1 if repeat % 2 else -1]:
                found[kind].append(_time_steps(*runners[kind], timer))
        for kind, times in found.items():
            attend, store, step = (median(values) * 1e3 for values in zip(*times[1:], strict=True))
            rows.append(
                {
                    "model": name,
                    "cache": kind,
                    "rows": point.rows,
                    "context": point.context,
                    "new": point.new,
                    "attend_ms": round(attend, 2),
                    "rotate_ms": round(store, 2),
                    "step_ms": round(step, 2),
                    "cache_mb": round(runners[kind][0].memory.cache / 1e6, 1),
                }
            )
    return rows


def _fill(model: Model, sampler: Sampler, point: Point, dtype: torch.dtype) -> tuple[ModelRunner, list[Chunk]]:
    """A runner over a cache of any numbers, and the step's chunks, whose blocks lie anywhere."""
    cache = make_cache(model.cache_shapes, num_blocks=point.num_blocks, block_size=_BLOCK_SIZE, dtype=dtype, device=CPU)
    for layer in cache.layers:
        for part in (layer.keys, layer.values):
            _ = part.random_(-127, 127) if dtype is torch.int8 else part.normal_()
        for scales in (layer.key_scales, layer.value_scales):
            if scales is not None:
                scales.fill_(0.02)
    blocks = list(range(point.num_blocks))
    random.Random(0).shuffle(blocks)
    each = point.num_blocks // point.rows
    chunks = [
        Chunk(
            request=Request(str(row), [100 + row] * point.context, _PARAMS),
            start=point.context - point.new,
            end=point.context,
            block_ids=tuple(blocks[row * each : (row + 1) * each]),
        )
        for row in range(point.rows)
    ]
    return ModelRunner(model, cache, device=CPU, sampler=sampler), chunks


def _time_steps(runner: ModelRunner, chunks: list[Chunk], timer: TimedRunner) -> tuple[float, float, float]:
    """Of the best of three steps' stages: attention, storing, all."""
    best = (float("inf"),) * 3
    for _ in range(3):
        timer.take()
        start = time.perf_counter()
        runner.run(chunks)
        whole, stages = time.perf_counter() - start, timer.take()
        best = min(best, (stages[StageKind.ATTEND], stages[StageKind.ROTATE], whole))
    return best


@torch.inference_mode()
def measure_quality(name: str, model: Model, types: dict[str, torch.dtype], ids: Sequence[int]) -> list[dict[str, Any]]:
    names = {"float32": torch.float32, **types}
    caches = {
        kind: make_cache(
            model.cache_shapes, num_blocks=WINDOW // _BLOCK_SIZE, block_size=_BLOCK_SIZE, dtype=dtype, device=CPU
        )
        for kind, dtype in names.items()
    }
    sums = {kind: torch.zeros(3, dtype=torch.float64) for kind in names}  # loss, divergence, agreement
    num_windows = len(ids) // WINDOW
    for number in range(num_windows):
        window = list(ids[number * WINDOW : (number + 1) * WINDOW])
        exact = _log_probabilities(model, window, caches["float32"])
        for kind, cache in caches.items():
            found = exact if kind == "float32" else _log_probabilities(model, window, cache)
            sums[kind] += _compare(found, exact, torch.tensor(window[1:]))
    num_scored = num_windows * (WINDOW - 1)
    rows = []
    for kind, total in sums.items():
        loss, divergence, agreement = (total / num_scored).tolist()
        rows.append(
            {
                "model": name,
                "cache": kind,
                "tokens": num_scored,
                "loss": round(loss, 5),
                "perplexity": round(torch.tensor(loss, dtype=torch.float64).exp().item(), 4),
                "kl": float(f"{divergence:.2e}"),
                "same_greedy": round(agreement, 4),
            }
        )
    return rows


def _log_probabilities(model: Model, window: list[int], cache: KVCache) -> Tensor:
    """(window - 1, vocabulary), float32."""
    chunk = Chunk(request=Request("w", window, _PARAMS), start=0, end=WINDOW, block_ids=tuple(range(cache.num_blocks)))
    hidden = model.forward(make_batch([chunk], block_size=_BLOCK_SIZE, device=CPU), cache)
    return torch.log_softmax(model.logits(hidden[:-1]), dim=-1).clone()


def _compare(found: Tensor, exact: Tensor, targets: Tensor) -> Tensor:
    loss = -found.gather(1, targets.unsqueeze(1)).double().sum()
    divergence = (exact.exp() * (exact - found)).double().sum()
    agreement = (found.argmax(dim=1) == exact.argmax(dim=1)).double().sum()
    return torch.stack([loss, divergence, agreement])


def make_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(*rows[0], box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    return table


if __name__ == "__main__":
    sys.exit(main())
