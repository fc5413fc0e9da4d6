"""One engine and one build of the sandbox's image for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.stack.engine import IMAGE, NoEngine, build, engine


@pytest.fixture(scope="session")
def sandbox_image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of the image, in an engine that runs. Skips, saying why, where none can be had."""
    try:
        with engine():
            build(tmp_path_factory.mktemp("image"))
            yield IMAGE
    except NoEngine as reason:
        pytest.skip(str(reason))
