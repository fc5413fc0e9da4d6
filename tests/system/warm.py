"""`retool` processes that begin with torch and transformers imported already: each is forked from one warm process.

Most of a short command's time would be imports. What is forked is a process like any other: its own arguments,
environment, folder and output, and the interpreter's ordinary end. It has seen nothing of the commands before it.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from functools import cache
from pathlib import Path
from typing import BinaryIO, NoReturn

REPO = Path(__file__).parents[2]
_HEAD = 4


@cache
def _server() -> socket.socket:
    """The warm process of this test process; it ends with it."""
    near, far = socket.socketpair()
    with far:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.system.warm", str(far.fileno())],
            pass_fds=(far.fileno(),),
            stdin=subprocess.DEVNULL,
            cwd=REPO,
            env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def end() -> None:
        near.close()
        process.wait()

    atexit.register(end)
    return near


def run(args: tuple[str, ...], cwd: Path, env: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Like `subprocess.run` with captured text. Raises `TimeoutExpired`, after killing the command."""
    server = _server()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        request = json.dumps({"args": args, "cwd": str(cwd), "env": env}).encode()
        socket.send_fds(server, [len(request).to_bytes(_HEAD, "big")], [out.fileno(), err.fileno()])
        server.sendall(request)
        pid = int.from_bytes(_receive(server, _HEAD), "big")
        timely = bool(select.select([server], [], [], timeout)[0])
        if not timely:
            os.kill(pid, signal.SIGKILL)
        code = int.from_bytes(_receive(server, _HEAD), "big", signed=True)
        texts = [_text(file) for file in (out, err)]
    if not timely:
        raise subprocess.TimeoutExpired(args, timeout, *texts)
    return subprocess.CompletedProcess(args, code, *texts)


def _text(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode()


def _receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        if not (piece := sock.recv(size - len(data))):
            raise RuntimeError("the warm process has ended; its error is above")
        data += piece
    return data


def _imports() -> None:
    import transformers

    import retool.compare_command
    import retool.data_command
    import retool.demo
    import retool.eval_command
    import retool.sft
    import retool.template_command
    import retool.train
    import retool.viewer.run_page  # noqa: F401

    for name in ("LlamaForCausalLM", "LlamaModel", "PreTrainedTokenizerFast", "AutoTokenizer"):
        getattr(transformers, name)  # loads what it needs


def _next(control: socket.socket) -> bool:
    """Serve one request; True in the process that is to be the command."""
    head, fds, _, _ = socket.recv_fds(control, _HEAD, 2)
    if len(head) < _HEAD:
        sys.exit()
    request = json.loads(_receive(control, int.from_bytes(head, "big")))
    pid = os.fork()
    if pid == 0:
        control.close()
        for fd, place in zip(fds, (1, 2), strict=True):
            os.dup2(fd, place)
            os.close(fd)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        sys.argv = ["retool", *request["args"]]
        return True
    for fd in fds:
        os.close(fd)
    control.sendall(pid.to_bytes(_HEAD, "big"))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    control.sendall(code.to_bytes(_HEAD, "big", signed=True))
    return False


def _end(code: int) -> NoReturn:
    """The interpreter's end, without taking down memory that is shared with the warm process: that takes seconds."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _imports()
    gc.freeze()
    control = socket.socket(fileno=int(sys.argv[1]))
    while not _next(control):
        pass
    from retool.cli import main

    try:
        main()
    except SystemExit as end:
        _end(end.code if isinstance(end.code, int) else int(end.code is not None))
    except BaseException:
        traceback.print_exc()
        _end(1)
    _end(0)
