"""CPU time that a streamed token costs the process that trains, two versions of the vLLM client side by side.

    git worktree add ../before COMMIT
    python -m benchmarks.stream_client ../before . --output benchmarks/stream_client.json

A server that only writes events as vLLM does, one a token, is asked for many turns at once; the clients take turns.
What a token costs here bounds how many tokens a second all servers of a learner together can bring in.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
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


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    """This program, with the modules of `folder`."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def ask(worker: subprocess.Popen[str], word: str = "go") -> str:
    """Its next line."""
    assert worker.stdin is not None and worker.stdout is not None
    print(word, file=worker.stdin, flush=True)
    line = worker.stdout.readline()
    if not line:
        raise SystemExit("a part of the benchmark has ended; its error is above")
    return line


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="two checkouts: before and after")
    parser.add_argument("--turns", type=int, default=64, help="at once")
    parser.add_argument("--tokens", type=int, default=100, help="of each turn")
    parser.add_argument("--gap", type=float, default=0.03, help="seconds between a turn's tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--url", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.tokens, options.gap))
    elif options.url:
        asyncio.run(work(options.url, options.turns))
    elif len(options.folders) != 2:
        parser.error("two checkouts are needed")
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Both versions against one server."""
    here = Path(__file__).resolve().parent.parent
    server = start(here, "--serve", "--tokens", str(options.tokens), "--gap", str(options.gap))
    url = f"http://127.0.0.1:{int(ask(server))}"
    workers = [start(folder.resolve(), "--url", url, "--turns", str(options.turns)) for folder in options.folders]
    rows: list[list[float]] = [[], []]
    for number in range(options.rounds):
        for index in (0, 1) if number % 2 else (1, 0):
            rows[index].append(float(ask(workers[index])))
    for process in (*workers, server):
        process.kill()
        process.wait()
    first, second = (round(percentile(row, 0.5), 1) for row in rows)
    ratio = round(percentile([b / a for a, b in zip(*rows, strict=True)], 0.5), 3)
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
    main()
