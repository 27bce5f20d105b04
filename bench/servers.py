"""The same streamed work over HTTP, from our server and from others, in turns within one run.

    python -m bench.servers [--targets ...] [--clients 1,8,32] [--prompt 115] [--tokens 64] [--repeats 3]

Every server serves SmolLM2-135M-Instruct: ours as each recipe, llama.cpp the GGUF file that the demo comes from and its
weights in other types, transformers the float model. Prompts are English prose of so many tokens, new ones in every
run, so that no cache knows them; greedy, with ignore_eos where the server knows it. All servers run at once, one works.
The figures are medians over the repeats; ratios are to the first target, repeat by repeat.
"""

import argparse
import asyncio
import json
import pydoc_data.topics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any

import uvloop
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from bench.environment import NotInstallable
from bench.models import FLOAT, get_model
from bench.peers import IGNORE_EOS, PEERS, DoesNotStart, RunningPeer, running
from qserve.bench.figures import Figures
from qserve.bench.load import make_loads
from qserve.bench.machine import Machine, describe_circumstances
from qserve.bench.measure import Plan, measure
from qserve.bench.process import ServerProcess
from qserve.bench.result import Row
from qserve.bench.target import Server, Target, connect
from qserve.bench.work import COMPLETIONS, Job
from qserve.errors import UsageError

# The recipe, and options of the server.
OURS: dict[str, tuple[str, tuple[str, ...]]] = {
    "qserve-int8da-int4w": ("int8-dynamic-act-int4-weight", ()),
    "qserve-int8da-int4w-plain": ("int8-dynamic-act-int4-weight", ("--speculative-tokens", "0")),
    "qserve-int8da-int4w-kv8": ("int8-dynamic-act-int4-weight", ("--kv-cache-dtype", "int8")),
    "qserve-int4wo": ("int4-weight-only", ()),
    "qserve-int8da-int8w": ("int8-dynamic-act-int8-weight", ()),
    "qserve-bf16": (FLOAT, ()),
}
FIGURES = {
    "output_throughput": "tok/s",
    "median_ttft_ms": "first\nms",
    "median_itl_ms": "gap\nms",
    "p99_itl_ms": "gap p99\nms",
    "rss_mib": "memory\nMiB",
}
RATIOS = {"output_throughput": "tok/s", "median_ttft_ms": "first"}


class Prose:
    """Prompts of an exact number of tokens from the documentation of Python, a new place for each."""

    def __init__(self, tokenizer: Tokenizer, *, prompt: int, tokens: int, rounds: int) -> None:
        self._tokenizer = tokenizer
        self._ids = tokenizer.encode("\n".join(pydoc_data.topics.topics.values()), add_special_tokens=False).ids
        self._prompt = prompt
        self._tokens = tokens
        self._rounds = rounds
        self._next: dict[int, int] = {}  # by run: where its prompts begin
        self._end = 0

    def count(self, *, concurrency: int | None) -> int:
        return max(8, self._rounds * (concurrency or 1))

    def make_jobs(self, number: int, *, run: int) -> list[Job]:
        """The same for every target of a run."""
        start = self._next.setdefault(run, self._end)
        self._end = max(self._end, start + number * self._prompt)
        return [self._job(start + index * self._prompt) for index in range(number)]

    def _job(self, start: int) -> Job:
        places = range(start, start + self._prompt)
        text = self._tokenizer.decode([self._ids[place % len(self._ids)] for place in places])
        body = {"prompt": text, "max_tokens": self._tokens, "temperature": 0, "stream": True}
        return Job(COMPLETIONS, {**body, "stream_options": {"include_usage": True}})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join([*OURS, *PEERS]), help="the first is what others are compared to")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=115, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens asked for")
    parser.add_argument("--rounds", type=int, default=2, help="requests of a run for each client")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    circumstances = describe_circumstances()
    tokenizer = Tokenizer.from_file(str(get_model("smollm2") / "tokenizer.json"))
    plan = Plan(
        work=Prose(tokenizer, prompt=args.prompt, tokens=args.tokens, rounds=args.rounds),
        loads=make_loads(rates="", concurrency=args.clients, burstiness=1.0),
        repeats=args.repeats,
        num_warmups=-1,
        seed=0,
        percentiles=(90, 99),
        goodput={},
    )
    targets = args.targets.split(",")
    if unknown := [name for name in targets if name not in (*OURS, *PEERS)]:
        parser.error(f"no such target: {', '.join(unknown)}; there are {', '.join((*OURS, *PEERS))}")
    rows = run(targets, plan)
    console = Console(width=130)
    console.print(make_table(rows))
    for row in rows:
        for note in row.notes:
            console.print(f"{row.target}, {row.load}: {note}", markup=False, highlight=False)
    console.print(Machine(**circumstances["machine"]).line, highlight=False)
    print(json.dumps({"bench": "servers", **circumstances, "options": vars(args), "rows": to_json(rows)}))
    return 0


def run(names: Sequence[str], plan: Plan) -> list[Row]:
    """Start what can be started, measure it in turns; what cannot is a row that says why."""
    most = max(load.concurrency or 1 for load in plan.loads)
    with ExitStack() as stack:
        memories: dict[str, ServerProcess | RunningPeer] = {}
        servers = []
        for name in names:
            print(f"starting {name}", file=sys.stderr)
            server, process = start(name, stack, clients=most)
            servers.append(server)
            if process is not None:
                memories[name] = process

        def look(label: str) -> Figures:
            return dict(memories[label].read_memory())

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_measure(servers, plan, look))


def start(name: str, stack: ExitStack, *, clients: int) -> tuple[Server, ServerProcess | RunningPeer | None]:
    """A server that answers, or one whose problem is known, and the process behind it."""
    nowhere = connect(Target(label=name, url="http://127.0.0.1:9", model="none"), api_key="", seconds=1)
    try:
        if name in OURS:
            recipe, options = OURS[name]
            own = stack.enter_context(ServerProcess([str(get_model("smollm2", recipe)), *options]))
            own.wait_until_ready()
            server = connect(Target(label=name, url=own.url, model=""), api_key="", seconds=600)
            server.extra = IGNORE_EOS
            return server, own
        peer = stack.enter_context(running(name, clients=clients))
    except (NotInstallable, DoesNotStart, UsageError) as error:
        nowhere.problem = str(error)
        return nowhere, None
    server = connect(Target(label=name, url=peer.url, model=peer.model), api_key="", seconds=600)
    server.extra = peer.extra
    return server, peer


async def _measure(servers: Sequence[Server], plan: Plan, look: Any) -> list[Row]:
    for server in servers:
        if not server.problem:
            await server.look()
    # No bar: what redraws a terminal takes from what is measured.
    rows = await measure(servers, plan, on_end=lambda label: None, look=look)
    for server in servers:
        server.connections.close()
    return rows


def medians(rows: Sequence[Row], row: Row) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Of the figures, and of their ratios to the first target under the same load."""
    first = next(other for other in rows if other.load == row.load)
    figures = {name: median(values) if (values := row.values(name)) else None for name in FIGURES}
    ratios: dict[str, float | None] = {}
    for name in RATIOS:
        own, reference = row.values(name), first.values(name)
        pairs = list(zip(own, reference, strict=False))
        ratios[name] = median(a / b for a, b in pairs) if pairs else None
    return figures, ratios


def make_table(rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("server", no_wrap=True)
    table.add_column("load", no_wrap=True)
    for heading in (*FIGURES.values(), *(f"ratio\n{title}" for title in RATIOS.values())):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        figures, ratios = medians(rows, row)
        cells = [_show(value, 2 if "itl" in name else 0) for name, value in figures.items()]
        table.add_row(row.target, row.load, *cells, *(_show(value, 2) for value in ratios.values()))
    return table


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        figures, ratios = medians(rows, row)
        place = {"target": row.target, "load": row.load, "notes": list(row.notes)}
        found.append({**place, "medians": figures, "ratios_to_first": ratios, "repeats": list(row.runs)})
    return found


def _show(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
