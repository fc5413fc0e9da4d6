"""vLLM servers that all tests of a session share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engines.vllm_servers import Fleet


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    made = Fleet(tmp_path_factory.mktemp("vllm"))
    yield made
    made.close()
