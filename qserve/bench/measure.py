"""The order of things: every repeat takes every load, and every load every target, one after the other.

So what is compared ran within minutes of each other, and a machine that slows down slows all of it. What a server does
wrong becomes a note on its row.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

from qserve.bench.answer import Answer, read_answer
from qserve.bench.figures import Figures, make_figures, samples
from qserve.bench.load import Load, offer
from qserve.bench.result import Row
from qserve.bench.target import Server
from qserve.bench.work import Job


class JobSource(Protocol):
    """How many requests make a run, and which; `Work` is one."""

    def count(self, *, concurrency: int | None) -> int: ...
    def make_jobs(self, number: int, *, run: int) -> list[Job]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `measure` does. A negative `num_warmups` stands for one for each client."""

    work: JobSource
    loads: Sequence[Load]
    repeats: int
    num_warmups: int
    seed: int
    percentiles: Sequence[float]
    goodput: Mapping[str, float]
    keeps_details: bool = False

    def count(self, load: Load) -> int:
        return self.work.count(concurrency=load.concurrency)

    def count_warmups(self, load: Load) -> int:
        return (load.concurrency or 1) if self.num_warmups < 0 else self.num_warmups

    @property
    def num_requests(self) -> int:
        """For each target, warm-ups and all."""
        return sum(self.repeats * self.count(load) + self.count_warmups(load) for load in self.loads)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    answers: list[Answer]
    figures: Figures


async def measure(
    servers: Sequence[Server],
    plan: Plan,
    *,
    on_end: Callable[[str], None],
    look: Callable[[str], Figures] = lambda label: {},
) -> list[Row]:
    """`on_end` hears of every request that has ended, with its target's label.

    `look` is asked after each run of a target for figures that only the caller can know, such as a server's memory.
    """
    runs: dict[tuple[str, int], list[_Run]] = {}
    await _warm_up(servers, plan, on_end)
    for repeat in range(plan.repeats):
        for index, load in enumerate(plan.loads):
            turn = repeat * len(plan.loads) + index
            for server in _in_turn(servers, turn):
                run = await _run(server, load, plan, turn=turn, on_end=on_end)
                run.figures.update(look(server.label))
                runs.setdefault((server.label, index), []).append(run)
    return [
        _make_row(server, load, runs.get((server.label, index), []))
        for index, load in enumerate(plan.loads)
        for server in servers
    ]


def _in_turn(servers: Sequence[Server], turn: int) -> list[Server]:
    """Another one begins each time, so that none is always the one after the same other."""
    able = [server for server in servers if not server.problem]
    first = turn % len(able) if able else 0
    return able[first:] + able[:first]


async def _warm_up(servers: Sequence[Server], plan: Plan, on_end: Callable[[str], None]) -> None:
    for load in plan.loads:
        for server in _in_turn(servers, 0):
            jobs = [server.encode(job) for job in plan.work.make_jobs(plan.count_warmups(load), run=-1)]
            await offer(_told(server, on_end), jobs, Load(concurrency=load.concurrency), seed=0)


async def _run(server: Server, load: Load, plan: Plan, *, turn: int, on_end: Callable[[str], None]) -> _Run:
    jobs = [server.encode(job) for job in plan.work.make_jobs(plan.count(load), run=turn)]
    start = perf_counter()
    exchanges = await offer(_told(server, on_end), jobs, load, seed=plan.seed + turn)
    duration = perf_counter() - start
    answers = [read_answer(exchange) for exchange in exchanges]
    figures = make_figures(answers, duration, percentiles=plan.percentiles, goodput=plan.goodput)
    figures |= {"request_rate": _number(load.request_rate), "max_concurrency": load.concurrency}
    if plan.keeps_details:
        figures |= _details(answers, start)
    return _Run(answers=answers, figures=figures)


def _told(server: Server, on_end: Callable[[str], None]) -> Any:
    async def send(job: tuple[str, bytes]) -> Any:
        exchange = await server.send(job)
        on_end(server.label)
        return exchange

    return send


def _make_row(server: Server, load: Load, runs: Sequence[_Run]) -> Row:
    answers = [answer for run in runs for answer in run.answers]
    return Row(
        target=server.label,
        load=load.label,
        runs=tuple(run.figures for run in runs),
        notes=(server.problem,) if server.problem else make_notes(answers),
        samples=samples([answer for answer in answers if not answer.failure]),
    )


def make_notes(answers: Sequence[Answer]) -> tuple[str, ...]:
    """Every way in which requests failed or answers were odd, the most frequent first."""
    failures = Counter(answer.failure for answer in answers if answer.failure)
    defects = Counter(defect for answer in answers for defect in answer.defects if not answer.failure)
    of_all = f"of {len(answers)}"
    return tuple(
        [f"{number} {of_all} failed: {failure}" for failure, number in failures.most_common()]
        + [f"{number} {of_all}: {defect}" for defect, number in defects.most_common()]
    )


def _details(answers: Sequence[Answer], start: float) -> Figures:
    """A value for each request, under the names of vLLM's --save-detailed; seconds, as there."""
    is_whole = [not answer.failure for answer in answers]
    return {
        "input_lens": [answer.num_prompt_tokens for answer in answers],
        "output_lens": [answer.num_output_tokens for answer in answers],
        "ttfts": [answer.ttft if whole else None for answer, whole in zip(answers, is_whole, strict=True)],
        "itls": [answer.itls for answer in answers],
        "start_times": [answer.started_at - start for answer in answers],
        "errors": [answer.failure for answer in answers],
    }


def _number(rate: float) -> float | str:
    """JSON has no infinity; vLLM writes it as a word too."""
    return rate if rate != float("inf") else "inf"
