"""What a recipe names by `module:NAME`."""

from __future__ import annotations

import importlib
from typing import Any

from retool.objectives.base import ObjectiveError


def imported(path: str, what: str) -> Any:
    """The object behind `module:NAME`. Raises `ObjectiveError`, which calls it `what`."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ObjectiveError(f"{what} {path!r} cannot be imported: {error}; write it as module:NAME") from error
