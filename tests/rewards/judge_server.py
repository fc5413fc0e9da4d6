"""A real HTTP server that answers like an OpenAI-compatible one, and misbehaves on request."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

Reply = Callable[[dict[str, Any]], Any]
"""Body of a request -> body of the reply, a `Response`, or an awaitable of either."""


def one_token(token: str, **probabilities: float) -> dict[str, Any]:
    """A chat completion of one token with the probabilities of its alternatives."""
    top = [{"token": t, "logprob": math.log(p)} for t, p in probabilities.items()]
    chosen = {"token": token, "logprob": math.log(probabilities.get(token, 0.01)), "top_logprobs": top}
    return {"choices": [{"message": {"role": "assistant", "content": token}, "logprobs": {"content": [chosen]}}]}


def words(text: str) -> dict[str, Any]:
    """A chat completion of a text."""
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


@dataclass
class JudgeServer:
    """`reply` may be changed at any time; `asked` holds the bodies of all requests, `keys` their authorization."""

    url: str = ""
    reply: Reply = lambda body: one_token("YES", YES=0.9, NO=0.08)
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    @property
    def prompt(self) -> str:
        """What the last request said."""
        text: str = self.asked[-1]["messages"][0]["content"]
        return text

    def in_turn(self, *replies: Any) -> None:
        """One reply after the other; the last one stays."""
        left = list(replies)
        self.reply = lambda body: left.pop(0) if len(left) > 1 else left[0]


@contextlib.contextmanager
def judge_server() -> Iterator[JudgeServer]:
    """The server in a thread of its own, on a free port."""
    app = FastAPI()
    state = JudgeServer()

    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> Response:
        body = await request.json()
        state.asked.append(body)
        state.keys.append(request.headers.get("authorization", ""))
        answer = state.reply(body)
        if asyncio.iscoroutine(answer):
            answer = await answer
        return answer if isinstance(answer, Response) else JSONResponse(answer)

    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    state.url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield state
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join()
        listening.close()
