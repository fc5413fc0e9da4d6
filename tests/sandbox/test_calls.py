"""Lists of prepared system calls: done in order, stopped at the first failure, which is named."""

from __future__ import annotations

import os

import pytest

from sandbox.linux.calls import AT_FDCWD, Calls, Slot, number


def test_arguments_are_texts_numbers_and_what_is_put_in(tmp_path: object) -> None:
    reader, writer = os.pipe()
    target = Slot()
    calls = Calls()
    calls.add("write", target, b"one", 3, returns=3)
    calls.add("mkdirat", AT_FDCWD, os.fsencode(f"{tmp_path}/made"), 0o700)
    calls.add("write", target, b"two", 3, returns=3)
    try:
        calls.put(target, writer)
        calls.perform()
        assert os.read(reader, 100) == b"onetwo" and os.listdir(f"{tmp_path}") == ["made"]  # noqa: PTH208
    finally:
        os.close(reader)
        os.close(writer)


def test_the_first_failure_ends_it_and_is_named(tmp_path: object) -> None:
    calls = Calls()
    calls.add("getpid")
    calls.add("write", 1 << 20, b"x", 1, says="write to nowhere")
    calls.add("mkdirat", AT_FDCWD, os.fsencode(f"{tmp_path}/never"), 0o700)
    with pytest.raises(OSError, match="write to nowhere: Bad file descriptor"):
        calls.perform()
    assert os.listdir(f"{tmp_path}") == []  # noqa: PTH208


def test_a_call_that_gives_something_else_than_expected_is_a_failure() -> None:
    calls = Calls()
    calls.add("getpid", returns=os.getpid())
    calls.perform()
    calls.add("getpid", returns=1, says="who am I")
    with pytest.raises(OSError, match=f"who am I: got {os.getpid()}, not 1"):
        calls.perform()


def test_a_call_that_nobody_numbered_is_a_mistake_of_ours() -> None:
    assert number("getpid") > 0
    with pytest.raises(KeyError, match="ptrace"):
        number("ptrace")
