"""One verifier pool for the module, and trajectories made of the policy's text alone."""

from __future__ import annotations

from retool.config import ProtocolConfig
from retool.protocols import ToolProtocol, build_protocol
from retool.records import Problem, ToolCall, Trajectory, TrajectoryStatus
from retool.transcript import Transcript


def protocol() -> ToolProtocol:
    return build_protocol(ProtocolConfig())


def trajectory(
    text: str, gold: str, *, calls: int = 0, observation: str = "", status: TrajectoryStatus = "finished"
) -> Trajectory:
    problem = Problem("p", "What is it? \\boxed{42}", gold)
    tool_calls = [ToolCall(i, "print(1)", "ok", observation) for i in range(calls)]
    return Trajectory(
        "0.0.0", problem, "0.0", 0, 0, Transcript(), status=status, tool_calls=tool_calls, policy_text=text
    )


def boxed(answer: str) -> str:
    return f"So <answer>\n\\boxed{{{answer}}}\n</answer>"
