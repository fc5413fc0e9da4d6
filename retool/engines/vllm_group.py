"""The learner's weights over a process group, or through memory that it shares with a server (`engine.weight_sync`
`nccl`, `gloo`, `ipc`). The other end: `weight_group.Receiver` in vllm_plugin.py.

A group lasts as long as the server's life. Weights are packed and sent straight from the learner, bucket by bucket: no
copy of the model is kept, so what is sent must still be what was saved (`Weights.current`).
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from retool.engines.vllm_adapter import How, Server, ServerFailed, ServerLost, ServerRefused
from retool.engines.vllm_weights import WeightFiles, Weights
from retool.engines.weight_group import (
    JOIN_S,
    Group,
    Invitation,
    address_towards,
    gpu_of,
    nccl_version,
    serve_store,
    welcome,
)
from retool.engines.weight_wire import BUCKET, Entry, WireError, WireRefused, buckets, export_bucket, pack
from retool.lora import merged

T = TypeVar("T")
_GRACE_S = 5.0  # for the other half of an exchange to say what it knows


def weights_of(
    model: Any,
    tokenizer: Any,
    how: How,
    *,
    share: str | Path | None = None,
    sync_host: str | None = None,
    sync_s: float = 300.0,
) -> Weights:
    """The way that `engine.weight_sync` names."""
    if how in ("nccl", "gloo", "ipc"):
        return WeightGroups(model, how, sync_host, sync_s)
    return WeightFiles(model, tokenizer, share, how)


def outgoing(model: Any) -> dict[str, Tensor]:
    """Weights by the names and in the shapes that `save_merged` writes: adapters added, tied weights once, in the
    checkpoint's format."""
    state = merged(model, model.state_dict())
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    found: dict[str, Tensor] = revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
    return found


@dataclass
class _Link:
    """A server's group. `tag`: of the version that it was given last."""

    key: str
    store: dist.Store | None = None
    group: Group | None = None
    tag: str = ""
    left: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        """Called while a thread waits."""
        if self.left.is_set():
            raise WireError("the learner has left the group")

    def close(self) -> None:
        self.left.set()
        if self.store is not None:
            with suppress(RuntimeError):
                self.store.set("stop", "1")
        if self.group is not None:
            self.group.close()


class WeightGroups(Weights):
    """`host`: HOST or HOST:PORT of this machine where servers find the learner; None: the address that they see.
    `seconds`: a server that takes longer for one bucket counts as lost."""

    def __init__(self, model: Any, how: How, host: str | None, seconds: float) -> None:
        super().__init__(model, how)
        self._host, self._seconds = host, seconds
        self._stores: dict[str, dist.TCPStore] = {}
        self._serving = threading.Lock()
        self._links: dict[str, _Link] = {}
        self._device = torch.device("cpu") if how == "gloo" else next(model.parameters()).device

    async def install(self, server: Server, asleep: bool) -> None:
        await server.load(partial(self._send, server), asleep)

    async def _send(self, server: Server) -> None:
        """Everything, over the server's group; a group that failed is left."""
        link = self._links.get(server.url)
        if link is None or await server.weight_version() != link.tag:  # it was started anew
            await self._leave(server.url)
            link = await self._join(server)
        tag = self.tag
        try:
            await server.begin_update()
            tensors = await asyncio.to_thread(outgoing, self._model)
            names = list(tensors)
            entries = [Entry.of(name, tensors[name]) for name in names]
            for chosen in buckets(entries, BUCKET):
                await self._ship(server, link, [entries[i] for i in chosen], [tensors[names[i]] for i in chosen])
            if not self.current or tag != self.tag:
                raise ServerLost(f"{server.url}: the learner's weights changed while they were sent")
            await server.finish_update(tag)
            link.tag = tag
        except BaseException:
            await self._leave(server.url)
            raise

    async def _ship(self, server: Server, link: _Link, entries: list[Entry], tensors: list[Tensor]) -> None:
        """One bucket: the request announces it, the group carries it."""
        try:
            buffer = await asyncio.to_thread(pack, entries, tensors, self._device)
            told: dict[str, Any] = {"key": link.key, "bytes": buffer.numel()}
            told["tensors"] = [[e.name, e.dtype, list(e.shape)] for e in entries]
            carry: Callable[[], None] = _nothing
            if buffer.numel() and link.group is not None:
                carry = partial(link.group.broadcast, buffer, link.look)
            elif buffer.numel():
                told["handle"] = export_bucket(buffer)
            await _both(server.take_part({"bucket": told}), carry, self._seconds)
        except (WireError, TimeoutError) as error:
            raise ServerLost(f"{server.url}: the weights did not get through: {error or 'too slow'}") from error

    async def _join(self, server: Server) -> _Link:
        """A group with a server's workers."""
        size = 1 + await server.workers()
        link = _Link(uuid.uuid4().hex)
        try:
            host, port = ("", 0) if self.how == "ipc" else await asyncio.to_thread(self._store_for, server)
            nccl, gpu = nccl_version() if self.how == "nccl" else "", gpu_of(self._device)
            invitation = Invitation(self.how, self.run, link.key, host, port, size, self._seconds, nccl, gpu)

            def enter() -> None:
                if self.how != "ipc":
                    link.store, link.group = welcome(invitation, self._device, link.look)

            await _both(server.join_group(invitation.told()), enter, 2 * JOIN_S + _GRACE_S)
        except BaseException as error:
            await asyncio.to_thread(link.close)
            told = f"{server.url} and the learner cannot form a group for engine.weight_sync={self.how}: {error}"
            if isinstance(error, WireRefused):
                raise ServerRefused(told) from None
            if isinstance(error, (WireError, TimeoutError, ServerFailed)):
                raise ServerFailed(told) from error
            raise
        self._links[server.url] = link
        return link

    def _store_for(self, server: Server) -> tuple[str, int]:
        """Where that server finds the learner."""
        host, port = split_host(self._host) if self._host else ("", 0)
        if not host:
            local = server.url.startswith("unix:")
            host = "127.0.0.1" if local else address_towards(urlsplit(server.url).hostname or "127.0.0.1")
        with self._serving:
            if host not in self._stores:
                self._stores[host] = serve_store(host, port)
            return host, self._stores[host].port

    async def _leave(self, url: str) -> None:
        link = self._links.pop(url, None)
        if link is not None:
            await asyncio.to_thread(link.close)

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._stores.clear()


def split_host(text: str) -> tuple[str, int]:
    """HOST, HOST:PORT, [IPv6] or [IPv6]:PORT. Raises `ValueError`."""
    found = urlsplit(f"//{text}")
    if not found.hostname or found.path or found.query or found.username:
        raise ValueError(f"{text!r} is no HOST or HOST:PORT")
    return found.hostname, found.port or 0


def _nothing() -> None:
    """With `ipc` the request is all."""


async def _both(asked: Awaitable[None], work: Callable[[], None], seconds: float) -> None:
    """A request, and in a thread what makes the server able to answer it. Raises what the one raises that fails
    (`WireError` when both do), or `TimeoutError`; then closing the link is what ends the thread."""
    request = asyncio.ensure_future(asked)
    thread = in_thread(work)
    pending = {request, thread}
    try:
        done, pending = await asyncio.wait(pending, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        if pending and done:  # one failed, or it is the last one's time
            _, pending = await asyncio.wait(pending, timeout=_GRACE_S)
        failed = [half.exception() for half in (thread, request) if half.done() and half.exception() is not None]
        if len(failed) == 2 and not isinstance(failed[0], WireRefused):
            raise WireError(f"{failed[0]}; {failed[1]}")
        if failed:
            raise failed[0]
        if pending:
            raise TimeoutError(f"no answer within {seconds:g} s")
    finally:
        for half in pending:
            half.cancel()
        for half in (request, thread):
            if half.done() and not half.cancelled():
                half.exception()  # it was told, or the other one was


def in_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """As `asyncio.to_thread`, but in a thread that nobody waits for, not even the end of the process: it may hang."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as caught:
            error = caught
        with suppress(RuntimeError):  # the loop is gone
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, daemon=True).start()
    return future
