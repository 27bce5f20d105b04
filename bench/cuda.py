"""A step on a GPU: Triton kernels against plain torch, over a model of a billion random weights that is drawn there.

    python -m bench.cuda [--repeats 5] [--steps 8]

Whole steps, from the chunks to the tokens, host and all. The kernels take turns with torch in every repeat; figures are
medians of milliseconds over the repeats.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.models import BILLION, GROUP_SIZE
from qserve.bench.machine import describe_circumstances
from qserve.device.architectures import read_spec
from qserve.device.decoder import load_decoder
from qserve.device.kv_cache import make_cache
from qserve.device.runner import ModelRunner
from qserve.device.sampler import Sampler
from qserve.engine.request import Chunk, Request, SamplingParams
from qserve.kernels.cuda.open import open_cuda
from qserve.kernels.ops import Ops
from qserve.kernels.reference import ReferenceOps
from qserve.quant.weight import ActivationQuantization, QuantizedWeight, Weight

CUDA = torch.device("cuda")
BLOCK_SIZE, NUM_BLOCKS = 16, 2048
CONFIG = {**BILLION, "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10_000.0}
NONE, DYNAMIC = ActivationQuantization.NONE, ActivationQuantization.INT8_ASYMMETRIC
RECIPES: Mapping[str, ActivationQuantization | None] = {
    "bf16": None,
    "int4-weight-only": NONE,
    "int8-dynamic-act-int4-weight": DYNAMIC,
}


@dataclass(frozen=True, slots=True)
class Load:
    """So many requests, each with the last `num_tokens` of its context to compute."""

    name: str
    num_requests: int
    context: int
    num_tokens: int

    def chunks(self) -> list[Chunk]:
        width = -(-self.context // BLOCK_SIZE)
        params = SamplingParams(max_tokens=1, temperature=0.0)
        return [
            Chunk(
                request=Request(str(row), [5] * self.context, params),
                start=self.context - self.num_tokens,
                end=self.context,
                block_ids=tuple(range(row * width, (row + 1) * width)),
            )
            for row in range(self.num_requests)
        ]


LOADS = (
    Load("decode 1", 1, 128, 1),
    Load("decode 1 after 2,000", 1, 2000, 1),
    Load("decode 32", 32, 128, 1),
    Load("prompt of 446", 1, 446, 446),
)


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of a step, one figure for each repeat; the bytes are the weights'."""

    recipe: str
    load: str
    kernels: str
    num_bytes: int
    milliseconds: list[float]


def draw_weights(activation: ActivationQuantization | None) -> dict[str, Weight]:
    """A whole checkpoint on the GPU; None leaves the linears bfloat16."""
    hidden, inner, key_size = CONFIG["hidden_size"], CONFIG["intermediate_size"], 512
    linears = {
        **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qo"},
        **{f"self_attn.{name}_proj": (key_size, hidden) for name in "kv"},
        **{f"mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")},
        "mlp.down_proj": (hidden, inner),
    }
    weights: dict[str, Weight] = {"model.embed_tokens.weight": _draw((CONFIG["vocab_size"], hidden), None)}
    for layer in range(CONFIG["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        weights |= {f"{start}{name}.weight": _draw(shape, activation) for name, shape in linears.items()}
        weights |= {f"{start}{name}_layernorm.weight": torch.ones(hidden) for name in ("input", "post_attention")}
    return weights | {"model.norm.weight": torch.ones(hidden)}


def _draw(shape: tuple[int, int], activation: ActivationQuantization | None) -> Weight:
    if activation is None:
        return torch.randn(shape, device=CUDA, dtype=torch.bfloat16) * 0.02
    return QuantizedWeight(
        codes=torch.randint(-8, 8, shape, device=CUDA, dtype=torch.int8),
        scales=torch.full((shape[0], shape[1] // GROUP_SIZE), 0.005, device=CUDA),
        group_size=GROUP_SIZE,
        bits=4,
        dtype=torch.bfloat16,
        activation=activation,
    )


def load(weights: Mapping[str, Weight], ops: Ops) -> tuple[ModelRunner, int]:
    """A runner, and the bytes of its weights."""
    spec = read_spec(CONFIG)
    assert spec is not None
    model = load_decoder(spec, weights, ops=ops, device=CUDA, max_positions=4096)
    cache = make_cache(
        model.cache_shapes, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, dtype=torch.bfloat16, device=CUDA
    )
    return ModelRunner(model, cache, device=CUDA, sampler=Sampler(choose=ops.sample)), model.num_bytes


def time_steps(runner: ModelRunner, chunks: list[Chunk], *, steps: int) -> float:
    """Milliseconds of one."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        runner.run(chunks)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps * 1e3


def measure(recipe: str, *, repeats: int, steps: int) -> Iterator[Timing]:
    weights = draw_weights(RECIPES[recipe])
    runners = {"triton": load(weights, open_cuda(CUDA)[0]), "torch": load(weights, ReferenceOps(device=CUDA))}
    for each in LOADS:
        chunks = each.chunks()
        timings = [Timing(recipe, each.name, kernels, size, []) for kernels, (_, size) in runners.items()]
        for turn in range(repeats + 1):
            for timing in timings:
                runner, _ = runners[timing.kernels]
                milliseconds = time_steps(runner, chunks, steps=steps)
                if turn:  # the first compiles, and records
                    timing.milliseconds.append(milliseconds)
        yield from timings


def show(timings: Sequence[Timing]) -> Table:
    table = Table("recipe", "load", "kernels", "weights MB", "ms", "range", box=box.SIMPLE)
    for each in timings:
        times = sorted(each.milliseconds)
        table.add_row(
            *(each.recipe, each.load, each.kernels, f"{each.num_bytes / 1e6:,.0f}"),
            *(f"{median(times):.2f}", f"{times[0]:.2f} to {times[-1]:.2f}"),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="of one repeat")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here")
    timings = [
        timing for recipe in RECIPES for timing in measure(recipe, repeats=arguments.repeats, steps=arguments.steps)
    ]
    gpu = torch.cuda.get_device_name(CUDA)
    Console().print(show(timings), f"{gpu}, torch {torch.__version__}", sep="\n")
    print(json.dumps({**describe_circumstances(), "gpu": gpu, "results": [asdict(timing) for timing in timings]}))


if __name__ == "__main__":
    main()
