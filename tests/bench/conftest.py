from collections.abc import Iterator

import pytest

from tests.bench import fake_server


@pytest.fixture(scope="session")
def fake() -> Iterator[str]:
    with fake_server.running() as url:
        yield url
