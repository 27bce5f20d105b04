"""A source, a text and one finished run, shared by the tests of a module: none of them changes what it is given."""

from pathlib import Path

import pytest

from tests.training.qat.running import make_source, make_text, trained
from training.run import Run


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def done(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of the default recipe."""
    return trained(source, text, tmp_path_factory.mktemp("run") / "run")
