"""Keeps a vLLM server running over whatever model a run has put into a shared folder (vllm_share.py):

    python -m retool.engines.vllm_server --share FOLDER --host 0.0.0.0 --port 8000

It waits until FOLDER names a model, serves it, begins anew when FOLDER names another one, and starts the server again
when it dies. SIGTERM ends both; a killed keeper takes its server along (vllm_launch.py). `--health-port N` answers
`/health` at all times: 200 while it waits for a model, loads one, or the server answers; 503 while the server fails.
"""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from retool.engines.vllm_server import arguments, end, environment, spawn, write_plugin
from retool.engines.vllm_share import Start
from retool.errors import UserError

_POLL_S = 0.5
_LONGEST_PAUSE_S = 30.0
_STEADY_S = 120.0  # a server that lived so long did not fail to start


class Keeper:
    """`run` blocks until SIGTERM or SIGINT. `dtype`, `context`, `slots`: instead of what the run asks for."""

    def __init__(
        self,
        share: Path,
        python: str,
        host: str,
        port: int,
        *,
        cpu: bool = False,
        dtype: str | None = None,
        context: int | None = None,
        slots: int | None = None,
        more: Sequence[str] = (),
    ) -> None:
        self.share, self.python, self.host, self.port = share, python, host, port
        self.cpu, self.dtype, self.context, self.slots, self.more = cpu, dtype, context, slots, more
        self.state = "waiting"
        """`waiting` for a model, `starting`, `serving`, `failing`."""
        self._process: subprocess.Popen[bytes] | None = None
        self._served: Start | None = None
        self._began = 0.0
        self._failures = 0
        self._again = 0.0
        self._complained = ""

    def run(self, health_port: int | None = None) -> None:
        """Until told to stop."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop)
        home = Path(tempfile.mkdtemp(prefix="retool-vllm-"))
        try:
            plugin = write_plugin(home)
            if health_port is not None:
                health = _Health((self.host, health_port), self)
                threading.Thread(target=health.serve_forever, daemon=True).start()
            _say(f"waiting for a model in {self.share}: a run with engine.share={self.share} puts it there")
            while True:
                self.look(plugin)
                time.sleep(_POLL_S)
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            self._end()
            shutil.rmtree(home, ignore_errors=True)

    def look(self, plugin: Path) -> None:
        """One round: compare what is wanted with what runs."""
        try:
            wanted = Start.read(self.share)
        except UserError as error:
            wanted = None
            if self._complained != str(error):
                self._complained = str(error)
                _say(f"error: {error}")
        if wanted is not None and wanted != self._served:
            if self._process is not None:
                _say("another model is asked for")
            self._end()
            self._served, self._failures, self._again = wanted, 0, 0.0
        if self._process is not None and self._process.poll() is not None:
            code = self._process.returncode
            self._end()
            self._failures = 1 if time.monotonic() - self._began > _STEADY_S else self._failures + 1
            pause = min(2.0**self._failures, _LONGEST_PAUSE_S) if self._failures > 1 else 0.0
            self._again = time.monotonic() + pause
            self.state = "failing" if self._failures > 1 else "starting"
            _say(f"vLLM ended with code {code}; it is started again in {pause:g} s")
        if self._process is None and self._served is not None and time.monotonic() >= self._again:
            self._begin(self._served, plugin)

    def healthy(self) -> bool:
        """Whether nothing is wrong; asks the server when there is one."""
        if self.state not in ("starting", "serving", "failing") or self._process is None:
            return self.state != "failing"
        answered = self._answers()
        if answered:
            self.state = "serving"
        return answered or self.state == "starting"

    def _answers(self) -> bool:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        connection = http.client.HTTPConnection(host, self.port, timeout=4)  # not urllib: it would ask a proxy
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _begin(self, start: Start, plugin: Path) -> None:
        command = arguments(
            str(self.share / start.folder),
            where=["--host", self.host, "--port", str(self.port)],
            dtype=self.dtype or start.dtype,
            context=self.context or start.context,
            slots=self.slots or start.slots,
            cpu=self.cpu,
            more=self.more,
        )
        _say(f"starting vLLM with {start.folder}")
        if self.state != "failing":
            self.state = "starting"
        self._began = time.monotonic()
        self._process = spawn(self.python, plugin, command, environment(plugin, cpu=self.cpu), None)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            end(process)


class _Health(ThreadingHTTPServer):
    """Tells how the keeper is."""

    daemon_threads = True

    def __init__(self, where: tuple[str, int], keeper: Keeper) -> None:
        self.keeper = keeper
        super().__init__(where, _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Health

    def do_GET(self) -> None:
        fine = self.server.keeper.healthy()
        body = json.dumps({"state": self.server.keeper.state}).encode()
        self.send_response(404 if self.path != "/health" else 200 if fine else 503)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Health checks fill no log."""


def _stop(number: int, frame: object) -> None:
    raise SystemExit(0)


def _say(text: str) -> None:
    print(f"vllm_server: {text}", file=sys.stderr, flush=True)
