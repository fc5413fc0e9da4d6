"""From a trajectory to its reward. A verifier that cannot decide gives an unknown reward, never a zero.

`Rewarder` is imported on first use, so that a verifier worker (`python -m retool.rewards.worker`) starts without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retool.rewards.pool import VerifierError
    from retool.rewards.rewarder import Rewarder

__all__ = ["Rewarder", "VerifierError"]


def __getattr__(name: str) -> Any:
    if name == "Rewarder":
        from retool.rewards.rewarder import Rewarder

        return Rewarder
    if name == "VerifierError":
        from retool.rewards.pool import VerifierError

        return VerifierError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
