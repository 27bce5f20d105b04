"""lm-evaluation-harness over a real socket: its scores of a local task are those of transformers."""

from pathlib import Path

import pytest

from bench.environment import NotInstallable, get_environment
from bench.evaluation import TOLERANCE, compare, make_tasks, write_tasks
from bench.harness import REQUIREMENT, run_harness
from qserve.api.service import Service
from qserve.build import build_llm
from qserve.config import DeviceConfig
from tests import tiny
from tests.api.conftest import listening

LONGEST = 512  # the tiny model's context


@pytest.fixture(scope="module")
def harness() -> None:
    try:
        get_environment([REQUIREMENT])
    except NotInstallable:
        pytest.skip("lm-evaluation-harness is not installed, and could not be: is there a network?")


def test_the_harness_gets_the_models_own_scores(harness: None, tmp_path: Path) -> None:
    model = tiny.make_checkpoint(tmp_path / "model")
    tasks = list(make_tasks(4, longest=700))
    write_tasks(tasks, tmp_path)
    llm = build_llm(model, device=DeviceConfig(kv_cache_mb=16))
    try:
        with listening(Service(llm)) as (host, port):
            outcome = run_harness(
                f"http://{host}:{port}",
                tasks=tmp_path,
                names=[task.name for task in tasks],
                out=tmp_path / "out",
                max_length=LONGEST,
                num_concurrent=4,
            )
    finally:
        llm.close()
    assert set(outcome.metrics) == {"true_continuation", "last_word", "perplexity"}
    assert len(outcome.scores) == 4 * (2 + 1 + 1)
    assert max(compare(str(model), outcome.scores, max_length=LONGEST)) < TOLERANCE
