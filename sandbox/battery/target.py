"""What there is to attack outside, and whether it was: a secret file, listeners, a process of our own user.

Everything is real. One target serves the confined programs, another one the controls, which are expected to hit it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Self

from sandbox.battery.calls import calls

_SENTINEL = """
import os, signal
for number in (signal.SIGURG, signal.SIGTERM, signal.SIGUSR1, signal.SIGIO):
    signal.signal(number, lambda *_: os.write(1, b"!"))
secret = os.environ["BATTERY_SECRET"]
os.write(1, b"R")
while True:
    signal.pause()
"""


class Target:
    """Use as a context manager. `disturbances()` says what has happened since it was last asked."""

    def __init__(self, *, unconfined: bool) -> None:
        self.unconfined = unconfined
        self.secret = secrets.token_hex(16)
        self._listeners: dict[str, socket.socket] = {}

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="retool-battery-"))
        self.folder.chmod(0o777)
        for name in ("secret", "victim"):
            path = self.folder / name
            path.write_text(self.secret)
            path.chmod(0o666)
        self.abstract = f"\0retool-battery-{secrets.token_hex(8)}"
        self._listen("tcp", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0))
        self._listen("udp", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0))
        self._listen("abstract", socket.AF_UNIX, socket.SOCK_STREAM, self.abstract)
        self._listen("abstract datagram", socket.AF_UNIX, socket.SOCK_DGRAM, self.abstract + "d")
        self._listen("unix", socket.AF_UNIX, socket.SOCK_STREAM, str(self.folder / "service.sock"))
        (self.folder / "service.sock").chmod(0o777)
        self.sentinel = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _SENTINEL],
            env={"BATTERY_SECRET": self.secret},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            cwd=self.folder,
            start_new_session=True,
        )
        assert self.sentinel.stdout is not None
        os.read(self.sentinel.stdout.fileno(), 1)
        os.set_blocking(self.sentinel.stdout.fileno(), False)
        self._before = self._state()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.sentinel.pid, signal.SIGKILL)
        self.sentinel.wait()
        if self.sentinel.stdout is not None:
            self.sentinel.stdout.close()
        for listener in self._listeners.values():
            listener.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _listen(self, name: str, family: int, kind: int, address: str | tuple[str, int]) -> None:
        listener = socket.socket(family, kind)
        self._listeners[name] = listener
        with contextlib.suppress(OSError):  # no loopback device: the others have to do
            listener.bind(address)
            if kind == socket.SOCK_STREAM:
                listener.listen(16)
        listener.setblocking(False)

    def told(self) -> dict[str, Any]:
        """What a program is told on its first line of standard input."""
        return {
            "unconfined": self.unconfined,
            "folder": str(self.folder),
            "pid": self.sentinel.pid,
            "service": os.getpid(),
            "secret": self.secret,
            "tcp": self._port("tcp"),
            "udp": self._port("udp"),
            "abstract": self.abstract,
            "calls": calls(),
        }

    def restore(self) -> None:
        """After a control has hit it: as new."""
        self.disturbances()
        for path in self.folder.iterdir():
            if path.name not in ("secret", "victim", "service.sock"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in ("secret", "victim"):
            path = self.folder / name
            path.write_text(self.secret)
            path.chmod(0o666)
        self.folder.chmod(0o777)
        self.disturbances()

    def _port(self, name: str) -> int:
        with contextlib.suppress(OSError):
            return int(self._listeners[name].getsockname()[1])
        return 0

    def _state(self) -> dict[str, tuple[object, ...]]:
        seen: dict[str, tuple[object, ...]] = {}
        for path in (self.folder, *sorted(self.folder.iterdir())):
            found = path.lstat()
            text = path.read_text() if path.name in ("secret", "victim") and path.is_file() else ""
            when = 0 if path == self.folder else found.st_mtime_ns
            seen[path.name] = (found.st_mode, found.st_uid, found.st_nlink, when, text)
        return seen

    def disturbances(self) -> list[str]:
        """Files that changed, connections and datagrams that came, signals that arrived; forgotten once told."""
        now = self._state()
        found = [f"file {name}" for name in sorted({*now, *self._before}) if now.get(name) != self._before.get(name)]
        self._before = now
        for name, listener in self._listeners.items():
            with contextlib.suppress(OSError):
                if listener.type == socket.SOCK_STREAM:
                    listener.accept()[0].close()
                else:
                    listener.recv(1)
                found.append(f"reached {name}")
        assert self.sentinel.stdout is not None
        with contextlib.suppress(BlockingIOError):
            found += ["signalled"] if os.read(self.sentinel.stdout.fileno(), 64) else []
        if self.sentinel.poll() is not None:
            found.append("sentinel killed")
        elif Path(f"/proc/{self.sentinel.pid}/stat").read_text().rsplit(") ", 1)[1][0] == "T":
            found.append("sentinel stopped")
        return found
