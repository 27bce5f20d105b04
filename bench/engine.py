"""What the engine does in a second, without text and without HTTP, and where a step's time goes.

    python -m bench.engine [--models smollm2,1b] [--recipes bf16,int8-dynamic-act-int4-weight,...]
                           [--rows 1,4,8,16,32] [--prompts 32,446] [--steps 32] [--repeats 5]

All recipes of a model are loaded together and take turns in every repeat. For each number of rows and prompt length:
the prompts' time, and then the decoding's, in tokens a second and split into the stages of a step (schedule, batch,
forward, head, sample, update). `limit` is what reading the weights once a step would allow at the read bandwidth
measured for that many bytes; the figures are medians over the repeats.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.bandwidth import read_bandwidth
from bench.models import FLOAT, GROUP_SIZE, MODELS, get_model
from qserve.bench.machine import Machine, describe_circumstances
from qserve.checkpoint.agree import EMBEDDING
from qserve.checkpoint.detect import detect
from qserve.checkpoint.load import open_weights
from qserve.config import EngineConfig
from qserve.device.kv_cache import CacheShape, KVCache, make_cache
from qserve.device.load import load_model
from qserve.device.runner import Model, ModelRunner
from qserve.device.sampler import Choose, Sampler
from qserve.engine.request import Request, SamplingParams
from qserve.engine.scheduler import Scheduler
from qserve.kernels.build import count_cores
from qserve.kernels.native import NativeOps, open_native
from qserve.kernels.ops import Batch

RECIPES = (
    FLOAT,
    "int8-dynamic-act-int4-weight",
    "int4-weight-only",
    "int8-dynamic-act-int8-weight",
    "int8-weight-only",
)
STAGES = ("schedule", "batch", "forward", "head", "sample", "update")
_BLOCK_SIZE = 16
_WARM_UP_STEPS = 4


@dataclass(slots=True)
class Clock:
    """Seconds by stage, since they were last taken."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def add(self, stage: str, start: float) -> None:
        self.seconds[stage] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, dict.fromkeys(STAGES, 0.0)
        return taken


class TimedModel:
    """A model that tells the clock."""

    def __init__(self, model: Model, clock: Clock) -> None:
        self._model = model
        self._clock = clock

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @property
    def cache_shapes(self) -> tuple[CacheShape, ...]:
        return self._model.cache_shapes

    @property
    def num_bytes(self) -> int:
        return self._model.num_bytes

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        start = time.perf_counter()
        hidden = self._model.forward(batch, cache)
        self._clock.add("forward", start)
        return hidden

    def finish(self, hidden: Tensor) -> Tensor:
        return self._model.finish(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        start = time.perf_counter()
        logits = self._model.logits(hidden)
        self._clock.add("head", start)
        return logits


class TimedSampler(Sampler):
    """A sampler that tells the clock."""

    def __init__(self, clock: Clock, choose: Choose) -> None:
        super().__init__(choose=choose)
        self._clock = clock

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> list[int | None]:
        start = time.perf_counter()
        tokens = super().sample(logits, requests)
        self._clock.add("sample", start)
        return tokens


@dataclass(slots=True, kw_only=True)
class Candidate:
    """One recipe of a model, loaded. `num_bytes` is what a decoded token reads of its weights."""

    recipe: str
    runner: ModelRunner
    clock: Clock
    num_bytes: int
    vocab_size: int
    num_runs: int = 0

    def run(self, point: "Point") -> "Measured":
        """The prompts, then the steps: by hand, as `Engine.step` does it."""
        self.num_runs += 1
        num_slots = point.rows * (point.prompt + point.steps + _BLOCK_SIZE)
        config = EngineConfig(max_running=point.rows, max_step_tokens=max(512, point.rows), block_size=_BLOCK_SIZE)
        scheduler = Scheduler(
            replace(config, prefix_caching=False, speculative_tokens=0), num_slots // _BLOCK_SIZE + point.rows
        )
        generator = torch.Generator().manual_seed(self.num_runs)
        for row in range(point.rows):
            ids = torch.randint(100, self.vocab_size, (point.prompt,), generator=generator).tolist()
            scheduler.add(Request(f"{row}", ids, SamplingParams(max_tokens=point.steps + 1, temperature=0.0)))
        start = time.perf_counter()
        while scheduler.stats.num_generated_tokens < point.rows:
            self._step(scheduler)
        prompts_end = time.perf_counter()
        self.clock.take()
        num_before = scheduler.stats.num_generated_tokens
        decode_start, num_steps = time.perf_counter(), 0
        while scheduler.has_work:
            self._step(scheduler)
            num_steps += 1
        duration = time.perf_counter() - decode_start
        num_tokens = scheduler.stats.num_generated_tokens - num_before
        stages = {stage: seconds / num_steps for stage, seconds in self.clock.take().items()}
        return Measured(prompts=prompts_end - start, decode=num_tokens / duration, stages=stages)

    def _step(self, scheduler: Scheduler) -> None:
        start = time.perf_counter()
        chunks = scheduler.schedule()
        self.clock.add("schedule", start)
        start, inside = time.perf_counter(), self._inside()
        sampled = self.runner.run(chunks)
        self.clock.seconds["batch"] += time.perf_counter() - start - (self._inside() - inside)
        start = time.perf_counter()
        scheduler.update(chunks, sampled)
        self.clock.add("update", start)

    def _inside(self) -> float:
        """What the runner spends in stages that are timed themselves; the rest of it is `batch`."""
        return sum(self.clock.seconds[stage] for stage in ("forward", "head", "sample"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What is run: so many rows, each with a prompt of so many tokens, and then so many steps."""

    rows: int
    prompt: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    prompts: float  # seconds until every row had its first token
    decode: float  # tokens a second
    stages: dict[str, float]  # seconds a step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="of the benches, or directories")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--rows", default="1,4,8,16,32")
    parser.add_argument("--prompts", default="32,446")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(count_cores())
    points = [
        Point(rows=int(rows), prompt=int(prompt), steps=args.steps)
        for prompt in args.prompts.split(",")
        for rows in args.rows.split(",")
    ]
    circumstances, ops, console = describe_circumstances(), open_native(), Console(width=160)
    rows: list[dict[str, Any]] = []
    for model in args.models.split(","):
        rows += measure(model, args.recipes.split(","), points, repeats=args.repeats, ops=ops)
    console.print(make_table(rows))
    console.print(Machine(**circumstances["machine"]).line, highlight=False)
    print(json.dumps({"bench": "engine", **circumstances, "kernels": ops.variant, "rows": rows}))
    return 0


def measure(
    model: str, recipes: Sequence[str], points: Sequence[Point], *, repeats: int, ops: NativeOps
) -> list[dict[str, Any]]:
    """Every recipe of one model, in turns."""
    most = max(point.rows * (point.prompt + point.steps + 2 * _BLOCK_SIZE) for point in points)
    candidates = [load(model, recipe, ops=ops, num_slots=most) for recipe in recipes]
    bandwidths = {candidate.recipe: 0.0 for candidate in candidates}
    found: dict[tuple[str, Point], list[Measured]] = {}
    for point in points:
        for candidate in candidates:
            candidate.run(replace(point, steps=_WARM_UP_STEPS))
    for repeat in range(repeats):
        for candidate in candidates:  # the best of all: it is a limit, and may not have been had at one moment
            best = bandwidths[candidate.recipe]
            bandwidths[candidate.recipe] = max(best, read_bandwidth(candidate.num_bytes))
        for point in points:
            for candidate in candidates[repeat % len(candidates) :] + candidates[: repeat % len(candidates)]:
                found.setdefault((candidate.recipe, point), []).append(candidate.run(point))
        print(f"{model}: repeat {repeat + 1} of {repeats}", file=sys.stderr)
    return [
        summarize(
            model, candidate, point, found, bandwidth=bandwidths[candidate.recipe], reference=candidates[0].recipe
        )
        for point in points
        for candidate in candidates
    ]


def load(model: str, recipe: str, *, ops: NativeOps, num_slots: int) -> Candidate:
    checkpoint = detect(get_model(model, recipe))
    device, clock = torch.device("cpu"), Clock()
    weights = open_weights(checkpoint)
    loaded = load_model(checkpoint.config, weights, ops=ops, device=device, max_positions=num_slots)
    dtype = torch.bfloat16 if checkpoint.is_quantized else torch.float32  # as the server chooses it
    cache = make_cache(
        loaded.cache_shapes, num_blocks=num_slots // _BLOCK_SIZE, block_size=_BLOCK_SIZE, dtype=dtype, device=device
    )
    looked_up = sum(info.num_bytes for name, info in checkpoint.tensors.items() if EMBEDDING.fullmatch(name))
    return Candidate(
        recipe=recipe,
        runner=ModelRunner(TimedModel(loaded, clock), cache, device=device, sampler=TimedSampler(clock, ops.sample)),
        clock=clock,
        num_bytes=loaded.num_bytes - looked_up,
        vocab_size=loaded.vocab_size,
    )


def summarize(
    model: str,
    candidate: Candidate,
    point: Point,
    found: dict[tuple[str, Point], list[Measured]],
    *,
    bandwidth: float,
    reference: str,
) -> dict[str, Any]:
    """Medians over the repeats; the ratio is the median of each repeat's own."""
    own, first = found[candidate.recipe, point], found[reference, point]
    decode = median(each.decode for each in own)
    limit = bandwidth / candidate.num_bytes * point.rows
    return {
        "model": model,
        "recipe": candidate.recipe,
        "rows": point.rows,
        "prompt_tokens": point.prompt,
        "group_size": GROUP_SIZE,
        "decode_tokens_per_second": decode,
        "ratio_to_first": median(a.decode / b.decode for a, b in zip(own, first, strict=True)),
        "prompts_ms": median(each.prompts for each in own) * 1e3,
        "prompt_ratio_to_first": median(b.prompts / a.prompts for a, b in zip(own, first, strict=True)),
        "stages_ms": {stage: median(each.stages[stage] for each in own) * 1e3 for stage in STAGES},
        "weight_bytes": candidate.num_bytes,
        "bandwidth": bandwidth,
        "share_of_limit": decode / limit,
        "repeats": [each.decode for each in own],
    }


def make_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("model", "recipe"):
        table.add_column(heading, no_wrap=True)
    headings: tuple[str, ...] = ("rows", "prompt", "prompts\nms", "\nratio", "decode\ntok/s", "\nratio", "of\nlimit")
    headings += (*(f"{stage}\nms" for stage in STAGES), "read\nMB")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["model"],
            row["recipe"],
            str(row["rows"]),
            str(row["prompt_tokens"]),
            f"{row['prompts_ms']:,.0f}",
            f"{row['prompt_ratio_to_first']:.2f}",
            f"{row['decode_tokens_per_second']:,.0f}",
            f"{row['ratio_to_first']:.2f}",
            f"{row['share_of_limit']:.0%}" if row["rows"] == 1 else "",
            *(f"{row['stages_ms'][stage]:.2f}" for stage in STAGES),
            f"{row['weight_bytes'] / 1e6:,.0f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
