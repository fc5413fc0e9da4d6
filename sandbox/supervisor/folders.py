"""Removing the work folder of a run whose processes are dead, whatever the run made of it."""

from __future__ import annotations

import contextlib
import os
import subprocess

_SCRIPT = 'chmod -R u+rwX -- "$1" 2>/dev/null; rm -rf -- "$1"'  # folders within folders that nobody may enter
_ATTEMPTS = 3


def remove_empty(path: str) -> bool:
    """Remove a folder that holds nothing, which is what most runs leave; False when it needs `remove`."""
    try:
        os.rmdir(path)  # noqa: PTH106
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def remove(path: str, uid: int) -> bool:
    """Remove a folder and everything in it; True when it is gone. Blocks: call it in a thread.

    `chmod` and `rm` cope with any depth and never follow links. They run as the user `uid` that made the files (0: as
    ourselves), since root without CAP_DAC_OVERRIDE may not look into them; the folder itself is then ours to remove.
    """
    # Nothing of ours is inherited, and user code has no process left that could interfere.
    user = {"user": uid, "group": uid, "extra_groups": ()} if uid else {}
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(OSError):
            subprocess.run(  # type: ignore[call-overload]
                ["/bin/sh", "-c", _SCRIPT, "sh", path],
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                **user,
            )
        if remove_empty(path):
            return True
    return False
