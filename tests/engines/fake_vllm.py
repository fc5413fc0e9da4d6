"""A vLLM server in the shapes of version 0.32, over a model in this process: for tests of the client that must run
where no vLLM is. It samples token by token without a cache; `slow` seconds a token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file

from retool.engines.sampler import draw, processed_logprobs, uniforms
from retool.engines.weight_group import Invitation, Receiver
from retool.engines.weight_wire import WireError
from retool.lora import adapters


class FakeVllm(httpx.AsyncBaseTransport):
    """`down`: nobody answers. `broken`: says so when it is to load weights, and closes the connection, as vLLM does.
    `deaf`: takes weights and keeps the old ones. `stuck`: takes part in no broadcast and does not answer. `restart()`:
    as after a crash. A model with adapters is a server started with --enable-lora: it serves the adapters in `served`.
    It is the worker of a group itself, as the plugin is inside vLLM."""

    def __init__(self, model: Any, slow: float = 0.0, version: str = "0.32.0", dev: bool = True) -> None:
        self.model, self.slow, self.version, self.dev = model, slow, version, dev
        self.first = {k: v.clone() for k, v in model.state_dict().items()}
        self.tag = "default"
        self.down = self.deaf = self.broken = self.closed = self.stuck = False
        self.updating = False
        self.receiver: Receiver | None = None
        self.joined = self.buckets = 0
        self.paused = False
        self.calls: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.served: list[str] = []
        self.sleeping: str | None = None
        self.left_open = 0

    def restart(self) -> None:
        self.model.load_state_dict(self.first)
        self.tag = "default"
        self.served = []
        self.updating = False
        self.leave()

    def leave(self) -> None:
        """Its worker is gone."""
        if self.receiver is not None:
            self.receiver.close()
        self.receiver = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.down:
            raise httpx.ConnectError("All connection attempts failed", request=request)
        if self.closed:
            self.closed = False
            raise httpx.RemoteProtocolError("Server disconnected without sending a response.", request=request)
        path = request.url.path
        body = json.loads(await request.aread() or b"{}")
        tags = request.url.params.get("tags")
        self.calls.append(path if tags is None else f"{path}?{tags}")
        if path == "/version":
            return httpx.Response(200, json={"version": self.version})
        if path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "policy", "max_model_len": 512}]})
        if path == "/v1/completions":
            if body["model"] not in ("policy", *self.served):
                return httpx.Response(404, json={"error": {"message": f"The model {body['model']} does not exist."}})
            return self._complete(body)
        if path.endswith("_lora_adapter"):
            return self._adapter(path, body)
        if not self.dev:
            return httpx.Response(404, json={"detail": "Not Found"})
        if path == "/sleep":
            self.sleeping = request.url.params["level"]
            self.paused = True
        if path == "/wake_up" and tags == "kv_cache":
            self.sleeping, self.paused = None, False
        if path == "/weight_info":
            return httpx.Response(200, json={"weight_version": self.tag})
        if path == "/update_weights" and self.broken:
            self.closed = True
            return httpx.Response(500, json={"error": {"message": "Worker failed with error ''"}})
        if path == "/get_world_size":
            return httpx.Response(200, json={"world_size": 1})
        if "weight_transfer" in path or "weight_update" in path or path == "/update_weights":
            try:
                await self._transfer(path, body)
            except (WireError, ValueError) as error:
                self.updating = self.updating and path != "/update_weights"
                return httpx.Response(500, json={"error": {"message": str(error)}})
        if path == "/update_weight_version":
            self.tag = body["new_version"]
        self.paused = path == "/pause" or (self.paused and path != "/resume")
        return httpx.Response(200, json={"success": True})

    def _adapter(self, path: str, body: dict[str, Any]) -> httpx.Response:
        layers, name = adapters(self.model), body["lora_name"]
        if not layers:
            return httpx.Response(500, json={"error": {"message": "LoRA is not enabled."}})
        if path == "/v1/unload_lora_adapter":
            if name not in self.served:
                return httpx.Response(404, json={"error": {"message": f"The lora adapter '{name}' cannot be found."}})
            self.served.remove(name)
            return httpx.Response(200, text="Success")
        found = load_file(Path(body["lora_path"]) / "adapter_model.safetensors")
        with torch.no_grad():
            for layer in layers:
                for part in ("lora_A", "lora_B"):
                    getattr(layers[layer], part).copy_(found[f"base_model.model.{layer}.{part}.weight"])
        self.served.append(name)
        return httpx.Response(200, text="Success")

    async def _transfer(self, path: str, body: dict[str, Any]) -> None:
        if path == "/init_weight_transfer_engine" and "group" in body["init_info"]:
            invitation = Invitation.read(body["init_info"]["group"])
            old, busy = self.receiver, ""
            if old is not None and old.invitation.run != invitation.run and old.alive():
                busy = "this server gets the weights of another run, which is still there"
            made = await asyncio.to_thread(Receiver, invitation, 0, torch.device("cpu"), busy)
            self.leave()
            self.receiver, self.joined = made, self.joined + 1
        if path == "/start_weight_update":
            if self.updating:
                raise ValueError("start_weight_update called while a weight update is already active.")
            self.updating = True
        if path == "/finish_weight_update":
            if not self.updating:
                raise ValueError("finish_weight_update called without a matching start_weight_update.")
            self.updating = False
            self.tag = body.get("weight_version") or self.tag
        if path == "/update_weights":
            update = body["update_info"]
            if "folder" in update:
                return None if self.deaf else self._load(Path(update["folder"]))
            while self.stuck:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            if self.receiver is None:
                raise ValueError("no group: this server was started anew")
            found = dict(await asyncio.to_thread(self.receiver.receive, update["bucket"]))
            self.buckets += 1
            if not self.deaf:
                self.model.load_state_dict(found, strict=False)
        return None

    def _load(self, folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            self.model.load_state_dict(load_file(file), strict=False)

    def _complete(self, body: dict[str, Any]) -> httpx.Response:
        self.bodies.append(body)
        if len(body["prompt"]) >= 512:
            error = {"message": "This model's maximum context length is 512 tokens.", "code": 400}
            return httpx.Response(400, json={"error": error})
        return httpx.Response(200, stream=_Stream(self, body))


class _Stream(httpx.AsyncByteStream):
    def __init__(self, server: FakeVllm, body: dict[str, Any]) -> None:
        self.server, self.body = server, body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.server.left_open += 1
        ids, body = list(self.body["prompt"]), self.body
        extra = body.get("vllm_xargs", {})
        for n in range(body["max_tokens"]):
            await asyncio.sleep(self.server.slow)
            while self.server.paused:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            if self.server.down:
                raise httpx.ReadError("connection lost")
            with torch.no_grad():
                logits = self.server.model(input_ids=torch.tensor([ids])).logits[:, -1].float()
            if n < extra.get("retool_min_tokens", 0):
                logits[:, json.loads(extra["retool_early_ids"])] = -torch.inf
            temperature = torch.tensor([body["temperature"]])
            logp = processed_logprobs(logits, temperature, [body["top_k"]], [body["top_p"]])
            (token,), (value,) = draw(logp, uniforms([body["seed"]], [n]), [body["temperature"] == 0])
            ids.append(token)
            reason = "stop" if token in body["stop_token_ids"] else None
            reason = "length" if reason is None and n + 1 == body["max_tokens"] else reason
            yield self._event(token, value, reason)
            if reason == "stop":
                break
        yield b"data: [DONE]\n\n"

    def _event(self, token: int, value: float, reason: str | None) -> bytes:
        logprobs = {"text_offset": [0], "token_logprobs": [value], "tokens": ["?"], "top_logprobs": [{"?": value}]}
        choice = {"index": 0, "text": "?", "logprobs": logprobs, "finish_reason": reason, "stop_reason": None}
        choice |= {"prompt_token_ids": None, "token_ids": [token]}
        event = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "policy", "choices": [choice]}
        return b"data: " + json.dumps(event).encode() + b"\n\n"

    async def aclose(self) -> None:
        self.server.left_open -= 1
