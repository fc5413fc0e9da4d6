"""The one module that knows vLLM's version, endpoints and JSON: a client of one server (written for vLLM 0.32).

Token ids go in and come out of `/v1/completions`; weights are renewed over vLLM's RL endpoints, which a server only
has with VLLM_SERVER_DEV_MODE=1.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

from retool.engines.base import EngineError, Sampling
from retool.errors import UserError

OLDEST = (0, 32)
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
MODEL = "policy"  # the name under which a server serves it
How = Literal["file", "reload", "adapter", "nccl", "gloo", "ipc"]
_COLDEST = 0.01  # vLLM silently raises lower temperatures to this
_FLOOR = -9998.0  # vLLM writes -9999 for minus infinity
_SOON_S = 30.0
_KEEP_S = 4.0  # vLLM closes an idle connection after 5; while a step is computed here nobody would notice
_BROKEN = (httpx.HTTPError, aiohttp.ClientError)  # aiohttp's transport lets some of its own through
_DROPPED = (httpx.RemoteProtocolError, httpx.ConnectTimeout)  # the second is what aiohttp's transport makes of it


class ServerRefused(EngineError, UserError):
    """The server understood and said no: the same request would fail again, until somebody mends what it says."""

    retryable = False


class ServerLost(EngineError):
    """The server does not answer, or not as it should; it has to be looked at before it is used again."""


class ServerFailed(ServerLost):
    """It answered that it could not do what it was asked."""


@dataclass(frozen=True)
class Chunk:
    """Tokens as they arrive. `ended`: why the server stopped, None while it goes on."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: str | None = None


def request_body(
    ids: Sequence[int],
    sampling: Sampling,
    *,
    budget: int,
    seed: int,
    eos: frozenset[int],
    tail: Sequence[int] = (),
    sampled: int = 0,
    salt: str | None = None,
    adapter: bool = False,
) -> dict[str, Any]:
    """What asks for the rest of a turn. `tail`: ids of this turn's text so far, `sampled`: how many of them count
    against `min_tokens`. `salt`: tag of the weights; `adapter`: they are an adapter on the server's model. Raises
    `ServerRefused` for what vLLM cannot do."""
    if 0 < sampling.temperature < _COLDEST:
        raise ServerRefused(f"vLLM samples no colder than {_COLDEST}: temperature {sampling.temperature:g}; use 0")
    if sampling.probe is not None:
        raise ServerRefused("vLLM cannot choose temperatures by position: leave out eval.fork_temperature")
    greedy = sampling.temperature == 0
    body: dict[str, Any] = {
        "model": adapter_name(salt) if adapter and salt is not None else MODEL,
        "prompt": list(ids),
        "max_tokens": budget,
        "temperature": sampling.temperature,
        "top_p": 1.0 if greedy else sampling.top_p,
        "top_k": 0 if greedy else sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": seed,
        "logprobs": 0,
        "return_token_ids": True,
        "stream": True,
        "stop": [s for s in sampling.stop if s],
        "include_stop_str_in_output": True,
        "stop_token_ids": sorted(eos),
        "ignore_eos": True,  # the ids above are the end, and they count as sampled
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "add_special_tokens": False,
    }
    if salt is not None:
        body["cache_salt"] = salt
    early = max(0, sampling.min_tokens - sampled)
    if sampling.banned or early:
        body["vllm_xargs"] = {
            "retool_banned": json.dumps(list(sampling.banned)),
            "retool_early": json.dumps(list(sampling.stop)),
            "retool_early_ids": json.dumps(sorted(eos)),
            "retool_min_tokens": early,
            "retool_tail": json.dumps(list(tail)[-64:]),
        }
    return body


def adapter_name(tag: str) -> str:
    """Under which a server serves the adapter of that version."""
    return f"{MODEL}-{tag}"


def parse_event(line: str) -> Chunk | None:
    """One line of the stream; None for lines without tokens. Raises `ServerLost` for errors and unknown shapes."""
    if not line.startswith("data:"):
        return None
    text = line[5:].strip()
    if text == "[DONE]":
        return None
    try:
        event = json.loads(text)
        if "error" in event:
            raise ServerLost(f"vLLM failed within a turn: {event['error'].get('message', event['error'])}")
        if not event["choices"]:
            return None
        return parse_choice(event["choices"][0])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, EngineError):
            raise
        raise ServerLost(f"vLLM sent what this adapter does not know ({error!r}): {text[:200]}") from error


def parse_choice(choice: Mapping[str, Any]) -> Chunk:
    """The ids and log-probs of one choice of a completion."""
    ids = tuple(int(i) for i in choice["token_ids"] or ())
    given = choice["logprobs"]["token_logprobs"] if ids else ()
    if len(given) != len(ids):
        raise ServerLost(f"vLLM sent {len(ids)} ids with {len(given)} log-probs")
    logprobs = tuple(float(x) for x in given)
    for value in logprobs:
        if not _FLOOR < value < 1e-4:
            raise ServerRefused(f"vLLM sampled a token with log-prob {value}")
    return Chunk(ids, tuple(min(x, 0.0) for x in logprobs), choice.get("finish_reason"))


def _connections(socket: str | None) -> aiohttp.ClientSession:
    """As many as there are turns. aiohttp's: with httpx's own a streamed token takes three times the CPU time."""
    if socket is None:
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_S))
    return aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket, limit=0, keepalive_timeout=_KEEP_S))


class Server:
    """One vLLM server at `url` (`http://...` or `unix:/path`). Everything raises `ServerLost` when it does not answer
    and `ServerRefused` when it says no. `silence_s`: longest pause within a turn. `transport`: httpx's, for tests."""

    def __init__(self, url: str, silence_s: float = 600.0, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.url = url
        timeout = httpx.Timeout(30.0, read=silence_s, pool=None)
        socket = url.removeprefix("unix:") if url.startswith("unix:") else None
        self._client = httpx.AsyncClient(
            base_url=url if socket is None else "http://vllm",
            transport=transport or AiohttpTransport(client=lambda: _connections(socket)),
            timeout=timeout,
        )

    async def check(self) -> int:
        """The longest context it allows. Raises `ServerRefused` for an older vLLM, or one without RL endpoints."""
        version = (await self._get("/version"))["version"]
        numbers = tuple(int(x) if x.isdigit() else 0 for x in version.split(".")[:2])
        if numbers < OLDEST:
            raise ServerRefused(f"{self.url} is vLLM {version}; {OLDEST[0]}.{OLDEST[1]} or newer is needed")
        await self.weight_version()
        models = (await self._get("/v1/models"))["data"]
        found = next((m for m in models if m["id"] == MODEL), None)
        if found is None:
            raise ServerRefused(
                f"{self.url} serves {', '.join(m['id'] for m in models)}, not {MODEL!r}: start it with "
                "`python -m retool.engines.vllm_server`"
            )
        return int(found["max_model_len"])

    async def root(self) -> str:
        """Path of the model that it was started with."""
        models = (await self._get("/v1/models"))["data"]
        return next((str(m.get("root", "")) for m in models if m["id"] == MODEL), "")

    async def weight_version(self) -> str:
        """The tag of the weights it has; a fresh server says `default`."""
        return str((await self._get("/weight_info"))["weight_version"])

    async def metrics(self) -> dict[str, float]:
        """Its counters by name, summed over labels; those of prompt tokens also by `name/source`."""
        found: dict[str, float] = {}
        for line in (await self._send("GET", "/metrics")).text.splitlines():
            if line.startswith("vllm:"):
                name, _, value = line.rpartition(" ")
                key, _, labels = name.partition("{")
                found[key] = found.get(key, 0.0) + float(value)
                if 'source="' in labels:
                    key = f"{key}/{labels.split('source=' + chr(34))[1].split(chr(34))[0]}"
                    found[key] = found.get(key, 0.0) + float(value)
        return found

    @asynccontextmanager
    async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[AsyncIterator[Chunk]]:
        """Tokens as they are sampled; leaving the context ends the request on the server."""
        try:
            async with self._client.stream("POST", "/v1/completions", json=dict(body)) as response:
                if response.status_code != 200:
                    await response.aread()
                    self._raise(response)
                yield self._chunks(response)
        except _BROKEN as error:
            raise ServerLost(f"{self.url}: {type(error).__name__}: {error}") from error

    async def _chunks(self, response: httpx.Response) -> AsyncIterator[Chunk]:
        rest = b""
        async for data in response.aiter_raw():
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                chunk = parse_event(line.decode(errors="replace"))
                if chunk is not None:
                    yield chunk

    async def sleep(self, level: int) -> None:
        """Give its GPU memory back until `load` wakes it. `level`: 1 keeps the weights in main memory, 2 forgets them.
        Raises `ServerRefused` for a server without sleep mode."""
        try:
            await self._post("/sleep", params={"level": str(level)})
        except ServerFailed as error:
            raise ServerRefused(
                f"{self.url} cannot sleep: start it with --enable-sleep-mode, or set engine.sleep=false ({error})"
            ) from None

    async def load(self, bring: Callable[[], Awaitable[None]], asleep: bool = False) -> None:
        """Take new weights, which `bring` makes it do, and drop every cached key and value; afterwards it is awake."""
        if asleep:  # room for the weights first; nothing is scheduled before the cache has its room as well
            await self._post("/wake_up", params={"tags": "weights"})
        else:
            await self._post("/pause", params={"mode": "keep"})
        resume = ("/wake_up", {"tags": "kv_cache"}) if asleep else ("/resume", {})
        try:
            await bring()
            dropped = await self._post("/reset_prefix_cache", params={"reset_running_requests": "true"})
            if not dropped.json().get("success"):
                raise ServerLost(f"{self.url} could not drop its cache of older weights")
        except BaseException:
            with suppress(EngineError):  # what went wrong first is what has to be told
                await self._post(resume[0], params=resume[1], timeout=_SOON_S)
            raise
        await self._post(resume[0], params=resume[1])

    async def take_files(self, folder: str, tag: str) -> None:
        """Whole weights in `folder`, in place; they are called `tag`. For `load`, as the next three."""
        await self.join_group(None)
        await self.begin_update()
        await self.take_part({"folder": folder})
        await self.finish_update(tag)

    async def reload(self, folder: str, tag: str) -> None:
        """The same by vLLM's own means."""
        kwargs = {"weights_path": folder}
        await self._post("/collective_rpc", json={"method": "reload_weights", "kwargs": kwargs})
        await self._post("/update_weight_version", json={"new_version": tag})

    async def take_adapter(self, folder: str, tag: str) -> None:
        """Every version is an adapter of its own: vLLM would read one that is replaced in place at every step."""
        before = await self.weight_version()
        try:
            await self._post("/v1/load_lora_adapter", json={"lora_name": adapter_name(tag), "lora_path": folder})
        except (ServerRefused, ServerFailed) as error:
            raise ServerRefused(
                f"{self.url} does not take the adapter in {folder}: it must see that folder and be started with "
                f"--enable-lora and --max-lora-rank, or set engine.weight_sync=file ({error})"
            ) from None
        await self._post("/update_weight_version", json={"new_version": tag})
        with suppress(ServerRefused):  # a server that was started anew has none
            await self._post("/v1/unload_lora_adapter", json={"lora_name": adapter_name(before)})

    async def workers(self) -> int:
        """How many processes hold a part of its weights, over all its kinds of parallelism."""
        return int((await self._get("/get_world_size"))["world_size"])

    async def join_group(self, invitation: Mapping[str, Any] | None) -> None:
        """Its workers take up a group with the learner (`weight_group.Invitation`), or need none."""
        info = {} if invitation is None else {"group": dict(invitation)}
        await self._post("/init_weight_transfer_engine", json={"init_info": info})

    async def begin_update(self) -> None:
        """Weights follow; an update that somebody left open is ended first."""
        try:
            await self._post("/start_weight_update")
        except ServerFailed:
            await self._post("/finish_weight_update", json={})
            await self._post("/start_weight_update")

    async def take_part(self, update: Mapping[str, Any]) -> None:
        """Some of the weights, as vllm_plugin.py describes them."""
        await self._post("/update_weights", json={"update_info": dict(update)})

    async def finish_update(self, tag: str) -> None:
        """That was all; the weights are called `tag`."""
        await self._post("/finish_weight_update", json={"weight_version": tag})

    async def close(self) -> None:
        await self._client.aclose()

    async def _get(self, path: str) -> Any:
        return (await self._send("GET", path)).json()

    async def _post(self, path: str, **content: Any) -> httpx.Response:
        return await self._send("POST", path, **content)

    async def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        try:
            try:
                response = await self._client.request(method, path, **content)
            except _DROPPED:  # the server closed an idle connection; a resume may come twice
                if method != "GET" and path != "/resume":
                    raise
                response = await self._client.request(method, path, **content)
        except _BROKEN as error:
            raise ServerLost(f"{self.url}{path}: {type(error).__name__}: {error}") from error
        if response.status_code == 404:
            raise ServerRefused(
                f"{self.url} has no {path}: start it with `python -m retool.engines.vllm_server` "
                "(VLLM_SERVER_DEV_MODE=1 switches vLLM's RL endpoints on)"
            )
        if response.status_code != 200:
            self._raise(response)
        return response

    def _raise(self, response: httpx.Response) -> None:
        try:
            body = response.json()
            said = body.get("error", body)
            said = said.get("message", said) if isinstance(said, dict) else said
        except ValueError:
            said = response.text
        text = f"{self.url}{response.request.url.path} answered {response.status_code}: {str(said)[:500]}"
        raise (ServerRefused if 400 <= response.status_code < 500 else ServerFailed)(text)
