"""Wrong arguments: embedded and remote sandboxes refuse the same ones, in the same words, before anything is sent."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio

from sandbox import Limits, LocalSandbox, SessionError
from sandbox.remote import RemoteSandbox
from tests.sandbox.serving import Served, served

pytestmark = pytest.mark.asyncio(loop_scope="module")
BIG = "a" * (40 << 20)
ID = "0" * 32

# `b` is a sandbox, `s` a session. The types are wrong on purpose.
WRONG: dict[str, Callable[[Any, Any], Any]] = {
    "code": lambda b, s: b.exec(5),
    "bytes as code": lambda b, s: b.exec(b"1"),
    "stdin": lambda b, s: b.exec("1", stdin=b""),
    "limits": lambda b, s: b.exec("1", limits={"wall_s": 5}),
    "text as a limit": lambda b, s: b.exec("1", limits=Limits(wall_s="5")),  # type: ignore[arg-type]
    "nothing as a limit": lambda b, s: b.exec("1", limits=Limits(memory_mb=None)),  # type: ignore[arg-type]
    "half a process": lambda b, s: b.exec("1", limits=Limits(processes=1.5)),  # type: ignore[arg-type]
    "no time": lambda b, s: b.exec("1", limits=Limits(wall_s=0)),
    "no memory": lambda b, s: b.exec("1", limits=Limits(memory_mb=0)),
    "no process": lambda b, s: b.exec("1", limits=Limits(processes=0)),
    "profile": lambda b, s: b.exec("1", profile="nope"),
    "seed": lambda b, s: b.exec("1", seed=2**70),
    "text as a seed": lambda b, s: b.exec("1", seed="1"),
    "key": lambda b, s: b.exec("1", idempotency_key=7),
    "files": lambda b, s: b.exec("1", files={"x": "text"}),
    "a list of files": lambda b, s: b.exec("1", files=["x"]),
    "nothing to fetch": lambda b, s: b.exec("1", fetch=None),
    "fetch a number": lambda b, s: b.exec("1", fetch=7),
    "fetch": lambda b, s: b.exec("1", fetch="name"),
    "deadline": lambda b, s: b.exec("1", deadline_s="1"),
    "endless deadline": lambda b, s: b.exec("1", deadline_s=float("inf")),
    "large stdin": lambda b, s: b.exec("1", stdin=BIG),
    "large code": lambda b, s: b.exec(BIG),
    "large files": lambda b, s: b.exec("1", files={"x": BIG.encode()}),
    "attach to nothing": lambda b, s: b.attach(""),
    "attach to a number": lambda b, s: b.attach(7),
    "restore nothing": lambda b, s: b.restore(""),
    "restore none": lambda b, s: b.restore(ID, count=0),
    "drop nothing": lambda b, s: b.drop_snapshot(""),
    "endless lease": lambda b, s: b.session(ttl_s=1e9)._opening(),
    "no lease": lambda b, s: b.session(ttl_s=0)._opening(),
    "text as a lease": lambda b, s: b.session(ttl_s="60")._opening(),
    "session of no profile": lambda b, s: b.session(profile="nope")._opening(),
    "session's limits": lambda b, s: b.session(limits=5)._opening(),
    "code in a session": lambda b, s: s.exec(None),
    "limits in a session": lambda b, s: s.exec("1", limits=5),
    "step": lambda b, s: s.exec("1", expect_step="1"),
    "large code in a session": lambda b, s: s.exec(BIG),
    "no copy": lambda b, s: s.fork(0),
    "many copies": lambda b, s: s.fork(300),
    "half a copy": lambda b, s: s.fork(1.5),
    "too few seeds": lambda b, s: s.fork(2, seeds=[1]),
    "seeds that are none": lambda b, s: s.fork(1, seeds=["x"]),
    "roll back to nothing": lambda b, s: s.restore(""),
    "a file of text": lambda b, s: s.write_file("f", "text"),
    "a path of bytes": lambda b, s: s.read_file(b"f"),
}
REFUSED: dict[str, Callable[[Any, Any], Any]] = {
    "step_conflict": lambda b, s: s.exec("1", expect_step=0),
    "bad_path": lambda b, s: s.write_file("\ud800", b""),
    "too_large": lambda b, s: s.write_file("big", BIG.encode()),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served("--workers", "2") as it:
        yield it


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(server: Served) -> AsyncIterator[list[tuple[Any, Any]]]:
    """An embedded and a remote sandbox, each with a session."""
    async with contextlib.AsyncExitStack() as stack:
        found: list[tuple[Any, Any]] = []
        for box in (LocalSandbox("py-bare", workers=2), RemoteSandbox(server.url)):
            opened = await stack.enter_async_context(box)
            found.append((opened, await stack.enter_async_context(opened.session())))
        yield found


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
async def test_a_wrong_argument_is_a_value_error_everywhere(both: list[tuple[Any, Any]], call: Any) -> None:
    said = []
    for box, session in both:
        before = (await box.stats())["executions"]
        with pytest.raises(ValueError) as wrong:
            await call(box, session)
        said.append(str(wrong.value))
        assert (await box.stats())["executions"] == before
    assert said[0] == said[1] and len(said[0]) < 300


@pytest.mark.parametrize(("code", "call"), REFUSED.items(), ids=REFUSED)
async def test_what_no_session_takes_is_refused_alike(both: list[tuple[Any, Any]], code: str, call: Any) -> None:
    for box, session in both:
        with pytest.raises(SessionError) as refused:
            await call(box, session)
        assert refused.value.code == code


async def test_what_is_large_but_fits_is_judged_by_the_sandbox(both: list[tuple[Any, Any]]) -> None:
    results = [await box.exec("1", stdin=BIG[: 17 << 20]) for box, _ in both]
    assert [result.status.value for result in results] == ["rejected", "rejected"]


async def test_a_sandbox_is_made_with_limits_and_a_profile_that_exist() -> None:
    for wrong in ({"limits": 5}, {"profile": "nope"}, {"limits": Limits(memory_mb=0)}):
        for make in (LocalSandbox, lambda **given: RemoteSandbox("http://127.0.0.1:1", **given)):
            with pytest.raises(ValueError, match=r"limits|profile|memory_mb"):
                make(**wrong)  # type: ignore[operator]


async def test_what_is_no_profile_and_no_list_of_properties_is_refused() -> None:
    for wrong, said in (
        ({"profile": None}, "unknown profile 'None'"),
        ({"profile": 5}, "unknown profile '5'"),
        ({"require": "files"}, "require is a list of properties, not 'files'"),
        ({"require": None}, "require is a list"),
        ({"require": [5]}, "unknown properties 5"),
        ({"require": ["file"]}, "unknown properties file"),
    ):
        with pytest.raises(ValueError, match=said):
            LocalSandbox(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("urls", "token", "said"),
    [
        (None, None, "sandbox URL None: write"),
        (5, None, "sandbox URL 5: write"),
        ([b"http://h"], None, "write http"),
        ([], None, "at least one URL"),
        ("127.0.0.1:8080", None, "'127.0.0.1:8080': write"),
        ("http://127.0.0.1:99999", None, "'http://127.0.0.1:99999': write"),
        ("http://[::1", None, "write http"),
        ("unix:", None, "write http"),
        ("http://name:word@127.0.0.1:1", "token", "user name and a token"),
        ("http://127.0.0.1:1", "from a file\n", "the token holds"),
        ("http://127.0.0.1:1", b"token", "the token holds"),
    ],
)
async def test_what_is_no_address_or_no_token_is_said_when_it_is_given(urls: Any, token: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RemoteSandbox(urls, token=token)
