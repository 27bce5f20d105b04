"""lm-evaluation-harness against a server: its environment, made once in the cache, and one run of its command.

Knows nothing of tasks but the folder that defines them, and nothing of the model but its server's address.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.environment import get_environment

REQUIREMENT = "lm-eval[api]==0.4.13"  # needs no torch, but much else that the server has no use for


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One text and the log-likelihood that the harness found for it; a rolling score has no context."""

    task: str
    context: str | None
    text: str
    logprob: float
    is_greedy: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A task's metrics, and every score that they were made of."""

    metrics: dict[str, dict[str, float]]
    scores: list[Scored]


def run_harness(
    url: str, *, tasks: Path, names: Sequence[str], out: Path, max_length: int, num_concurrent: int
) -> Outcome:
    """Every task, over /v1/completions, with the server's own tokenizer."""
    endpoint = f"base_url={url}/v1/completions,tokenizer_backend=remote"
    settings = f"{endpoint},max_length={max_length},num_concurrent={num_concurrent}"
    command = [str(get_environment([REQUIREMENT])), "-m", "lm_eval", "run", "--model", "local-completions"]
    command += ["--model_args", settings, "--include_path", str(tasks), "--tasks", ",".join(names)]
    command += ["--output_path", str(out), "--log_samples"]
    # Local files alone are read, so nothing is to be asked of the hub.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(out / "datasets")}
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    (results,) = out.glob("*/results_*.json")
    metrics = {name: _numbers(found) for name, found in json.loads(results.read_text())["results"].items()}
    return Outcome(metrics=metrics, scores=[score for name in names for score in _read_scores(out, name)])


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    """The harness writes `acc,none` for the metric and the filter it went through."""
    return {name.partition(",")[0]: value for name, value in found.items() if isinstance(value, float)}


def _read_scores(out: Path, task: str) -> list[Scored]:
    (samples,) = out.glob(f"*/samples_{task}_*.jsonl")
    found = []
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        for arguments, (response,) in zip(sample["arguments"].values(), sample["resps"], strict=True):
            found.append(_as_scored(task, list(arguments.values()), response))
    return found


def _as_scored(task: str, arguments: list[str], response: Any) -> Scored:
    if isinstance(response, list):
        context, text = arguments
        return Scored(
            task=task, context=context, text=text, logprob=float(response[0]), is_greedy=response[1] == "True"
        )
    return Scored(task=task, context=None, text=arguments[0], logprob=float(response))
