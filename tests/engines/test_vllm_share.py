"""A server that waits for its first model: the shared folder, and the keeper with a stand-in for vLLM that answers what
the client asks before a run. With vLLM itself: tests/stack/test_compose.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from retool.config import EngineConfig
from retool.engines.vllm_adapter import Server
from retool.engines.vllm_open import answers, open_vllm
from retool.engines.vllm_server import main
from retool.engines.vllm_share import Share, Start, digest_of, is_start
from retool.errors import UserError
from tests.engines.speakers import speaker, tag_tokenizer

SIZES: dict[str, Any] = {"dtype": "float32", "context": 64, "slots": 4}
STAND_IN = """
import http.server, json, os, sys
told = dict(zip(sys.argv[1:], sys.argv[2:]))
if os.path.exists(os.path.join(told["--model"], "broken")):
    sys.exit(3)
model = {"id": "policy", "root": told["--model"], "max_model_len": int(told["--max-model-len"]), "pid": os.getpid()}
said = {"/version": {"version": "0.32.0"}, "/weight_info": {"weight_version": "default"}, "/health": {},
        "/v1/models": {"data": [model]}}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(said[self.path]).encode())
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer((told["--host"], int(told["--port"])), Handler).serve_forever()
"""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Share]:
    share = Share(folder)
    try:
        yield share
    finally:
        share.release()


def write(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")


# -- the folder ------------------------------------------------------------------------------------------------------


def test_a_model_is_there_whole_and_left_alone_when_it_fits(tmp_path: Path) -> None:
    first = Share(tmp_path)
    assert Start.read(tmp_path) is None

    def slow(folder: Path) -> None:
        assert Start.read(tmp_path) is None  # nothing is told before it is whole
        write(folder)

    start = first.begin("a" * 12, slow, **SIZES)
    assert Start.read(tmp_path) == start and (tmp_path / start.folder / "model.safetensors").exists()
    assert is_start(f"/else/where/{start.folder}") and not is_start("/models/policy") and not is_start("")
    first.release()
    first.release()
    second = Share(tmp_path)
    assert second.begin("a" * 12, pytest.fail, **SIZES) == start  # not written again
    other = second.begin("b" * 12, write, **SIZES)
    longer = second.begin("b" * 12, write, **{**SIZES, "context": 65})
    assert len({start.folder, other.folder, longer.folder}) == 3
    (tmp_path / "weights-1").mkdir()
    second.sweep()
    assert {p.name for p in tmp_path.iterdir()} == {"lock", "start.json", "weights-1", longer.folder}
    second.release()


def test_two_runs_cannot_have_it_and_a_killed_one_leaves_servers_that_begin_anew(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from retool.engines.vllm_share import Share\n"
        f"s = Share({str(tmp_path)!r}); (Path({str(tmp_path)!r}) / 'weights-old').mkdir()\n"
        f"s.begin('a' * 12, Path.mkdir, **{SIZES!r}); print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="in use by another run"):
            Share(tmp_path)
        other.kill()
    before = Start.read(tmp_path)
    with held(tmp_path) as share:
        assert share.orphaned and not (tmp_path / "weights-old").exists()
        after = share.begin("a" * 12, write, **SIZES)
        assert before is not None and after == replace(before, folder=after.folder) and after.folder != before.folder
    with held(tmp_path) as share:
        assert not share.orphaned


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"folder": "../etc", "dtype": "float32", "context": 1, "slots": 1}', "\x00"]
)
def test_what_no_run_wrote_is_refused_and_written_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "start.json").write_text(text)
    with pytest.raises(UserError, match=r"start\.json .*delete it"):
        Start.read(tmp_path)
    with held(tmp_path) as share:
        assert share.begin("a" * 12, write, **SIZES) == Start.read(tmp_path)


def test_a_folder_that_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"engine\.share: cannot write"):
        Share(tmp_path / "file")


def test_models_that_can_exchange_weights_have_one_name(tmp_path: Path) -> None:
    tag_tokenizer().save_pretrained(tmp_path)
    config = speaker("tags").config.to_dict()
    name = digest_of("Llama", config, tmp_path)
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")  # it writes down where it is from
    shutil.move(tmp_path / "again", again := tmp_path.with_name("again"))
    assert digest_of("Llama", config, again) == name
    assert name == digest_of("Llama", {**config, "_name_or_path": "x", "transformers_version": "1"}, tmp_path)
    others = [digest_of("Qwen", config, tmp_path), digest_of("Llama", {**config, "rope_theta": 7.0}, tmp_path)]
    (tmp_path / "tokenizer.json").write_text("{}")
    assert len({name, *others, digest_of("Llama", config, tmp_path)}) == 4


# -- the keeper ------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def read(url: str) -> tuple[int, Any]:
    """(status, JSON); status 0 when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
    except OSError:
        return 0, None


def until(holds: Callable[[], Any], seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


class Kept:
    """A keeper as one starts it by hand."""

    def __init__(self, folder: Path) -> None:
        package = folder / "stand_in/vllm/entrypoints/openai"
        package.mkdir(parents=True)
        for where in (package, package.parent, package.parent.parent):
            (where / "__init__.py").touch()
        (package / "api_server.py").write_text(STAND_IN)
        python = folder / "python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH={folder}/stand_in:$PYTHONPATH exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        self.share = folder / "share"
        self.url, self.health_url = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        ports = ["--port", self.url.split(":")[2], "--health-port", self.health_url.split(":")[2]]
        command = [sys.executable, "-m", "retool.engines.vllm_server", "--share", str(self.share), *ports]
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*command, "--python", str(python)], stderr=log, stdin=subprocess.DEVNULL)

    def state(self) -> tuple[int, str]:
        status, told = read(f"{self.health_url}/health")
        return status, told["state"] if told else ""

    def serves(self) -> dict[str, Any]:
        status, told = read(f"{self.url}/v1/models")
        return dict(told["data"][0]) if status == 200 else {}


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = Kept(tmp_path)
    yield made
    made.process.kill()
    made.process.wait()


def gone(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    return True


def test_it_waits_serves_begins_anew_and_ends(kept: Kept) -> None:
    until(lambda: kept.state() == (200, "waiting"))
    assert kept.serves() == {}
    with held(kept.share) as share:
        start = share.begin("a" * 12, write, **SIZES)
    first = until(kept.serves)
    assert (first["root"], first["max_model_len"]) == (str(kept.share / start.folder), 64)
    assert kept.state() == (200, "serving")
    os.kill(first["pid"], signal.SIGKILL)  # it dies: started again
    again = until(lambda: (s := kept.serves()) and s["pid"] != first["pid"] and s)
    with held(kept.share) as share:
        other = share.begin("b" * 12, write, **{**SIZES, "context": 99})
    last = until(lambda: (s := kept.serves()) and s["root"].endswith(other.folder) and s)
    assert last["max_model_len"] == 99 and gone(again["pid"])
    kept.process.terminate()
    assert kept.process.wait(30) == 0 and gone(last["pid"])
    assert "another model is asked for" in kept.log.read_text()


def test_a_killed_keeper_takes_its_server_along(kept: Kept) -> None:
    with held(kept.share) as share:
        share.begin("a" * 12, write, **SIZES)
    served = until(kept.serves)
    kept.process.kill()
    until(lambda: gone(served["pid"]))


def test_a_model_that_cannot_be_served_is_unhealthy_until_another_one_comes(kept: Kept) -> None:
    def broken(folder: Path) -> None:
        write(folder)
        (folder / "broken").touch()

    with held(kept.share) as share:
        share.begin("a" * 12, broken, **SIZES)
        until(lambda: kept.state() == (503, "failing"))
        assert "vLLM ended with code 3" in kept.log.read_text()
        share.begin("b" * 12, write, **SIZES)
    until(kept.serves)
    until(lambda: kept.state() == (200, "serving"))


async def test_a_run_brings_its_model_and_waits_for_the_server_to_have_it(kept: Kept) -> None:
    config = EngineConfig(kind="vllm", urls=(kept.url,), share=str(kept.share), start_s=60, slots=7)
    roots = []
    for head_dim in (32, 32, 64):
        model = speaker("tags", head_dim=head_dim)
        engine = await open_vllm(config.model_copy(update={"context": 128}), model, tag_tokenizer())
        roots.append(kept.serves()["root"])
        with pytest.raises(UserError, match="in use by another run"):
            await open_vllm(config, model, tag_tokenizer())
        await engine.close()
    assert roots[0] == roots[1] != roots[2]  # what fits is not started anew
    start = Start.read(kept.share)
    assert start is not None and (start.slots, start.context, start.dtype) == (7, 128, "float32")
    assert [p.name for p in kept.share.glob("start-*")] == [start.folder]
    assert {p.name for p in (kept.share / start.folder).iterdir()} >= {"config.json", "tokenizer.json"}


async def test_a_server_with_another_model_is_waited_for(kept: Kept, caplog: pytest.LogCaptureFixture) -> None:
    with held(kept.share) as share:
        old = share.begin("a" * 12, write, **SIZES)
    await asyncio.to_thread(until, kept.serves)
    server = Server(kept.url)
    try:
        await answers(server, 5, old)
        with pytest.raises(UserError, match=r"not ready within .*still has the model of an earlier run.*--share"):
            await answers(server, 0.1, replace(old, folder="start-" + "b" * 12 + "-00000000"))
    finally:
        await server.close()


@pytest.mark.parametrize("argv", [[], ["model", "--share", "/x"], ["--host", "h"]])
def test_a_command_without_or_with_two_models_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(argv)
    assert refused.value.code == 2 and "--share FOLDER" in capsys.readouterr().err
