"""CPU time that a streamed token costs the process that trains, two versions of the vLLM client side by side.

    git worktree add ../before COMMIT
    python -m benchmarks.stream_client ../before . --output benchmarks/stream_client.json

A server that only writes events as vLLM does, one a token, is asked for many turns at once; the clients take turns.
What a token costs here bounds how many tokens a second all servers of a learner together can bring in.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from sandbox.bench.load import percentile
from sandbox.bench.main import machine

_EVENT = {
    "id": "cmpl-0123456789abcdef",
    "object": "text_completion",
    "created": 1700000000,
    "model": "policy",
    "choices": [
        {
            "index": 0,
            "text": " a",
            "logprobs": {"text_offset": [0], "token_logprobs": [-0.5], "tokens": [" a"], "top_logprobs": [None]},
            "finish_reason": None,
            "stop_reason": None,
            "token_ids": [264],
            "prompt_token_ids": None,
        }
    ],
    "usage": None,
}
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def _piece(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def serve(tokens: int, gap_s: float) -> None:
    """Prints its port; every request is answered with so many tokens."""
    event = _piece(b"data: " + json.dumps(_EVENT).encode() + b"\n\n")

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
                writer.write(_HEAD)
                for _ in range(tokens):
                    await asyncio.sleep(gap_s)
                    writer.write(event)
                writer.write(_piece(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    listener = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(listener.sockets[0].getsockname()[1], flush=True)
    await listener.serve_forever()


async def work(url: str, turns: int) -> None:
    """For every line that comes in: so many turns at once, and the microseconds of CPU time for each token."""
    from retool.engines.vllm_adapter import Server  # of the version whose turn it is

    client = Server(url)

    async def turn() -> int:
        async with client.stream({"prompt": [1]}) as chunks:
            return sum([len(chunk.ids) async for chunk in chunks])

    while await asyncio.to_thread(sys.stdin.readline):
        started = time.process_time()
        tokens = sum(await asyncio.gather(*(turn() for _ in range(turns))))
        print(1e6 * (time.process_time() - started) / tokens, flush=True)
    await client.close()


def compare() -> None:
    """Both versions against one server."""
    from benchmarks import versions

    parser = versions.parser(__doc__)
    parser.add_argument("--turns", type=int, default=64, help="at once")
    parser.add_argument("--tokens", type=int, default=100, help="of each turn")
    parser.add_argument("--gap", type=float, default=0.03, help="seconds between a turn's tokens")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    folders = versions.pair(parser, options)
    here = Path(__file__).resolve().parent.parent
    server = versions.start(__file__, here, "--serve", str(options.tokens), str(options.gap))
    url = f"http://127.0.0.1:{int(versions.ask(server))}"
    workers = [versions.start(__file__, folder, "--worker", url, str(options.turns)) for folder in folders]
    pairs = list(versions.turns(options.rounds, lambda index: float(versions.ask(workers[index]))))
    for process in (*workers, server):
        process.kill()
        process.wait()
    first, second = (round(percentile(list(row), 0.5), 1) for row in zip(*pairs, strict=True))
    ratio = round(percentile([b / a for a, b in pairs], 0.5), 3)
    report: dict[str, Any] = {
        "host": machine(),
        "turns": options.turns,
        "tokens": options.tokens,
        "gap_s": options.gap,
        "rounds": options.rounds,
        "cpu_us_a_token": {"first": first, "second": second, "median_of_ratios": ratio},
    }
    print(json.dumps(report["cpu_us_a_token"]))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        asyncio.run(serve(int(sys.argv[2]), float(sys.argv[3])))
    elif sys.argv[1:2] == ["--worker"]:
        asyncio.run(work(sys.argv[2], int(sys.argv[3])))
    else:
        compare()
