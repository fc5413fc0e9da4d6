"""`dns+http://NAME:PORT`: one server for each address; and user ids that another container's sandbox does not take."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandbox.names import addresses
from sandbox.supervisor.service import reserve_uids
from sandbox.types import SandboxUnavailable


def test_only_marked_names_are_looked_up() -> None:
    plain = ["http://nobody.invalid:1", "unix:/x", "https://h"]
    assert addresses(plain) == plain
    assert "http://127.0.0.1:8080" in addresses(["dns+http://localhost:8080"])
    assert addresses(["dns+http://127.0.0.1", "http://127.0.0.1:80"]) == ["http://127.0.0.1:80"]
    assert addresses(["dns+http://[::1]:9"]) == ["http://[::1]:9"]


def test_a_name_without_an_address_is_our_failure() -> None:
    with pytest.raises(SandboxUnavailable, match=r"'nobody\.invalid' has no address"):
        addresses(["dns+http://nobody.invalid:8080"])
    for bad in ("dns+https://h:1", "dns+http://:1"):
        with pytest.raises(ValueError, match=r"dns\+http://NAME:PORT"):
            addresses([bad])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has user ids to give")
def test_user_ids_start_somewhere_else_each_time() -> None:
    firsts = []
    for _ in range(4):
        first, locks = reserve_uids(600)
        firsts.append(first)
        for lock in locks:  # as another container: its locks are not seen
            lock.close()
    assert all(30_000 <= first < 2**31 for first in firsts)
    rows = Path("/proc/self/uid_map").read_text().splitlines()
    whole = sum(int(row.split()[2]) for row in rows) > 2_000_000_000
    assert not whole or len(set(firsts)) == 4
