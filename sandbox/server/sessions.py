"""`/v1/sessions` and `/v1/snapshots`: live interpreters, their copies, their past and their files."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any
from urllib.parse import unquote_to_bytes

from starlette.requests import Request
from starlette.responses import Response

from sandbox.codec import dumps
from sandbox.server.bodies import read, read_body, ticket
from sandbox.server.execs import fingerprint, idempotency_key
from sandbox.server.models import ForkRequest, KeyRequest, OpenRequest, RestoreRequest, SessionExecRequest, Strict
from sandbox.server.owners import Owned
from sandbox.server.replies import Refused, Reply, error_reply, result_reply
from sandbox.server.state import ServerState
from sandbox.types import SandboxError, Session, Status

Work = Callable[[], Coroutine[Any, Any, Reply]]


def _json(fields: dict[str, Any], status: int = 200) -> Reply:
    return Reply(status, dumps(fields))


def _described(owned: Owned) -> dict[str, Any]:
    return {"id": owned.session.id, "step": owned.step, "ttl_s": owned.ttl_s}


async def _guarded(state: ServerState, work: Work) -> Reply:
    try:
        return await work()
    except SandboxError as error:
        state.failed(error)
        return error_reply(error)


async def _once(state: ServerState, request: Request, key: str | None, body: Strict, work: Work) -> Response:
    """`work`, exactly once when there is a key. It is never cut off half-way: a session must not be left in a state
    that nobody can know."""
    if key is None:
        return (await _guarded(state, work)).response()
    name = (ticket(request).owner, request.scope["path"], key)
    mark = fingerprint(*body.model_copy(update={"idempotency_key": None}))
    return (await state.once.run(name, mark, lambda: _guarded(state, work))).response()


def _found(state: ServerState, request: Request) -> Owned:
    return state.owners.session(ticket(request).owner, request.path_params["session"])


async def open_session(state: ServerState, request: Request) -> Response:
    """A new session."""
    body = await read(request, OpenRequest)
    state.check_profile(body.profile)
    limits = state.limits(body.limits)
    owner = ticket(request).owner

    async def work() -> Reply:
        session = await state.box.session(profile=body.profile, limits=limits, seed=body.seed, ttl_s=body.ttl_s)
        owned = state.owners.add(owner, session, body.ttl_s)
        return _json(_described(owned), 201)

    return await _once(state, request, idempotency_key(request, body.idempotency_key), body, work)


async def show_session(state: ServerState, request: Request) -> Response:
    """Whether it lives, and where it stands. Renews the lease."""
    owned = _found(state, request)

    async def work() -> Reply:
        lease = await owned.session.heartbeat()
        return _json({**_described(owned), "lease_s": lease})

    return (await _guarded(state, work)).response()


async def close_session(state: ServerState, request: Request) -> Response:
    """End it. Deleting what has ended already is fine."""
    owned = _found(state, request)

    async def work() -> Reply:
        await owned.session.close()
        state.owners.forget(owned.session.id)
        return _json({"closed": True})

    return (await _guarded(state, work)).response()


async def exec_in_session(state: ServerState, request: Request) -> Response:
    """One execution in the session's state. It runs to its end even when the client goes away."""
    body = await read(request, SessionExecRequest)
    owned = _found(state, request)
    limits = state.limits(body.limits) if body.limits is not None else None
    key = idempotency_key(request, body.idempotency_key)

    async def work() -> Reply:
        with state.load.place(owned.owner):
            fields = await owned.session.exec_fields(
                body.code,
                stdin=body.stdin,
                limits=limits,
                expect_step=body.expect_step,
                rich=body.rich,
                owner=owned.owner,
            )
        if fields["step"] > owned.step or fields["status"] == Status.REJECTED:  # else a stored result
            state.ended(fields)
        owned.step = max(owned.step, fields["step"])
        return result_reply(fields)

    return await _once(state, request, key, body, work)


def _adopt(state: ServerState, owner: str, sessions: Sequence[Session], ttl_s: float, step: int) -> Reply:
    found = [state.owners.add(owner, session, ttl_s, step) for session in sessions]
    return _json({"sessions": [_described(owned) for owned in found]}, 201)


def _check_seeds(body: ForkRequest) -> None:
    if body.seeds is not None and len(body.seeds) != body.count:
        raise Refused(422, "invalid_request", f"seeds: {len(body.seeds)} given for {body.count} sessions")


async def fork_session(state: ServerState, request: Request) -> Response:
    """Live copies."""
    body = await read(request, ForkRequest)
    _check_seeds(body)
    owned = _found(state, request)

    async def work() -> Reply:
        sessions = await owned.session.fork(body.count, seeds=body.seeds)
        return _adopt(state, owned.owner, sessions, owned.ttl_s, owned.step)

    return await _once(state, request, idempotency_key(request, body.idempotency_key), body, work)


async def snapshot_session(state: ServerState, request: Request) -> Response:
    """Keep this state."""
    body = await read(request, KeyRequest)
    owned = _found(state, request)

    async def work() -> Reply:
        ident = await owned.session.snapshot()
        state.owners.add_snapshot(owned.owner, ident, owned.step)
        return _json({"snapshot": ident, "step": owned.step}, 201)

    return await _once(state, request, idempotency_key(request, body.idempotency_key), body, work)


async def restore_session(state: ServerState, request: Request) -> Response:
    """Roll this session back."""
    body = await read(request, RestoreRequest)
    owned = _found(state, request)

    async def work() -> Reply:
        step = state.owners.snapshot(owned.owner, body.snapshot)
        await owned.session.restore(body.snapshot)
        owned.step = step
        return _json(_described(owned))

    return await _once(state, request, idempotency_key(request, body.idempotency_key), body, work)


async def restore_snapshot(state: ServerState, request: Request) -> Response:
    """New sessions from a snapshot."""
    body = await read(request, ForkRequest)
    _check_seeds(body)
    owner, ident = ticket(request).owner, request.path_params["snapshot"]

    async def work() -> Reply:
        step = state.owners.snapshot(owner, ident)
        sessions = await state.box.restore(ident, count=body.count, seeds=body.seeds)
        return _adopt(state, owner, sessions, 600.0, step)

    return await _once(state, request, idempotency_key(request, body.idempotency_key), body, work)


async def drop_snapshot(state: ServerState, request: Request) -> Response:
    """Forget a snapshot."""
    owner, ident = ticket(request).owner, request.path_params["snapshot"]

    async def work() -> Reply:
        state.owners.snapshot(owner, ident)
        await state.box.drop_snapshot(ident)
        state.owners.forget_snapshot(ident)
        return _json({"dropped": True})

    return (await _guarded(state, work)).response()


async def interrupt_session(state: ServerState, request: Request) -> Response:
    """KeyboardInterrupt in the running execution."""
    owned = _found(state, request)

    async def work() -> Reply:
        return _json({"interrupted": await owned.session.interrupt()})

    return (await _guarded(state, work)).response()


async def heartbeat_session(state: ServerState, request: Request) -> Response:
    """Renew the lease."""
    owned = _found(state, request)

    async def work() -> Reply:
        return _json({"lease_s": await owned.session.heartbeat()})

    return (await _guarded(state, work)).response()


def _file_path(request: Request) -> str:
    """The path after `/files/`, from the raw bytes: a name need not be UTF-8."""
    raw: bytes = request.scope.get("raw_path") or request.url.path.encode()
    _, _, tail = raw.partition(b"?")[0].partition(b"/files/")
    return unquote_to_bytes(tail).decode("utf-8", "surrogateescape")


async def list_files(state: ServerState, request: Request) -> Response:
    """Regular files of the work folder."""
    owned = _found(state, request)

    async def work() -> Reply:
        files = await owned.session.list_files()
        return _json({"files": [{"path": info.path, "size": info.size} for info in files]})

    return (await _guarded(state, work)).response()


async def read_file(state: ServerState, request: Request) -> Response:
    """A file's bytes."""
    owned = _found(state, request)
    try:
        data = await owned.session.read_file(_file_path(request))
    except SandboxError as error:
        return error_reply(error).response()
    return Response(data, media_type="application/octet-stream", headers={"X-Content-Type-Options": "nosniff"})


async def write_file(state: ServerState, request: Request) -> Response:
    """Write a file: the body is its content."""
    owned = _found(state, request)
    data = await read_body(request)

    async def work() -> Reply:
        path = _file_path(request)
        await owned.session.write_file(path, data)
        return _json({"path": path, "size": len(data)})

    return (await _guarded(state, work)).response()
